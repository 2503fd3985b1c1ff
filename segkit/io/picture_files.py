"""Reading and writing of pictures: PNG, TIFF, JPEG and BMP files."""

import logging
import re
from dataclasses import replace
from pathlib import Path

from numpy import ndarray

from segkit.errors import VolumeError
from segkit.geometry.grid import Grid
from segkit.io.bitmap import BITMAP_SUFFIXES, SMALLEST_IN_PNG_MM, read_bitmap_header, write_png
from segkit.io.picture_rules import PictureFacts, PictureRules, size_in_words
from segkit.io.raster import Raster, check_claimed_size, image_of, labels_of_picture
from segkit.io.safe_text import read_json
from segkit.io.tiff import TIFF_SUFFIXES, read_tiff_header, write_tiff
from segkit.system.memory import free_memory

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (*BITMAP_SUFFIXES, *TIFF_SUFFIXES)
"""Suffixes of pictures that segkit reads."""
MOST_OF_SPACING = 2**16
"""So many first bytes of a JSON file are searched for a spacing."""


FOUR_DIGITS = re.compile(r"_[0-9]{4}$")


def spacing_file(path: Path) -> Path | None:
    """The JSON file beside a picture that says its pixel size, as nnU-Net has it; None if none.

    `CASE_0000.tif` and its label `CASE.tif` have it in `CASE.json`:
    `{"spacing": [slice distance, row distance, column distance]}`.
    """
    stem = path.name[: -len(next(s for s in PICTURE_SUFFIXES if path.name.lower().endswith(s)))]
    names = dict.fromkeys((stem, FOUR_DIGITS.sub("", stem)))
    return next(
        (file for name in names if _says_spacing(file := path.with_name(f"{name}.json"))), None
    )


def _says_spacing(file: Path) -> bool:
    return file.is_file() and b'"spacing"' in file.read_bytes()[:MOST_OF_SPACING]


def _spacing_in(file: Path) -> tuple[float, float, float | None] | None:
    """The pixel size in a JSON file, along columns, rows and slices; None if it has none."""
    try:
        content = read_json(file)
    except ValueError as error:
        raise VolumeError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or "spacing" not in content:
        return None
    steps = content["spacing"]
    numbers = isinstance(steps, list) and all(
        isinstance(step, int | float) and 0 < step < float("inf") for step in steps
    )
    if not numbers or len(steps) not in (2, 3):
        raise VolumeError(
            f"{file}: expected spacing to hold the distances between slices, rows and columns in "
            f"mm, found {steps}; correct it"
        )
    *across, rows, columns = map(float, steps)
    return columns, rows, across[0] if across else None


def picture_grid(path: Path, rules: PictureRules) -> tuple[Grid, PictureFacts]:
    """The grid and the facts of a picture, read from its header."""
    raster, _ = _raster(path, rules)
    return _as_image(raster, rules)


def _as_image(raster: Raster, rules: PictureRules) -> tuple[Grid, PictureFacts]:
    grid, facts = raster.grid(rules)
    return grid, replace(facts, notes=(*raster.image_notes, *facts.notes))


def picture_channels(path: Path, rules: PictureRules) -> int:
    """Number of channels of a picture, read from its header."""
    return _raster(path, rules)[0].num_channels


def read_picture(
    path: Path, rules: PictureRules, *, as_labels: bool
) -> tuple[ndarray, Grid, PictureFacts]:
    """The pixels, the grid and the facts of a picture.

    Args:
        path: the file.
        rules: settings for reading it.
        as_labels: whether the pixels are labels, with one number for each.

    Returns:
        Pixels (column, row, slice), or (column, row, slice, channel) for several channels; the
        grid; the facts.

    Raises:
        VolumeError: the picture is not supported, or does not fit into memory.
        ValueError: the file is damaged.
    """
    raster, capacity = _raster(path, rules)
    check_claimed_size(raster, capacity, free_memory())
    if as_labels:
        return labels_of_picture(raster, rules.colours), *raster.grid(rules)
    values = image_of(raster)
    return values if values.shape[3] > 1 else values[..., 0], *_as_image(raster, rules)


def write_picture(
    path: Path,
    name: str,
    data: ndarray,
    spacing: tuple[float, float, float],
    facts: PictureFacts | None,
) -> None:
    """Write a picture. Raises VolumeError if its format cannot hold the data.

    Args:
        path: the file to write.
        name: the final name of the file, whose suffix sets the format.
        data: pixels (column, row, slice) or (column, row, slice, channel).
        spacing: distance between pixels along columns, rows and slices, in mm.
        facts: pixel size, orientation and label colours; if None, the spacing is the pixel size.
    """
    facts = facts or PictureFacts("mm", "its volume's spacing")
    if name.lower().endswith(TIFF_SUFFIXES):
        write_tiff(path, name, data, spacing, facts)
        return
    if facts.sized and min(spacing[:2]) < SMALLEST_IN_PNG_MM:
        told = size_in_words(spacing[:2], facts.unit)
        logger.warning("%s: PNG cannot store pixels of %s; it gets no pixel size", name, told)
        facts = replace(facts, unit="pixel")
    write_png(path, data, spacing[:2], facts)


def _raster(path: Path, rules: PictureRules) -> tuple[Raster, int | None]:
    is_tiff = path.name.lower().endswith(TIFF_SUFFIXES)
    raster, capacity = read_tiff_header(path, rules) if is_tiff else read_bitmap_header(path)
    file = spacing_file(path)
    spacing = _spacing_in(file) if file else None
    if file and spacing:
        raster = replace(raster, pixel_mm=spacing, source=f"spacing in {file.name}, in mm")
    return raster, capacity
