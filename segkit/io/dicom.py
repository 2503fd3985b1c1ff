"""DICOM series: the images of one series in a folder, read as a volume.

A series is named by its folder or, if the folder holds several, by any of its files. An image is a
file, or a frame of an enhanced file of several frames (`dicom_frames`).

The position of each slice is read from its own header. So a missing slice, two slices at the same
position, or a rotated slice is an error and is never stacked. A tilted gantry shears the slices
against their rows and columns: the affine is exact. Values are rescaled by each header, so CT
values are in HU.
"""

import filecmp
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from segkit.errors import VolumeError
from segkit.geometry.grid import LPS_TO_RAS, Grid
from segkit.io.dicom_frames import Frame, frame_values, frames_of, surplus_of_frames
from segkit.io.dicom_pixels import surplus_of_pixels
from segkit.io.gridded import Volume
from segkit.io.itk import simple_itk
from segkit.io.kept import kept_while_unchanged
from segkit.io.voxel_bytes import refuse_beyond_memory

logger = logging.getLogger(__name__)

MAGIC = b"DICM"
MAGIC_AT = 128
SUFFIX = ".dcm"
UNEVEN = 0.01
"""Allowed deviation of a slice from even spacing, as a fraction of the slice distance."""
ROUNDING = 0.02
"""Deviation in mm that is always allowed, because positions are written with few decimals."""
SERIES, DESCRIPTION, MODALITY = "0020|000e", "0008|103e", "0008|0060"
STUDY, PATIENT, FRAME_OF_REFERENCE = "0020|000d", "0010|0020", "0020|0052"
INSTANCE = "0008|0018"
POSITION, ORIENTATION, SPACING = "0020|0032", "0020|0037", "0028|0030"
THICKNESS = "0018|0050"
MOST_BYTES_OF_PIXEL = 4
"""Largest size of a rescaled value in memory."""
STORAGE_CLASS = b"\x02\0\x02\0UI"
"""Bytes near the start of a file that come before the length and the text of its storage class."""
STORAGE = "1.2.840.10008.5.1.4.1.1."
ENHANCED = tuple(f"{STORAGE}{kind}" for kind in ("2.1", "2.2", "4.1", "4.4", "128.1", "130"))
"""Storage classes of enhanced CT, MR and PET: each frame has its own position."""
CONTOURS, SEGMENTATIONS = f"{STORAGE}481.3", (f"{STORAGE}66.4", f"{STORAGE}66.7")
"""Storage classes of structure sets, and of segmentations."""
SLICES_KEPT = 250_000
"""Most slices whose headers are not read again while their files stay as they are."""
FILES_KEPT = 2**16
"""Most files whose storage class is not read again."""
BITS = "0028|0100"
NO_IMAGES = (
    "1.2.840.10008.1.3.10",  # a DICOMDIR
    # Waveforms, presentations, segmentations and registrations, reports, documents, therapy.
    *(f"{STORAGE}{group}" for group in ("9.", "11.", "66", "88.", "104.", "481.3", "481.5")),
)
"""Prefixes of storage classes that refer to images but are not images."""


@dataclass(frozen=True, eq=False, slots=True)
class Slice:
    """The header of one image; lengths are in mm, positions in DICOM's LPS+."""

    path: Path
    size: tuple[int, ...]
    """Columns, rows and frames."""
    components: int
    kind: int
    """SimpleITK's number for the type of its rescaled values."""
    position: tuple[float, ...]
    """Position of the first pixel; empty if the header does not give it."""
    orientation: tuple[float, ...]
    """Direction of the rows, then of the columns: six numbers."""
    spacing: tuple[float, ...]
    """Distance between rows, then between columns."""
    thickness: float
    frame: int | None = None
    """The number of the frame from 0 on; None if the file holds one image."""

    def __str__(self) -> str:
        return str(self.path) if self.frame is None else f"{self.path} frame {self.frame + 1}"

    @property
    def name(self) -> str:
        """Its name within the folder, for messages about two slices."""
        return str(self).removeprefix(f"{self.path.parent}{os.sep}")


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
    return any(_is_image(file) for file in _files_in(folder))


def is_dicom(path: Path) -> bool:
    """Whether a path is a folder of DICOM images, or a DICOM file of any kind."""
    if path.is_dir():
        return holds_series(path)
    return path.is_file() and storage_class(path) is not None


def holds_frames(file: Path) -> bool:
    """Whether a DICOM file holds several frames; False if it cannot be read."""
    reader = _reader(file)
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # what SimpleITK raises for everything
        return False
    return int((*reader.GetSize(), 1)[2]) > 1


def is_only_image(file: Path) -> bool:
    """Whether a file is the only DICOM image in its folder."""
    return not any(other != file and _is_image(other) for other in _files_in(file.parent))


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
        if not _is_image(file):
            continue
        reader = _reader(file)
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:  # the only exception type of SimpleITK
            raise _unreadable(file, error) from None
        yield file
        instance = _text(reader, INSTANCE)
        first = firsts.setdefault((_text(reader, SERIES), instance), file) if instance else file
        if first is not file:
            if filecmp.cmp(first, file, shallow=False):
                continue
            raise VolumeError(
                f"{file}: has the same SOP Instance UID as {first.name}, {instance}, but a "
                "different image; move one of them away"
            )
        told = tuple(_text(reader, key) for key in (DESCRIPTION, MODALITY))
        about = tuple(_text(reader, key) for key in (STUDY, PATIENT, FRAME_OF_REFERENCE))
        _, slices = found.setdefault(_text(reader, SERIES), ((*told, *about), []))
        slices += _slices(file, reader)
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


