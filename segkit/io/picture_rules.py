"""Settings for reading pictures, facts about pictures, and units of length."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from segkit.io.structure_rules import StructureRules

Rgb = tuple[int, int, int]
Unit = Literal["mm", "µm", "pixel"]
"""Unit of printed lengths; grids are always in mm."""
MM_OF: Mapping[Unit, float] = {"mm": 1.0, "µm": 1e-3, "pixel": 1.0}
"""Millimetres of each unit; a pixel of unknown size counts as one."""
WORD_OF: Mapping[Unit, str] = {"mm": "mm", "µm": "µm", "pixel": "pixels"}
"""Printed word of each unit."""
SMALLEST_MM, LARGEST_MM = 1e-8, 1e6
"""Limits in mm of voxel sizes, and of the first voxel's coordinates: 10 picometres, a kilometre.
TIFF cannot store smaller pixels."""
IN_LENGTHS = {
    **dict.fromkeys(("pm", "picometer", "picometre"), 1e-9),
    **dict.fromkeys(("å", "angstrom"), 1e-7),
    **dict.fromkeys(("nm", "nanometer", "nanometre"), 1e-6),
    **dict.fromkeys(("µm", "um", "micron", "microns", "micrometer", "micrometre"), 1e-3),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 10.0),
    **dict.fromkeys(("in", "inch", "inches"), 25.4),
    **dict.fromkeys(("m", "meter", "metre"), 1e3),
}
"""Millimetres of each unit, by its name in files and settings, in lower case."""
NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?"
"""Pattern of a number above or equal to zero, as settings may give it."""
LENGTH_IN_UNIT = re.compile(rf"\s*({NUMBER})\s*([^\W\d]+)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class PictureRules:
    """Settings for reading pictures, which add to their files or replace them.

    Example:
        >>> rules = PictureRules(pixel_mm=(0.0005, 0.0005), colours={(255, 0, 0): 1})
        >>> nuclei = read_labels("nuclei.png", rules=rules)
    """

    pixel_mm: tuple[float, ...] | None = None
    """Pixel size in mm along x, y and, for a stack, z; it replaces the file's own."""
    in_pixels: bool = False
    """Whether pixel sizes in files are ignored, so that lengths are in pixels."""
    pages: Literal["slices", "channels"] | None = None
    """The meaning of a TIFF's pages; if None, the file decides, and slices are the default."""
    colours: Mapping[Rgb, int] = field(default_factory=dict)
    """The label number of each colour in label pictures."""
    structures: StructureRules | None = field(default=None, repr=False)
    """How structures of DICOM files become labels."""

    def painting_on(self, image: Path | None) -> "PictureRules":
        """The rules that paint structures of DICOM files on the grid of an image, if given."""
        if self.structures is None or image is None:
            return self
        return replace(self, structures=replace(self.structures, image=image))


@dataclass(frozen=True)
class PictureFacts:
    """Facts about a picture in addition to its pixels and its grid."""

    unit: Unit
    """Unit of its printed lengths; 'pixel' if the pixel size is unknown."""
    source: str
    """Source of the pixel size, as a phrase."""
    notes: tuple[str, ...] = ()
    """Sentences about 'it', the file, on things that were left out, changed or turned."""
    orientation: int = 1
    """EXIF orientation of the file, 1 to 8, which results get too."""
    colours: Mapping[int, Rgb] = field(default_factory=dict)
    """Colours of labels that are written on its grid; if empty, labels are written as numbers."""

    @property
    def sized(self) -> bool:
        """Whether the size of a pixel is known."""
        return self.unit != "pixel"


def length_mm(text: str) -> float:
    """A length such as '0.5 µm' in mm. Raises ValueError for any other text."""
    found = LENGTH_IN_UNIT.fullmatch(text)
    unit = found and found[2].lower().replace("\u03bc", "µ")
    if not found or unit not in IN_LENGTHS:
        raise ValueError(
            f"expected a length such as '0.5 µm', '4 nm' or '0.1 mm', found {text!r}"
            "; give a number and a unit"
        )
    return float(found[1]) * IN_LENGTHS[unit]


def pixel_length_mm(text: str) -> float:
    """A pixel size such as '4 nm' in mm. Raises ValueError for any other text or size."""
    size = length_mm(text)
    if not SMALLEST_MM <= size <= LARGEST_MM:
        raise ValueError(
            f"expected a pixel size from 0.01 nm to 1000 m, found {text!r}; correct the number or "
            "the unit"
        )
    return size


def size_in_words(sizes: Sequence[float], unit: Unit) -> str:
    """Lengths in mm along several axes, as text in a unit, such as '0.5 x 0.5 µm'."""
    return " x ".join(f"{size / MM_OF[unit]:.4g}" for size in sizes) + f" {WORD_OF[unit]}"


def length_in_words(length_mm: float, unit: Unit) -> str:
    """A length in mm, as text in a unit, such as '1 mm', '0.5 µm' or '2 pixels'."""
    number = f"{length_mm / MM_OF[unit]:.6g}"
    return f"{number} {unit if number == '1' else WORD_OF[unit]}"
