"""Settings of pictures: their pixel size, their pages, and the colours of their labels."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from segkit.config.base import Name, Section
from segkit.config.labels import Labelling
from segkit.io.picture_rules import PictureRules, Rgb, length_mm

PIXEL = "pixel"
HEXADECIMAL = re.compile(r"#[0-9a-f]{6}")
MOST_AXES = 3


def _sizes(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _checked_sizes(sizes: list[str]) -> list[str]:
    for size in sizes:
        if size != PIXEL:
            length_mm(size)
    if PIXEL in sizes and len(sizes) > 1:
        raise ValueError(f"'{PIXEL}' must stand alone: no file's pixel size then counts")
    return sizes


def _colours(value: Any) -> Any:
    """One colour or several, as '#rrggbb' each."""
    is_one = isinstance(value, str) or (
        isinstance(value, Sequence) and all(isinstance(part, int) for part in value)
    )
    colours = [value] if is_one else value
    if not isinstance(colours, list) or not colours:
        raise ValueError(f"{value!r} must be a colour such as '#ff0000' or [255, 0, 0]")
    return [_hexadecimal(colour) for colour in colours]


def _hexadecimal(colour: Any) -> str:
    if isinstance(colour, str) and HEXADECIMAL.fullmatch(colour.lower()):
        return colour.lower()
    is_rgb = isinstance(colour, list | tuple) and len(colour) == 3
    if is_rgb and all(isinstance(part, int) and 0 <= part <= 255 for part in colour):
        return "#" + "".join(f"{part:02x}" for part in colour)
    raise ValueError(f"{colour!r} must be a colour such as '#ff0000' or [255, 0, 0]")


Colours = Annotated[list[str], BeforeValidator(_colours)]
PixelSize = Annotated[
    list[str],
    BeforeValidator(_sizes),
    Field(min_length=1, max_length=MOST_AXES),
    AfterValidator(_checked_sizes),
]


class PicturesConfig(Section):
    """What PNG, TIFF, JPEG and BMP files do not say themselves."""

    pixel_size: PixelSize | None = None
    """The size of a pixel, such as `4 nm` or `0.5 µm`, or a list of it along x, y and, of a stack,
    z; `pixel` measures in pixels. By default what each file says, or pixels if it says nothing."""
    pages: Literal["slices", "channels"] | None = None
    """What the pages of a TIFF are; by default what the file says, or slices."""
    label_colours: dict[Name, Colours] = Field({})
    """The colour of each label in label pictures, or several, such as `{cell: '#ff0000'}`, by the
    label's name or number; predictions are written in them. By default grey values, and the indices
    of a palette, are the numbers of labels."""

    def rules(self, labelling: Labelling) -> PictureRules:
        """How pictures are read. Raises ValueError for a colour of an unknown label."""
        places = range(len(labelling.value_names))
        told = labelling.in_files or [(place,) for place in places]
        numbers = {str(number): number for group in told for number in group}
        numbers |= labelling.numbers_in_files
        if labelling.ignore is not None and told[labelling.ignore]:
            numbers["ignore"] = told[labelling.ignore][0]
        return self.with_numbers(numbers)

    def with_numbers(self, numbers: Mapping[str, int]) -> PictureRules:
        """The same, by the number of each label's name."""
        colours: dict[Rgb, int] = {}
        for name, listed in self.label_colours.items():
            if name not in numbers:
                raise ValueError(
                    f"pictures.label_colours names {name}, which is none of the labels "
                    f"{', '.join(numbers)}"
                )
            for colour in listed:
                red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
                if (red, green, blue) in colours:
                    raise ValueError(f"pictures.label_colours gives {colour} to two labels")
                colours[red, green, blue] = numbers[name]
        pixel_mm, in_pixels = pixel_mm_of(self.pixel_size)
        return PictureRules(pixel_mm, in_pixels, self.pages, colours)


def pixel_mm_of(sizes: Sequence[str] | None) -> tuple[tuple[float, ...] | None, bool]:
    """The size in mm along each axis, and whether lengths are pixels."""
    if sizes is None:
        return None, False
    if list(sizes) == [PIXEL]:
        return None, True
    lengths = tuple(length_mm(size) for size in sizes)
    return lengths * 2 if len(lengths) == 1 else lengths, False
