"""Datasets: folders of volumes, described by a dataset.json or a config."""

import logging
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy import ndarray

from segkit.config.dataset_files import DatasetConfig, FilesConfig, LabelCodeConfig, NanRule
from segkit.config.dicom import DicomConfig
from segkit.config.labels import Labelling
from segkit.config.pictures import PicturesConfig
from segkit.data.bids import bids_label_names, is_bids, list_bids
from segkit.data.case_table import kept_for_test
from segkit.data.dataset_json import labelling_of, picture_rules, read_dataset_file
from segkit.data.dicom_cases import check_structures, list_dicom_files, structure_rules
from segkit.data.file_patterns import list_files
from segkit.data.label_numbers import declared, within
from segkit.data.partly_labelled_cases import unlabelled_of
from segkit.errors import DatasetError, Problems, VolumeError, counted, first_few
from segkit.geometry.grid import Grid, Orientation
from segkit.io.file_names import safe_name, tell_changed_names
from segkit.io.gridded import turn_onto
from segkit.io.nan_values import nan_as_zero, value_problem
from segkit.io.picture_rules import PictureRules, Unit
from segkit.io.volume import (
    AS_IT_SAYS,
    BYTES_OF_IMAGE,
    BYTES_OF_LABEL,
    Volume,
    read_grid,
    read_label_values,
    read_num_channels,
    read_picture_facts,
    read_volume,
)
from segkit.io.volume_names import has_volume_suffix, is_picture
from segkit.io.whole_numbers import in_full, whole_numbers
from segkit.system.progress import Track, untracked

logger = logging.getLogger(__name__)

COLOURS = ("red", "green", "blue")
ARE_WHOLE = "; labels are whole numbers, so resample them by nearest neighbour"


@dataclass(frozen=True)
class CaseFiles:
    """One case: the files of its channels, and its label.

    A case without images is a label map from which images are synthesised.
    """

    name: str
    images: tuple[Path, ...]
    label: Path

    @property
    def file_name(self) -> str:
        """The name in names of files; another only if no file can be called so."""
        return safe_name(self.name)


