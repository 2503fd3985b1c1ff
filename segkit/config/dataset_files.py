"""Where the files of a dataset without a dataset.json lie, and what its labels are called."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from segkit.config.base import Name, Section
from segkit.config.dicom import DicomConfig
from segkit.config.pictures import PicturesConfig

OTHERS = "others"
"""Stands for all numbers in label files that no name has."""
NumberInFiles = Annotated[int, Field(ge=-(2**53), le=2**53)]
Word = Annotated[str, Field(min_length=1, coerce_numbers_to_str=True)]


def _by_name(value: Any) -> Any:
    """`{0: background, 17: hippocampus, 53: hippocampus}` as names with lists of numbers."""
    if not isinstance(value, Mapping):
        return value
    by_number = value and all(isinstance(name, str) and name != OTHERS for name in value.values())
    groups: dict[Any, list[Any]] = {}
    if by_number:
        for number, name in value.items():
            groups.setdefault(name, []).append(number)
        return groups
    return {
        name: numbers if isinstance(numbers, list) else [numbers] for name, numbers in value.items()
    }


LabelsConfig = Annotated[
    dict[Name, Annotated[list[NumberInFiles | Literal["others"]], Field(min_length=1)]],
    BeforeValidator(_by_name),
]
"""The numbers in label files of each name, or a name for each number."""


class CodeConfig(Section):
    """A concept of a terminology, such as `{scheme: SCT, value: 10200004, meaning: Liver}`."""

    scheme: Annotated[Word, Field(max_length=16)]
    value: Annotated[Word, Field(max_length=16)]
    meaning: Annotated[Word, Field(max_length=64)]


class LabelCodeConfig(CodeConfig):
    """The concept that a label stands for, and the kind of thing that it is."""

    category: CodeConfig = CodeConfig(
        scheme="SCT", value="123037004", meaning="Anatomical Structure"
    )


class FilesConfig(Section):
    """The files of each case, by patterns or by a table, and the names of labels.

    In patterns `*` stands for any characters but a slash, `?` for one of them, and `**` for folders
    to any depth. What the wildcards matched, said once each, names the case; its files are those
    whose patterns matched the same.
    """

    images: dict[Name, str] = Field({})
    """By the name of each channel, the pattern of its files, or with a table their column."""
    label: str = ""
    """The pattern of the labels, or with a table their column."""
    table: Path | None = None
    """A CSV file instead of patterns: the columns `id`, `label`, and `image` or one per channel."""
    labels: LabelsConfig = Field({})
    """Names and numbers, as in `data.labels`, which may stand in their place."""
    regions_class_order: list[int] | None = None
    """The number that each region is written as."""
    codes: dict[str, LabelCodeConfig] = Field({})
    """Of labels by name, the concept of a terminology that DICOM segmentations give."""

    @model_validator(mode="after")
    def _patterns_are_given(self) -> Self:
        if self.table is not None:
            return self
        if not self.images or not self.label:
            raise ValueError(
                "data.files needs patterns: images, one for each channel by its name, and label; "
                "or a table"
            )
        for pattern in (*self.images.values(), self.label):
            *folders, name = pattern.split("/")
            wrong = "**" in name or any("**" in part and part != "**" for part in folders)
            if wrong or not {"*", "?"} & set(pattern) or Path(pattern).is_absolute():
                raise ValueError(
                    f"data.files: {pattern!r} must be a pattern such as sub-*/**/*_T1w.nii.gz, "
                    f"from data.folder on, whose wildcards name the case"
                )
        return self


class ColumnConfig(Section):
    """A column of the table of cases."""

    column: Annotated[str, Field(min_length=1)]


NanRule = Literal["refuse", "background"]


class DatasetConfig(Section):
    """Which volumes, and nothing of how to train on them: what can be checked and planned for."""

    folder: Path
    """A folder with a dataset.json, in the Decathlon's form or nnU-Net's, or any with `files`."""
    files: FilesConfig | None = None
    """Where the files of each case lie, in place of a dataset.json."""
    dicom: DicomConfig | None = None
    """Which DICOM series are images, and which structures labels, in place of a dataset.json; or
    beside `files`, if these name DICOM folders, which structures are which class."""
    pictures: PicturesConfig | None = None
    """What PNG, TIFF, JPEG and BMP files do not say themselves; it wins over a dataset.json."""
    nan: NanRule = "refuse"
    """What is done with an image that holds NaN or infinite values. `background` takes them as 0
    before anything else is done, so that they lie outside the body: for scans that are NaN outside
    a mask. The model keeps the rule. An image without any number is refused all the same."""
    labels: LabelsConfig | None = None
    """Names of classes and their numbers in label files, in place of those of dataset.json. Any
    whole numbers, several of one class too: `{background: 0, hippocampus: [17, 53], ignore: 255}`,
    or `{0: background, 17: hippocampus, 53: hippocampus}`. Results are written in the same numbers,
    0 to 65535; of several, the first. `ignore` names voxels that nobody labelled. `others` stands
    for all numbers that no name has: `background: [0, others]` or `ignore: others`. The background
    is the class of that name, or else that of 0."""
    regions_class_order: list[int] | None = None
    """With `labels` that overlap, the number that each region is written as, as in nnU-Net."""
    case_table: Path | None = None
    """A CSV file, from `folder` on, with what is known of each case: a column `id` with its name,
    and any others that settings name as `{column: NAME}`. By default the table of `files`."""
    labelled: ColumnConfig | dict[str, list[str]] | None = None
    """If some cases lack labels of some classes: by the name of a case the classes or regions that
    it has labels of, or a column that lists them (`liver; spleen`), or `all`. What else is
    background in such a case may be any of the others. Cases that are not named have all."""
    test: ColumnConfig | list[str] | None = None
    """Cases that are never looked at, for a last test: their names, or a column in which they are
    marked by `test`, `yes`, `true` or `1`."""

    @model_validator(mode="after")
    def _images_are_named_once(self) -> Self:
        if self.files is not None and self.dicom is not None and self.dicom.images:
            raise ValueError(
                "data.files and data.dicom.images both say which files are images; give one of them"
            )
        return self
