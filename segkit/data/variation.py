"""The variation of patches in training, made from the settings of the data."""

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
"""The amplitude of bending, as a share of the distance of its control points; nothing folds."""


def build_variation(
    config: DataConfig,
    patch_size: tuple[int, int, int],
    *,
    spacing: tuple[float, float, float],
    labels: Sequence[str],
    first_classes: int = 0,
) -> tuple[Vary, tuple[int, ...]]:
    """The function that varies a batch, and the voxels to cut beyond either end of each patch.

    With `data.synthesis` images are drawn from labels that were turned and deformed, and their
    intensities are not varied further.

    Args:
        config: the settings of the data.
        patch_size: in voxels along x, y and z.
        spacing: in mm along x, y and z.
        labels: a name for each number that label maps hold.
        first_classes: the number of classes in a first stage's labels, which are the last channel.

    Raises ConfigError if `data.synthesis` names a label that the dataset does not have.
    """
    mirror_axes = tuple(WORLD_AXES[name] for name in config.mirrored(labels))
    # A patch has two control points at least along its longest side, or it would only be shifted.
    sides = zip(patch_size, spacing, strict=True)
    longest = max(size * step for size, step in sides if size > 1)
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


def _synthesiser(
    settings: SynthesisConfig, labels: Sequence[str]
) -> Callable[[Tensor, Generator], tuple[Tensor, Tensor]]:
    """Deforms a label map, and draws an image for it."""
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
