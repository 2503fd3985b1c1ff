"""Settings become objects, here and nowhere else."""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import Generator, Tensor, device, nn

from segkit.config.data import (
    CtWindowConfig,
    DataConfig,
    NormalisationConfig,
    SynthesisConfig,
    ZScoreConfig,
)
from segkit.config.model import ModelDescription
from segkit.data import preprocess
from segkit.data.augment_intensity import IntensityVariation
from segkit.data.augment_labels import LabelCorruption
from segkit.data.augment_spatial import SpatialVariation, Vary
from segkit.data.first_stage_labels import VariationWithLabels
from segkit.data.synthesis import deform, synthesise
from segkit.errors import ConfigError, ModelError
from segkit.model.build_attention import block_factory, pooling_factory, skip_factory, token_factory
from segkit.nn.external import Given
from segkit.nn.network import SegmentationNetwork, unet_of
from segkit.nn.slicewise import SlicewiseNetwork
from segkit.nn.unet import UNet
from segkit.system.resources import free_memory
from segkit.training.memory import in_words

SIDE = re.compile(r"(?<![a-z])(left|right|l|r|lh|rh)(?![a-z])")
BYTES_PER_NUMBER = 4
FEATURES_HELD = 4
"""Of each channel at once: the skip, what comes from below, and the two side by side."""
WORLD_AXES = {"x": 0, "y": 1, "z": 2}
ACROSS = {"sagittal": 0, "coronal": 1, "axial": 2}
"""The world axis across each plane."""
ELASTIC_PROBABILITY = 0.2
CONTROL_POINTS_MM = 24.0
BENDING = 1 / 12
"""Amplitude of bending over the distance of its control points; at this ratio nothing folds."""


def build_network(description: ModelDescription) -> SegmentationNetwork:
    """The network that a model's description asks for, with fresh weights; it takes volumes.

    Raises ConfigError where its weights alone would take more memory than is free, and ModelError
    where it is a module which Python must give.
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
    """Raise ConfigError where the features of a window alone would outgrow free memory.

    Counted are those of the finest level where a skip is joined, the least that any U-Net holds.
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
    """The name and shape of every weight that the network will have; none is made for this.

    Raises ConfigError where there can be no such network.
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
    """A module that gives logits, in the form of a network; it takes volumes.

    `network.given` of the description must say what the sizes of its input are multiples of.
    Raises ModelError where the description is that of a U-Net, or where the module's state cannot
    be saved.
    """
    given = description.network.given
    if given is None:
        raise ModelError(
            f"{description.run}: is described as a U-Net, and a module was given; set "
            f"network.given.multiple to what the sizes of its input must be multiples of"
        )
    if description.first_stage is not None:
        raise ModelError("labels of a first stage are for U-Nets, found a module that was given")
    network = Given(
        module, out_channels=len(description.labelling.outputs), multiple=given.multiple
    )
    return _of_volumes(network, description)


def _of_volumes(network: UNet | Given, description: ModelDescription) -> SegmentationNetwork:
    if description.network.spatial_dims == 3:
        return network
    return SlicewiseNetwork(network, axis=ACROSS[description.slices])


def interpolation_order(description: ModelDescription) -> Literal[1, 3]:
    """The order by which images are resampled for a model."""
    return 3 if description.interpolation == "cubic" else 1


def build_normalisers(settings: Sequence[NormalisationConfig]) -> list[Callable[[Tensor], Tensor]]:
    """One function per channel. A CT window must be complete by now."""
    return [_normaliser(setting) for setting in settings]


def volume_patch(description: ModelDescription) -> tuple[int, int, int]:
    """The patch in voxels of a volume: one voxel thick across the planes of a 2D network."""
    patch = list(description.patch_size)
    if description.network.spatial_dims == 2:
        patch.insert(ACROSS[description.slices], 1)
    x, y, z = patch
    return x, y, z


def channels_in(description: ModelDescription) -> int:
    """Channels of what a network is given: a first stage's labels are one more."""
    return len(description.channels) + (description.first_stage is not None)


