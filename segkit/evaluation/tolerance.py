"""The tolerance of a distance: a length, or a number of pixels, which each picture makes a length.

2 pixels  ──▶  1 µm in a picture with pixels of 0.5 µm, 10 µm in one with pixels of 5 µm
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segkit.errors import VolumeError
from segkit.io.picture_rules import NUMBER, PictureRules, Unit, length_in_words, length_mm
from segkit.io.volume import read_picture_facts
from segkit.io.volume_names import is_picture

PLAIN_NUMBER = re.compile(NUMBER, re.IGNORECASE)
IN_PIXELS = re.compile(rf"({NUMBER})\s*(?:px|pixels?)", re.IGNORECASE)


@dataclass(frozen=True)
class Tolerance:
    """The largest distance at which two places agree.

    Example:
        >>> Tolerance(mm=1.0, pixels=2.0).of_case([Path("cells.png")], PictureRules())
        (2.0, 2.0)
    """

    mm: float | None = None
    """The tolerance in mm; None if it is only given in pixels."""
    pixels: float | None = None
    """The tolerance of pictures in pixels; if None, that in mm holds for pictures too."""

    def of_case(
        self, paths: Sequence[Path | None], rules: PictureRules
    ) -> tuple[float, float | None]:
        """The tolerance in mm of one case, and in pixels if it is in pixels there.

        Args:
            paths: the files of the case; if they are pictures, one of them may lack a pixel size.
            rules: how pictures are read.

        Raises:
            VolumeError: if the tolerance is in pixels and the case is a volume, or in mm and the
                case is a picture without a pixel size; or a picture cannot be read.
        """
        pictures = [path for path in paths if path and is_picture(path)]
        if not pictures:
            if self.mm is None:
                raise VolumeError(
                    f"{paths[-1]}: expected a tolerance in mm, found {self.pixels:g} pixels; only "
                    "pictures have a tolerance in pixels"
                )
            return self.mm, None
        known = [read_picture_facts(path, rules=rules) for path in pictures]
        grid, facts = next((each for each in known if each[1].sized), known[0])
        if self.pixels is not None:
            return self.pixels * max(grid.spacing[:2]), self.pixels
        if not facts.sized:
            raise VolumeError(
                f"{pictures[-1]}: expected a tolerance in pixels, found {self.mm:g} mm; it has no "
                "pixel size and is measured in pixels; give it as '2 pixels', or set --pixel-size"
            )
        assert self.mm is not None
        return self.mm, None


def tolerance_in(given: str | float | None, default: Tolerance) -> Tolerance:
    """The tolerance that a user gives.

    Args:
        given: a number in mm, or a length with its unit, such as '0.5 µm' or '2 pixels'.
        default: the tolerance if none is given.

    Raises:
        VolumeError: if it is not a length.
    """
    if given is None:
        return default
    text = str(given).strip()
    if in_pixels := IN_PIXELS.fullmatch(text):
        return Tolerance(pixels=float(in_pixels[1]))
    try:
        return Tolerance(mm=float(text) if PLAIN_NUMBER.fullmatch(text) else length_mm(text))
    except ValueError as error:
        raise VolumeError(f"tolerance {text!r}: {error}") from None


def tolerance_in_words(mm: float | None, pixels: float | None, unit: Unit) -> str:
    """A tolerance in words: '1 mm', '2 pixels', or '2 pixels (1 µm)' for pixels of one size.

    Args:
        mm: the tolerance in mm; None if it differs between cases.
        pixels: the tolerance in pixels; None if it is in mm.
        unit: the unit of the printed length.
    """
    if pixels is None:
        assert mm is not None
        return length_in_words(mm, unit)
    words = length_in_words(pixels, "pixel")
    return words if mm is None or unit == "pixel" else f"{words} ({length_in_words(mm, unit)})"
