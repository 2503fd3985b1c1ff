"""DICOM files written with pydicom: series by slices or frames, and contours of structures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray
from pydicom import Dataset, dcmread
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    RTStructureSetStorage,
    generate_uid,
)

from segkit.geometry.grid import Grid

Change = Callable[[int, Dataset], None]


def write_series(
    folder: Path,
    stored: ndarray,
    grid: Grid,
    *,
    slope: float = 1,
    intercept: float = -1024,
    description: str = "thorax",
    change: Change = lambda number, slice_: None,
) -> list[Path]:
    """A CT series of 16-bit numbers (column, row, slice) on a RAS+ grid; its file names tell
    nothing of the order. `change` may alter a slice before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine
    columns, rows, count = stored.shape
    spacing = grid.spacing
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    order = np.random.default_rng(0).permutation(count)
    paths = []
    for number in range(count):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)  # type: ignore[arg-type]
        one.SOPClassUID = meta.MediaStorageSOPClassUID
        one.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame
        one.PatientID, one.PatientName, one.PatientSex = "17", "Doe^Jo", "O"
        one.PatientBirthDate, one.StudyDate, one.StudyTime = "19700101", "20240102", "101112"
        one.AccessionNumber, one.StudyID, one.ReferringPhysicianName = "a", "1", "Roe^Al"
        one.Modality, one.SeriesNumber, one.InstanceNumber = "CT", 4, number + 1
        one.SeriesDescription = description
        one.Rows, one.Columns, one.SamplesPerPixel = rows, columns, 1
        one.PhotometricInterpretation = "MONOCHROME2"
        one.BitsAllocated = one.BitsStored = 16
        one.HighBit, one.PixelRepresentation = 15, int(stored.dtype.kind == "i")
        one.PixelSpacing = [decimal(spacing[1]), decimal(spacing[0])]
        one.SliceThickness = decimal(spacing[2])
        cosines = (lps[:3, :2] / spacing[:2]).T.ravel()
        one.ImageOrientationPatient = [decimal(value) for value in cosines]
        place = lps[:3] @ (0, 0, number, 1)
        one.ImagePositionPatient = [decimal(value) for value in place]
        one.RescaleSlope, one.RescaleIntercept = decimal(slope), decimal(intercept)
        one.PixelData = np.ascontiguousarray(stored[:, :, number].T).astype("<i2").tobytes()
        change(number, one)
        paths.append(folder / f"IM{order[number]:03d}")
        one.save_as(paths[-1], enforce_file_format=True)
    return paths


