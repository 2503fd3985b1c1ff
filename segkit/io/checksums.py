"""Identification of files: by SHA-256, or by size and time of change."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from segkit.errors import DatasetError
from segkit.io.volume import files_of


def checksum(path: Path) -> str:
    """The SHA-256 of a file, as `sha256sum` prints it."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def checksums(files: Iterable[Path]) -> list[dict[str, str]]:
    """The name and SHA-256 of each file, and of the data file that its header names.

    A folder stands for the files in it, sorted by name.
    """
    found = []
    for file in files:
        inside = sorted(each for each in file.iterdir() if each.is_file()) if file.is_dir() else ()
        found += [
            {"file": each.name, "sha256": checksum(each)} for each in inside or files_of(file)
        ]
    return found


def file_states(volumes: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size (bytes) and time of change (ns) of each volume's files, as a key for caches.

    Raises DatasetError for a missing file, and VolumeError for a header that cannot be read.
    """
    try:
        states = [
            (str(file.resolve()), file.stat()) for volume in volumes for file in files_of(volume)
        ]
    except OSError as error:
        raise DatasetError(
            f"{error.filename}: cannot be read: {error.strerror}; check the path and its "
            f"permissions"
        ) from None
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]
