"""Settings of the data: volumes, their preprocessing, and how patches are drawn from them."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from segkit.config.base import Millimetres, Positive, Section, Share, section_of_kind
from segkit.config.dataset_files import ColumnConfig, DatasetConfig
from segkit.config.sides import names_of_sides

DrawWeight = Annotated[float, Field(ge=0, le=1e6)]
MOST_IN_BATCH = 2**31
MOST_NAMES = 4
"""A sentence names at most so many labels that tell left from right; it counts the others."""
WorldAxis = Literal["x", "y", "z"]
WORLD_AXES: dict[WorldAxis, int] = {"x": 0, "y": 1, "z": 2}


class ZScoreConfig(Section):
    """Each image minus its mean, divided by its standard deviation."""

    kind: Literal["zscore"] = "zscore"
    nonzero: bool = False
    """Whether mean and deviation leave out voxels that are 0, as in skull-stripped heads."""


def is_ct(channel: str) -> bool:
    """Whether a channel is normalised by a window in HU by default, because it is named CT."""
    return channel.lower() == "ct"


class CtWindowConfig(Section):
    """Intensities clipped to a window in HU, minus a mean, divided by a standard deviation.

    Values that are not given are measured in the foreground of the training cases: percentiles 0.5
    and 99.5, mean and standard deviation.
    """

    kind: Literal["ct"] = "ct"
    lower: float | None = None
    upper: float | None = None
    mean: float | None = None
    std: Annotated[float, Field(gt=0)] | None = None


NormalisationConfig = Annotated[
    Annotated[ZScoreConfig | CtWindowConfig, Field(discriminator="kind")],
    BeforeValidator(section_of_kind),
]


def _listed(items: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _one_or_each(value: Any) -> str:
    return "each" if isinstance(value, list) else "one"


class SynthesisConfig(Section):
    """Training on images drawn from label maps instead of scans (Billot et al. 2023)."""

    intensities: dict[str, tuple[float, float]] | None = None
    """The range from which the mean intensity of a label is drawn, by the label's name. A label
    without a range gets a mean from the whole range of intensities."""
    deformation: Annotated[float, Field(ge=0)] = 2.0
    """Standard deviation, in voxels, of the smooth displacement at points 16 voxels apart."""


class FoldConfig(Section):
    """Names of the cases that a fold trains on and of those that it holds out.

    The form is that of nnU-Net's splits_final.json.
    """

    train: Annotated[list[str], Field(min_length=1)]
    val: list[str]


class PatternConfig(Section):
    """A regular expression with one group, which is searched for in the name of a case."""

    pattern: str

    @model_validator(mode="after")
    def _one_group(self) -> Self:
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(
                f"pattern {self.pattern!r} is not a regular expression: {error}; correct it"
            ) from None
        if groups != 1:
            raise ValueError(
                f"pattern {self.pattern!r} must have one group in parentheses, which names the "
                f"patient, such as '(p[0-9]+)_', found {groups}"
                "; put the part that names the patient in parentheses"
            )
        return self


class SplitDatasetConfig(DatasetConfig):
    """A dataset and its split into training and held-out cases."""

    validation: Share | list[str] = 0.2
    """The share of cases that is held out, drawn by the seed, or a list of their names."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """Number of a fold, from 0 on, that is held out instead of `validation`. The folds come from
    `splits`; or from a splits_final.json beside the dataset.json; or `num_folds` folds are drawn,
    as nnU-Net draws its five."""
    num_folds: Annotated[int, Field(ge=2)] = 5
    """Number of folds that are drawn."""
    splits: ColumnConfig | list[FoldConfig] | Path | None = None
    """Your own folds: a list of `{train: [...], val: [...]}` with names of cases; a JSON or YAML
    file with such a list, relative to `folder`; or a column of the table of cases. The column holds
    the number of the fold that holds a case out, `test`, or nothing if all folds train on it."""
    group_by: Literal["subject"] | ColumnConfig | PatternConfig | None = None
    """Cases of one group, such as one patient, are never split between training and validation. The
    group is `{column: NAME}` of the table of cases; or `{pattern: REGEX}`, whose parentheses match
    the patient in a case's name; or `subject`, the `sub-…` of BIDS in the case's name or paths."""
    stratify_by: Literal["classes"] | ColumnConfig | None = None
    """A property that all folds, or training and validation, share evenly: the values of a column,
    or the classes in a label. It does not change how many cases are held out."""


class DataConfig(SplitDatasetConfig):
    """The volumes of a dataset, their preprocessing, and how patches are drawn from them."""

    spacing: tuple[Millimetres, Millimetres, Millimetres] | None = None
    """Voxel size in mm along right-left, back-front and foot-head. Default: the cases' median."""
    interpolation: Literal["linear", "cubic"] = "cubic"
    """How images are resampled to that spacing: by cubic splines, as in nnU-Net, or linearly. If
    slices are more than three times as far apart as pixels, the nearest slice is taken instead."""
    normalisation: (
        Annotated[
            Annotated[NormalisationConfig, Tag("one")]
            | Annotated[list[NormalisationConfig], Tag("each")],
            Discriminator(_one_or_each),
        ]
        | None
    ) = None
    """Normalisation of all channels, or a list with one for each channel. Default: `ct` for
    channels named CT, and `zscore` for others."""
    slices: Literal["sagittal", "coronal", "axial"] = "axial"
    """The orientation of the slices that a 2D network sees."""
    patch_size: Annotated[list[Positive], Field(min_length=2, max_length=3)]
    """Size in voxels of the network's spacing, one number for each axis of the network."""
    batch_size: Positive = 2
    foreground_share: Share = 0.33
    """The share of patches that are centred on a voxel of a class drawn at random."""
    draw_cases: ColumnConfig | dict[str, DrawWeight] | None = None
    """How often patches are drawn from each case: a weight by the case's name, or a column of the
    table of cases. The weight is 1 if not given; 0 means never. Default: all cases equally often.
    """
    draw_classes: dict[str, DrawWeight] = Field({})
    """How often foreground patches are centred on each class: a weight by the class's name, 1 if
    not given. If any weight is given, a class of the dataset is drawn first and then a case that
    holds it, so that a class of few cases is drawn as often as others. By default the case is drawn
    first, and then one of its classes."""
    augment: bool = True
    """Whether patches are rotated, scaled and mirrored, and their intensities varied."""
    augment_share: Share = 1.0
    """How often patches are rotated, scaled and deformed, and their intensities varied, as a share
    of nnU-Net's probabilities. With 0, patches are only mirrored. A short training learns more from
    patches as they are. Used only if `augment` is true and `synthesis` is not given."""
    elastic: bool = False
    """Whether a fifth of the patches is also deformed smoothly, by about 2 mm (not in nnU-Net)."""
    mirror: list[WorldAxis] | None = None
    """World axes along which patches may be mirrored: x runs from left to right, y from back to
    front, z from foot to head. Default: only x, or none if names of labels tell left from right
    (`LeftLung`, `kidney_r`, `rein gauche`, `LV` beside `RV`). (nnU-Net mirrors along all three.
    Anatomy with a front and a top is learned far faster without y and z.)"""
    synthesis: SynthesisConfig | None = None
    """If given, training draws images from the label maps instead of using the scans."""
    first_stage: Annotated[list[Path], Field(min_length=1)] | None = None
    """Runs, model folders or addresses of models, for example of lower resolution. The network
    receives their labels beside the image. The labels of a case come from the runs that held it
    out, or from all runs if none did. A model does better on cases that it was trained on than on
    new ones. So the folds of a cross-validation (`data.fold`) best teach a second stage how far to
    trust the first."""
    workers: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = "auto"
    """Number of processes that cut patches. `auto` means 0 on a CPU; 0 on a GPU with memory for all
    cases, which then cuts the patches itself; and otherwise the other CPU cores, up to 12."""
    cache: Path | None = None
    """Folder for prepared cases. Default: the folder `.cache` beside the runs."""

    def mirrored(self, labels: Sequence[str]) -> list[WorldAxis]:
        """The world axes along which training mirrors patches of a dataset with these labels.

        By default they are x, or none if names of labels tell left from right.

        Example:
            >>> config.data.mirrored(["background", "liver"])
            ['x']
        """
        if not self.augment and self.synthesis is None:
            return []
        if self.mirror is not None:
            return self.mirror
        return [] if names_of_sides(labels) else ["x"]

    def mirrored_because(self, labels: Sequence[str]) -> str:
        """A sentence about the mirrored axes and the names that tell left from right."""
        axes, sides = self.mirrored(labels), names_of_sides(labels)
        patches = (
            f"Patches are mirrored along {_listed(axes)}" if axes else "Patches are not mirrored"
        )
        if not sides:
            return f"{patches}; no label's name tells left from right."
        named, more = [repr(name) for name in sides[:MOST_NAMES]], len(sides) - MOST_NAMES
        names = _listed([*named, f"{more} more"] if more > 0 else named)
        link = ", although" if "x" in axes else ";"
        return f"{patches}{link} {names} {'tells' if len(sides) == 1 else 'tell'} left from right."

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        if self.first_stage and self.synthesis:
            raise ValueError(
                "data.first_stage cannot label the images that data.synthesis draws; remove one of "
                "the two settings"
            )
        if self.elastic and not self.augment and self.synthesis is None:
            raise ValueError("data.elastic needs data.augment, which is false; set it to true")
        if self.elastic and self.augment_share == 0 and self.synthesis is None:
            raise ValueError(
                "data.elastic needs data.augment_share above 0, found 0; set it to 1, or less"
            )
        if self.batch_size * math.prod(self.patch_size) > MOST_IN_BATCH:
            raise ValueError(
                f"data.batch_size {self.batch_size} with data.patch_size {self.patch_size} has "
                f"more than {MOST_IN_BATCH:,} voxels; make one of them smaller"
            )
        return self
