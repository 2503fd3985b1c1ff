"""Settings of DICOM datasets: the series that are images, and the structures that are labels."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from segkit.config.base import Name, Section
from segkit.io.structure_rules import AbsentRule

Pattern = Annotated[str, Field(min_length=1)]
Patterns = Annotated[
    list[Pattern], BeforeValidator(lambda told: [told] if isinstance(told, str) else told)
]
"""One or several patterns, of which one must match. `*` is any characters, `?` is one."""


class SeriesConfig(Section):
    """Conditions of a DICOM series. A condition that is not given always holds."""

    modality: str | None = None
    """The modality, such as CT, MR or PT."""
    description: Patterns = Field([])
    """Patterns of the Series Description. Upper and lower case are the same."""
    folder: Patterns = Field([])
    """Patterns of the path of its folder, relative to `data.folder`."""
    min_slices: Annotated[int, Field(ge=1)] = 1
    max_slices: Annotated[int | None, Field(ge=1)] = None


class StructuresConfig(Section):
    """Conditions of a DICOM structure set or segmentation. By default every one fits."""

    modality: Literal["RTSTRUCT", "SEG"] | None = None
    description: Patterns = Field([])
    """Patterns of the Series Description or, if there is none, of the Structure Set Label."""
    folder: Patterns = Field([])
    """Patterns of the path of its folder, relative to `data.folder`."""


class DicomConfig(Section):
    """Images from DICOM series, and labels from structure sets (RTSTRUCT) or segmentations (SEG).

    With `images`, segkit searches all series in `data.folder`, to any depth. Without it, the paths
    of `data.files` name folders of series and files of structures.
    """

    images: dict[Name, SeriesConfig] = Field({})
    """Conditions of the series of each channel, by the channel's name. With one channel, each
    series is a case. With several channels, the series of a study are one case."""
    label: StructuresConfig = StructuresConfig()
    """Conditions of the structure sets or segmentations with the labels. They must refer to a
    case's series."""
    structures: dict[Name, Annotated[Patterns, Field(min_length=1)]] = Field({})
    """Patterns of the names of structures, by class. Default: the name of the class. Several
    structures may belong to one class."""
    absent: AbsentRule = "refuse"
    """How a case without structures of a class is treated. A structure of a structure set counts
    only if it has contours. `refuse`, because a name may be spelt
    differently; `background`, if the patient has no such structure; or `unlabelled`, as in
    `data.labelled`."""
    cases: Literal["study", "patient"] = "study"
    """Series of several channels belong to one case if they share the study, or the patient."""
