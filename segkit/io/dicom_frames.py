"""The frames of an enhanced DICOM file: where each lies, how it is rescaled, and its values.

A file of CT, MR or PET in the enhanced form holds all slices. Each frame says where it lies and how
its values are rescaled, or the file says so for all of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from segkit.errors import SegkitError, VolumeError
from segkit.io.dicom_pixels import surplus_of_pixels

SIZE_OF_PIXELS = ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "BitsAllocated")


@dataclass(frozen=True)
class Frame:
    """What a file says of one frame; lengths are mm, places DICOM's LPS+."""

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    """Between rows, and between columns."""
    thickness: float
    slope: float
    intercept: float

    @property
    def is_whole(self) -> bool:
        """Whether rescaled whole numbers stay whole."""
        return self.slope.is_integer() and self.intercept.is_integer()


def pydicom_of(path: Path) -> Any:
    """The package pydicom. Raises SegkitError, which names the file, if it is not installed."""
    try:
        import pydicom
    except ImportError:
        raise SegkitError(
            f"{path}: is read by pydicom, which is not installed; run pip install 'segkit[dicom]'"
        ) from None
    return pydicom


def read_header(path: Path, *, pixels: bool = False, only: Sequence[str] = ()) -> Any:
    """What a DICOM file says, as pydicom has it: all, or only some keywords; without its pixels.

    Raises VolumeError for a file that is damaged.
    """
    pydicom = pydicom_of(path)
    try:
        header = pydicom.dcmread(
            path, stop_before_pixels=not pixels, force=True, specific_tags=list(only) or None
        )
    except (OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise damaged(path, error) from None
    if "SOPClassUID" not in header:
        raise damaged(path, ValueError("it does not say what kind of object it is"))
    return header


def damaged(path: Path, error: Exception) -> VolumeError:
    """What is said of a DICOM file that pydicom cannot make anything of."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return VolumeError(f"{path}: cannot be read as DICOM, repair it or move it away: {reason}")


def frames_of(path: Path) -> list[Frame]:
    """The frames of an enhanced file, in their order; none if it does not say where they lie.

    Raises VolumeError for a file that is damaged, SegkitError if pydicom is not installed.
    """
    header = read_header(path)
    each = header.get("PerFrameFunctionalGroupsSequence")
    if not each:
        return []
    shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
    try:
        frames = [_frame(one, shared, header) for one in each]
    except (ValueError, TypeError) as error:
        raise damaged(path, error) from None
    if len(frames) != int(header.get("NumberOfFrames") or 1):
        raise VolumeError(
            f"{path}: says that it holds {header.get('NumberOfFrames')} frames and where "
            f"{len(frames)} lie; repair it"
        )
    return frames


def frame_values(path: Path) -> Iterator[tuple[int, ndarray]]:
    """The number of each frame of an enhanced file and its rescaled values (column, row).

    Raises VolumeError for a file that is damaged, or compressed in a way that is not known here.
    """
    frames = frames_of(path)
    pydicom = pydicom_of(path)
    try:
        for number, stored in enumerate(pydicom.pixels.iter_pixels(path)):
            yield number, _rescaled(stored.T, frames[number])
    except (OSError, EOFError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise VolumeError(
            f"{path}: its frames cannot be decoded; decompress it, with dcmdjpls or gdcmconv say, "
            f"or convert it to NIfTI: {reason}"
        ) from None


def surplus_of_frames(path: Path) -> int:
    """Bytes of pixels in an enhanced file beyond those of its frames. Raises VolumeError."""
    header = read_header(path, only=("SOPClassUID", *SIZE_OF_PIXELS))
    told = [int(header.get(name) or 1) for name in SIZE_OF_PIXELS]
    return surplus_of_pixels(path, math.ceil(math.prod(told) / 8))


def _rescaled(stored: ndarray, frame: Frame) -> ndarray:
    if frame.is_whole:
        return stored.astype(np.int32) * int(frame.slope) + int(frame.intercept)
    return (stored * frame.slope + frame.intercept).astype(np.float32)


def group_of(own: Any, shared: Any, name: str) -> Any:
    """A functional group of a frame: its own, or else that of all frames; None if it has none."""
    for groups in (own, shared):
        if groups is not None and groups.get(name):
            return groups.get(name)[0]
    return None


def _frame(own: Any, shared: Any, header: Any) -> Frame:
    def numbers(group: str, key: str) -> tuple[float, ...]:
        found = group_of(own, shared, group)
        value = None if found is None else found.get(key)
        if value is None:
            return ()
        return tuple(map(float, value)) if np.iterable(value) else (float(value),)

    def rescaling(key: str, otherwise: float) -> float:
        found = numbers("PixelValueTransformationSequence", key)
        return found[0] if found else float(header.get(key, otherwise))

    frame = Frame(
        numbers("PlanePositionSequence", "ImagePositionPatient"),
        numbers("PlaneOrientationSequence", "ImageOrientationPatient"),
        numbers("PixelMeasuresSequence", "PixelSpacing"),
        next(iter(numbers("PixelMeasuresSequence", "SliceThickness")), 0.0),
        rescaling("RescaleSlope", 1.0),
        rescaling("RescaleIntercept", 0.0),
    )
    told = (*frame.position, *frame.orientation, *frame.spacing, frame.slope, frame.intercept)
    if not np.isfinite(told).all():
        raise ValueError("a frame's place or scale is not a number")
    return frame
