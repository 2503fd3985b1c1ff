"""DICOM structure sets and segmentations as labels on the grid of the series that they belong to.

A structure set (RTSTRUCT) holds contours in mm, which are filled here: a voxel is inside if its
centre lies within an odd number of the contours on its slice, so that a contour in another is a
hole. A segmentation (SEG) holds masks with the place of each frame. Names of structures are brought
to classes by patterns, as they differ from patient to patient.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy import ndarray
from PIL import Image, ImageDraw

from segkit.errors import SegkitError, VolumeError, first_few
from segkit.geometry.grid import LPS_TO_RAS, Grid
from segkit.io.dicom import CONTOURS, SEGMENTATIONS, storage_class
from segkit.io.dicom_frames import damaged, group_of, read_header
from segkit.io.kept import kept_while_unchanged
from segkit.io.structure_rules import StructureRules

logger = logging.getLogger(__name__)

OFF_SLICE = 0.25
"""Slice distances that a contour may lie off its slice, and a mask's pixel off its voxel."""
FINER = 15
"""Pixels that a voxel's edge is divided into when a contour is filled; an odd number, so that one
of them lies at the voxel's centre."""
FILLED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
STRUCTURE_FILES_KEPT = 2**14
"""Most files whose names of structures are not read again."""
MOST_STRUCTURES = 20
"""Structures in a sentence."""

TOLD_BY_FILE = (
    *("SOPClassUID", "SeriesDescription", "StructureSetLabel", "Modality", "StudyInstanceUID"),
    *("StructureSetROISequence", "ReferencedFrameOfReferenceSequence"),
    *("SegmentSequence", "ReferencedSeriesSequence", "FrameOfReferenceUID"),
)
"""What is read to know a file of structures: not its contours, which may be many."""

StructureKind = Literal["contours", "segmentation"]


@dataclass(frozen=True)
class StructureFile:
    """What a structure set or a segmentation says of itself."""

    path: Path
    kind: StructureKind
    description: str
    modality: str
    names: tuple[str, ...]
    """Of its structures, in its order."""
    series: frozenset[str] = field(default_factory=frozenset)
    """The UIDs of the series that it was drawn on."""
    frames_of_reference: frozenset[str] = field(default_factory=frozenset)
    """The UIDs of the worlds that its places are in."""
    study: str = ""


def structure_kind(path: Path) -> StructureKind | None:
    """Whether a file is a DICOM structure set or a segmentation, by its first bytes."""
    if not path.is_file():
        return None
    storage = storage_class(path)
    if storage == "":  # without the part of a file that says it first
        storage = str(read_header(path).get("SOPClassUID", ""))
    if storage == CONTOURS:
        return "contours"
    return "segmentation" if storage in SEGMENTATIONS else None


@kept_while_unchanged(STRUCTURE_FILES_KEPT)
def read_structure_file(path: Path) -> StructureFile:
    """What a structure set or a segmentation says of itself, and the names of its structures.

    Raises VolumeError for a file that is damaged or neither, SegkitError if pydicom is missing.
    """
    kind = structure_kind(path)
    if kind is None:
        raise VolumeError(f"{path}: expected a DICOM structure set or segmentation, found another")
    header = read_header(path, only=TOLD_BY_FILE)
    about = (
        str(header.get("SeriesDescription") or header.get("StructureSetLabel") or "").strip(),
        str(header.get("Modality") or "").strip(),
    )
    study = str(header.get("StudyInstanceUID") or "")
    if kind == "contours":
        names = [
            str(roi.get("ROIName") or "") for roi in _listed(header, "StructureSetROISequence")
        ]
        worlds = _listed(header, "ReferencedFrameOfReferenceSequence")
        series = [
            str(one.SeriesInstanceUID)
            for world in worlds
            for within in _listed(world, "RTReferencedStudySequence")
            for one in _listed(within, "RTReferencedSeriesSequence")
            if "SeriesInstanceUID" in one
        ]
        frames = [str(world.get("FrameOfReferenceUID") or "") for world in worlds]
    else:
        names = [str(one.get("SegmentLabel") or "") for one in _listed(header, "SegmentSequence")]
        series = [
            str(one.SeriesInstanceUID)
            for one in _listed(header, "ReferencedSeriesSequence")
            if "SeriesInstanceUID" in one
        ]
        frames = [str(header.get("FrameOfReferenceUID") or "")]
    known = frozenset(frames) - {""}
    return StructureFile(path, kind, *about, tuple(names), frozenset(series), known, study)


