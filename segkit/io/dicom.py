"""DICOM series: the single-frame images of one series in a folder, put together as a volume.

Nothing is taken for granted about them: where a slice lies is read from its own header, so that a
missing slice, a second one at the same place or one that is turned is told rather than stacked.
Slices may be sheared against their rows and columns, as of a tilted gantry: the affine is exact.
Values are rescaled as their headers say: CT comes out in HU.
"""

import filecmp
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from segkit.errors import VolumeError
from segkit.geometry.grid import Grid
from segkit.io.volume import LPS_TO_RAS, SUFFIXES, Volume, simple_itk
from segkit.io.voxel_bytes import refuse_beyond_memory

MAGIC = b"DICM"
MAGIC_AT = 128
SUFFIX = ".dcm"
UNEVEN = 0.01
"""The share of a slice's distance by which it may lie off its place in an even series."""
ROUNDING = 0.02
"""Millimetres by which it may lie off in any case: positions are written with few decimals."""
SERIES, DESCRIPTION, MODALITY = "0020|000e", "0008|103e", "0008|0060"
INSTANCE = "0008|0018"
POSITION, ORIENTATION, SPACING = "0020|0032", "0020|0037", "0028|0030"
THICKNESS = "0018|0050"
MOST_BYTES_OF_PIXEL = 4
"""Of rescaled values as they are held."""
STORAGE_CLASS = b"\x02\0\x02\0UI"
"""Before its length and itself, in the first bytes of a file."""
STORAGE = "1.2.840.10008.5.1.4.1.1."
NO_IMAGES = (
    "1.2.840.10008.1.3.10",  # a DICOMDIR
    # Waveforms, presentations, segmentations and registrations, reports, documents, therapy.
    *(f"{STORAGE}{group}" for group in ("9.", "11.", "66", "88.", "104.", "481.3", "481.5")),
)
"""The beginnings of storage classes that are about images, and none."""


@dataclass(frozen=True, eq=False)
class Slice:
    """What the header of one image says; lengths are mm, places DICOM's LPS+."""

    path: Path
    size: tuple[int, ...]
    """Columns, rows and frames."""
    components: int
    kind: int
    """SimpleITK's number for the type of its rescaled values."""
    position: tuple[float, ...]
    """Of the first pixel; empty where the header does not say."""
    orientation: tuple[float, ...]
    """Of a row and of a column."""
    spacing: tuple[float, ...]
    """Between rows, and between columns."""
    thickness: float


@dataclass(frozen=True, eq=False)
class Series:
    """The images of one series, in the order of their file names."""

    folder: Path
    uid: str
    description: str
    modality: str
    slices: tuple[Slice, ...]

    def __str__(self) -> str:
        count = f"{len(self.slices)} slice{'s' * (len(self.slices) > 1)}"
        return f"{self.uid} ({self.description or 'no description'}, {self.modality}, {count})"


def holds_series(folder: Path) -> bool:
    """Whether a folder holds DICOM images, whatever else there is."""
    return any(
        _is_image(file) for file in _files_in(folder) if not file.name.lower().endswith(SUFFIXES)
    )


def list_series(folder: Path) -> list[Series]:
    """The series in a folder, in the order of their UIDs; folders in it are not looked into.

    What is about images rather than one, such as a segmentation, is passed over, and so are copies
    of an image: files of the same bytes. Raises VolumeError if there is no image, for one that
    cannot be read, without which the rest might look whole, and for two of one SOP Instance UID
    that differ.
    """
    found: dict[str, tuple[str, str, list[Slice]]] = {}
    firsts: dict[tuple[str, str], Path] = {}
    for file in _files_in(folder):
        if not _is_image(file):
            continue
        reader = _reader(file)
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:  # what SimpleITK raises for everything
            raise _unreadable(file, error) from None
        instance = _text(reader, INSTANCE)
        first = firsts.setdefault((_text(reader, SERIES), instance), file) if instance else file
        if first is not file:
            if filecmp.cmp(first, file, shallow=False):
                continue
            raise VolumeError(
                f"{file}: is another image than {first.name}, although both say that they are the "
                f"one with the SOP Instance UID {instance}; move one away"
            )
        told = (_text(reader, DESCRIPTION), _text(reader, MODALITY))
        _, _, slices = found.setdefault(_text(reader, SERIES), (*told, []))
        slices.append(_slice(file, reader))
    if not found:
        raise VolumeError(f"{folder}: expected the DICOM files of a series in it, found none")
    return [
        Series(folder, uid, description, modality, tuple(slices))
        for uid, (description, modality, slices) in sorted(found.items())
    ]


def choose_series(folder: Path, uid: str | None = None) -> Series:
    """The series of that UID, or the only one. Raises VolumeError that lists those there are."""
    found = list_series(folder)
    chosen = [series for series in found if uid in (None, series.uid)]
    if len(chosen) == 1:
        return chosen[0]
    listing = "; ".join(map(str, found))
    if chosen:
        raise VolumeError(
            f"{folder}: holds {len(found)} series, give the UID of one as --series: {listing}"
        )
    raise VolumeError(f"{folder}: holds no series {uid}, but {listing}")


