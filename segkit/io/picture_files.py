"""Pictures read from their files and written to them: PNG, TIFF, JPEG and BMP."""

from dataclasses import replace
from pathlib import Path

from numpy import ndarray

from segkit.geometry.grid import Grid
from segkit.io.bitmap import BITMAP_SUFFIXES, read_bitmap_header, write_png
from segkit.io.picture_rules import PictureFacts, PictureRules
from segkit.io.raster import Raster, check_room, image_of, labels_of_picture
from segkit.io.tiff import TIFF_SUFFIXES, read_tiff_header, write_tiff
from segkit.system.memory import free_memory

PICTURE_SUFFIXES = (*BITMAP_SUFFIXES, *TIFF_SUFFIXES)
"""Of pictures that are read."""


def picture_grid(path: Path, rules: PictureRules) -> tuple[Grid, PictureFacts]:
    """The grid of a picture and what is known of it, from its header alone."""
    raster, _ = _raster(path, rules)
    return _as_image(raster, rules)


def _as_image(raster: Raster, rules: PictureRules) -> tuple[Grid, PictureFacts]:
    grid, facts = raster.grid(rules)
    return grid, replace(facts, notes=(*raster.image_notes, *facts.notes))


def picture_channels(path: Path, rules: PictureRules) -> int:
    """How many channels a picture has as an image, from its header alone."""
    return _raster(path, rules)[0].num_channels


def read_picture(
    path: Path, rules: PictureRules, *, as_labels: bool
) -> tuple[ndarray, Grid, PictureFacts]:
    """The pixels of a picture, its grid and what is known of it.

    Args:
        path: of the file.
        rules: what is known beside what the file says.
        as_labels: whether the pixels are labels, one number for each.

    Returns:
        (column, row, slice), or (column, row, slice, channel) of an image of several channels.

    Raises:
        VolumeError: the picture is not one that is read, or does not fit into memory.
        ValueError: the file is damaged.
    """
    raster, held = _raster(path, rules)
    check_room(raster, held, free_memory())
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
    """Write a picture to a path; its format is that of the name that it will have.

    Without facts the spacing counts as mm. Raises VolumeError if the format cannot hold the data.
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
