"""Settings of the data: volumes, the one form they are brought to, and how patches are drawn."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from segkit.config.base import Millimetres, Positive, Section, Share, kind_alone
from segkit.config.dataset_files import ColumnConfig, DatasetConfig
from segkit.config.sides import names_of_sides

DrawWeight = Annotated[float, Field(ge=0, le=1e6)]
MOST_IN_BATCH = 2**31
MOST_NAMES = 4
"""Of labels that tell left from right; a sentence counts the others."""
WorldAxis = Literal["x", "y", "z"]
WORLD_AXES: dict[WorldAxis, int] = {"x": 0, "y": 1, "z": 2}


class ZScoreConfig(Section):
    """Each image minus its mean, over its standard deviation."""

    kind: Literal["zscore"] = "zscore"
    nonzero: bool = False
    """Whether mean and deviation are those of voxels other than 0 alone (skull-stripped heads)."""


class CtWindowConfig(Section):
    """Intensities clipped to a window in HU, minus a mean, over a standard deviation.

    Whatever is not given is read off the foreground of the training cases: percentiles 0.5 and
    99.5, mean and standard deviation.
    """

    kind: Literal["ct"] = "ct"
    lower: float | None = None
    upper: float | None = None
    mean: float | None = None
    std: Annotated[float, Field(gt=0)] | None = None


NormalisationConfig = Annotated[
    Annotated[ZScoreConfig | CtWindowConfig, Field(discriminator="kind")],
    BeforeValidator(kind_alone),
]


def _listed(items: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _one_or_each(value: Any) -> str:
    return "each" if isinstance(value, list) else "one"


class SynthesisConfig(Section):
    """Train on images drawn from the label maps instead of on the scans (Billot et al. 2023)."""

    intensities: dict[str, tuple[float, float]] | None = None
    """Per label name, the range its mean intensity is drawn from; wholly random where not given."""
    deformation: Annotated[float, Field(ge=0)] = 2.0
    """Standard deviation, in voxels, of the smooth displacement at points 16 voxels apart."""


class FoldConfig(Section):
    """Names of cases that a fold trains on and holds out, as in nnU-Net's splits_final.json."""

    train: Annotated[list[str], Field(min_length=1)]
    val: list[str]


class PatternConfig(Section):
    """A regular expression with one group, searched for in the name of a case."""

    pattern: str

    @model_validator(mode="after")
    def _one_group(self) -> Self:
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(
                f"pattern {self.pattern!r} is no regular expression: {error}"
            ) from None
        if groups != 1:
            raise ValueError(
                f"pattern {self.pattern!r} must have one group in parentheses, which names the "
                f"patient, such as '(p[0-9]+)_', found {groups}"
            )
        return self


