"""Settings of pictures: their pixel size, their pages, and the colours of their labels."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from segkit.config.base import Name, Section
from segkit.config.labels import Labelling
from segkit.io.picture_rules import PictureRules, Rgb, pixel_length_mm

PIXEL = "pixel"
HEXADECIMAL = re.compile(r"#[0-9a-f]{6}")
MOST_AXES = 3


def _sizes(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _checked_sizes(sizes: list[str]) -> list[str]:
    for size in sizes:
        if size != PIXEL:
            pixel_length_mm(size)
    if PIXEL in sizes and len(sizes) > 1:
        raise ValueError(f"'{PIXEL}' must be the only value, found {sizes}; remove the others")
    return sizes


def _colours(value: Any) -> Any:
    """A list of '#rrggbb', from one colour or several."""
    is_one = isinstance(value, str) or (
        isinstance(value, Sequence) and all(isinstance(part, int) for part in value)
    )
    colours = [value] if is_one else value
    if not isinstance(colours, list) or not colours:
        raise ValueError(f"{value!r} must be a colour such as '#ff0000' or [255, 0, 0]; correct it")
    return [_hexadecimal(colour) for colour in colours]


def _hexadecimal(colour: Any) -> str:
    if isinstance(colour, str) and HEXADECIMAL.fullmatch(colour.lower()):
        return colour.lower()
    is_rgb = isinstance(colour, list | tuple) and len(colour) == 3
    if is_rgb and all(isinstance(part, int) and 0 <= part <= 255 for part in colour):
        return "#" + "".join(f"{part:02x}" for part in colour)
    raise ValueError(f"{colour!r} must be a colour such as '#ff0000' or [255, 0, 0]; correct it")


Colours = Annotated[list[str], BeforeValidator(_colours)]
PixelSize = Annotated[
    list[str],
    BeforeValidator(_sizes),
    Field(min_length=1, max_length=MOST_AXES),
    AfterValidator(_checked_sizes),
]


class PicturesConfig(Section):
    """Information that PNG, TIFF, JPEG and BMP files lack."""

    pixel_size: PixelSize | None = None
    """The size of a pixel, such as `4 nm` or `0.5 µm`, or a list with the size along x, y and, for
    a stack, z. `pixel` means that lengths are measured in pixels. Default: the size in each file,
    or pixels if the file has none."""
    pages: Literal["slices", "channels"] | None = None
    """The meaning of the pages of a TIFF. Default: as stated in the file, or else slices."""
    label_colours: dict[Name, Colours] = Field({})
    """One or several colours of each label in label pictures, by the label's name or number, such
    as `{cell: '#ff0000'}`. Predictions are written in the same colours. By default grey values or
    palette indices are the numbers of labels."""

    def rules(self, labelling: Labelling) -> PictureRules:
        """The rules for reading pictures.

        Raises:
            ValueError: a colour is given to an unknown label, or to two labels.
        """
        places = range(len(labelling.value_names))
        in_files = labelling.in_files or [(place,) for place in places]
        numbers = {str(number): number for group in in_files for number in group}
        numbers |= labelling.numbers_in_files
        if labelling.ignore is not None and in_files[labelling.ignore]:
            numbers["ignore"] = in_files[labelling.ignore][0]
        return self.with_numbers(numbers)

    def with_numbers(self, numbers: Mapping[str, int]) -> PictureRules:
        """The rules for reading pictures, given the number of each label by name.

        Raises:
            ValueError: a colour is given to an unknown label, or to two labels.
        """
        colours: dict[Rgb, int] = {}
        for name, listed in self.label_colours.items():
            if name not in numbers:
                raise ValueError(
                    f"pictures.label_colours names {name}, which is not a label; choose from "
                    f"{', '.join(numbers)}"
                )
            for colour in listed:
                red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
                if (red, green, blue) in colours:
                    raise ValueError(
                        f"pictures.label_colours gives {colour} to two labels; change one of them"
                    )
                colours[red, green, blue] = numbers[name]
        pixel_mm, in_pixels = pixel_mm_of(self.pixel_size)
        return PictureRules(pixel_mm, in_pixels, self.pages, colours)


def pixel_mm_of(sizes: Sequence[str] | None) -> tuple[tuple[float, ...] | None, bool]:
    """The pixel size in mm along each axis, and whether lengths are measured in pixels.

    The size is None if files state it themselves, or if lengths are measured in pixels.
    """
    if sizes is None:
        return None, False
    if list(sizes) == [PIXEL]:
        return None, True
    lengths = tuple(pixel_length_mm(size) for size in sizes)
    return lengths * 2 if len(lengths) == 1 else lengths, False
