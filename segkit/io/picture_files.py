"""Reading and writing of pictures: PNG, TIFF, JPEG and BMP files."""

from dataclasses import replace
from pathlib import Path

from numpy import ndarray

from segkit.geometry.grid import Grid
from segkit.io.bitmap import BITMAP_SUFFIXES, read_bitmap_header, write_png
from segkit.io.picture_rules import PictureFacts, PictureRules
from segkit.io.raster import Raster, check_claimed_size, image_of, labels_of_picture
from segkit.io.tiff import TIFF_SUFFIXES, read_tiff_header, write_tiff
from segkit.system.memory import free_memory

PICTURE_SUFFIXES = (*BITMAP_SUFFIXES, *TIFF_SUFFIXES)
"""Suffixes of pictures that segkit reads."""


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
    else:
        write_png(path, data, spacing[:2], facts)


def _raster(path: Path, rules: PictureRules) -> tuple[Raster, int | None]:
    if path.name.lower().endswith(TIFF_SUFFIXES):
        return read_tiff_header(path, rules)
    return read_bitmap_header(path)