def read_series(series: Series, *, working: float = 0) -> Volume:
    """The volume of a series, (column, row, slice), with slices in the direction of their normal.

    Values keep an integer type if rescaling gives integers in every slice; otherwise they become
    float32.

    Args:
        series: the series, as `choose_series` returns it.
        working: bytes per voxel that the caller will need in addition to the values.

    Raises:
        VolumeError: the slices do not form one even block of grey values, a file is damaged, or the
            volume and the caller's work on it do not fit into free memory.
    """
    slices, grid = arranged(series)
    try:
        refuse_beyond_memory(grid.shape, 0, working=MOST_BYTES_OF_PIXEL + working)
    except VolumeError as error:
        raise VolumeError(f"{series.folder}: {error}") from None
    data = _filled(slices, grid.shape)
    return Volume(data, grid)


def _filled(slices: Sequence[Slice], shape: tuple[int, int, int]) -> ndarray:
    """The values of all slices in one array; of an integer type if rescaling gives integers."""
    places = {(one.path, one.frame): number for number, one in enumerate(slices)}
    files = {one.path: one for one in slices}
    one_kind = len({one.kind for one in slices}) == 1
    data, longer = np.empty(0), list[str]()
    for path, one in files.items():
        for frame, values in _values_in(one, longer):
            if not data.size:
                whole = values.dtype.kind in "iu" and one_kind
                data = np.empty(shape, values.dtype if whole else np.float32, order="F")
            data[:, :, places[path, frame]] = values
    if longer:
        logger.warning(
            "%s: %d of %d files hold more pixels than their header says; these are ignored",
            *(longer[0], len(longer), len(files)),
        )
    return data


def _values_in(one: Slice, longer: list[str]) -> Iterator[tuple[int | None, ndarray]]:
    """The rescaled values (column, row) of each frame of a slice's file, with its number if any.

    Names of files that hold more pixels than their header says are added to `longer`.
    """
    if one.frame is None:
        values, surplus = _pixels(one)
        yield None, values
    else:
        surplus = surplus_of_frames(one.path)
        yield from frame_values(one.path)
    if surplus:
        longer.append(str(one.path))


def _pixels(one: Slice) -> tuple[ndarray, int]:
    """The rescaled values of a slice (column, row), and the bytes of pixels beyond its size."""
    reader = _reader(one.path)
    try:
        reader.ReadImageInformation()
        bits = _values(one.path, reader, BITS)
        size = math.prod(one.size) * one.components * int(bits[0] if bits else 0)
        surplus = surplus_of_pixels(one.path, math.ceil(size / 8)) if size else 0
        image = reader.Execute()
    except RuntimeError as error:  # the only exception type of SimpleITK
        raise _unreadable(one.path, error) from None
    values: ndarray = simple_itk().GetArrayFromImage(image)
    return values.reshape(one.size[1::-1]).T, surplus


def arranged(series: Series) -> tuple[list[Slice], Grid]:
    """The slices sorted along their normal, and their grid (RAS+).

    Raises:
        VolumeError: the slices do not form a block.
    """
    first = series.slices[0]
    for one in series.slices:
        _check_single(one)
    for one in series.slices:
        for name in ("size", "orientation", "spacing"):
            own, other = np.array(getattr(one, name)), np.array(getattr(first, name))
            if not np.allclose(own, other, rtol=0, atol=1e-4):
                raise VolumeError(
                    f"{one}: expected the {name} {_numbers(other)} of {first.name} in "
                    f"the same series, found {_numbers(own)}; split the series"
                )
    along, down = np.array(first.orientation).reshape(2, 3)
    normal = np.cross(along, down)
    slices = sorted(series.slices, key=lambda one: float(normal @ one.position))
    places = np.array([one.position for one in slices])
    if len(slices) == 1:
        step = normal * (first.thickness or 1.0)
    else:
        step = (places[-1] - places[0]) / (len(slices) - 1)
        _check_even(slices, places, normal)
    affine = np.eye(4)
    affine[:3, 0] = along * first.spacing[1]
    affine[:3, 1] = down * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = places[0]
    columns, rows = first.size[:2]
    return slices, Grid((columns, rows, len(slices)), LPS_TO_RAS @ affine)


