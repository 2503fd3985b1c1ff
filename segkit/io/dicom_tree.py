"""All DICOM series and structures in a folder, to any depth, and names of cases by their paths."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from segkit.errors import SegkitError, VolumeError
from segkit.io.dicom_headers import storage_class
from segkit.io.dicom_labels import StructureFile, read_structure_file, structure_kind
from segkit.io.dicom_listing import Series, find_folders, holds_series, listing_steps
from segkit.system.listing import tracked

DIGITS = 6
"""Number of digits of a UID's SHA-256 in a name. They distinguish the series of one folder."""


@dataclass(frozen=True)
class DicomTree:
    """The series and structures of a folder."""

    root: Path
    series: tuple[Series, ...]
    structures: tuple[StructureFile, ...]
    failures: dict[Path, str] = field(default_factory=dict)
    """A sentence about each folder and each file of structures that cannot be read."""


def read_tree(root: Path, *, structures: bool = True) -> DicomTree:
    """The series in a folder, with the files of structures.

    All headers are read. A file that cannot be read is listed in `failures`; the others are read
    all the same.

    Args:
        root: the folder.
        structures: whether files of structures are read.

    Raises:
        VolumeError: there is no such folder.
    """
    if not root.is_dir():
        raise VolumeError(f"{root}: expected a folder of DICOM files, found none; check the path")
    series: list[Series] = []
    found: list[StructureFile] = []
    failures: dict[Path, str] = {}
    folders = list(find_folders(root))
    count = sum(len(files) for _, _, files in os.walk(root))

    def headers() -> Iterator[Path]:
        for folder in folders:
            if holds_series(folder):
                try:
                    series.extend((yield from listing_steps(folder)))
                except SegkitError as error:
                    failures[folder] = str(error)
            for path in dicom_files(folder) if structures else ():
                try:
                    if structure_kind(path):
                        found.append(read_structure_file(path))
                        yield path
                except SegkitError as error:
                    failures[path] = str(error)

    for _ in tracked(headers(), "reading DICOM headers", count):
        pass
    return DicomTree(root, tuple(series), tuple(found), failures)


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files in a folder, sorted; their first bytes or their names identify them."""
    with os.scandir(folder) as entries:
        files = sorted(
            Path(entry.path)
            for entry in entries
            if entry.is_file() and not entry.name.startswith(".")
        )
    return [file for file in files if storage_class(file) is not None]


def path_of(series: Series, tree: Iterable[Series]) -> Path:
    """The path to read a series from: its folder, or its first file if the folder holds several."""
    several = any(other.folder == series.folder and other is not series for other in tree)
    return series.files[0] if several else series.folder


def name_in(root: Path, folder: Path, uid: str | None = None) -> str:
    """The name of a case, made of the folders below `root`.

        PA0/ST0/SE1  ──▶  PA0_ST0_SE1

    Args:
        root: the folder that the user named.
        folder: the folder of the case, inside `root`.
        uid: the UID of the case, if other cases lie in the same folder; its digest ends the name.
    """
    inside = folder.relative_to(root).parts or (root.resolve().name,)
    digest = [] if uid is None else [hashlib.sha256(uid.encode()).hexdigest()[:DIGITS]]
    return "_".join([*inside, *digest])
