"""The DICOM series in a folder; the listings of the last folders are kept.

A series is named by its folder or, if the folder holds several, by any of its files. An image is a
file, or a frame of an enhanced file of several frames (`dicom_frames`).
"""

import filecmp
import os
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from segkit.errors import VolumeError
from segkit.io.dicom_headers import (
    FRAME_OF_REFERENCE,
    INSTANCE,
    MODALITY,
    PATIENT,
    SERIES,
    SERIES_DESCRIPTION,
    STUDY,
    Slice,
    header_text,
    is_image,
    reader_of,
    slices_in,
    storage_class,
    unreadable,
)

SLICES_KEPT = 250_000
"""Most slices whose headers are not read again while their files stay as they are."""


@dataclass(frozen=True, eq=False)
class Series:
    """The images of one series, in the order of their file names."""

    folder: Path
    uid: str
    description: str
    modality: str
    slices: tuple[Slice, ...]
    study: str = ""
    """The UID of its study."""
    patient: str = ""
    """The patient's ID, by which cases may be grouped. It is never written to a file."""
    frame_of_reference: str = ""
    """The UID of the coordinate system of its positions."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Its files, each once."""
        return tuple(dict.fromkeys(one.path for one in self.slices))

    def __str__(self) -> str:
        count = f"{len(self.slices)} slice{'s' * (len(self.slices) > 1)}"
        return f"{self.uid} ({self.description or 'no description'}, {self.modality}, {count})"


def holds_series(folder: Path) -> bool:
    """Whether a folder holds DICOM images, possibly among other files."""
    return any(is_image(file) for file in _files_in(folder))


def is_dicom(path: Path) -> bool:
    """Whether a path is a folder of DICOM images, or a DICOM file of any kind."""
    if path.is_dir():
        return holds_series(path)
    return path.is_file() and storage_class(path) is not None


def is_only_image(file: Path) -> bool:
    """Whether a file is the only DICOM image in its folder."""
    return not any(other != file and is_image(other) for other in _files_in(file.parent))


def series_at(path: Path) -> Series:
    """The only series of a folder, or the series that a file belongs to.

    Raises:
        VolumeError: the folder holds several series, or the file none.
    """
    if path.is_dir():
        return choose_series(path)
    listing = _LISTINGS.of(path.parent)
    if listing is not None and (known := listing.with_file(path)) is not None:
        return known
    for series in list_series(path.parent):
        if path in series.files:
            return series
    raise VolumeError(f"{path}: expected an image of a DICOM series, found none; check the path")


def find_folders(root: Path) -> Iterator[Path]:
    """The folder and all folders in it, to any depth and sorted; hidden ones are left out.

    Raises:
        OSError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    for folder, inside, _ in os.walk(root, onerror=refuse):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        yield Path(folder)


def list_series(folder: Path) -> list[Series]:
    """The series in a folder, sorted by UID; subfolders are not searched.

    Objects that are not images, such as segmentations, are skipped, and so are copies: files with
    the same bytes.

    Raises:
        VolumeError: there is no image; an image cannot be read, so that a series might look
            complete without it; or two different images have the same SOP Instance UID.
    """
    steps = listing_steps(folder)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return list(end.value)


def listing_steps(folder: Path) -> Generator[Path, None, tuple[Series, ...]]:
    """Read the headers in a folder: yield each file that was read, and return the series.

    Raises VolumeError as `list_series` does.
    """
    changed = folder.stat().st_mtime_ns if folder.is_dir() else 0
    states = {file: _state(file) for file in _files_in(folder)}
    kept = _LISTINGS.of(folder)
    if kept is not None and kept.states == states:
        return kept.series
    series = yield from _listed(folder, states)
    _LISTINGS.keep(folder, _Listing(changed, states, series))
    return series


@dataclass(frozen=True, eq=False)
class _Listing:
    """The series in a folder, and the state of the folder and its files when they were read."""

    changed: int
    states: Mapping[Path, tuple[int, int]]
    series: tuple[Series, ...]

    def __post_init__(self) -> None:
        by_file = {file: series for series in self.series for file in series.files}
        object.__setattr__(self, "by_file", by_file)

    by_file: Mapping[Path, Series] = field(init=False)

    @property
    def num_slices(self) -> int:
        return sum(len(series.slices) for series in self.series)

    def with_file(self, file: Path) -> Series | None:
        """The series of a file, unless the folder or a file of the series has changed."""
        series = self.by_file.get(file)
        if series is None or file.parent.stat().st_mtime_ns != self.changed:
            return None
        same = all(each.exists() and _state(each) == self.states[each] for each in series.files)
        return series if same else None


class _Listings:
    """The listings of the folders that were read last, up to a number of slices."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Path, _Listing] = OrderedDict()
        self.num_slices = 0

    def of(self, folder: Path) -> _Listing | None:
        return self.kept.get(folder)

    def keep(self, folder: Path, listing: _Listing) -> None:
        if (old := self.kept.pop(folder, None)) is not None:
            self.num_slices -= old.num_slices
        self.kept[folder] = listing
        self.num_slices += listing.num_slices
        while self.num_slices > SLICES_KEPT and len(self.kept) > 1:
            self.num_slices -= self.kept.popitem(last=False)[1].num_slices