class DataConfig(DatasetConfig):
    """Which volumes, how they are brought to one form, and how patches are drawn from them."""

    validation: Share | list[str] = 0.2
    """The share of cases held out, chosen by the seed, or a list of their names."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """A fold, from 0 on, held out instead: of `splits`; or of the splits_final.json beside the
    dataset.json; or of `num_folds` that are drawn, as nnU-Net draws its five."""
    num_folds: Annotated[int, Field(ge=2)] = 5
    """How many folds are drawn."""
    splits: ColumnConfig | list[FoldConfig] | Path | None = None
    """Folds of your own: a list of `{train: [...], val: [...]}` with names of cases; a JSON or YAML
    file of it, from `folder` on; or a column of the table of cases with the number of the fold that
    holds a case out, `test`, or nothing for cases that all folds train on."""
    group_by: Literal["subject"] | ColumnConfig | PatternConfig | None = None
    """Cases that stay together, such as those of a patient: `{column: NAME}` of the table of cases;
    `{pattern: REGEX}`, whose group in a case's name names the patient; or `subject`, the `sub-…` of
    BIDS in its name or its files' path."""
    stratify_by: Literal["classes"] | ColumnConfig | None = None
    """What is shared out evenly: the values of a column, or which classes a case's label holds."""
    spacing: tuple[Millimetres, Millimetres, Millimetres] | None = None
    """Voxel size in mm along right-left, back-front and foot-head; the cases' median by default."""
    interpolation: Literal["linear", "cubic"] = "cubic"
    """How images are brought to that spacing: by cubic splines, as nnU-Net, or linearly. Between
    slices over three times as far apart as their pixels, the nearest is taken instead."""
    normalisation: (
        Annotated[
            Annotated[NormalisationConfig, Tag("one")]
            | Annotated[list[NormalisationConfig], Tag("each")],
            Discriminator(_one_or_each),
        ]
        | None
    ) = None
    """Of every channel, or a list, one for each; `ct` for channels named CT and `zscore` for others
    where not given."""
    slices: Literal["sagittal", "coronal", "axial"] = "axial"
    """The plane that a 2D network sees."""
    patch_size: Annotated[list[Positive], Field(min_length=2, max_length=3)]
    """In voxels of the network's spacing, one number per axis of the network."""
    batch_size: Positive = 2
    foreground_share: Share = 0.33
    """The share of patches that are centred on a voxel of a class drawn at random."""
    draw_cases: ColumnConfig | dict[str, DrawWeight] | None = None
    """How often patches are drawn from each case: a weight by its name, or a column of the table of
    cases; 1 if not given, 0 for never. Cases are drawn evenly by default."""
    draw_classes: dict[str, DrawWeight] = Field({})
    """How often patches on the foreground are centred on each class: a weight by its name, 1 if not
    given. With any, the class is drawn among those of all cases and then a case that holds it, so
    that a class of few cases is drawn as often as others; by default the case is drawn first."""
    augment: bool = True
    """Whether patches are turned, scaled and mirrored, and their intensities varied."""
    elastic: bool = False
    """Whether a fifth of the patches is also bent, smoothly, by 2 mm or so (not in nnU-Net)."""
    mirror: list[WorldAxis] | None = None
    """World axes along which patches may be mirrored: x runs from left to right, y from back to
    front, z from foot to head. Where not given, x alone, or none where labels tell left from right
    by their names (`LeftLung`, `kidney_r`, `rein gauche`, `LV` beside `RV`). (nnU-Net mirrors along
    all three; what has a front and a top is learned far faster without.)"""
    synthesis: SynthesisConfig | None = None
    first_stage: Annotated[list[Path], Field(min_length=1)] | None = None
    """Runs or model folders, of lower resolution say, whose labels the network is given beside the
    image. Labels of a case come from the runs that held it out, or else from all of them. A model
    does better on cases that it was trained on than on new ones, so that the five folds of a
    cross-validation (`data.fold`) teach a second stage best how far to trust a first."""
    workers: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = "auto"
    """Processes that cut patches. `auto` is none on a CPU, and none on a GPU with room for all
    cases, which are then cut there; else the other cores, up to 12."""
    cache: Path | None = None
    """Where prepared cases are kept; the folder `.cache` beside the runs by default."""

    def mirrored(self, labels: Sequence[str]) -> list[WorldAxis]:
        """The world axes along which training mirrors patches of a dataset with these labels.

        By default it is x, or none if the names of labels tell left from right.
        """
        if not self.augment and self.synthesis is None:
            return []
        if self.mirror is not None:
            return self.mirror
        return [] if names_of_sides(labels) else ["x"]

    def mirrored_because(self, labels: Sequence[str]) -> str:
        """What training mirrors, and which names tell left from right, as a sentence."""
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
                "data.first_stage labels scans, and data.synthesis draws images that are none; "
                "take one of them"
            )
        if self.elastic and not self.augment and self.synthesis is None:
            raise ValueError("data.elastic is part of data.augment, which is false; set it to true")
        if self.batch_size * math.prod(self.patch_size) > MOST_IN_BATCH:
            raise ValueError(
                f"data.batch_size {self.batch_size} of data.patch_size {self.patch_size} comes to "
                f"more than {MOST_IN_BATCH:,} voxels; make either smaller"
            )
        return self
