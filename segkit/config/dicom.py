"""Which DICOM series and structures are the images and labels of a dataset."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from segkit.config.base import Name, Section
from segkit.io.structure_rules import AbsentRule

Pattern = Annotated[str, Field(min_length=1)]
Patterns = Annotated[
    list[Pattern], BeforeValidator(lambda told: [told] if isinstance(told, str) else told)
]
"""One pattern or several, of which one must match: `*` for any characters, `?` for one."""


class SeriesConfig(Section):
    """What a DICOM series must be like; what is not given may be anything."""

    modality: str | None = None
    """Such as CT, MR or PT."""
    description: Patterns = Field([])
    """Of the Series Description; upper and lower case are the same."""
    folder: Patterns = Field([])
    """Of the path of its folder, from `data.folder` on."""
    min_slices: Annotated[int, Field(ge=1)] = 1
    max_slices: Annotated[int | None, Field(ge=1)] = None


class StructuresConfig(Section):
    """What a DICOM structure set or segmentation must be like; by default any is taken."""

    modality: Literal["RTSTRUCT", "SEG"] | None = None
    description: Patterns = Field([])
    """Of the Series Description or, if there is none, of the Structure Set Label."""
    folder: Patterns = Field([])
    """Of the path of its folder, from `data.folder` on."""


class DicomConfig(Section):
    """Images from DICOM series, and labels from structure sets (RTSTRUCT) or segmentations (SEG).

    With `images`, all series in `data.folder`, to any depth, are looked at. Without, the paths of
    `data.files` name folders of series and files of structures.
    """

    images: dict[Name, SeriesConfig] = Field({})
    """By the name of each channel, which series it is. With one channel each series is a case; with
    several, the series of a study are."""
    label: StructuresConfig = StructuresConfig()
    """Which structure sets or segmentations are the labels; they must refer to a case's series."""
    structures: dict[Name, Annotated[Patterns, Field(min_length=1)]] = Field({})
    """By class, patterns of the names that its structures have; by default the class's own name.
    Several structures may be one class."""
    absent: AbsentRule = "refuse"
    """What a case is that lacks structures of a class: refused, as names may differ; `background`,
    since there is none in the patient; or `unlabelled`, as in `data.labelled`."""
    cases: Literal["study", "patient"] = "study"
    """What the series of several channels have in common."""
