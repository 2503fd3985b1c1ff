"""What is known of pictures beside their pixels: settings, pixel sizes, units of length."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from segkit.io.structure_rules import StructureRules

Rgb = tuple[int, int, int]
Unit = Literal["mm", "µm", "pixel"]
"""Of lengths that are told to a reader; grids are in mm throughout."""
MM_OF: Mapping[Unit, float] = {"mm": 1.0, "µm": 1e-3, "pixel": 1.0}
"""Millimetres of each unit; a pixel of unknown size counts as one."""
WORD_OF: Mapping[Unit, str] = {"mm": "mm", "µm": "µm", "pixel": "pixels"}
"""What a reader is told the unit by."""
IN_LENGTHS = {
    **dict.fromkeys(("å", "angstrom"), 1e-7),
    **dict.fromkeys(("nm", "nanometer", "nanometre"), 1e-6),
    **dict.fromkeys(("µm", "um", "micron", "microns", "micrometer", "micrometre"), 1e-3),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 10.0),
    **dict.fromkeys(("in", "inch", "inches"), 25.4),
    **dict.fromkeys(("m", "meter", "metre"), 1e3),
}
"""Millimetres of a unit by its name in files and settings, in lower case."""
LENGTH_IN_UNIT = re.compile(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([^\W\d]+)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class PictureRules:
    """What is known of pictures beside what their files say.

    Example:
        >>> rules = PictureRules(pixel_mm=(0.0005, 0.0005), colours={(255, 0, 0): 1})
        >>> nuclei = read_labels("nuclei.png", rules=rules)
    """

    pixel_mm: tuple[float, ...] | None = None
    """Size of a pixel, mm along x, y and, of a stack, z; it wins over the file's."""
    in_pixels: bool = False
    """Whether no file's pixel size counts, so that lengths are pixels."""
    pages: Literal["slices", "channels"] | None = None
    """What the pages of a TIFF are; if None, what the file says, or slices."""
    colours: Mapping[Rgb, int] = field(default_factory=dict)
    """The number of each colour in label pictures."""
    structures: StructureRules | None = field(default=None, repr=False)
    """How structures of DICOM files become labels."""


@dataclass(frozen=True)
class PictureFacts:
    """What is known of a volume that came from a picture, beside its voxels and its grid."""

    unit: Unit
    """The unit that its lengths are told in; 'pixel' if nothing says how large a pixel is."""
    source: str
    """Where the pixel size comes from, as the end of a sentence."""
    notes: tuple[str, ...] = ()
    """What of the file was left out or turned, each a sentence about 'it'."""
    orientation: int = 1
    """EXIF orientation, 1 to 8, that the file has, and that results get."""
    colours: Mapping[int, Rgb] = field(default_factory=dict)
    """The colours that labels on its grid are written in; as numbers, if there are none."""

    @property
    def sized(self) -> bool:
        """Whether the size of a pixel is known."""
        return self.unit != "pixel"


def length_mm(text: str) -> float:
    """Millimetres of a length such as '0.5 µm'. Raises ValueError for anything else."""
    found = LENGTH_IN_UNIT.fullmatch(text)
    unit = found and found[2].lower().replace("\u03bc", "µ")
    if not found or unit not in IN_LENGTHS:
        raise ValueError(f"{text!r} must be a length such as '0.5 µm', '4 nm' or '0.1 mm'")
    return float(found[1]) * IN_LENGTHS[unit]


def size_in_words(sizes: Sequence[float], unit: Unit) -> str:
    """Lengths along several axes, in mm, as they are told in a unit: '0.5 x 0.5 µm'."""
    return " x ".join(f"{size / MM_OF[unit]:.4g}" for size in sizes) + f" {WORD_OF[unit]}"


def length_in_words(length_mm: float, unit: Unit) -> str:
    """A length, in mm, as it is told in a unit: '1 mm', '0.5 µm' or '2 pixels'."""
    return f"{length_mm / MM_OF[unit]:.6g} {WORD_OF[unit]}"
