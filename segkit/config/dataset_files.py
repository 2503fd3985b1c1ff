"""Settings of a dataset: the files of each case, and the names and numbers of its labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from segkit.config.base import Name, Section
from segkit.config.dicom import DicomConfig
from segkit.config.pictures import PicturesConfig

OTHERS = "others"
"""This word stands for all numbers in label files that belong to no name."""
TABLE_SUFFIXES = (".csv", ".tsv")
NumberInFiles = Annotated[int, Field(ge=-(2**53), le=2**53)]
Word = Annotated[str, Field(min_length=1, coerce_numbers_to_str=True)]


def _by_name(value: Any) -> Any:
    """Lists of numbers by name, from either form.

    `{0: background, 17: hippocampus, 53: hippocampus}` becomes
    `{background: [0], hippocampus: [17, 53]}`.
    """
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
"""Label names with their numbers in files, or numbers in files with their names."""


class CodeConfig(Section):
    """A concept of a terminology, such as `{scheme: SCT, value: 10200004, meaning: Liver}`."""

    scheme: Annotated[Word, Field(max_length=16)]
    value: Annotated[Word, Field(max_length=16)]
    meaning: Annotated[Word, Field(max_length=64)]


class LabelCodeConfig(CodeConfig):
    """The concept that a label stands for, and its category, such as an anatomical structure."""

    category: CodeConfig = CodeConfig(
        scheme="SCT", value="123037004", meaning="Anatomical Structure"
    )


class FilesConfig(Section):
    """The files of each case, by patterns or by a table, and the names of labels.

    In patterns `*` matches any characters except a slash, `?` matches one such character, and `**`
    matches folders to any depth. The texts that the wildcards match, each taken once, name the
    case. Files whose wildcards match the same texts belong to the same case.
    """

    images: dict[Name, str] = Field({})
    """The file pattern of each channel, by the channel's name; with a table, the column."""
    label: str = ""
    """The file pattern of the labels; with a table, the column. Only to predict, none is needed."""
    table: Path | None = None
    """A CSV file instead of patterns, with columns `id`, `label`, and `image` or one per channel.
    """
    labels: LabelsConfig = Field({})
    """Names and numbers of labels, in the form of `data.labels`, which can be given instead."""
    regions_class_order: list[int] | None = None
    """The number that each region is written as, in the order of the regions."""
    codes: dict[str, LabelCodeConfig] = Field({})
    """The terminology concept of each label, by the label's name, for DICOM segmentations."""

    @model_validator(mode="after")
    def _patterns_are_given(self) -> Self:
        if self.table is not None:
            return self
        label_is_empty = "label" in self.model_fields_set and not self.label
        if not self.images or label_is_empty:
            raise ValueError(
                "data.files needs either a table, or images (a pattern for each channel) and "
                "label (a pattern); give one or the other"
            )
        for pattern in (*self.images.values(), *([self.label] if self.label else [])):
            *folders, name = pattern.split("/")
            wrong = "**" in name or any("**" in part and part != "**" for part in folders)
            if wrong or not {"*", "?"} & set(pattern) or Path(pattern).is_absolute():
                raise ValueError(
                    f"data.files: {pattern!r} must be a pattern such as sub-*/**/*_T1w.nii.gz, "
                    f"relative to data.folder, whose wildcards name the case"
                    "; correct the pattern"
                )
        return self


class ColumnConfig(Section):
    """A column of the table of cases."""

    column: Annotated[str, Field(min_length=1)]


NanRule = Literal["refuse", "background"]


class DatasetConfig(Section):
    """Settings of a dataset, without any of training: enough to check it and to plan for it."""

    folder: Path
    """A folder with a dataset.json in the form of the Decathlon or of nnU-Net, or any folder if
    `files` is given."""
    files: FilesConfig | None = None
    """The files of each case, instead of a dataset.json."""
    dicom: DicomConfig | None = None
    """DICOM series that are the images and structures that are the labels, instead of a
    dataset.json. With `files` that name DICOM folders, only the structures of each class."""
    pictures: PicturesConfig | None = None
    """Information that PNG, TIFF, JPEG and BMP files lack. It overrides a dataset.json."""
    nan: NanRule = "refuse"
    """How to treat an image that contains NaN or infinite values. `background` replaces them by 0
    before anything else, so that they lie outside the body; use it for scans that are NaN outside a
    mask. The model keeps the rule. An image with no finite value is refused in either case."""
    labels: LabelsConfig | None = None
    """Names of classes and their numbers in label files, instead of those of dataset.json. Any
    whole numbers are allowed, and several for one class:
    `{background: 0, hippocampus: [17, 53], ignore: 255}`, or
    `{0: background, 17: hippocampus, 53: hippocampus}`. Results are written with the same numbers,
    0 to 65535, and with the first one if a class has several. `ignore` names voxels that nobody
    labelled. `others` stands for all numbers that belong to no name: `background: [0, others]` or
    `ignore: others`. The background is the class of that name, or the class of 0 if there is none.
    """
    regions_class_order: list[int] | None = None
    """If `labels` overlap, the number that each region is written as, as in nnU-Net."""
    case_table: Path | None = None
    """A CSV file, relative to `folder`, with properties of each case: a column `id` with the case's
    name, and the columns that settings name as `{column: NAME}`. Default: the table of `files`."""
    labelled: ColumnConfig | dict[str, list[str]] | None = None
    """The classes or regions that are labelled in each case, for datasets in which some cases lack
    some labels: a list by the case's name, or a column with a list (`liver; spleen`) or `all`. In
    such a case, background voxels may belong to any of the other classes. Cases that are not named
    are labelled completely."""
    test: ColumnConfig | list[str] | None = None
    """Cases that are kept for a last test and never used before: their names, or a column that
    marks them by `test`, `yes`, `true` or `1`."""

    @model_validator(mode="after")
    def _images_are_named_once(self) -> Self:
        if self.files is not None and self.dicom is not None and self.dicom.images:
            raise ValueError(
                "data.files and data.dicom.images both select the images; remove one of them"
            )
        return self