def empty_file(storage: str) -> FileDataset:
    """A file of a storage class, with nothing in it."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = storage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)  # type: ignore[arg-type]
    one.SOPClassUID, one.SOPInstanceUID = storage, meta.MediaStorageSOPInstanceUID
    return one


def write_enhanced(
    path: Path,
    stored: ndarray,
    grid: Grid,
    *,
    order: Sequence[int] | None = None,
    slopes: Sequence[float] | None = None,
    intercept: float = -1024,
    change: Callable[[Dataset], None] = lambda file: None,
) -> Path:
    """One enhanced CT file with all slices (column, row, slice) on a RAS+ grid as its frames.

    `order` is that of the slices in the file, `slopes` those of its frames.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns, rows, count = stored.shape
    order = order or range(count)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine
    one = empty_file(EnhancedCTImageStorage)
    one.StudyInstanceUID, one.SeriesInstanceUID = generate_uid(), generate_uid()
    one.FrameOfReferenceUID = generate_uid()
    one.PatientID, one.PatientName, one.PatientSex = "17", "Doe^Jo", "O"
    one.PatientBirthDate, one.StudyDate, one.StudyTime = "19700101", "20240102", "101112"
    one.AccessionNumber, one.StudyID = "a", "1"
    one.Modality, one.SeriesNumber, one.InstanceNumber = "CT", 4, 1
    one.SeriesDescription, one.NumberOfFrames = "enhanced", count
    one.Rows, one.Columns, one.SamplesPerPixel = rows, columns, 1
    one.PhotometricInterpretation = "MONOCHROME2"
    one.BitsAllocated = one.BitsStored = 16
    one.HighBit, one.PixelRepresentation = 15, 0
    turned, measures, shared = Dataset(), Dataset(), Dataset()
    cosines = (lps[:3, :2] / grid.spacing[:2]).T.ravel()
    turned.ImageOrientationPatient = [decimal(value) for value in cosines]
    measures.PixelSpacing = [decimal(grid.spacing[1]), decimal(grid.spacing[0])]
    measures.SliceThickness = decimal(grid.spacing[2])
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [turned], [measures]
    frames = []
    for number in order:
        place, scale, frame = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [decimal(value) for value in lps[:3] @ (0, 0, number, 1)]
        scale.RescaleSlope = decimal(slopes[number] if slopes else 1)
        scale.RescaleIntercept, scale.RescaleType = decimal(intercept), "HU"
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [place], [scale]
        frames.append(frame)
    one.SharedFunctionalGroupsSequence, one.PerFrameFunctionalGroupsSequence = [shared], frames
    one.PixelData = b"".join(
        np.ascontiguousarray(stored[:, :, number].T).astype("<u2").tobytes() for number in order
    )
    change(one)
    one.save_as(path, enforce_file_format=True)
    return path


def write_structures(
    path: Path,
    slice_of_series: Path,
    contours: Mapping[str, Sequence[ndarray]],
    *,
    kind: str = "CLOSED_PLANAR",
    description: str = "plan",
) -> Path:
    """A structure set of closed contours, each (point, 3) in mm, RAS+, by the structure's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = dcmread(slice_of_series, stop_before_pixels=True)
    one = empty_file(RTStructureSetStorage)
    one.StudyInstanceUID, one.SeriesInstanceUID = source.StudyInstanceUID, generate_uid()
    one.PatientID, one.PatientName, one.Modality = source.PatientID, "Doe^Jo", "RTSTRUCT"
    one.StructureSetLabel, one.SeriesDescription = "label", description
    series, study, world = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = source.SeriesInstanceUID
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"
    study.ReferencedSOPInstanceUID = source.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    world.FrameOfReferenceUID = source.FrameOfReferenceUID
    world.RTReferencedStudySequence = [study]
    one.ReferencedFrameOfReferenceSequence = [world]
    one.StructureSetROISequence, one.ROIContourSequence = [], []
    # Their numbers are not those of their places, as in files that were edited.
    for number, (name, drawn) in enumerate(contours.items(), start=7):
        roi, outlines = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = number, name
        roi.ReferencedFrameOfReferenceUID = source.FrameOfReferenceUID
        outlines.ReferencedROINumber, outlines.ContourSequence = number, []
        for points in drawn:
            contour = Dataset()
            contour.ContourGeometricType = kind
            contour.NumberOfContourPoints = len(points)
            lps = points * (-1.0, -1.0, 1.0)
            contour.ContourData = [decimal(value) for value in lps.ravel().tolist()]
            outlines.ContourSequence.append(contour)
        one.StructureSetROISequence.append(roi)
        one.ROIContourSequence.append(outlines)
    one.save_as(path, enforce_file_format=True)
    return path


def box_contour(grid: Grid, low: Sequence[float], high: Sequence[float], z: float) -> ndarray:
    """The contour in mm, RAS+, of a rectangle of a slice, by voxel indices of two corners."""
    (left, top), (right, bottom) = low, high
    corners = [(left, top, z), (right, top, z), (right, bottom, z), (left, bottom, z)]
    return grid.world(np.array(corners, float))


def decimal(value: float) -> str:
    """At most 16 characters, as a DICOM decimal string may have."""
    return f"{value:.10g}" if abs(value) >= 1e-4 else f"{value:.9f}"
