"""Where the files of a dataset without a dataset.json lie, and what its labels are called."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from segkit.config.base import Name, Section
from segkit.config.pictures import PicturesConfig

Word = Annotated[str, Field(min_length=1, coerce_numbers_to_str=True)]


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
    labels: Annotated[dict[Name, int | list[int]], Field(min_length=1)]
    """Names and numbers, or lists of them for regions, as in nnU-Net's dataset.json."""
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


class DatasetConfig(Section):
    """Which volumes, and nothing of how to train on them: what can be checked and planned for."""

    folder: Path
    files: FilesConfig | None = None
    pictures: PicturesConfig | None = None
