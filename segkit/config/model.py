"""The description of a trained model: the content of `model.json`."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from segkit.config.base import Millimetres, Name, Positive, Section
from segkit.config.data import WORLD_AXES, NormalisationConfig, WorldAxis
from segkit.config.dataset_files import LabelCodeConfig, NanRule, NumberInFiles
from segkit.config.labels import Labelling
from segkit.config.network import NetworkConfig
from segkit.config.pictures import PIXEL, PicturesConfig, pixel_mm_of
from segkit.config.training import Config
from segkit.io.picture_rules import PictureRules

ACROSS = {"sagittal": 0, "coronal": 1, "axial": 2}
"""The axis of a volume that is perpendicular to each plane."""


class FirstStageConfig(Section):
    """The first-stage models whose labels the network receives beside the image."""

    models: Positive
    """Number of models. They lie in `first/0`, `first/1`, … of the model folder."""
    classes: Annotated[list[str], Field(min_length=1)]
    """Names of their labels 1, 2, …; the network turns each into a channel of 0 and 1."""


class PostprocessingConfig(Section):
    """Changes to predicted labels. Default: none; only cross-validation selects any."""

    largest_foreground: bool = False
    """Whether only the largest connected component of the foreground is kept."""
    largest_of: tuple[Positive, ...] = ()
    """Numbers of labels of which, after that, only the largest connected component is kept."""


LabelNumber = Annotated[int, Field(ge=0, lt=2**16)]


class ModelDescription(Section):
    """All information that prediction needs beside the weights; the content of `model.json`.

    Example:
        description = segkit.load_model("runs/my_run").description
        description.channels, description.labels, description.spacing
    """

    format: Literal[1] = 1
    segkit: str
    """The version of segkit that wrote the file."""
    run: Name
    """Name of the run that trained the model."""
    channels: list[Name]
    """Names of the input's channels, in order."""
    labels: Annotated[dict[Name, LabelNumber], Field(min_length=2)]
    """The number of each class or region, by name; the background is 0."""
    regions: dict[str, Annotated[list[LabelNumber], Field(min_length=1)]] = Field({})
    """The numbers of each region, in the order of writing; empty for classes."""
    ignore: LabelNumber | None = None
    """The number of voxels that nobody labelled."""
    in_files: list[list[NumberInFiles]] = Field([])
    """For each number 0, 1, …, the numbers in label files that mean it. The first of them is the
    one that is written. Empty if files have the same numbers as the model."""
    others: LabelNumber | None = None
    """The number for all numbers in label files that `in_files` does not list, if any."""
    codes: dict[str, LabelCodeConfig] = Field({})
    """The terminology concept of each label, by the label's name, for DICOM segmentations."""
    pictures: PicturesConfig | None = None
    """Information about pictures that their files lack."""
    nan: NanRule = "refuse"
    """How to treat an image that contains NaN or infinite values; `background` sets them to 0."""
    unit: Literal["mm", "µm", "pixel"] = "mm"
    """Unit of lengths in output; 'pixel' if the model was trained on pictures of unknown scale."""
    network: NetworkConfig
    """Architecture of the network."""
    spacing: tuple[Millimetres, Millimetres, Millimetres]
    """Distance between the network's voxels along each RAS+ axis, in mm (in pixels if `unit` is
    'pixel')."""
    interpolation: Literal["linear", "cubic"] = "linear"
    """Interpolation of images. Default: linear, for models from before this setting existed."""
    normalisation: list[NormalisationConfig]
    """The normalisation of each channel, in order."""
    slices: Literal["sagittal", "coronal", "axial"]
    """The plane of the slices that a 2D network sees."""
    patch_size: list[Positive]
    """Size of a window in voxels: three numbers, or two for a 2D network."""
    mirror: list[WorldAxis] = Field([])
    """World axes along which training patches were mirrored."""
    first_stage: FirstStageConfig | None = None
    """Models whose labels are one more channel of the input, after the image's channels."""
    postprocessing: PostprocessingConfig = PostprocessingConfig()
    temperature: Annotated[float, Field(gt=0)] | None = None
    """Logits are divided by it before they become probabilities, if it was fitted on held-out cases
    (Guo et al. 2017). Labels do not depend on it."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if unknown := [name for name in self.regions if name not in self.labels]:
            raise ValueError(
                f"regions has {unknown[0]!r}, which has no number in labels; add it to labels"
            )
        numbers = list(self.labels.values())
        if not self.regions and numbers != list(range(len(numbers))):
            raise ValueError(f"labels must be numbered 0, 1, 2, … in order, found {numbers}")
        named = list(self.labels)
        if self.regions and (numbers[0] != 0 or named[1:] != list(self.regions)):
            raise ValueError(
                "labels must start with the background, as number 0, and then list the regions, "
                f"found {named}"
            )
        if self.in_files:
            highest = max(*numbers, self.ignore or 0, *itertools.chain(*self.regions.values()))
            empty = [place for place, group in enumerate(self.in_files) if not group]
            if len(self.in_files) != highest + 1 or set(empty) - {self.ignore}:
                raise ValueError(
                    f"in_files must have numbers for each of 0 to {highest}, found {self.in_files}"
                )
            if bad := [n for n in numbers if not 0 <= self.in_files[n][0] < 2**16]:
                raise ValueError(
                    f"in_files must write {bad[0]} as a number from 0 to 65535, found "
                    f"{self.in_files[bad[0]][0]}"
                )
        self.network.check_patch(self.patch_size, "patch_size")
        return self

    @property
    def labelling(self) -> Labelling:
        """The model's classes or regions and their numbers."""
        regions = {name: tuple(numbers) for name, numbers in self.regions.items()}
        in_files = tuple(tuple(group) for group in self.in_files)
        return Labelling(self.labels, regions, self.ignore, in_files, self.others)

    def picture_rules(self, pixel_size: Sequence[str] | None = None) -> PictureRules:
        """How pictures are read for the model.

        Args:
            pixel_size: lengths such as `0.5 µm`, or `pixel`, that override those in files; None
                keeps those in files. `PicturesConfig.pixel_size` describes the form.

        Raises:
            ValueError: `pixel_size` is not a length.
        """
        rules = PictureRules() if self.pictures is None else self.pictures.rules(self.labelling)
        sizes = list(pixel_size) if pixel_size else [PIXEL] if self.unit == PIXEL else None
        if sizes is None:
            return rules
        pixel_mm, in_pixels = pixel_mm_of(sizes)
        return replace(rules, pixel_mm=pixel_mm, in_pixels=in_pixels)

    @property
    def axis_across(self) -> int | None:
        """The axis perpendicular to the slices that a 2D network sees; None for a 3D network."""
        return ACROSS[self.slices] if self.network.spatial_dims == 2 else None

    @property
    def volume_patch(self) -> tuple[int, int, int]:
        """The patch size in voxels of a volume. For a 2D network, it is one slice thick."""
        return self._in_volume(self.patch_size)

    @property
    def volume_stride(self) -> tuple[int, int, int]:
        """The network's total stride in voxels of a volume. Across slices it is 1."""
        return self._in_volume(self.network.total_stride)

    def _in_volume(self, sizes: Sequence[int]) -> tuple[int, int, int]:
        """Sizes along the axes of a volume; those of a 2D network get a 1 across its slices."""
        axes = list(sizes)
        if self.axis_across is not None:
            axes.insert(self.axis_across, 1)
        x, y, z = axes
        return x, y, z

    @property
    def channels_in(self) -> int:
        """Number of channels of the network's input; the labels of a first stage add one."""
        return len(self.channels) + (self.first_stage is not None)

    @property
    def interpolation_order(self) -> Literal[1, 3]:
        """The order of the splines that resample images."""
        return 3 if self.interpolation == "cubic" else 1

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """The axes of a volume along which training patches were mirrored.

        The axis perpendicular to the slices of a 2D network is left out.
        """
        axes = (WORLD_AXES[name] for name in self.mirror)
        return tuple(axis for axis in axes if axis != self.axis_across)


