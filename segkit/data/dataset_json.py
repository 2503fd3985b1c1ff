"""The content of a dataset.json, as in the Medical Segmentation Decathlon or in nnU-Net v2."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from segkit.config.base import Name
from segkit.config.dataset_files import LabelCodeConfig
from segkit.config.labels import Labelling
from segkit.config.pictures import PicturesConfig
from segkit.config.refusals import refusal
from segkit.data.labelling_from import labelling_from
from segkit.data.proposed_files import told_proposal
from segkit.errors import DatasetError, Problems, counted, first_few, printable
from segkit.io.picture_rules import PictureRules
from segkit.io.safe_text import read_json
from segkit.io.volume import is_dicom_path
from segkit.io.volume_names import (
    SUFFIXES,
    case_name_of,
    has_volume_suffix,
    is_picture,
    stem_of,
)

logger = logging.getLogger(__name__)

MOST_NAMED = 20
"""A sentence lists at most so many labels."""
MOST_LEFT_OUT = 5
"""A sentence lists at most so many files that are left out."""
CHANNEL = re.compile(r"_[0-9]{4}$")
"""The number of a channel at the end of a name."""
WHOLE_NUMBER = re.compile(r"-?[0-9]+")

NamedFiles = tuple[str, tuple[Path, ...], Path]
"""The name of a case, its images and its label."""


class _Training(BaseModel):
    image: str | list[str] = []
    label: str


class _Labels(BaseModel):
    labels: dict[Name, Name | int | list[int]] = {}
    regions_class_order: list[int] | None = None
    codes: dict[str, LabelCodeConfig] = {}
    pictures: PicturesConfig | None = None


class _DatasetFile(_Labels):
    """The keys that segkit reads. The file may have others."""

    modality: dict[str, Name] | None = None
    channel_names: dict[str, Name] | None = None
    training: Annotated[list[_Training], Field(min_length=1)] | None = None
    num_training: Annotated[int | None, Field(alias="numTraining")] = None
    file_ending: str | None = None


Content = TypeVar("Content", bound=BaseModel)


@dataclass(frozen=True)
class DatasetJson:
    """The names of the channels in order, the labelling, and the files of each case."""

    channels: tuple[str, ...]
    labelling: Labelling
    files: tuple[NamedFiles, ...]
    codes: dict[str, LabelCodeConfig] = field(default_factory=dict)
    """The terminology concept of each label, by the label's name, if given."""
    pictures: PicturesConfig | None = None
    """Information about pictures that their files lack, if given."""


def read_dataset_file(folder: Path, given: Labelling | None = None) -> DatasetJson:
    """Read `folder/dataset.json`, and check that all files that it names exist.

    - `channel_names` (or `modality`) names the channels.
    - `labels` gives each number a name, as in the Decathlon, or each name a number or a list of
      numbers. With `regions_class_order`, lists are regions, as in nnU-Net: regions are written in
      the order of `labels`, each as its number in `regions_class_order`. The label `ignore` marks
      voxels that nobody labelled.
    - `training` lists images (one file, or one for each channel) and labels, or only labels from
      which images are synthesised. A case has the name of its label, or of the label's path if
      labels share a name. Without it, the cases are `labelsTr/CASE` and
      `imagesTr/CASE_0000`, `_0001` and so on, one for each channel, with the suffix `file_ending`.
      A picture `CASE_0000` may contain all channels.
    - `codes` (only in segkit) gives labels a terminology concept, and `pictures` (only in segkit)
      has information that picture files lack.

    Args:
        folder: the folder of the dataset.json.
        given: classes and numbers, instead of `labels` and `regions_class_order`.

    Raises:
        DatasetError: the file is wrong, or a file that it names does not exist.
    """
    path = folder / "dataset.json"
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such dataset folder; set data.folder")
    if not path.exists():
        raise DatasetError(
            f"{folder}: expected a dataset.json in it, found none; {told_proposal(folder)}"
        )
    file = _read(path, _DatasetFile)
    names = file.modality if file.channel_names is None else file.channel_names
    if names is None:
        raise DatasetError(f"{path}: expected channel_names (or modality), found neither; add one")
    channels = tuple(names[key] for key in sorted(names, key=_number))
    problems = Problems()
    with problems.noted():
        labelling = given or _labelling_of_file(path, file)
        codes = {name: code for name, code in file.codes.items() if name in labelling.members}
        if given is None:
            check_codes(str(path), file.codes, labelling)
    with problems.noted():
        files = (
            _on_disk(folder, file, len(channels))
            if file.training is None
            else _listed(folder, file.training)
        )
    problems.refuse()
    return DatasetJson(channels, labelling, tuple(files), codes, file.pictures)


