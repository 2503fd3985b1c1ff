"""DICOM structure sets and segmentations as labels on the grid of their series.

A structure set (RTSTRUCT) holds contours in mm, which are filled here. A voxel is inside if its
centre lies within an odd number of the contours on its slice; so a contour inside another is a
hole. Segmentations (SEG) are read by `segkit.io.dicom_segments`. Names of structures differ from
patient to patient, so patterns assign them to classes.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy import ndarray
from PIL import Image, ImageDraw

from segkit.errors import VolumeError, counted, first_few
from segkit.geometry.grid import LPS_TO_RAS, Grid
from segkit.io.dicom_frames import damaged, read_header
from segkit.io.dicom_headers import CONTOURS, SEGMENTATIONS, storage_class
from segkit.io.dicom_segments import named_segments, paint_segments
from segkit.io.kept import kept_while_unchanged
from segkit.io.structure_rules import StructureRules

logger = logging.getLogger(__name__)

OFF_SLICE = 0.25
"""The largest distance of a contour from its slice, in slice distances."""
FINER = 15
"""Number of pixels along the edge of a voxel while a contour is filled. It is odd, so that one
pixel lies at the centre of the voxel."""
FILLED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
STRUCTURE_FILES_KEPT = 2**14
"""Most files whose names of structures are not read again."""
MOST_STRUCTURES = 20
"""A sentence names at most so many structures."""

TOLD_BY_FILE = (
    *("SOPClassUID", "SeriesDescription", "StructureSetLabel", "Modality", "StudyInstanceUID"),
    *("StructureSetROISequence", "ReferencedFrameOfReferenceSequence", "ROIContourSequence"),
    *("SegmentSequence", "ReferencedSeriesSequence", "FrameOfReferenceUID"),
    *("SegmentationType", "PixelPaddingValue"),
)
"""Elements of the header that describe a file of structures; contours themselves are not parsed."""

StructureKind = Literal["contours", "segmentation"]


@dataclass(frozen=True)
class StructureFile:
    """The description of a structure set or a segmentation, from its header."""

    path: Path
    kind: StructureKind
    description: str
    modality: str
    names: tuple[str, ...]
    """Names of its structures, in order."""
    series: frozenset[str] = field(default_factory=frozenset)
    """UIDs of the series on which it was drawn."""
    frames_of_reference: frozenset[str] = field(default_factory=frozenset)
    """UIDs of the coordinate systems of its positions."""
    study: str = ""
    undrawn: frozenset[int] = field(default_factory=frozenset)
    """Indices of structures without contours: listed, such as by a template, but never drawn. A
    segment is never one of them: BINARY, FRACTIONAL and LABELMAP say of each described segment
    where it is absent (DICOM PS3.3 C.8.20.2.3), and writers leave out its empty frames."""

    def names_told(self) -> str:
        """The names of its structures as text; those without contours are marked."""
        told = [
            f"{name} (no contours)" if place in self.undrawn else name
            for place, name in enumerate(self.names)
        ]
        return first_few(told, MOST_STRUCTURES) or "none"


def structure_kind(path: Path) -> StructureKind | None:
    """The kind of a DICOM file with structures; None for any other file.

    Raises:
        VolumeError: the file is damaged.
    """
    if not path.is_file():
        return None
    storage = storage_class(path)
    if storage == "":  # the file has no meta information in front of its header
        storage = str(read_header(path).get("SOPClassUID", ""))
    if storage == CONTOURS:
        return "contours"
    return "segmentation" if storage in SEGMENTATIONS else None


@kept_while_unchanged(STRUCTURE_FILES_KEPT)
def read_structure_file(path: Path) -> StructureFile:
    """The description of a structure set or a segmentation, with the names of its structures.

    Raises:
        VolumeError: the file is damaged, or is another kind of file.
        SegkitError: pydicom is not installed.
    """
    kind = structure_kind(path)
    if kind is None:
        raise VolumeError(
            f"{path}: expected a DICOM structure set or segmentation, found another kind of file; "
            "choose a file of the modality RTSTRUCT or SEG"
        )
    header = read_header(path, only=TOLD_BY_FILE)
    about = (
        str(header.get("SeriesDescription") or header.get("StructureSetLabel") or "").strip(),
        str(header.get("Modality") or "").strip(),
    )
    study = str(header.get("StudyInstanceUID") or "")
    undrawn: set[int] = set()
    if kind == "contours":
        structures = _listed(header, "StructureSetROISequence")
        names = [str(roi.get("ROIName") or "") for roi in structures]
        drawn = {
            one.get("ReferencedROINumber")
            for one in _listed(header, "ROIContourSequence")
            if _has_contours(one)
        }
        undrawn = {
            place for place, roi in enumerate(structures) if roi.get("ROINumber") not in drawn
        }
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
        names = [name for _, name in named_segments(header)]
        series = [
            str(one.SeriesInstanceUID)
            for one in _listed(header, "ReferencedSeriesSequence")
            if "SeriesInstanceUID" in one
        ]
        frames = [str(header.get("FrameOfReferenceUID") or "")]
    known = frozenset(frames) - {""}
    return StructureFile(
        path, kind, *about, tuple(names), frozenset(series), known, study, frozenset(undrawn)
    )


def paint_structures(path: Path, grid: Grid, rules: StructureRules) -> ndarray:
    """Labels (x, y, z) on a grid, from the structures of a file.

    Classes are painted in the order of the rules. If two overlap, the later one counts.

    Args:
        path: a structure set or a segmentation.
        grid: the grid of the series on which it was drawn, in RAS+.
        rules: the structures and the number of each class.

    Returns:
        The number of each voxel, in the smallest type that holds all numbers.

    Raises:
        VolumeError: the file is damaged, the rules refuse a class without structures, or a
            structure does not lie on the grid.
        SegkitError: pydicom or highdicom is not installed.
    """
    kind, header = structure_kind(path), read_header(path, pixels=True)
    file = read_structure_file(path)
    names = file.names
    if kind == "contours":
        _refuse_unknown_contours(path, header)
    chosen, absent = rules.chosen(names), rules.lacking(names, file.undrawn)
    if rules.refuses(absent):
        raise VolumeError(absent_structure(file, absent, rules))
    highest = max(abs(number) for number in (rules.background, *rules.numbers.values()))
    signed = min(rules.background, *rules.numbers.values()) < 0
    kind_of = np.min_scalar_type(-highest - 1 if signed else highest)
    labels = np.full(grid.shape, rules.background, kind_of, order="F")
    if kind == "segmentation":
        paint_segments(path, header, chosen, rules.numbers, grid, labels)
        return labels
    for name, places in chosen.items():
        for place in places:
            _contoured(path, header, place, names[place], grid, labels, rules.numbers[name])
    return labels


def absent_structure(file: StructureFile, absent: Sequence[str], rules: StructureRules) -> str:
    """A sentence about the classes that have no structure in a file."""
    first = absent[0]
    patterns = ", ".join(rules.patterns[first])
    more = f" and {counted(len(absent) - 1, 'more class')}" if len(absent) > 1 else ""
    return (
        f"{file.path}: expected a structure called {patterns} for {first}{more}, found "
        f"{file.names_told()}; add its name to data.dicom.structures, or set data.dicom.absent, "
        f"which decides about cases without it"
    )


def _refuse_unknown_contours(path: Path, header: Any) -> None:
    """Raise VolumeError for contours of no structure, as they would become background."""
    known = {roi.get("ROINumber") for roi in _listed(header, "StructureSetROISequence")}
    for one in _listed(header, "ROIContourSequence"):
        number = one.get("ReferencedROINumber")
        if number not in known and _listed(one, "ContourSequence"):
            raise VolumeError(
                f"{path}: expected contours of its structures, found those of number {number}, "
                f"which no structure has; export the file again"
            )


def _contoured(
    path: Path, header: Any, place: int, name: str, grid: Grid, labels: ndarray, number: int
) -> None:
    """Fill the contours of one structure of a structure set.

    Args:
        path: the file, for messages.
        header: its header.
        place: index of the structure in the file.
        name: name of the structure.
        grid: the grid of the labels, in RAS+.
        labels: the labels, which are changed.
        number: the number that is painted.
    """
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
            beyond = abs(z - (z > 0) * (grid.shape[2] - 1))
            raise VolumeError(
                f"{path}: structure {name} has a contour {counted(beyond, 'slice')} beyond the "
                f"series; complete the series, or choose the one it belongs to"
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
            f"{path}: structure {name} has a contour of the kind {kind or 'unknown'}, but segkit "
            f"fills only {FILLED[0]}; leave the structure out of data.dicom.structures"
        )
    try:
        points = np.array(contour.get("ContourData"), float).reshape(-1, 3)
    except (ValueError, TypeError) as error:
        raise damaged(path, error) from None
    if len(points) < 3 or not np.isfinite(points).all():
        raise VolumeError(
            f"{path}: structure {name} has a contour of {len(points)} points, but a contour needs "
            f"three or more in mm; repair it, or leave it out of data.dicom.structures"
        )
    corners: ndarray = grid.index(points @ LPS_TO_RAS[:3, :3].T)
    middle = round(float(corners[:, 2].mean()))
    off = float(np.abs(corners[:, 2] - middle).max())
    if off > OFF_SLICE:
        raise VolumeError(
            f"{path}: structure {name} has a contour between two slices, {off:.2g} of a slice "
            "distance from the nearest one; choose the series on which it was drawn, or resample "
            "the structure"
        )
    return corners


def _toggle(mask: ndarray, corners: ndarray) -> None:
    """Invert the voxels (column, row) with their centre inside a polygon, in voxel indices."""
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


def _listed(header: Any, name: str) -> list[Any]:
    """The items of a sequence; none if it is absent."""
    return list(header.get(name) or [])


def _has_contours(one: Any) -> bool:
    """Whether a structure has contours, which are not parsed; for 3000, that takes 0.2 s."""
    found = one.get_item("ContourSequence")
    return found is not None and bool(found.value)


def told_names(files: Sequence[StructureFile]) -> Mapping[str, int]:
    """The number of files in which each structure was drawn, the most frequent name first."""
    counts: dict[str, int] = {}
    for file in files:
        drawn = {name for place, name in enumerate(file.names) if place not in file.undrawn}
        for name in dict.fromkeys(file.names):
            counts[name] = counts.get(name, 0) + (name in drawn)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
