"""Names of volumes: which suffixes segkit reads and writes, and those of results."""

from collections.abc import Iterable
from pathlib import Path

from segkit.errors import VolumeError
from segkit.io.picture_files import PICTURE_SUFFIXES
from segkit.io.tiff import TIFF_SUFFIXES

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ONE_FILE = {".nhdr": ".nrrd", ".mhd": ".mha"}
"""Suffix of each header that may name a data file, and that of the same format in one file."""
NOT_PICTURES = (*NIFTI_SUFFIXES, ".nrrd", ".mha", *ONE_FILE)
"""Suffixes of the volumes that segkit reads and that are not pictures."""
KEPT_AS = {".jpg": ".png", ".jpeg": ".png", ".bmp": ".png"}
"""Suffix of each picture format that cannot store labels, and that of the results instead."""
WRITTEN_SUFFIXES = (*NIFTI_SUFFIXES, ".nrrd", ".mha")
"""Suffixes of the volumes that segkit writes and that are not pictures."""
WRITTEN_PICTURES = (".png", *TIFF_SUFFIXES)
"""Suffixes of the pictures that segkit writes."""
SUFFIXES = (*NOT_PICTURES, *PICTURE_SUFFIXES)
"""Suffixes of all volumes that segkit reads."""


def suffix_of(path: Path) -> str:
    """The volume suffix of a file name, such as '.nii.gz'.

    Raises VolumeError if segkit cannot read files with this suffix.
    """
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return path.name[-len(suffix) :]
    raise VolumeError(f"{path}: expected a volume named *{', *'.join(SUFFIXES)}; convert it first")


def result_suffix(path: Path) -> str:
    """The suffix of results for a volume: its own, or that of a format that can store labels."""
    suffix = suffix_of(path)
    return {**ONE_FILE, **KEPT_AS}.get(suffix.lower(), suffix)


def is_picture(path: Path) -> bool:
    """Whether a file is a picture, by its suffix."""
    return path.name.lower().endswith(PICTURE_SUFFIXES)


def numbers_suffix(suffix: str) -> str:
    """Suffix of results that are not labels, such as maps, if labels have `suffix`."""
    if suffix.lower() not in PICTURE_SUFFIXES or suffix.lower() in TIFF_SUFFIXES:
        return suffix
    return ".tif"


def volumes_among(files: Iterable[Path]) -> list[Path]:
    """The volumes among files, sorted. Pictures only count if there are no other volumes."""
    found = [file for file in sorted(files) if file.name.lower().endswith(SUFFIXES)]
    scans = [file for file in found if not is_picture(file)]
    return scans or found


def check_writable(path: Path) -> None:
    """Raise VolumeError if segkit cannot write a volume with this suffix."""
    written = (*WRITTEN_SUFFIXES, *WRITTEN_PICTURES)
    if not path.name.lower().endswith(written):
        raise VolumeError(f"{path}: expected a name in *{', *'.join(written)}; change its suffix")


def stem_of(path: Path) -> str:
    """The file name without its volume suffix, such as 'scan' for 'scan.nii.gz'."""
    return path.name[: -len(suffix_of(path))]


def has_volume_suffix(path: Path) -> bool:
    """Whether a name is that of a volume in a file, and not of a DICOM file or a folder."""
    return path.name.lower().endswith(SUFFIXES)


def case_name_of(path: Path) -> str:
    """The name of a case from one of its files: without the suffix if it is that of a volume."""
    return stem_of(path) if has_volume_suffix(path) else path.name
