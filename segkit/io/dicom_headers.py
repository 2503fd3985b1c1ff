"""Headers of DICOM files: their storage class, and the positions of the images in them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segkit.errors import VolumeError
from segkit.io.dicom_frames import Frame, frames_of
from segkit.io.itk import simple_itk
from segkit.io.kept import kept_while_unchanged

MAGIC = b"DICM"
MAGIC_AT = 128
DICOM_SUFFIX = ".dcm"
SERIES, SERIES_DESCRIPTION, MODALITY = "0020|000e", "0008|103e", "0008|0060"
STUDY, PATIENT, FRAME_OF_REFERENCE = "0020|000d", "0010|0020", "0020|0052"
INSTANCE = "0008|0018"
POSITION, ORIENTATION, SPACING = "0020|0032", "0020|0037", "0028|0030"
THICKNESS = "0018|0050"
STORAGE_CLASS = b"\x02\0\x02\0UI"
"""Bytes near the start of a file that come before the length and the text of its storage class."""
STORAGE = "1.2.840.10008.5.1.4.1.1."
ENHANCED = tuple(f"{STORAGE}{kind}" for kind in ("2.1", "2.2", "4.1", "4.4", "128.1", "130"))
"""Storage classes of enhanced CT, MR and PET: each frame has its own position."""
CONTOURS, SEGMENTATIONS = f"{STORAGE}481.3", (f"{STORAGE}66.4", f"{STORAGE}66.7")
"""Storage classes of structure sets, and of segmentations."""
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


def holds_frames(file: Path) -> bool:
    """Whether a DICOM file holds several frames; False if it cannot be read."""
    reader = reader_of(file)
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # what SimpleITK raises for everything
        return False
    return int((*reader.GetSize(), 1)[2]) > 1


@kept_while_unchanged(FILES_KEPT)
def storage_class(file: Path) -> str | None:
    """The storage class of a DICOM file; '' if the file does not give it; None for any other file.

    The first bytes or the name show that a file is DICOM.
    """
    with file.open("rb") as content:
        begin = content.read(2 * MAGIC_AT + 256)
    if begin[MAGIC_AT : MAGIC_AT + len(MAGIC)] != MAGIC:
        return "" if file.name.lower().endswith(DICOM_SUFFIX) else None
    _, _, rest = begin.partition(STORAGE_CLASS)
    length = int.from_bytes(rest[:2], "little")
    return rest[2 : 2 + length].decode("ascii", "replace").strip("\0 ")


def is_image(file: Path) -> bool:
    """Whether a file is DICOM and its storage class may be an image."""
    found = storage_class(file)
    return found is not None and not found.startswith(NO_IMAGES)


def unreadable(file: Path, error: RuntimeError) -> VolumeError:
    """The error of a DICOM file that SimpleITK cannot read."""
    # SimpleITK's message begins with a place in its own source; the reason follows "ERROR:".
    reason = " ".join(str(error).split("ERROR:")[-1].split())
    return VolumeError(
        f"{file}: cannot be read as DICOM: {reason}; export the file again, or move it elsewhere"
    )


def reader_of(file: Path) -> Any:
    """SimpleITK's reader of a DICOM file, which has read nothing yet."""
    reader = simple_itk().ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    return reader


def slices_in(file: Path, reader: Any) -> list[Slice]:
    """The slice in a file, or the slices of all frames of an enhanced file."""
    columns, rows, count = (*reader.GetSize(), 1)[:3]
    components = reader.GetNumberOfComponents()
    position = header_numbers(file, reader, POSITION)
    enhanced = count > 1 or (not position and storage_class(file) in ENHANCED)
    if enhanced and (frames := frames_of(file)):
        kind = int(all(frame.is_whole for frame in frames))
        return [
            Slice(file, (columns, rows, 1), components, kind, *_placed(frame), number)
            for number, frame in enumerate(frames)
        ]
    thickness = header_numbers(file, reader, THICKNESS)
    one = Slice(
        file,
        (columns, rows, count),
        components,
        reader.GetPixelIDValue(),
        position,
        header_numbers(file, reader, ORIENTATION),
        header_numbers(file, reader, SPACING),
        thickness[0] if thickness else 0.0,
    )
    return [one]


def _placed(frame: Frame) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], float]:
    return frame.position, frame.orientation, frame.spacing, frame.thickness


def header_text(reader: Any, key: str) -> str:
    """Text of a header field; question marks replace characters that are not valid Unicode."""
    if not reader.HasMetaDataKey(key):
        return ""
    text: str = reader.GetMetaData(key)
    return text.encode("utf-8", "replace").decode().strip("\0 ")


def header_numbers(file: Path, reader: Any, key: str) -> tuple[float, ...]:
    """Numbers of a header field; none if it is missing. Raises VolumeError for other text."""
    text = header_text(reader, key)
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