def read_labelling(path: Path) -> Labelling:
    """The classes or regions in a dataset.json. Raises DatasetError."""
    return _labelling_of_file(path, _read(path, _Labels))


def read_picture_rules(path: Path) -> PictureRules:
    """The rules for reading pictures in a dataset.json. Raises DatasetError."""
    file = _read(path, _Labels)
    return picture_rules(str(path), file.pictures, _labelling_of_file(path, file))


def picture_rules(
    source: str, pictures: PicturesConfig | None, labelling: Labelling
) -> PictureRules:
    """The rules for reading pictures, from settings in `source`. Raises DatasetError."""
    try:
        return PictureRules() if pictures is None else pictures.rules(labelling)
    except ValueError as error:
        raise DatasetError(f"{source}: {error}") from None


def labelling_of(
    source: str,
    labels: Mapping[str, Sequence[int | str]],
    regions_class_order: Sequence[int] | None,
    codes: Mapping[str, LabelCodeConfig],
) -> Labelling:
    """The classes or regions that are described by names and their numbers in files.

    Args:
        source: file or setting with the names, for messages.
        labels: numbers in files, by name.
        regions_class_order: the number that each region is written as; None for classes.
        codes: terminology concepts, by name.

    Raises:
        DatasetError: names and numbers do not fit together, or `codes` has an unknown name.
    """
    groups = {name: tuple(dict.fromkeys(numbers)) for name, numbers in labels.items()}
    labelling = labelling_from(source, groups, regions_class_order)
    check_codes(source, codes, labelling)
    return labelling


def check_codes(source: str, codes: Mapping[str, Any], labelling: Labelling) -> None:
    """Raise DatasetError if `codes` in `source` names a label that is not in the labelling."""
    for name in codes:
        if name not in labelling.members:
            raise DatasetError(
                f"{source}: codes names {name}, which is not one of the labels "
                f"{_listing(labelling.members)}; correct the name"
            )


def _read(path: Path, kind: type[Content]) -> Content:
    try:
        content = read_json(path)
    except OSError as error:
        raise DatasetError(
            f"{path}: cannot be read: {(error.strerror or str(error)).lower()}; check the file"
        ) from None
    except ValueError as error:
        raise DatasetError(f"{path}: cannot be read as JSON: {error}; repair the file") from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise DatasetError(f"{path}: {refusal(error, content, kind)}") from None


def _labelling_of_file(path: Path, file: _Labels) -> Labelling:
    if not file.labels:
        raise DatasetError(
            f"{path}: expected labels (names and numbers of classes), found none; add them"
        )
    return labelling_from(str(path), _groups(str(path), file.labels), file.regions_class_order)


def _groups(path: str, labels: dict[str, str | int | list[int]]) -> dict[str, tuple[int, ...]]:
    """The numbers of each name, from either form of `labels`."""
    decathlon = {key: name for key, name in labels.items() if isinstance(name, str)}
    if len(decathlon) == len(labels):
        numbers = [int(key) for key in labels if WHOLE_NUMBER.fullmatch(key)]
        if len(set(numbers)) != len(labels):
            raise DatasetError(
                f"{path}: labels must have different whole numbers, found {list(labels)}; correct "
                f"them"
            )
        groups: dict[str, tuple[int, ...]] = {}
        for number, name in zip(numbers, decathlon.values(), strict=True):
            groups[name] = (*groups.get(name, ()), number)
        return groups
    groups = {}
    for name, listed in labels.items():
        if isinstance(listed, str) or listed == []:
            raise DatasetError(
                f"{path}: labels.{name} must be a number or a list of numbers, found {listed!r}"
                "; correct dataset.json"
            )
        group = [listed] if isinstance(listed, int) else listed
        groups[name] = tuple(dict.fromkeys(group))
    return groups


