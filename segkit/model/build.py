"""Networks from a model's description; settings become networks only here."""

import math
from collections.abc import Sequence

from torch import device, nn

from segkit.config.model import ModelDescription
from segkit.errors import ConfigError, ModelError
from segkit.model.build_attention import block_factory, pooling_factory, skip_factory, token_factory
from segkit.nn.external import ExternalNetwork
from segkit.nn.network import SegmentationNetwork, unet_of
from segkit.nn.slicewise import SlicewiseNetwork
from segkit.nn.unet import UNet
from segkit.system.memory import free_memory, in_words

BYTES_PER_NUMBER = 4
FEATURES_HELD = 4
"""Feature maps of each channel at once: the skip, the one from below, and the two side by side."""


def build_network(description: ModelDescription) -> SegmentationNetwork:
    """The network of a model's description, with fresh weights; it takes volumes.

    Raises ConfigError if its weights would take more memory than is free, and ModelError if it is a
    module from Python, which no file holds.
    """
    count = sum(math.prod(shape) for shape in weight_shapes(description).values())
    free = free_memory()
    if count * BYTES_PER_NUMBER > free:
        raise ConfigError(
            f"network: {count:,} weights take {in_words(count * BYTES_PER_NUMBER)} of memory, and "
            f"{in_words(free)} are free; take fewer network.channels"
        )
    return _network(description)


def check_windows(description: ModelDescription, patch_size: Sequence[int]) -> None:
    """Raise ConfigError if the features of a window would take more memory than is free.

    Only those of the finest level are counted, at the join with its skip: every U-Net holds them.
    """
    if description.network.given is not None:
        return
    width = description.network.channels[0]
    needed = FEATURES_HELD * width * math.prod(patch_size) * BYTES_PER_NUMBER
    free = free_memory()
    if needed > free:
        size = " x ".join(map(str, patch_size))
        raise ConfigError(
            f"patch_size: the features of {size} voxels take {in_words(needed)} of memory or more, "
            f"and {in_words(free)} are free; this model needs a larger machine"
        )


def weight_shapes(description: ModelDescription) -> dict[str, tuple[int, ...]]:
    """The name and shape of every weight of the network, without making any.

    Raises ConfigError if there can be no such network.
    """
    try:
        with device("meta"):
            unet = unet_of(_network(description))
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise ConfigError(f"network: cannot be built: {' '.join(str(error).split())}") from None
    return {name: tuple(weight.shape) for name, weight in unet.state_dict().items()}


def _network(description: ModelDescription) -> SegmentationNetwork:
    config = description.network
    if config.given is not None:
        raise ModelError(
            f"{description.run}: its network is a module of Python's "
            f"({config.given.name or 'unnamed'}), which no file holds; give it from Python: "
            f"train(config, network=module), load_model(path, network=module)"
        )
    attention = config.attention
    coarsest = [
        size // stride
        for size, stride in zip(description.patch_size, config.total_stride, strict=True)
    ]
    unet = UNet(
        config.spatial_dims,
        len(description.channels),
        out_channels=len(description.labelling.outputs),
        channels=config.channels,
        strides=config.step_strides,
        kernels=config.level_kernels,
        norm=config.normalisation,
        downsampling=config.downsampling,
        deep_supervision=config.deep_supervision,
        skip_gate=skip_factory(config) if attention.skip else None,
        encoder_attention=block_factory(attention.encoder, config) if attention.encoder else None,
        decoder_attention=block_factory(attention.decoder, config) if attention.decoder else None,
        bottleneck_attention=(
            token_factory(attention.bottleneck, coarsest) if attention.bottleneck else None
        ),
        presence_head=(
            pooling_factory(attention.head, len(description.labels) - 1) if attention.head else None
        ),
        label_classes=len(description.first_stage.classes) if description.first_stage else 0,
    )
    return _of_volumes(unet, description)


def wrap_network(description: ModelDescription, module: nn.Module) -> SegmentationNetwork:
    """A module that gives logits, as a network that takes volumes.

    `network.given` of the description must say what the sizes of its input are multiples of.
    Raises ModelError if the description is that of a U-Net, or if the module's state cannot be
    saved.
    """
    given = description.network.given
    if given is None:
        raise ModelError(
            f"{description.run}: is described as a U-Net, and a module was given; set "
            f"network.given.multiple to what the sizes of its input must be multiples of"
        )
    if description.first_stage is not None:
        raise ModelError("labels of a first stage are for U-Nets, found a module that was given")
    network = ExternalNetwork(
        module, out_channels=len(description.labelling.outputs), multiple=given.multiple
    )
    return _of_volumes(network, description)


def _of_volumes(
    network: UNet | ExternalNetwork, description: ModelDescription
) -> SegmentationNetwork:
    across = description.axis_across
    return network if across is None else SlicewiseNetwork(network, axis=across)