def paint_structures(path: Path, grid: Grid, rules: StructureRules) -> ndarray:
    """The number of each voxel of a grid, (x, y, z), by the structures that a file holds.

    Classes are painted in the order of the rules: where two overlap, the later one counts.

    Args:
        path: a structure set or a segmentation.
        grid: of the series that it was drawn on, RAS+.
        rules: which structures make which class, and its number.

    Raises:
        VolumeError: the file is damaged, a class has no structure and the rules refuse that, or
            structures do not lie on the grid.
    """
    kind, header = structure_kind(path), read_header(path, pixels=True)
    names = read_structure_file(path).names
    chosen, absent = rules.chosen(names), rules.lacking(names)
    if rules.refuses(absent):
        raise VolumeError(absent_structure(path, absent, names, rules))
    highest = max(abs(number) for number in (rules.background, *rules.numbers.values()))
    signed = min(rules.background, *rules.numbers.values()) < 0
    kind_of = np.min_scalar_type(-highest if signed else highest)
    labels = np.full(grid.shape, rules.background, kind_of, order="F")
    masks = _contoured if kind == "contours" else _segmented
    for name, places in chosen.items():
        for place in places:
            masks(path, header, place, names[place], grid, labels, rules.numbers[name])
    return labels


def absent_structure(
    path: Path, absent: Sequence[str], names: Sequence[str], rules: StructureRules
) -> str:
    """A sentence on classes that none of a file's structures is of."""
    first = absent[0]
    patterns = ", ".join(rules.patterns[first])
    more = f" and {len(absent) - 1} more classes" if len(absent) > 1 else ""
    return (
        f"{path}: expected a structure called {patterns} for {first}{more}, found "
        f"{first_few(names, MOST_STRUCTURES) or 'none'}; name it in data.dicom.structures, or say "
        f"by data.dicom.absent what a case without it is"
    )


def _contoured(
    path: Path, header: Any, place: int, name: str, grid: Grid, labels: ndarray, number: int
) -> None:
    """Paint a structure of a structure set."""
    roi = _listed(header, "StructureSetROISequence")[place].get("ROINumber")
    found = [
        contour
        for one in _listed(header, "ROIContourSequence")
        if one.get("ReferencedROINumber") == roi
        for contour in _listed(one, "ContourSequence")
    ]
    slices: dict[int, ndarray] = {}
    for contour in found:
        corners = _corners(path, name, contour, grid)
        z = round(float(corners[:, 2].mean()))
        if not 0 <= z < grid.shape[2]:
            raise VolumeError(
                f"{path}: structure {name} has a contour {abs(z - (z > 0) * (grid.shape[2] - 1))} "
                f"slices beyond the series; complete the series, or name another one"
            )
        mask = slices.setdefault(z, np.zeros(grid.shape[:2], bool))
        _toggle(mask, corners[:, :2])
    for z, mask in slices.items():
        labels[..., z][mask] = number
    if slices and len(slices) < (span := max(slices) - min(slices) + 1):
        logger.warning(
            "%s: structure %s has no contour on %d of the %d slices that it spans; they stay empty",
            *(path, name, span - len(slices), span),
        )