@dataclass(frozen=True)
class Dataset:
    """Cases in the order of their names, and the meaning of their channels and labels."""

    folder: Path
    cases: tuple[CaseFiles, ...]
    channels: tuple[str, ...]
    labels: dict[str, int]
    """The number of each class or region, by name; the background is first."""
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The numbers of each region, in the order of writing; empty for classes."""
    ignore: int | None = None
    """The number of voxels that nobody labelled."""
    in_files: tuple[tuple[int, ...], ...] = ()
    """For each number 0, 1, …, the numbers in label files that mean it; empty if equal."""
    others: int | None = None
    """The number for all numbers in label files that belong to no name, if these are allowed."""
    codes: dict[str, LabelCodeConfig] = field(default_factory=dict)
    """The terminology concept of each label, by the label's name, if given."""
    pictures: PicturesConfig | None = None
    """Information about pictures that their files lack."""
    rules: PictureRules = AS_IT_SAYS
    """The rules for reading pictures, made from `pictures`."""
    unit: Unit = "mm"
    """Unit of lengths in output; 'pixel' if pictures do not state the size of their pixels. Either
    all cases are in pixels, or none."""

    test: tuple[CaseFiles, ...] = ()
    """Cases that are kept for a last test; `cases` does not contain them."""

    unlabelled: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The classes or regions that nobody labelled in a partly labelled case, by its name."""

    nan: NanRule = "refuse"
    """How `read_case` treats images that contain NaN or infinite values."""

    @property
    def names_with_test(self) -> list[str]:
        """Names of all cases, first of `cases` and then of those kept for a last test."""
        return [case.name for case in (*self.cases, *self.test)]

    @property
    def unlabelled_sets(self) -> tuple[tuple[str, ...], ...]:
        """The different sets of classes that are unlabelled in some case; the first is empty."""
        return ((), *sorted({names for names in self.unlabelled.values() if names}))

    @property
    def labelling(self) -> Labelling:
        """The classes or regions and their numbers."""
        return Labelling(self.labels, self.regions, self.ignore, self.in_files, self.others)

    def rules_of(self, case: CaseFiles) -> PictureRules:
        """The rules for the files of a case; structures are painted on its first image."""
        return self.rules.painting_on(case.images[0] if case.images else None)

    def foreground(self, label: ndarray) -> ndarray:
        """A mask of the voxels that are neither background nor ignored."""
        inside: ndarray = label > 0
        return inside if self.ignore is None else inside & (label != self.ignore)


def read_dataset(
    folder: Path,
    files: FilesConfig | None = None,
    pictures: PicturesConfig | None = None,
    given: Labelling | None = None,
    dicom: DicomConfig | None = None,
) -> Dataset:
    """The dataset in a folder, with its cases in the order of their names.

    If one channel name, such as photo, stands for a picture of several channels, the channels are
    called photo red, photo green and photo blue.

    Args:
        folder: the folder of the dataset.
        files: settings of the files, instead of `folder/dataset.json`.
        pictures: information that pictures lack, instead of that in the dataset.json.
        given: classes and numbers, instead of those in the dataset.json or in `files`.
        dicom: the DICOM series that are images, and the class of each DICOM structure.

    Raises:
        DatasetError: the dataset is wrong or incomplete.
        VolumeError: a file is not a volume.
    """
    if dicom is not None and dicom.images:
        file = list_dicom_files(folder, dicom, given)
    elif files is not None:
        file = list_files(folder, files, given)
    elif is_bids(folder) and not (folder / "dataset.json").exists():
        file = list_bids(folder, given)
    else:
        file = read_dataset_file(folder, given)
    cases = sorted((CaseFiles(*named) for named in file.files), key=lambda case: case.name)
    problems = Problems()
    for name, count in Counter(case.name for case in cases).items():
        with problems.noted():
            if count > 1:
                raise DatasetError(
                    f"{folder}/dataset.json: case {name} is listed twice in training; remove one"
                )
    alike: dict[str, str] = {}
    for name in dict.fromkeys(case.name for case in cases):
        with problems.noted():
            if (other := alike.setdefault(safe_name(name), name)) != name:
                raise DatasetError(
                    f"{folder}: results of the cases {other!r} and {name!r} would have the same "
                    f"file names, because not every system can write both; give each another id "
                    f"in a table (data.files.table)"
                )
    problems.refuse()
    tell_changed_names(case.name for case in cases)
    labelling = file.labelling
    pictures = pictures or file.pictures
    rules = picture_rules(str(folder), pictures, labelling)
    unlabelled = {}
    if labels := [(case.name, case.label) for case in cases if _is_dicom_label(case)]:
        structures = structure_rules(dicom or DicomConfig(), labelling)
        rules = replace(rules, structures=structures)
        unlabelled = check_structures(labels, structures)
    channels, unit = _of_pictures(cases, file.channels, rules)
    return Dataset(
        folder,
        tuple(cases),
        channels,
        dict(labelling.numbers),
        dict(labelling.regions),
        labelling.ignore,
        labelling.in_files,
        labelling.others,
        file.codes,
        pictures,
        rules,
        unit,
        unlabelled=unlabelled,
    )


def _is_dicom_label(case: CaseFiles) -> bool:
    return bool(case.images) and not has_volume_suffix(case.label)


def dataset_of(data: DatasetConfig, *, with_test: bool = False) -> Dataset:
    """The dataset that a config names.

    Args:
        data: settings of the dataset.
        with_test: whether cases that are kept for a last test are included.

    Raises:
        DatasetError: the dataset is wrong or incomplete.
        VolumeError: a file is not a volume.
    """
    dataset = _labelled(data)
    names = [case.name for case in dataset.cases]
    kept = kept_for_test(data, names)
    unlabelled = unlabelled_of(data, names, list(dataset.labelling.members))
    for name, lacking in dataset.unlabelled.items():
        unlabelled[name] = tuple(dict.fromkeys((*unlabelled.get(name, ()), *lacking)))
    dataset = replace(dataset, unlabelled=unlabelled, nan=data.nan)
    if not kept or with_test:
        return dataset
    verb = "is" if len(kept) == 1 else "are"
    told = (data.folder, counted(len(kept), "case"), verb)
    logger.info("%s: %s %s kept for a test and not used", *told)
    left = tuple(case for case in dataset.cases if case.name not in kept)
    test = tuple(case for case in dataset.cases if case.name in kept)
    return replace(dataset, cases=left, test=test)


def _labelled(data: DatasetConfig) -> Dataset:
    if data.labels is None:
        return read_dataset(data.folder, data.files, data.pictures, dicom=data.dicom)
    labelling = labelling_of("data.labels", data.labels, data.regions_class_order, {})
    if source := _other_source_of_labels(data):
        logger.warning("%s: labels come from data.labels instead of %s", data.folder, source)
    return read_dataset(data.folder, data.files, data.pictures, labelling, data.dicom)


def _other_source_of_labels(data: DatasetConfig) -> str | None:
    """The place of names of labels that `data.labels` replaces, if there is one."""
    if data.dicom is not None and data.dicom.images:
        return None
    if data.files is not None:
        return "data.files.labels" if data.files.labels else None
    if (data.folder / "dataset.json").exists():
        return "dataset.json"
    return "dseg.tsv" if is_bids(data.folder) and bids_label_names(data.folder) else None


def _of_pictures(
    cases: Sequence[CaseFiles], channels: tuple[str, ...], rules: PictureRules
) -> tuple[tuple[str, ...], Unit]:
    """The names of all channels and the unit of lengths, from the files of the first case."""
    if not cases:
        return channels, "mm"
    images, label = cases[0].images, cases[0].label
    first = images[0] if images else label
    if not is_picture(first):
        return channels, "mm"
    unit = read_picture_facts(first, rules=rules)[1].unit
    if len(images) != len(channels) or not all(is_picture(image) for image in images):
        return channels, unit
    groups = channels_of_pictures(channels, images, rules)
    return tuple(name for group in groups for name in group), unit


def channels_of_pictures(
    names: Sequence[str], images: Sequence[Path], rules: PictureRules
) -> list[tuple[str, ...]]:
    """The names of the channels in each picture of a case, read from their headers.

    photo, a picture in colours  ──▶  photo red, photo green, photo blue

    Args:
        names: the name of each picture; or those of all channels, in the order of the pictures.
        images: the pictures.
        rules: how pictures are read.
    """
    counts = [read_num_channels(image, rules=rules) for image in images]
    if len(names) == sum(counts):
        ends = np.cumsum(counts).tolist()
        return [tuple(names[end - count : end]) for end, count in zip(ends, counts, strict=True)]
    return [
        tuple(f"{name} {part}" for part in (COLOURS if count == 3 else range(1, count + 1)))
        if count > 1
        else (name,)
        for name, count in zip(names, counts, strict=True)
    ]


def grid_of_case(case: CaseFiles, dataset: Dataset) -> Grid:
    """The grid of a case, from its label's header, or its image's if it is a picture or DICOM."""
    if case.images and (is_picture(case.images[0]) or not has_volume_suffix(case.label)):
        return read_grid(case.images[0], rules=dataset.rules)
    return read_grid(case.label, rules=dataset.rules)


def read_case(case: CaseFiles, dataset: Dataset) -> tuple[Volume, Volume]:
    """The image (x, y, z, channel) and the label (x, y, z) of a case, on one grid.

    If a case has no image, all values of the image are 0.

    Raises:
        DatasetError: image and label do not fit each other or the dataset.
        VolumeError: a file cannot be read.
    """
    label = read_label_values(case.label, rules=dataset.rules_of(case), working=BYTES_OF_LABEL)
    if not case.images:
        blank = np.zeros((*label.grid.shape, len(dataset.channels)), np.float32)
        return label.like(blank), label.like(_checked_label(case, label, dataset))
    parts: list[Volume] = []
    for path in case.images:
        part = read_volume(path, rules=dataset.rules, working=BYTES_OF_IMAGE)
        part = part.measured_as(parts[0]) if parts else part
        if dataset.nan == "background":
            part = part.like(nan_as_zero(part.data))
        parts.append(_on_grid_of(case, parts[0] if parts else part, path, part))
        if trouble := value_problem(part.data):
            raise DatasetError(f"{path}: {trouble}")
    data = np.concatenate([part.data.reshape(*part.grid.shape, -1) for part in parts], axis=3)
    if data.shape[3] != len(dataset.channels):
        raise _miscounted(case, dataset, data.shape[3])
    _check_unit(case, parts[0], dataset)
    label = _on_grid_of(case, parts[0], case.label, label.measured_as(parts[0]))
    return parts[0].like(data), label.like(_checked_label(case, label, dataset))


def read_case_label(case: CaseFiles, dataset: Dataset) -> Volume:
    """The label of a case, with the numbers in its file. Raises DatasetError."""
    label = read_label_values(case.label, rules=dataset.rules_of(case), working=BYTES_OF_LABEL)
    return label.like(_whole(case, label, dataset))


def check_headers(cases: Collection[CaseFiles], dataset: Dataset, track: Track = untracked) -> None:
    """Check the headers of all cases, which is fast, before their voxels are read.

    Raises:
        DatasetError, VolumeError: a file is missing or is not a volume, the number of channels is
            wrong, or the files of a case lie on different grids. `problems` has a sentence for each
            such case.
    """
    problems = Problems()
    for case in track(cases, "reading headers", len(cases)):
        if any(map(is_picture, (*case.images, case.label))):
            continue  # reading the header of a picture takes as long as reading its voxels
        with problems.noted():
            files = (*case.images, case.label)
            grids = {path: read_grid(path, rules=dataset.rules_of(case)) for path in files}
            for path in (*case.images[1:], case.label) if case.images else ():
                _turned_onto(case, path, grids[path], grids[case.images[0]])
            found = sum(read_num_channels(path) for path in case.images)
            if case.images and found != len(dataset.channels):
                raise _miscounted(case, dataset, found)
    problems.refuse()


def unlabelled(dataset: Dataset, present: Collection[int], cases: str) -> str | None:
    """A warning about classes that are in no case; None if each class is in some case.

    Args:
        dataset: the dataset, with its folder and its labels.
        present: the numbers that appear in the labels of the cases.
        cases: the cases in words, such as "any of 4 cases".

    Raises:
        DatasetError: no case has a voxel of any class.
    """
    absent = dataset.labelling.absent(present)
    if not absent:
        return None
    fact = f"{dataset.folder}: no voxel in {cases} is labelled {first_few(absent)}"
    if len(absent) == len(dataset.labelling.members):
        raise DatasetError(
            f"{fact}, so there is nothing to learn; label some voxels, or check whether the right "
            f"files are named"
        )
    return f"{fact}, so the network cannot learn {'it' if len(absent) == 1 else 'them'}"


def _check_unit(case: CaseFiles, image: Volume, dataset: Dataset) -> None:
    if image.picture and image.picture.sized != (dataset.unit != "pixel"):
        other = dataset.cases[0].images[0] if dataset.cases else "the first case's"
        has = ("no pixel size", f"a pixel size ({image.picture.source})")
        raise DatasetError(
            f"{case.images[0]}: has {has[image.picture.sized]}, but {other} has "
            f"{('none', 'one')[dataset.unit != 'pixel']}; set data.pictures.pixel_size to one size "
            f"for all cases, or to 'pixel'"
        )


def _checked_label(case: CaseFiles, label: Volume, dataset: Dataset) -> ndarray:
    """The label with the numbers 0, 1, 2, …."""
    values, labelling = _whole(case, label, dataset), dataset.labelling
    try:
        numbers = within(values, labelling)
    except ValueError as error:
        raise DatasetError(f"{case.label}: {error}") from None
    return numbers.astype(np.min_scalar_type(len(labelling.value_names) - 1), copy=False)


def _whole(case: CaseFiles, label: Volume, dataset: Dataset) -> ndarray:
    if label.data.size != math.prod(label.grid.shape):
        raise DatasetError(
            f"{case.label}: expected one label per voxel, found shape {label.data.shape}; use a "
            f"file with one channel"
        )
    values = whole_numbers(label.data, case.label)
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            rounded = values.astype(np.int64)
        if len(strange := values[rounded != values]):
            raise DatasetError(
                f"{case.label}: holds label {', '.join(map(in_full, np.unique(strange)[:5]))}, "
                f"which the dataset does not declare (it has {declared(dataset.labelling)})"
                f"{ARE_WHOLE}"
            )
        values = rounded
    return values.reshape(label.grid.shape)


def _miscounted(case: CaseFiles, dataset: Dataset, found: int) -> DatasetError:
    return DatasetError(
        f"{case.images[0]}: expected {len(dataset.channels)} channels "
        f"({first_few(dataset.channels)}), found {found}; correct the files or the channel names"
    )


def _on_grid_of(case: CaseFiles, first: Volume, path: Path, volume: Volume) -> Volume:
    """A volume of a case, with its axes in the order and the directions of the first image."""
    return volume.on(
        first.grid, _turned_onto(case, path, volume.grid, first.grid).turn(volume.data)
    )


def _turned_onto(case: CaseFiles, path: Path, grid: Grid, first: Grid) -> Orientation:
    """The orientation that turns a grid into the first image's. Raises DatasetError."""
    try:
        return turn_onto(grid, first, what=f"{path}:", whose=case.images[0].name)
    except VolumeError as error:
        raise DatasetError(str(error)) from None
