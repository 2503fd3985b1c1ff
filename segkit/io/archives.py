"""Unpacking of untrusted archives into a new folder that is complete or absent.

Every file that the archive lists is checked before anything is written.
"""

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from segkit.errors import DatasetError
from segkit.io.atomic import whole_folder

MOST_MEMBERS = 1_000_000
INFLATION = 100
"""Largest allowed ratio of unpacked size to archive size; noisy scans reach about 2."""
ALWAYS_ALLOWED = 2**30
"""Unpacked bytes that are allowed for an archive of any size."""

DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    NotImplementedError,  # zipfile raises it for an unknown compression
)


class ArchiveMember(NamedTuple):
    """A file or folder in an archive, as the archive lists it."""

    name: str
    size: int
    is_folder: bool
    refusal: str
    """The reason to refuse it, such as "a link or a device"; empty for plain files and folders."""


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar archive, compressed or not, into a folder that is new or empty.

    The folder is complete or absent. The files belong to the user who unpacks them, and none is
    executable.

    Args:
        archive: the zip or tar file.
        folder: the folder to make.

    Raises:
        DatasetError: the folder is not empty; the archive is damaged; a member lies outside the
            folder (an absolute path, `..`), is a link, a device or encrypted, or occurs twice; or
            the archive unpacks to more than its size or the disk allows. Members are checked before
            anything is written.

    Example:
        >>> unpack(Path("Task04_Hippocampus.tar"), Path("data"))
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DatasetError(f"{folder}: exists already; choose a new folder to unpack {archive} to")
    try:
        limit = _size_limit(archive, folder)
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                _check(archive, _zip_members(zipped), limit)
                with whole_folder(folder) as inside:
                    zipped.extractall(inside)
            return
        if not hasattr(tarfile, "data_filter"):
            raise DatasetError(
                f"{archive}: unpacking a tar needs Python 3.11.4 or later; update it"
            )
        with tarfile.open(archive) as tarred:
            _check(archive, _tar_members(tarred), limit)
            with whole_folder(folder) as inside:
                tarred.extractall(inside, filter=_plain)
    except DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(
            f"{archive}: cannot be unpacked: {reason}; download it again if it is damaged"
        ) from None


def _zip_members(zipped: zipfile.ZipFile) -> Iterator[ArchiveMember]:
    for info in zipped.infolist():
        plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
        refusal = "encrypted" if info.flag_bits & 1 else "" if plain else "a link or a device"
        yield ArchiveMember(info.orig_filename, info.file_size, info.is_dir(), refusal)


def _tar_members(tarred: tarfile.TarFile) -> Iterator[ArchiveMember]:
    for info in tarred:
        plain = info.isreg() or info.isdir()
        refusal = "a link or a device" if not plain else "sparse" if info.issparse() else ""
        yield ArchiveMember(info.name, info.size, info.isdir(), refusal)


def _plain(info: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """Apply Python's `data` filter, and drop the archive's file modes and times."""
    return tarfile.data_filter(info, folder).replace(mode=None, mtime=None)  # type: ignore[arg-type]


def _size_limit(archive: Path, folder: Path) -> int:
    """Largest number of bytes that the archive may unpack to."""
    there = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(there).free
    return min(free, max(ALWAYS_ALLOWED, INFLATION * archive.stat().st_size))


def _check(archive: Path, members: Iterable[ArchiveMember], limit: int) -> None:
    """Raise DatasetError for the first member that must not be unpacked."""
    is_folder = {PurePosixPath("."): True}
    total = 0
    for count, member in enumerate(members, start=1):
        total += member.size
        if member.size < 0 or total > limit or count > MOST_MEMBERS:
            raise DatasetError(
                f"{archive}: unpacks to more than {limit / 1e9:.1f} GB or {MOST_MEMBERS:,} files, "
                "which is too much for this disk or for such an archive; unpack it by hand if you "
                "trust it"
            )
        # Also check the name as Windows would read it, with its separator and drive letters.
        parts = PureWindowsPath(member.name)
        place = PurePosixPath(member.name)
        above = place.parents
        why = f"is {member.refusal}" if member.refusal else ""
        if "\0" in member.name or "\\" in member.name or parts.anchor or ".." in parts.parts:
            why = why or "would lie outside the folder"
        elif not all(is_folder.get(each, True) for each in above) or (
            place in is_folder and not (member.is_folder and is_folder[place])
        ):
            why = why or "has the same path as another"
        if why:
            raise DatasetError(
                f"{archive}: expected plain files and folders, found {member.name[:200]!r}, which "
                f"{why}; nothing was unpacked"
            )
        is_folder.update(dict.fromkeys(above, True))
        is_folder[place] = member.is_folder
