"""Archives of strangers unpacked: into a folder that appears whole, and nowhere else.

All that an archive says it holds is checked before anything is written.
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
"""So many times its own size an archive may hold; scans, which are noise, come to 2 or so."""
ALWAYS_BEARABLE = 2**30
"""Bytes that an archive of any size may hold."""

DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    NotImplementedError,  # zipfile raises it for a compression that it does not know
)


class ArchiveMember(NamedTuple):
    """A file or folder of an archive, as the archive describes it."""

    name: str
    size: int
    is_folder: bool
    refusal: str
    """Its kind if it is neither a plain file nor a folder, else empty."""


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or a tar, compressed or not, into a folder that is new or empty.

    The folder appears whole or not at all. Files are those of whoever unpacks them, and none can be
    run.

    Raises:
        DatasetError: the folder holds something; or the archive is damaged; or, before anything is
            written, a member would lie elsewhere (an absolute path, `..`), is a link, a device or
            encrypted, or is there twice, or the archive holds more than its size or the disk allow.

    Example:
        >>> unpack(Path("Task04_Hippocampus.tar"), Path("data"))
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DatasetError(f"{folder}: exists already; name a new folder to unpack {archive} into")
    try:
        bearable = _bearable(archive, folder)
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                _check(archive, _zip_members(zipped), bearable)
                with whole_folder(folder) as inside:
                    zipped.extractall(inside)
            return
        if not hasattr(tarfile, "data_filter"):
            raise DatasetError(f"{archive}: a tar is unpacked by Python 3.11.4 or later; update it")
        with tarfile.open(archive) as tarred:
            _check(archive, _tar_members(tarred), bearable)
            with whole_folder(folder) as inside:
                tarred.extractall(inside, filter=_plain)
    except DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(
            f"{archive}: cannot be unpacked: {reason}; fetch it again if it is damaged"
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
    """Python's filter for data, and no mode or time of the archive's either."""
    return tarfile.data_filter(info, folder).replace(mode=None, mtime=None)  # type: ignore[arg-type]


def _bearable(archive: Path, folder: Path) -> int:
    """The bytes that may come out of an archive."""
    there = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(there).free
    return min(free, max(ALWAYS_BEARABLE, INFLATION * archive.stat().st_size))


def _check(archive: Path, members: Iterable[ArchiveMember], bearable: int) -> None:
    """Raise DatasetError for the first member that must not be unpacked."""
    is_folder = {PurePosixPath("."): True}
    total = 0
    for count, member in enumerate(members, start=1):
        total += member.size
        if member.size < 0 or total > bearable or count > MOST_MEMBERS:
            raise DatasetError(
                f"{archive}: holds more than {bearable / 1e9:.1f} GB or {MOST_MEMBERS:,} files, "
                f"which is beyond this disk or beyond belief; unpack it by hand if it is right"
            )
        # As Windows would read it as well: another separator, and drives.
        parts = PureWindowsPath(member.name)
        place = PurePosixPath(member.name)
        above = place.parents
        why = f"is {member.refusal}" if member.refusal else ""
        if "\0" in member.name or "\\" in member.name or parts.anchor or ".." in parts.parts:
            why = why or "would lie elsewhere than in the folder"
        elif not all(is_folder.get(each, True) for each in above) or (
            place in is_folder and not (member.is_folder and is_folder[place])
        ):
            why = why or "takes the place of another"
        if why:
            raise DatasetError(
                f"{archive}: expected plain files and folders, found {member.name[:200]!r}, which "
                f"{why}; nothing was unpacked"
            )
        is_folder.update(dict.fromkeys(above, True))
        is_folder[place] = member.is_folder
