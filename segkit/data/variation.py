"""The augmentation of patches in training, made from the settings of the data."""

from collections.abc import Callable, Sequence

from torch import Generator, Tensor

from segkit.config.data import WORLD_AXES, DataConfig, SynthesisConfig
from segkit.data.augment_intensity import IntensityVariation
from segkit.data.augment_labels import LabelCorruption
from segkit.data.augment_spatial import SpatialVariation, Vary
from segkit.data.first_stage_labels import VariationWithLabels
from segkit.data.synthesis import deform, synthesise
from segkit.errors import ConfigError

ELASTIC_PROBABILITY = 0.2
CONTROL_POINTS_MM = 24.0
BENDING = 1 / 12
"""Amplitude of the elastic deformation, as a share of the distance between control points. It is
small enough that nothing folds over."""


def build_variation(
    config: DataConfig,
    patch_size: tuple[int, int, int],
    *,
    spacing: tuple[float, float, float],
    labels: Sequence[str],
    first_classes: int = 0,
) -> tuple[Vary, tuple[int, ...]]:
    """The function that augments a batch, and the margin that patches need for it, in voxels.

    With `data.synthesis`, images are drawn from labels that were rotated and deformed, and their
    intensities are not varied further. Without it, `data.augment_share` multiplies the probability
    of each change but mirroring.

    Args:
        config: the settings of the data.
        patch_size: size of a patch in voxels along x, y and z.
        spacing: spacing in mm along x, y and z.
        labels: a name for each number in label maps.
        first_classes: number of classes of a first stage, whose labels are the last channel; 0
            without a first stage.

    Raises:
        ConfigError: `data.synthesis` names an unknown label.
    """
    mirror_axes = tuple(WORLD_AXES[name] for name in config.mirrored(labels))
    # Along its longest side, a patch has at least two control points; with one it would only move.
    sides = zip(patch_size, spacing, strict=True)
    longest = max(size * step for size, step in sides if size > 1)
    apart = min(CONTROL_POINTS_MM, longest / 2)
    share = config.augment_share if config.synthesis is None else 1.0
    spatial = SpatialVariation(
        patch_size,
        mirror_axes,
        spacing=spacing,
        share=share,
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
        share=share, low_resolution_kept_axes=tuple(axis for axis in still if patch_size[axis] > 1)
    )
    if first_classes:
        beside = VariationWithLabels(first_classes, spatial, intensity, LabelCorruption())
        return beside, spatial.margin

    def vary(image: Tensor, label: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        image, label = spatial(image, label, generator)
        return intensity(image, generator), label

    return vary, spatial.margin


def _synthesiser(
    settings: SynthesisConfig, labels: Sequence[str]
) -> Callable[[Tensor, Generator], tuple[Tensor, Tensor]]:
    """A function that deforms label maps and draws an image for each."""
    intensities = None
    if settings.intensities is not None:
        if unknown := sorted(set(settings.intensities) - set(labels)):
            raise ConfigError(
                f"data.synthesis.intensities names {unknown[0]!r}, but the dataset has "
                f"{', '.join(map(repr, labels))}; correct the name"
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
