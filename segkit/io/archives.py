"""Archives of strangers unpacked: into a folder that appears whole, and nowhere else.

Everything that an archive says it holds is looked at before anything is written.
"""

import lzma
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from segkit.errors import DatasetError

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
    NotImplementedError,  # what zipfile raises for a compression that it does not know
)


@dataclass(frozen=True)
class ArchiveMember:
    """A file or folder of an archive, as the archive describes it."""

    name: str
    size: int
    is_folder: bool
    refusal: str = ""
    """What it is, where it is neither a plain file nor a folder."""
    open: Callable[[], IO[bytes] | None] = lambda: None


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or a tar, compressed or not, into a folder that is new or empty.

    The folder appears whole or not at all. Raises DatasetError, before anything is written, for a
    member that would lie elsewhere (an absolute path, `..`), that is a link, a device or encrypted,
    that is there twice, and for an archive that holds absurdly much; and for a damaged one.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DatasetError(f"{folder}: exists already; name a new folder to unpack {archive} into")
    try:
        with _opened(archive) as members:
            places = _checked(archive, members, _bearable(archive, folder))
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as beside:
                inside = Path(beside) / "folder"
                inside.mkdir()
                for place, member in places.items():
                    _write(inside / place, member)
                inside.replace(folder)
    except DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(
            f"{archive}: cannot be unpacked: {reason}; fetch it again if it is damaged"
        ) from None


@contextmanager
def _opened(archive: Path) -> Iterator[Iterable[ArchiveMember]]:
    """The members of an archive, told one by one, while it is open."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            yield (_zip_member(zipped, info) for info in zipped.infolist())
    else:
        with tarfile.open(archive) as tarred:
            yield (_tar_member(tarred, info) for info in tarred)


def _zip_member(zipped: zipfile.ZipFile, info: zipfile.ZipInfo) -> ArchiveMember:
    kind = stat.S_IFMT(info.external_attr >> 16)
    refusal = ""
    if info.flag_bits & 1:
        refusal = "encrypted"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        refusal = "a link or a device"
    return ArchiveMember(
        info.orig_filename,
        info.file_size,
        info.is_dir(),
        refusal,
        lambda: zipped.open(info),
    )


def _tar_member(tarred: tarfile.TarFile, info: tarfile.TarInfo) -> ArchiveMember:
    refusal = ""
    if not (info.isreg() or info.isdir()):
        refusal = "a link or a device"
    elif info.issparse():
        refusal = "a file with holes"
    return ArchiveMember(
        info.name, info.size, info.isdir(), refusal, lambda: tarred.extractfile(info)
    )


def _bearable(archive: Path, folder: Path) -> int:
    """The bytes that may come out of an archive."""
    there = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(there).free
    return min(free, max(ALWAYS_BEARABLE, INFLATION * archive.stat().st_size))


def _checked(
    archive: Path, members: Iterable[ArchiveMember], bearable: int
) -> dict[str, ArchiveMember]:
    """Every member by where it goes. Raises DatasetError for the first that must not go there."""
    places: dict[str, ArchiveMember] = {}
    parents: set[str] = set()
    total = 0
    for count, member in enumerate(members, start=1):
        total += member.size
        if member.size < 0 or total > bearable or count > MOST_MEMBERS:
            raise DatasetError(
                f"{archive}: holds more than {bearable / 1e9:.1f} GB or {MOST_MEMBERS:,} files, "
                f"which is beyond this disk or beyond belief; unpack it by hand if it is right"
            )
        if member.refusal:
            raise _refused(archive, member, f"is {member.refusal}")
        place = _place(archive, member)
        if place is None:
            continue
        above = [str(parent) for parent in place.parents if parent.parts]
        known = places.get(str(place))
        if known is not None and member.is_folder and known.is_folder:
            continue
        hidden = not member.is_folder and str(place) in parents
        if known is not None or hidden or any(_is_file(places, parent) for parent in above):
            raise _refused(archive, member, "takes the place of another")
        places[str(place)] = member
        parents.update(above)
    return places


def _is_file(places: dict[str, ArchiveMember], place: str) -> bool:
    return place in places and not places[place].is_folder


def _place(archive: Path, member: ArchiveMember) -> PurePosixPath | None:
    """Where a member goes, below the folder; None for the folder itself."""
    # As Windows would read it as well: another separator, and drives.
    parts = PureWindowsPath(member.name)
    if "\0" in member.name or "\\" in member.name or parts.anchor or ".." in parts.parts:
        raise _refused(archive, member, "would lie elsewhere than in the folder")
    place = PurePosixPath(member.name)
    return place if place.parts else None


def _refused(archive: Path, member: ArchiveMember, why: str) -> DatasetError:
    return DatasetError(
        f"{archive}: expected plain files and folders, found {member.name[:200]!r}, which {why}; "
        f"nothing was unpacked"
    )


def _write(path: Path, member: ArchiveMember) -> None:
    """Write a member, no larger than it said it is; what runs, links or owns is not kept."""
    if member.is_folder:
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    content = member.open()
    assert content is not None, "a plain file has content"
    with content, path.open("xb") as file:
        left = member.size
        while left and (block := content.read(min(left, 2**20))):
            file.write(block)
            left -= len(block)
    if left:
        raise EOFError(f"{member.name} ends {left} bytes early")
