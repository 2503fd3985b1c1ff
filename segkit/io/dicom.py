"""Volumes from DICOM series.

The position of each slice is read from its own header. So a missing slice, two slices at the same
position, or a rotated slice is an error and is never stacked. A tilted gantry shears the slices
against their rows and columns: the affine is exact. Values are rescaled by each header, so CT
values are in HU.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy import ndarray

from segkit.errors import VolumeError
from segkit.geometry.grid import LPS_TO_RAS, Grid
from segkit.io.dicom_frames import frame_values, surplus_of_frames
from segkit.io.dicom_headers import BITS, Slice, header_numbers, reader_of, unreadable
from segkit.io.dicom_listing import Series
from segkit.io.dicom_pixels import surplus_of_pixels
from segkit.io.gridded import Volume
from segkit.io.itk import simple_itk
from segkit.io.voxel_bytes import refuse_beyond_memory

logger = logging.getLogger(__name__)

UNEVEN = 0.01
"""Allowed deviation of a slice from even spacing, as a fraction of the slice distance."""
ROUNDING = 0.02
"""Deviation in mm that is always allowed, because positions are written with few decimals."""
MOST_BYTES_OF_PIXEL = 4
"""Largest size of a rescaled value in memory."""


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
    reader = reader_of(one.path)
    try:
        reader.ReadImageInformation()
        bits = header_numbers(one.path, reader, BITS)
        size = math.prod(one.size) * one.components * int(bits[0] if bits else 0)
        surplus = surplus_of_pixels(one.path, math.ceil(size / 8)) if size else 0
        image = reader.Execute()
    except RuntimeError as error:  # the only exception type of SimpleITK
        raise unreadable(one.path, error) from None
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


def _numbers(values: Sequence[float] | ndarray) -> str:
    return " x ".join(f"{value:g}" for value in values)