def build_variation(
    config: DataConfig,
    patch_size: tuple[int, int, int],
    *,
    spacing: tuple[float, float, float],
    labels: Sequence[str],
    first_classes: int = 0,
) -> tuple[Vary, tuple[int, ...]]:
    """How a batch is varied on its way to the network, and what that needs beyond each patch.

    With `data.synthesis`, images are drawn from labels that have been turned and deformed; varying
    their intensities further would add nothing. `first_classes` are those of a first stage's
    labels, which stand in the last channel and are never varied as intensities are.
    """
    mirror_axes = tuple(WORLD_AXES[name] for name in mirrored(config, labels))
    # A patch has two control points at least along its longest side, or it would only be shifted.
    longest = max(size * step for size, step in zip(patch_size, spacing, strict=True))
    apart = min(CONTROL_POINTS_MM, longest / 2)
    spatial = SpatialVariation(
        patch_size,
        mirror_axes,
        spacing=spacing,
        elastic_probability=ELASTIC_PROBABILITY if config.elastic else 0.0,
        elastic_amplitude=apart * BENDING,
        elastic_spacing=apart,
    )
    if config.synthesis is not None:
        draw = _synthesiser(config.synthesis, labels)

        def invent(image: Tensor, label: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
            _, label = spatial(image, label, generator)
            return draw(label, generator)

        return invent, spatial.margin
    if not config.augment:
        return lambda image, label, _: (image, label), (0, 0, 0)
    still = [axis for axis in range(3) if axis not in spatial.moving_axes]
    intensity = IntensityVariation(
        low_resolution_spared_axes=tuple(axis for axis in still if patch_size[axis] > 1)
    )
    if first_classes:
        beside = VariationWithLabels(first_classes, spatial, intensity, LabelCorruption())
        return beside, spatial.margin

    def vary(image: Tensor, label: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        image, label = spatial(image, label, generator)
        return intensity(image, generator), label

    return vary, spatial.margin


def mirrored(config: DataConfig, labels: Sequence[str]) -> list[Literal["x", "y", "z"]]:
    """The world axes along which patches are mirrored in training."""
    if not config.augment and config.synthesis is None:
        return []
    return default_mirror(labels) if config.mirror is None else config.mirror


def default_mirror(labels: Sequence[str]) -> list[Literal["x", "y", "z"]]:
    """The world axes along which a dataset may be mirrored: x, unless labels tell left from right.

    A label tells by a word of its name: left, right, l, r, lh or rh.
    """
    sides = any(SIDE.search(name.lower()) for name in labels)
    return [] if sides else ["x"]


def _normaliser(setting: NormalisationConfig) -> Callable[[Tensor], Tensor]:
    match setting:
        case ZScoreConfig(nonzero=nonzero):
            return partial(preprocess.zscore, nonzero=nonzero)
        case CtWindowConfig(lower=lower, upper=upper, mean=mean, std=std):
            assert lower is not None and upper is not None and mean is not None and std is not None
            return partial(preprocess.ct_window, lower=lower, upper=upper, mean=mean, std=std)


def _synthesiser(
    settings: SynthesisConfig, labels: Sequence[str]
) -> Callable[[Tensor, Generator], tuple[Tensor, Tensor]]:
    """Draws an image for a label map that it deforms first.

    `labels` are names of all numbers that label maps hold. Raises ConfigError for another.
    """
    intensities = None
    if settings.intensities is not None:
        if unknown := sorted(set(settings.intensities) - set(labels)):
            raise ConfigError(
                f"data.synthesis.intensities names {unknown[0]!r}; "
                f"the dataset has {', '.join(map(repr, labels))}"
            )
        intensities = [settings.intensities.get(name, (0.0, 1.0)) for name in labels]

    def draw(label: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        label = deform(label, amplitude=settings.deformation, generator=generator)
        image = synthesise(
            label,
            num_labels=len(labels),
            intensities=intensities,
            generator=generator,
        )
        return image, label

    return draw