def read_series(series: Series, *, working: float = 0) -> Volume:
    """The volume of a series: columns, rows and slices, in the direction of their normal.

    Whole numbers stay whole if every slice is rescaled to such; else they become float32.

    Args:
        series: as `choose_series` gives it.
        working: bytes for each voxel that the caller will need beside the values.

    Raises:
        VolumeError: the slices do not make one even block of grey values, a file is damaged, or the
            volume and what will be made of it do not fit into free memory.
    """
    slices, grid = arranged(series)
    try:
        refuse_beyond_memory(grid.shape, 0, working=MOST_BYTES_OF_PIXEL + working)
    except VolumeError as error:
        raise VolumeError(f"{series.folder}: {error}") from None
    first = _pixels(slices[0])
    whole = first.dtype.kind in "iu" and len({one.kind for one in slices}) == 1
    data = np.empty(grid.shape, first.dtype if whole else np.float32, order="F")
    data[:, :, 0] = first
    for number, one in enumerate(slices[1:], start=1):
        data[:, :, number] = _pixels(one)
    return Volume(data, grid)


def _pixels(one: Slice) -> ndarray:
    """The rescaled values of a slice (column, row)."""
    try:
        image = _reader(one.path).Execute()
    except RuntimeError as error:  # what SimpleITK raises for everything
        raise _unreadable(one.path, error) from None
    values: ndarray = simple_itk().GetArrayFromImage(image)
    return values.reshape(one.size[1::-1]).T


def arranged(series: Series) -> tuple[list[Slice], Grid]:
    """The slices in the direction of their normal, and the grid (RAS+) that they make.

    Raises VolumeError, in one sentence, where they make none.
    """
    first = series.slices[0]
    for one in series.slices:
        _check_single(one)
    for one in series.slices:
        for what in ("size", "orientation", "spacing"):
            own, other = np.array(getattr(one, what)), np.array(getattr(first, what))
            if not np.allclose(own, other, rtol=0, atol=1e-4):
                raise VolumeError(
                    f"{one.path}: its {what} {_numbers(own)} is not {_numbers(other)}, that of "
                    f"{first.path.name} in the same series; split the series"
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
            f"{one.path}: holds {one.size[2]} frames where a slice to a file is expected; convert "
            f"it to NIfTI first, with dcm2niix say"
        )
    if one.components != 1:
        raise VolumeError(f"{one.path}: expected grey values, found {one.components} colours")
    if (len(one.position), len(one.orientation), len(one.spacing)) != (3, 6, 2):
        raise VolumeError(
            f"{one.path}: does not say where it lies: it lacks Image Position (Patient), Image "
            f"Orientation (Patient) or Pixel Spacing, so that it is no slice of a volume"
        )
    along, down = np.array(one.orientation).reshape(2, 3)
    lengths = [np.linalg.norm(along), np.linalg.norm(down), 1 + along @ down]
    if not np.allclose(lengths, 1, atol=1e-3) or min(one.spacing) <= 0:
        raise VolumeError(
            f"{one.path}: its rows and columns must be at right angles and its pixels larger than "
            f"0, found directions {_numbers(one.orientation)} and {_numbers(one.spacing)} mm"
        )


def _check_even(slices: Sequence[Slice], places: ndarray, normal: ndarray) -> None:
    distances = np.diff(places @ normal)
    for (one, other), distance in zip(pairwise(slices), distances, strict=True):
        if distance < ROUNDING:
            raise VolumeError(
                f"{one.path}: lies where {other.path.name} lies; the series holds several images "
                f"of one place, so split it"
            )
    usual = float(np.median(distances))
    even = places[0] + np.outer(np.arange(len(slices)), places[-1] - places[0]) / (len(slices) - 1)
    off = np.linalg.norm(places - even, axis=1)
    if off.max() <= max(UNEVEN * usual, ROUNDING):
        return
    worst = int(np.argmax(np.abs(distances - usual)))
    raise VolumeError(
        f"{slices[worst].path}: the next slice, {slices[worst + 1].path.name}, is "
        f"{distances[worst]:.3g} mm away where others are {usual:.3g} mm apart; complete the "
        f"series or resample it first"
    )


def _files_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise VolumeError(f"{folder}: expected a folder of DICOM files, found none; check the path")
    return sorted(
        file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")
    )


def _is_image(file: Path) -> bool:
    """Whether a file is DICOM, by its first bytes or its name, and says that it is an image."""
    with file.open("rb") as content:
        begin = content.read(2 * MAGIC_AT + 256)
    if begin[MAGIC_AT : MAGIC_AT + len(MAGIC)] != MAGIC:
        return file.name.lower().endswith(SUFFIX)
    _, _, rest = begin.partition(STORAGE_CLASS)
    length = int.from_bytes(rest[:2], "little")
    return not rest[2 : 2 + length].decode("ascii", "replace").startswith(NO_IMAGES)


def _unreadable(file: Path, error: RuntimeError) -> VolumeError:
    # SimpleITK says where in its own source it went wrong before it says what.
    reason = " ".join(str(error).split("ERROR:")[-1].split())
    return VolumeError(f"{file}: cannot be read as DICOM, repair it or move it away: {reason}")


def _reader(file: Path) -> Any:
    reader = simple_itk().ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    return reader


def _slice(file: Path, reader: Any) -> Slice:
    size = reader.GetSize()
    thickness = _values(file, reader, THICKNESS)
    return Slice(
        file,
        (*size, 1)[:3],
        reader.GetNumberOfComponents(),
        reader.GetPixelIDValue(),
        _values(file, reader, POSITION),
        _values(file, reader, ORIENTATION),
        _values(file, reader, SPACING),
        thickness[0] if thickness else 0.0,
    )


def _text(reader: Any, key: str) -> str:
    """A header's text; what is no Unicode becomes question marks."""
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
        raise VolumeError(f"{file}: expected numbers in its header at ({key}), found {text!r}")
    return values


def _numbers(values: Sequence[float] | ndarray) -> str:
    return " x ".join(f"{value:g}" for value in values)
