"""DICOM series written slice by slice with pydicom, from an array and where it lies."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy import ndarray
from pydicom import Dataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

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


def decimal(value: float) -> str:
    """At most 16 characters, as a DICOM decimal string may have."""
    return f"{value:.10g}" if abs(value) >= 1e-4 else f"{value:.9f}"