def _check_single(one: Slice) -> None:
    if one.size[2] > 1:
        raise VolumeError(
            f"{one.path}: expected one slice in a file, found {one.size[2]} frames without "
            f"their positions; convert it to NIfTI first, for example with dcm2niix"
        )
    if one.components != 1:
        raise VolumeError(
            f"{one}: expected one grey value per pixel, found {one.components} values; "
            f"convert it to grey, or choose another series"
        )
    if (len(one.position), len(one.orientation), len(one.spacing)) != (3, 6, 2):
        raise VolumeError(
            f"{one}: lacks Image Position (Patient), Image Orientation (Patient) or Pixel "
            f"Spacing, so its place in the volume is unknown; move it away, or repair its header"
        )
    along, down = np.array(one.orientation).reshape(2, 3)
    lengths = [np.linalg.norm(along), np.linalg.norm(down), 1 + along @ down]
    if not np.allclose(lengths, 1, atol=1e-3) or min(one.spacing) <= 0:
        raise VolumeError(
            f"{one}: expected rows and columns at right angles and pixels larger than 0, "
            f"found directions {_numbers(one.orientation)} and {_numbers(one.spacing)} mm; repair "
            f"its header"
        )


def _check_even(slices: Sequence[Slice], places: ndarray, normal: ndarray) -> None:
    distances = np.diff(places @ normal)
    for (one, other), distance in zip(pairwise(slices), distances, strict=True):
        if distance < ROUNDING:
            raise VolumeError(
                f"{one}: lies at the same position as {other.name}; split the series, "
                f"so that each position occurs once"
            )
    usual = float(np.median(distances))
    even = places[0] + np.outer(np.arange(len(slices)), places[-1] - places[0]) / (len(slices) - 1)
    off = np.linalg.norm(places - even, axis=1)
    if off.max() <= max(UNEVEN * usual, ROUNDING):
        return
    worst = int(np.argmax(np.abs(distances - usual)))
    raise VolumeError(
        f"{slices[worst]}: the next slice, {slices[worst + 1].name}, is "
        f"{distances[worst]:.3g} mm away, but others are {usual:.3g} mm apart; complete the series "
        f"or resample it first"
    )


def _files_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise VolumeError(
            f"{folder}: expected a folder of DICOM files, found no folder; check the path"
        )
    return sorted(
        file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")
    )


@kept_while_unchanged(FILES_KEPT)
def storage_class(file: Path) -> str | None:
    """The storage class of a DICOM file; '' if the file does not give it; None for any other file.

    The first bytes or the name show that a file is DICOM.
    """
    with file.open("rb") as content:
        begin = content.read(2 * MAGIC_AT + 256)
    if begin[MAGIC_AT : MAGIC_AT + len(MAGIC)] != MAGIC:
        return "" if file.name.lower().endswith(SUFFIX) else None
    _, _, rest = begin.partition(STORAGE_CLASS)
    length = int.from_bytes(rest[:2], "little")
    return rest[2 : 2 + length].decode("ascii", "replace").strip("\0 ")


def _is_image(file: Path) -> bool:
    """Whether a file is DICOM and its storage class may be an image."""
    found = storage_class(file)
    return found is not None and not found.startswith(NO_IMAGES)


def _unreadable(file: Path, error: RuntimeError) -> VolumeError:
    # SimpleITK's message begins with a place in its own source; the reason follows "ERROR:".
    reason = " ".join(str(error).split("ERROR:")[-1].split())
    return VolumeError(
        f"{file}: cannot be read as DICOM: {reason}; export the file again, or move it elsewhere"
    )


def _reader(file: Path) -> Any:
    reader = simple_itk().ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    return reader


def _slices(file: Path, reader: Any) -> list[Slice]:
    """The slice in a file, or the slices of all frames of an enhanced file."""
    columns, rows, count = (*reader.GetSize(), 1)[:3]
    components = reader.GetNumberOfComponents()
    position = _values(file, reader, POSITION)
    enhanced = count > 1 or (not position and storage_class(file) in ENHANCED)
    if enhanced and (frames := frames_of(file)):
        kind = int(all(frame.is_whole for frame in frames))
        return [
            Slice(file, (columns, rows, 1), components, kind, *_placed(frame), number)
            for number, frame in enumerate(frames)
        ]
    thickness = _values(file, reader, THICKNESS)
    one = Slice(
        file,
        (columns, rows, count),
        components,
        reader.GetPixelIDValue(),
        position,
        _values(file, reader, ORIENTATION),
        _values(file, reader, SPACING),
        thickness[0] if thickness else 0.0,
    )
    return [one]


def _placed(frame: Frame) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], float]:
    return frame.position, frame.orientation, frame.spacing, frame.thickness


def _text(reader: Any, key: str) -> str:
    """Text of a header field; question marks replace characters that are not valid Unicode."""
    if not reader.HasMetaDataKey(key):
        return ""
    text: str = reader.GetMetaData(key)
    return text.encode("utf-8", "replace").decode().strip("\0 ")


def _values(file: Path, reader: Any, key: str) -> tuple[float, ...]:
    text = _text(reader, key)
    try:
        values = tuple(float(part) for part in text.split("\\")) if text else ()
    except ValueError:
        values = (float("nan"),)
    if not np.isfinite(values).all():
        raise VolumeError(
            f"{file}: expected numbers in its header field ({key}), found {text!r}; export the "
            f"file again"
        )
    return values


def _numbers(values: Sequence[float] | ndarray) -> str:
    return " x ".join(f"{value:g}" for value in values)