def description_of(
    config: Config,
    *,
    channels: Sequence[str],
    labelling: Labelling,
    codes: Mapping[str, LabelCodeConfig],
    pictures: PicturesConfig | None = None,
    nan: NanRule = "refuse",
    unit: Literal["mm", "µm", "pixel"] = "mm",
    spacing: tuple[float, float, float],
    normalisation: Sequence[NormalisationConfig],
    first_stage: FirstStageConfig | None = None,
) -> ModelDescription:
    """The description of the model that a config trains.

    Args:
        config: the settings of its training.
        channels: names of the dataset's channels.
        labelling: classes or regions of the dataset, with their numbers.
        codes: terminology concept of each label, by the label's name.
        pictures: information about pictures that their files lack.
        nan: how to treat images that contain NaN or infinite values.
        unit: unit of lengths in output.
        spacing: spacing in mm along x, y and z.
        normalisation: the normalisation of each channel.
        first_stage: the models whose labels the network receives beside the image, if any.
    """
    return ModelDescription(
        format=1,
        segkit=version("segkit"),
        run=config.name,
        channels=list(channels),
        labels=dict(labelling.numbers),
        regions={name: list(numbers) for name, numbers in labelling.regions.items()},
        ignore=labelling.ignore,
        in_files=[list(group) for group in labelling.in_files],
        others=labelling.others,
        codes=dict(codes),
        pictures=pictures,
        nan=nan,
        unit=unit,
        network=config.network,
        spacing=spacing,
        interpolation=config.data.interpolation,
        normalisation=list(normalisation),
        slices=config.data.slices,
        patch_size=config.data.patch_size,
        mirror=config.data.mirrored(list(labelling.numbers)),
        first_stage=first_stage,
        postprocessing=PostprocessingConfig(largest_foreground=False, largest_of=()),
        temperature=None,
    )