def _listed(folder: Path, entries: Sequence[_Training]) -> list[NamedFiles]:
    found, problems = [], Problems()
    names = _names_of([entry.label for entry in entries])
    for entry, name in zip(entries, names, strict=True):
        images = [entry.image] if isinstance(entry.image, str) else entry.image
        paths = tuple(folder / image for image in images)
        label = folder / entry.label
        for path in (*paths, label):
            with problems.noted():
                if not path.is_file() and not is_dicom_path(path):
                    raise DatasetError(
                        f"{folder}/dataset.json: names {path}, which does not exist; add the file "
                        f"or correct its name"
                    )
        with problems.noted():
            found.append((name, paths, label))
    problems.refuse()
    return found


def _names_of(labels: Sequence[str]) -> list[str]:
    """The name of each case: that of its label, or of the label's path if labels share a name.

    p1/seg.nii.gz, p2/seg.nii.gz  ──▶  p1_seg, p2_seg
    """
    paths = [Path(label) for label in labels]
    names = [case_name_of(path) for path in paths]
    if len(set(names)) == len(set(paths)):  # a label that is listed twice is told of later
        return names
    folders = [
        [part for part in path.parts[:-1] if part not in (path.anchor, "..")] for path in paths
    ]
    return ["_".join((*parts, name)) for parts, name in zip(folders, names, strict=True)]


def _on_disk(folder: Path, file: _DatasetFile, num_channels: int) -> list[NamedFiles]:
    """All cases in nnU-Net's folders: `labelsTr/CASE` with `imagesTr/CASE_0000`, `_0001`, …."""
    path, ending = folder / "dataset.json", file.file_ending
    if ending is None:
        raise DatasetError(
            f"{path}: expected training (a list) or file_ending, found neither; add one"
        )
    if ending not in SUFFIXES:
        raise DatasetError(
            f"{path}: file_ending must be one of {_listing(SUFFIXES)}, found {ending}"
            "; correct it, or convert the files"
        )
    labels = sorted(
        label
        for label in (folder / "labelsTr").glob(f"*{ending}")
        if not label.name.startswith(".")
    )
    if not labels:
        raise DatasetError(
            f"{folder}/labelsTr: expected labels CASE{ending} in it, found none; check file_ending"
        )
    if file.num_training not in (None, len(labels)):
        raise DatasetError(
            f"{path}: numTraining is {file.num_training}, but {folder}/labelsTr has "
            f"{counted(len(labels), 'label')}; correct the number or add the missing files"
        )
    found, problems = [], Problems()
    for label in labels:
        images = tuple(
            folder / "imagesTr" / f"{stem_of(label)}_{channel:04d}{ending}"
            for channel in range(num_channels)
        )
        if is_picture(images[0]) and not any(image.is_file() for image in images[1:]):
            images = images[:1]
        for image in images:
            with problems.noted():
                if not image.is_file():
                    raise DatasetError(
                        f"{image}: no such file; {label.name} needs "
                        f"{counted(num_channels, 'image')}, "
                        f"one per channel"
                    )
        found.append((stem_of(label), images, label))
    problems.refuse()
    _tell_left_out(folder, ending, found)
    return found


def _tell_left_out(folder: Path, ending: str, found: Sequence[NamedFiles]) -> None:
    """Warn of volumes in nnU-Net's folders that belong to no case, such as images without a label.

    Args:
        folder: the folder of the dataset.json.
        ending: its `file_ending`.
        found: the cases.
    """
    used = {path for _, images, label in found for path in (*images, label)}
    names = {name for name, *_ in found}
    left: dict[str, list[str]] = {}
    for part in ("imagesTr", "labelsTr"):
        for path in sorted((folder / part).iterdir()):
            if path in used or path.name.startswith(".") or not has_volume_suffix(path):
                continue
            if is_picture(path) and not is_picture(Path(ending)):  # an illustration
                continue
            if not path.name.endswith(ending):
                reason = f"their names do not end in {ending} (file_ending)"
            elif CHANNEL.sub("", stem_of(path)) in names:
                reason = "dataset.json has fewer channels"
            else:
                reason = f"they have no label CASE{ending}"
            left.setdefault(f"{folder / part}: left out because {reason}", []).append(path.name)
    for sentence, files in left.items():
        logger.warning("%s", printable(f"{sentence}: {first_few(files, MOST_LEFT_OUT)}"))


def _listing(items: Sequence[Any] | Mapping[str, Any]) -> str:
    return first_few(items, MOST_NAMED)


def _number(key: str) -> tuple[int, str]:
    return (int(key) if key.isdecimal() else 0, key)
