"""Build networks from model descriptions. No other module turns settings into networks."""

import math
from collections.abc import Sequence
from functools import partial

from torch import device, nn

from segkit.config.model import ModelDescription
from segkit.config.network import ConvolutionBlockConfig, MedNeXtBlockConfig, NetworkConfig
from segkit.errors import ConfigError, ModelError
from segkit.model.build_attention import block_factory, pooling_factory, skip_factory, token_factory
from segkit.nn.blocks import ConvolutionBlock
from segkit.nn.external import ExternalNetwork
from segkit.nn.mednext import MedNeXtLevel
from segkit.nn.network import SegmentationNetwork, unet_of
from segkit.nn.slicewise import SlicewiseNetwork
from segkit.nn.unet import ConvolutionsFactory, UNet
from segkit.system.memory import free_memory, in_words

BYTES_PER_NUMBER = 4
FEATURES_HELD = 4
"""Feature maps of each channel in memory at once: the skip, the upsampled features, and the two
concatenated."""


def build_network(description: ModelDescription) -> SegmentationNetwork:
    """The network of a model's description, with new weights. It takes volumes.

    Raises:
        ConfigError: its weights need more memory than is free.
        ModelError: the network is a Python module of the user (`network.given`).
    """
    count = sum(math.prod(shape) for shape in weight_shapes(description).values())
    free = free_memory()
    if count * BYTES_PER_NUMBER > free:
        raise ConfigError(
            f"network: {count:,} weights need {in_words(count * BYTES_PER_NUMBER)} of memory, but "
            f"only {in_words(free)} are free; use fewer network.channels"
        )
    return _network(description)


def check_windows(description: ModelDescription, patch_size: Sequence[int]) -> None:
    """Raise ConfigError if the features of a window need more memory than is free.

    This counts only the features at the join of decoder and finest skip, which every
    U-Net holds in memory.
    """
    if description.network.given is not None:
        return
    width = description.network.channels[0]
    needed = FEATURES_HELD * width * math.prod(patch_size) * BYTES_PER_NUMBER
    free = free_memory()
    if needed > free:
        size = " x ".join(map(str, patch_size))
        raise ConfigError(
            f"patch_size: the features of {size} voxels need at least {in_words(needed)} of "
            f"memory, but only {in_words(free)} are free; use a machine with more memory"
        )


def weight_shapes(description: ModelDescription) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the network, computed without allocating memory.

    Raises:
        ConfigError: the settings do not describe a possible network.
    """
    try:
        with device("meta"):
            unet = unet_of(_network(description))
    except (RuntimeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"network: cannot be built from these settings: {reason}"
            "; make network.channels smaller or the network shallower"
        ) from None
    return {name: tuple(weight.shape) for name, weight in unet.state_dict().items()}


def _network(description: ModelDescription) -> SegmentationNetwork:
    config = description.network
    if config.given is not None:
        raise ModelError(
            f"{description.run}: its network is a Python module "
            f"({config.given.name or 'unnamed'}), which is not saved in files; pass it from "
            f"Python: train(config, network=module) or load_model(path, network=module)"
        )
    attention = config.attention
    grids = config.level_grids(description.patch_size)
    unet = UNet(
        config.spatial_dims,
        len(description.channels),
        out_channels=len(description.labelling.outputs),
        channels=config.channels,
        strides=config.step_strides,
        kernels=config.level_kernels,
        norm=config.normalisation,
        convolutions=_convolutions(config),
        downsampling=config.downsampling,
        deep_supervision=config.deep_supervision,
        skip_gate=skip_factory(config) if attention.skip else None,
        encoder_attention=block_factory("encoder", config, grids),
        decoder_attention=block_factory("decoder", config, grids),
        bottleneck_attention=(
            token_factory(attention.bottleneck, grids[-1]) if attention.bottleneck else None
        ),
        presence_head=(
            pooling_factory(attention.head, len(description.labels) - 1) if attention.head else None
        ),
        label_classes=len(description.first_stage.classes) if description.first_stage else 0,
    )
    return _of_volumes(unet, description)


def _convolutions(config: NetworkConfig) -> ConvolutionsFactory:
    """The makers of each level's convolutions."""
    match config.block:
        case ConvolutionBlockConfig():
            return ConvolutionBlock
        case MedNeXtBlockConfig(expansion=expansion, response_norm=response_norm):
            return partial(MedNeXtLevel, expansion=expansion, response_norm=response_norm)


def wrap_network(description: ModelDescription, module: nn.Module) -> SegmentationNetwork:
    """A network that takes volumes, from any module that computes logits.

    Args:
        description: its `network.given.multiple` says of which numbers the sizes of the module's
            input must be multiples.
        module: maps images to logits.

    Raises:
        ModelError: the description is that of a U-Net or has a first stage, or the module's state
            cannot be saved.
    """
    given = description.network.given
    if given is None:
        raise ModelError(
            f"{description.run}: is described as a U-Net, but a module was passed; set "
            "network.given.multiple, so that input sizes become multiples of these numbers"
        )
    if description.first_stage is not None:
        raise ModelError(
            f"{description.run}: only a U-Net can use the labels of a first stage, found a Python "
            "module; train it without a first stage"
        )
    network = ExternalNetwork(
        module, out_channels=len(description.labelling.outputs), multiple=given.multiple
    )
    return _of_volumes(network, description)


def _of_volumes(
    network: UNet | ExternalNetwork, description: ModelDescription
) -> SegmentationNetwork:
    across = description.axis_across
    return network if across is None else SlicewiseNetwork(network, axis=across)
