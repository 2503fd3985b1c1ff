"""DICOM segmentations (SEG) as labels on the grid of their series.

A segmentation has frames at positions in the world. A frame of the type BINARY or FRACTIONAL is the
mask of one segment. A frame of the type LABELMAP has the numbers of all segments, as its pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from segkit.errors import SegkitError, VolumeError, first_few
from segkit.geometry.grid import LPS_TO_RAS, Grid
from segkit.io.dicom_frames import damaged, group_of

LABELMAP, FRACTIONAL = "LABELMAP", "FRACTIONAL"
SEGMENTATION_TYPES = ("BINARY", FRACTIONAL, LABELMAP)
OFF_VOXEL = 0.25
"""The largest distance of a pixel from its voxel, in voxels."""
BACKGROUND_CODE = ("125040", "DCM")
"""The property type of a segment that is the background of a LABELMAP."""
DAMAGES = (ValueError, AttributeError, KeyError, IndexError, TypeError, RuntimeError)
"""Errors of highdicom and pydicom if a file is damaged."""


def named_segments(header: Any) -> list[tuple[int, str]]:
    """The number and the label of each segment, in order.

    A LABELMAP may describe its background as a segment. It is left out, because nobody outlined it.

    Args:
        header: the header of a segmentation.
    """
    found = []
    is_map = header.get("SegmentationType") == LABELMAP
    padding = header.get("PixelPaddingValue")
    for segment in header.get("SegmentSequence") or []:
        number = int(segment.get("SegmentNumber") or 0)
        kinds = segment.get("SegmentedPropertyTypeCodeSequence") or [{}]
        code = (kinds[0].get("CodeValue"), kinds[0].get("CodingSchemeDesignator"))
        if not is_map or (number != padding and code != BACKGROUND_CODE):
            found.append((number, str(segment.get("SegmentLabel") or "")))
    return found


def paint_segments(
    path: Path,
    header: Any,
    chosen: Mapping[str, Sequence[int]],
    numbers: Mapping[str, int],
    grid: Grid,
    labels: ndarray,
) -> None:
    """Paint the segments of a segmentation into labels (x, y, z).

    Args:
        path: the file, for messages.
        header: its header with the pixels.
        chosen: for each class, the indices of its segments in `named_segments`, in the order of
            painting.
        numbers: the number of each class in the labels.
        grid: the grid of the labels, in RAS+.
        labels: the labels, which are changed.

    Raises:
        VolumeError: the file is damaged, has an unknown type, or lies on another grid.
        SegkitError: highdicom is not installed.
    """
    _check_header(path, header)
    segments = named_segments(header)
    owners = [(*segments[place], numbers[name]) for name in chosen for place in chosen[name]]
    opened = _opened(path, header)
    if header.SegmentationType == LABELMAP:
        painted = {segment: (label, number) for segment, label, number in owners}
        known = _described(header) | {0, header.get("PixelPaddingValue")}
        for stored, affine in _frames(path, opened):
            held = set(np.unique(stored).tolist())
            _refuse_unknown(path, held - known)
            for segment in sorted(painted.keys() & held):
                label, number = painted[segment]
                _stamp(path, label, stored == segment, affine, grid, labels, number)
        return
    try:
        shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
        shown = {_segment_of(own, shared) for own in header.PerFrameFunctionalGroupsSequence}
    except DAMAGES as error:
        raise damaged(path, error) from None
    _refuse_unknown(path, shown - _described(header))
    highest = int(header.MaximumFractionalValue) if header.SegmentationType == FRACTIONAL else 1
    for segment, label, number in owners:
        for stored, affine in _frames(path, opened, segment):
            inside = 2 * stored.astype(int) >= highest
            if inside.any():
                _stamp(path, label, inside, affine, grid, labels, number)


def _check_header(path: Path, header: Any) -> None:
    """Refuse files that would be read wrongly. Raises VolumeError."""
    told = str(header.get("SegmentationType") or "unknown")
    if told not in SEGMENTATION_TYPES:
        raise VolumeError(
            f"{path}: expected a segmentation of the type {', '.join(SEGMENTATION_TYPES[:-1])} or "
            f"{LABELMAP}, found {told}; export it as one of these types"
        )
    if told == FRACTIONAL and not header.get("MaximumFractionalValue"):
        raise VolumeError(
            f"{path}: expected a Maximum Fractional Value, because voxels count as inside from "
            "half of it, found none; export the file again"
        )
    each = header.get("PerFrameFunctionalGroupsSequence") or []
    if len(each) != (count := int(header.get("NumberOfFrames") or 1)):
        raise VolumeError(
            f"{path}: expected positions of {count} frames, found {len(each)}; export the file "
            f"again (segmentations of whole slides and of projections are not read)"
        )
    numbers = [number for number, _ in named_segments(header)]
    if twice := [number for number in numbers if numbers.count(number) > 1]:
        raise VolumeError(
            f"{path}: expected segments with different numbers, found {twice[0]} several times; "
            f"export the file again"
        )


def _described(header: Any) -> set[int]:
    """The numbers of all segments, that of a background included."""
    return {int(each.get("SegmentNumber") or 0) for each in header.get("SegmentSequence") or []}


def _refuse_unknown(path: Path, unknown: set[int]) -> None:
    """Raise VolumeError for numbers in frames that no segment has, as they would be background."""
    if unknown:
        raise VolumeError(
            f"{path}: expected numbers of its segments in its frames, found "
            f"{first_few(sorted(unknown))}, which no segment describes; export the file again"
        )


def _opened(path: Path, header: Any) -> Any:
    """The file as a segmentation of highdicom, which decodes frames. Raises SegkitError."""
    try:
        import highdicom
    except ImportError:
        raise SegkitError(
            f"{path}: expected highdicom, which reads segmentations, but it is not installed; run "
            f"pip install 'segkit[dicom]'"
        ) from None
    try:
        return highdicom.seg.Segmentation.from_dataset(header, copy=False)
    except DAMAGES as error:
        raise damaged(path, error) from None


def _frames(path: Path, opened: Any, segment: int | None = None) -> Iterator[tuple[ndarray, Any]]:
    """The pixels (row, column) and the matrix of each frame of one segment, or of all frames.

    Raises:
        VolumeError: the file is damaged.
    """
    try:
        shared = (opened.get("SharedFunctionalGroupsSequence") or [None])[0]
        for index, own in enumerate(opened.PerFrameFunctionalGroupsSequence):
            if segment is not None and _segment_of(own, shared) != segment:
                continue
            yield opened.get_stored_frame(index + 1), _frame_affine(own, shared)
    except DAMAGES as error:
        raise damaged(path, error) from None


def _segment_of(own: Any, shared: Any) -> int:
    """The number of the segment that a frame of the type BINARY or FRACTIONAL shows."""
    return int(group_of(own, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)


def _frame_affine(own: Any, shared: Any) -> ndarray:
    """The matrix (4, 3) from (column, row, 1) of a frame to RAS+ in mm."""
    position = group_of(own, shared, "PlanePositionSequence").ImagePositionPatient
    along = group_of(own, shared, "PlaneOrientationSequence").ImageOrientationPatient
    spacing = group_of(own, shared, "PixelMeasuresSequence").PixelSpacing
    affine = np.zeros((4, 3))
    affine[:3, 0] = np.array(along[:3], float) * float(spacing[1])
    affine[:3, 1] = np.array(along[3:], float) * float(spacing[0])
    affine[:3, 2] = np.array(position, float)
    affine[3, 2] = 1
    return LPS_TO_RAS @ affine


def _stamp(
    path: Path,
    name: str,
    inside: ndarray,
    affine: ndarray,
    grid: Grid,
    labels: ndarray,
    number: int,
) -> None:
    """Paint the pixels (row, column) of a frame into the voxels at their positions.

    Args:
        path: the file, for messages.
        name: name of the segment.
        inside: mask of the frame's pixels.
        affine: matrix from (column, row, 1) to RAS+ in mm.
        grid: the grid of the labels, in RAS+.
        labels: the labels, which are changed.
        number: the number that is painted.
    """
    rows, columns = np.nonzero(inside)
    world = np.stack([columns, rows, np.ones(len(rows))]).T @ affine[:3].T
    places = grid.index(world)
    nearest = np.rint(places).astype(int)
    off = float(np.abs(places - nearest).max())
    beyond = (nearest < 0).any() or (nearest >= grid.shape).any()
    if off > OFF_VOXEL or beyond:
        what = "outside it" if beyond else f"up to {off:.2g} voxels beside its voxels"
        raise VolumeError(
            f"{path}: segment {name} lies on another grid than the series, {what}; choose the "
            f"series that it was made from, or resample the segmentation"
        )
    labels[tuple(nearest.T)] = number