def _corners(path: Path, name: str, contour: Any, grid: Grid) -> ndarray:
    """The corners of a closed contour, as fractional voxel indices. Raises VolumeError."""
    kind = str(contour.get("ContourGeometricType") or "")
    if kind not in FILLED:
        raise VolumeError(
            f"{path}: structure {name} has a contour of the kind {kind or 'unknown'}, expected "
            f"{FILLED[0]}; leave it out of data.dicom.structures"
        )
    try:
        points = np.array(contour.get("ContourData"), float).reshape(-1, 3)
    except (ValueError, TypeError) as error:
        raise damaged(path, error) from None
    if len(points) < 3 or not np.isfinite(points).all():
        raise VolumeError(
            f"{path}: structure {name} has a contour of {len(points)} points, expected three or "
            f"more in mm; repair it or leave it out of data.dicom.structures"
        )
    corners: ndarray = grid.index(points @ LPS_TO_RAS[:3, :3].T)
    middle = round(float(corners[:, 2].mean()))
    off = float(np.abs(corners[:, 2] - middle).max())
    if off > OFF_SLICE:
        raise VolumeError(
            f"{path}: structure {name} has a contour {off:.2g} of a slice distance off the nearest "
            f"slice; it was drawn on another series, so name that one, or resample first"
        )
    return corners


def _toggle(mask: ndarray, corners: ndarray) -> None:
    """Turn over the voxels (column, row) whose centres lie in a polygon, in voxel indices."""
    low = np.maximum(np.floor(corners.min(axis=0)), 0).astype(int)
    high = np.minimum(np.ceil(corners.max(axis=0)), np.array(mask.shape) - 1).astype(int)
    if (low > high).any():
        return
    columns, rows = (high - low + 1).tolist()
    fine = np.rint((corners - low + 0.5) * FINER - 0.5)
    drawn = Image.new("1", (columns * FINER, rows * FINER))
    ImageDraw.Draw(drawn).polygon([tuple(corner) for corner in fine.tolist()], fill=1, outline=1)
    centres = np.asarray(drawn)[FINER // 2 :: FINER, FINER // 2 :: FINER]
    mask[low[0] : high[0] + 1, low[1] : high[1] + 1] ^= centres.T


def _segmented(
    path: Path, header: Any, place: int, name: str, grid: Grid, labels: ndarray, number: int
) -> None:
    """Paint a segment of a segmentation."""
    try:
        import highdicom
    except ImportError:
        raise SegkitError(
            f"{path}: is read by highdicom, which is not installed; run pip install 'segkit[dicom]'"
        ) from None
    segment = _listed(header, "SegmentSequence")[place].get("SegmentNumber")
    try:
        segmentation = highdicom.seg.Segmentation.from_dataset(header, copy=False)
        shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
        for index, own in enumerate(header.PerFrameFunctionalGroupsSequence):
            belongs = group_of(own, shared, "SegmentIdentificationSequence")
            if belongs is not None and belongs.ReferencedSegmentNumber != segment:
                continue
            stored = segmentation.get_stored_frame(index + 1)
            if belongs is None:  # a map of labels
                inside = stored == segment
            else:
                inside = 2 * stored.astype(int) >= int(header.get("MaximumFractionalValue") or 1)
            if inside.any():
                _stamp(path, name, inside, _frame_affine(own, shared), grid, labels, number)
    except (ValueError, AttributeError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise damaged(path, error) from None


def _frame_affine(own: Any, shared: Any) -> ndarray:
    """The place in RAS+ of (column, row) of a frame, as a matrix (4, 3)."""
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
    """Paint the pixels (row, column) of a frame into the voxels that they lie at."""
    rows, columns = np.nonzero(inside)
    world = np.stack([columns, rows, np.ones(len(rows))]).T @ affine[:3].T
    places = grid.index(world)
    nearest = np.rint(places).astype(int)
    off = float(np.abs(places - nearest).max())
    beyond = (nearest < 0).any() or (nearest >= grid.shape).any()
    if off > OFF_SLICE or beyond:
        what = "beyond it" if beyond else f"up to {off:.2g} of a voxel off its voxels"
        raise VolumeError(
            f"{path}: segment {name} lies on another grid than the series, {what}; name the "
            f"series that it was made of, or resample it first"
        )
    labels[tuple(nearest.T)] = number


def _listed(header: Any, name: str) -> list[Any]:
    """The items of a sequence; none if it is absent."""
    return list(header.get(name) or [])


def told_names(files: Sequence[StructureFile]) -> Mapping[str, int]:
    """Names of structures, and how many files hold each, the most frequent first."""
    counts: dict[str, int] = {}
    for file in files:
        for name in dict.fromkeys(file.names):
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
