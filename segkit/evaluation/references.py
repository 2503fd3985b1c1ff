"""Volumes with the names of their cases: the references in a file, a folder or a dataset."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from segkit.config.dataset_files import TABLE_SUFFIXES
from segkit.config.labels import Labelling
from segkit.config.load import dataset_in, load_config
from segkit.data.bids import bids_label_names, bids_labels, is_bids
from segkit.data.dataset import CaseFiles, Dataset, dataset_of, read_dataset
from segkit.data.dataset_json import labelling_of
from segkit.data.file_patterns import ID, LABEL
from segkit.errors import DatasetError, VolumeError
from segkit.io.picture_rules import PictureRules
from segkit.io.tables import read_csv
from segkit.io.volume import AS_IT_SAYS
from segkit.io.volume_names import SUFFIXES, case_name_of, is_picture, stem_of, volumes_among

BESIDE = re.compile(r"_(prob|probseg|entropy|variance|preview)$|_map-")
"""Names of volumes that segkit writes beside predictions and that are not predictions."""
Parts = tuple[str, ...]
"""A path without suffix: the folders, then the name."""


@dataclass(frozen=True)
class NamedVolume:
    """A volume of labels, and the names by which it may be paired."""

    path: Path
    case: str
    """Name of its case in results and messages."""
    names: tuple[Parts, ...]
    image: Path | None = None
    """The image of its case, on whose grid structures of a DICOM file are painted."""
    unlabelled: tuple[str, ...] = ()
    """The classes that nobody labelled in it."""


@dataclass(frozen=True)
class References:
    """Reference volumes, with the names of their labels if a dataset gives them."""

    volumes: tuple[NamedVolume, ...]
    labelling: Labelling | None = None
    source: Path | None = None
    """The file that names the labels."""
    rules: PictureRules = AS_IT_SAYS
    """How pictures are read."""


def references_in(path: Path, *, but: Path | None = None) -> References:
    """The references in a file, a folder or a dataset.

    Args:
        path: a volume, a folder of volumes, a dataset folder with a dataset.json, a BIDS folder,
            whose `…_dseg` files are the references, a table with the columns `id` and `label`, or
            a YAML file with `data.folder` and optionally `data.files` or `data.dicom`.
        but: a folder of predictions inside `path`, which is left out.

    Raises:
        VolumeError: if the path does not exist.
        ConfigError: if a YAML file is not valid.
        DatasetError: if a dataset is not valid.
    """
    if path.suffix.lower() in (".yaml", ".yml") and not path.is_dir():
        named = dataset_in(path) or load_config(path).data
        dataset = dataset_of(named, with_test=True)
        own = named.files or named.labels or named.dicom or is_bids(named.folder)
        source = path if own else named.folder / "dataset.json"
    elif path.is_dir() and (path / "dataset.json").is_file() and not _at_top(path):
        dataset = read_dataset(path)
        source = path / "dataset.json"
    elif path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
        return References(tuple(_in_table(path)))
    elif is_bids(path) and (labels := bids_labels(path)):
        return _in_bids(path, labels)
    elif path.exists():
        return References(tuple(volumes_in(path, but=but)))
    else:
        raise VolumeError(f"{path}: no such file or folder; check the path")
    volumes = tuple(_of_case(case, dataset) for case in dataset.cases)
    return References(volumes, dataset.labelling, source, dataset.rules)


def _in_table(path: Path) -> list[NamedVolume]:
    """The column `label` of a table, called by the column `id`. Raises DatasetError."""
    rows, columns = read_csv(path)
    for column in (ID, LABEL):
        if column not in columns:
            raise DatasetError(
                f"{path}: expected a column {column}, found {', '.join(columns) or 'none'}"
                "; rename the column"
            )
    absent = [row[LABEL] for row in rows if not (path.parent / row[LABEL]).is_file()]
    if absent:
        raise DatasetError(
            f"{path}: names {absent[0] or 'nothing'} as {LABEL}, which is not a file in "
            f"{path.parent}; correct the table, or add the file"
        )
    return [
        NamedVolume(path.parent / row[LABEL], row[ID], ((_normal(row[ID]),), parts))
        for row in rows
        for parts in [_parts(path.parent / row[LABEL], path.parent)]
    ]


def _in_bids(folder: Path, labels: Mapping[str, Path]) -> References:
    """The labels of a BIDS folder, and their names if a table gives them."""
    volumes = tuple(
        NamedVolume(path, name, ((_normal(name),), _parts(path, folder)))
        for name, path in labels.items()
    )
    names = bids_label_names(folder)
    labelling = None if names is None else labelling_of(str(folder), names, None, {})
    return References(volumes, labelling)


def volumes_in(path: Path, *, but: Path | None = None) -> list[NamedVolume]:
    """The volume at a path, or all volumes in a folder and its subfolders, sorted by path.

    Hidden files and folders (`.x`, `._x.nii.gz`) are left out. If a folder contains pictures and
    other volumes, the pictures are left out.

    Args:
        path: a file or a folder.
        but: a folder inside `path` that is left out.

    Raises:
        OSError: if a folder cannot be listed.
    """
    if path.is_file():
        return [called(path, stem_of(path))]
    inner = but.resolve() if but and path.resolve() in but.resolve().parents else None
    paths = volumes_among(
        each for each in _walk(path) if not inner or inner not in each.resolve().parents
    )
    stems = Counter(stem_of(each) for each in paths)
    return [
        NamedVolume(each, stem_of(each) if stems[stem_of(each)] == 1 else "/".join(parts), (parts,))
        for each in paths
        for parts in [_parts(each, path)]
    ]


def called(path: Path, name: str) -> NamedVolume:
    """A volume with a single name, which does not depend on its folder."""
    return NamedVolume(path, name, ((_normal(name),),))


def _of_case(case: CaseFiles, dataset: Dataset) -> NamedVolume:
    """The label of a case. Its names are those of the case, of its own file and of its images."""
    files = [case.label, *case.images]
    return NamedVolume(
        case.label,
        case.name,
        ((_normal(case.name),), *(_parts(file, dataset.folder) for file in files)),
        case.images[0] if case.images else None,
        dataset.unlabelled.get(case.name, ()),
    )


def _at_top(folder: Path) -> bool:
    """Whether a folder itself contains volumes. Pictures beside `labelsTr` do not count."""
    found = volumes_among(path for path in folder.iterdir() if not path.name.startswith("."))
    return bool(found) and not (is_picture(found[0]) and (folder / "labelsTr").is_dir())


def _is_volume(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for inner, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(inner, name) for name in files if _is_volume(name))


def _parts(path: Path, folder: Path) -> Parts:
    inside = path.relative_to(folder) if path.is_relative_to(folder) else path
    return tuple(map(_normal, (*inside.parts[:-1], case_name_of(path))))


def _normal(name: str) -> str:
    """A name in Unicode's NFC form, because some systems write é as two characters."""
    return unicodedata.normalize("NFC", name)