_LISTINGS = _Listings()


def _state(file: Path) -> tuple[int, int]:
    """Size and time of change of a file."""
    state = file.stat()
    return state.st_size, state.st_mtime_ns


def _listed(
    folder: Path, states: Mapping[Path, tuple[int, int]]
) -> Generator[Path, None, tuple[Series, ...]]:
    """The series among files; each file is yielded when it has been read."""
    found: dict[str, tuple[tuple[str, ...], list[Slice]]] = {}
    firsts: dict[tuple[str, str], Path] = {}
    for file in states:
        if not is_image(file):
            continue
        reader = reader_of(file)
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:  # the only exception type of SimpleITK
            raise unreadable(file, error) from None
        yield file
        instance = header_text(reader, INSTANCE)
        first = (
            firsts.setdefault((header_text(reader, SERIES), instance), file) if instance else file
        )
        if first is not file:
            if filecmp.cmp(first, file, shallow=False):
                continue
            raise VolumeError(
                f"{file}: has the same SOP Instance UID as {first.name}, {instance}, but a "
                "different image; move one of them away"
            )
        told = tuple(header_text(reader, key) for key in (SERIES_DESCRIPTION, MODALITY))
        about = tuple(header_text(reader, key) for key in (STUDY, PATIENT, FRAME_OF_REFERENCE))
        _, slices = found.setdefault(header_text(reader, SERIES), ((*told, *about), []))
        slices += slices_in(file, reader)
    if not found:
        raise VolumeError(
            f"{folder}: expected the DICOM files of a series, found none; check the path"
        )
    return tuple(
        Series(folder, uid, description, modality, tuple(slices), *about)
        for uid, ((description, modality, *about), slices) in sorted(found.items())
    )


def choose_series(folder: Path, uid: str | None = None) -> Series:
    """The series with this UID, or the only series.

    Args:
        folder: a folder of DICOM files.
        uid: the Series Instance UID; None if the folder holds only one series.

    Raises:
        VolumeError: there is no such series, or several; the message lists them.
    """
    found = list_series(folder)
    chosen = [series for series in found if uid in (None, series.uid)]
    if len(chosen) == 1:
        return chosen[0]
    listing = "; ".join(map(str, found))
    if chosen:
        raise VolumeError(
            f"{folder}: holds {len(found)} series; pass the UID of one as --series: {listing}"
        )
    raise VolumeError(f"{folder}: expected the series {uid}, found only {listing}; check --series")


def _files_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise VolumeError(
            f"{folder}: expected a folder of DICOM files, found no folder; check the path"
        )
    return sorted(
        file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")
    )
