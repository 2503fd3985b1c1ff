"""Pictures as data: their headers, pixel sizes, grids and labels.

A picture is a volume of one slice, (column, row, 1), or of several if its file has several pages.
World coordinates are in mm; columns run along -x and rows along -y, so that viewers of volumes show
a picture as viewers of pictures do. ITK places pictures in the same way. An EXIF orientation turns
the grid and never the pixels: results for a turned picture are stored in the order of its file. If
the pixel size is unknown, a pixel counts as 1 mm, and lengths are printed in pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy import ndarray

from segkit.errors import VolumeError
from segkit.geometry.grid import Grid
from segkit.io.picture_rules import PictureFacts, PictureRules, Rgb, Unit

NOT_A_SCALE = (1.0, 72.0, 96.0)
"""Default resolutions, in pixels per inch, that programs write if the scale is unknown (ImageJ)."""
ACROSS_MM = 1.0
"""Step along the slice axis of a single picture, which has no thickness."""
MICROSCOPIC_MM = 0.1
"""Pixel sizes below this are printed in µm."""
MOST_COLOURS_SHOWN = 3
MOST_DEFLATED = 1032
"""Largest number of bytes that one byte of a deflate stream can decompress to."""


@dataclass(frozen=True)
class Raster:
    """The header of a picture, and a function that loads its pixels.

    `size` is columns, rows, slices and channels, as stored; `load` returns an array of this shape.
    The pixels of a palette picture are indices of `palette`, (entry, 3), in one channel.
    """

    size: tuple[int, int, int, int]
    kind: np.dtype
    load: Callable[[], ndarray]
    pixel_mm: tuple[float, float, float | None] | None = None
    """Pixel size along columns, rows and slices as stored; None if the file does not give it."""
    source: str = "its file does not give a pixel size"
    orientation: int = 1
    notes: tuple[str, ...] = ()
    palette: ndarray | None = None
    alpha: int | None = None
    """The channel of opacity, if there is one."""
    lossy: bool = False
    inverted_from: int | None = None
    """The value of black if 0 is white: images are then inverted, labels are not."""

    @property
    def num_channels(self) -> int:
        """Number of channels of the picture as an image."""
        if self.palette is not None:
            return 1 if (self.palette == self.palette[:, :1]).all() else 3
        return self.size[3] - (self.alpha is not None)

    @property
    def image_notes(self) -> tuple[str, ...]:
        """Sentences about 'it', the file, on things that are left out or changed in the image."""
        notes = []
        if self.palette is not None:
            kind = "grey" if self.num_channels == 1 else "red, green and blue"
            notes.append(f"its palette is read as {kind}")
        if self.alpha is not None:
            notes.append("its opacity (alpha) is left out")
        if self.inverted_from is not None:
            notes.append("its 0 is white, so its values are inverted")
        return tuple(notes)

    @property
    def num_bytes(self) -> int:
        """Bytes of its pixels in memory."""
        return int(np.prod(self.size, dtype=object)) * self.kind.itemsize

    def grid(self, rules: PictureRules) -> tuple[Grid, PictureFacts]:
        """The grid of the pixels, and the facts about the picture. Raises VolumeError."""
        columns, rows, slices, _ = self.size
        pixel, source, notes = self.pixel_mm, self.source, self.notes
        if rules.in_pixels:
            pixel, source = None, "a pixel counts as 1"
        elif rules.pixel_mm is not None:
            x, y, z = (*rules.pixel_mm, None)[:3]
            assert x is not None and y is not None
            across = z if z is not None else pixel[2] if pixel else None
            # The settings give sizes along the axes of the picture as it is shown.
            pixel = (x, y, across) if self.orientation < 5 else (y, x, across)
            source = "from the settings"
        unit: Unit = "pixel"
        across_mm: float | None = ACROSS_MM
        if pixel is not None:
            unit = "µm" if max(pixel[:2]) < MICROSCOPIC_MM else "mm"
            across_mm = pixel[2] if slices > 1 else ACROSS_MM
            if across_mm is None:
                across_mm = max(pixel[:2])
                notes += ("its slice distance is unknown, so the pixel size is used",)
        assert across_mm is not None
        x, y = (1.0, 1.0) if pixel is None else pixel[:2]
        affine = turned_by(self.orientation, columns, rows) @ np.diag([x, y, across_mm, 1.0])
        # The corner that is shown at the top left is the origin, whatever the pixel size.
        corners = np.array([(i, j, 0.0) for i in (0, columns - 1) for j in (0, rows - 1)])
        affine[:3, 3] = 0
        affine[:2, 3] = -(corners @ affine[:3, :3].T).max(axis=0)[:2]
        if self.orientation != 1:
            notes += (
                f"it is turned by its EXIF orientation, {self.orientation}; labels must fit the "
                f"picture as viewers show it",
            )
        written = {number: colour for colour, number in reversed(list(rules.colours.items()))}
        facts = PictureFacts(unit, source, notes, self.orientation, written)
        return Grid((columns, rows, slices), affine), facts


def turned_by(orientation: int, columns: int, rows: int) -> ndarray:
    """The affine of a stored picture with this EXIF orientation, for pixels of size 1.

    Raises VolumeError for an orientation that EXIF does not define.
    """
    # Steps on the screen, (right, down), of one step along the columns and one along the rows.
    steps = {
        1: ((1, 0), (0, 1)),
        2: ((-1, 0), (0, 1)),
        3: ((-1, 0), (0, -1)),
        4: ((1, 0), (0, -1)),
        5: ((0, 1), (1, 0)),
        6: ((0, 1), (-1, 0)),
        7: ((0, -1), (-1, 0)),
        8: ((0, -1), (1, 0)),
    }
    if orientation not in steps:
        raise VolumeError(
            f"expected an EXIF orientation from 1 to 8, found {orientation}; save it upright"
        )
    affine = np.eye(4)
    for axis, step in enumerate(steps[orientation]):
        affine[:2, axis] = [-part for part in step]
    return affine


def check_claimed_size(raster: Raster, capacity: int | None, free: int) -> None:
    """Raise VolumeError if a picture claims more bytes than its file or the free memory can hold.

    Args:
        raster: the header of the picture.
        capacity: the most bytes of pixels that its file can hold, if known.
        free: free memory in bytes.
    """
    columns, rows, slices, _ = raster.size
    claim = f"its header claims {columns} x {rows} pixels" + f" in {slices} slices" * (slices > 1)
    if capacity is not None and raster.num_bytes > capacity:
        raise VolumeError(
            f"{claim}, {raster.num_bytes} bytes, but its file can only hold {capacity}; it is "
            f"incomplete or damaged, so get a new copy"
        )
    if 2 * raster.num_bytes > free:
        raise VolumeError(
            f"{claim}, which need {2 * raster.num_bytes / 1e9:.3g} GB to read, but only "
            f"{free / 1e9:.3g} GB of memory are free; cut it into tiles"
        )


def image_of(raster: Raster) -> ndarray:
    """The values of a picture as an image, (column, row, slice, channel).

    A palette is converted to grey or RGB, and a channel of opacity is left out.
    """
    values = raster.load()
    if raster.palette is not None:
        values = raster.palette[np.minimum(values[..., 0], len(raster.palette) - 1)]
        values = values[..., : raster.num_channels]
    if raster.alpha is not None and raster.palette is None:
        values = np.delete(values, raster.alpha, axis=3)
    if raster.inverted_from is not None:
        values = (raster.inverted_from - values).astype(values.dtype)
    return values


def labels_of_picture(raster: Raster, colours: Mapping[Rgb, int]) -> ndarray:
    """The label of each pixel, (column, row, slice).

    If `colours` is not empty, it gives the label of each pixel's colour. Otherwise the grey values,
    or the indices of the palette, are the labels. Raises VolumeError for colours that are not in
    `colours`, and for pictures that cannot be labels.
    """
    if raster.lossy:
        raise VolumeError("JPEG compression changes label numbers; save labels as PNG or TIFF")
    values = raster.load()
    if raster.alpha is not None:
        opacity = values[..., raster.alpha]
        if (opacity != opacity.max()).any():
            raise VolumeError(
                "expected labels without transparent pixels, found some; save it without alpha"
            )
        values = np.delete(values, raster.alpha, axis=3)
    if raster.palette is not None and colours:
        values = raster.palette[np.minimum(values[..., 0], len(raster.palette) - 1)]
    if values.shape[3] not in (1, 3):
        raise VolumeError(f"expected one label per pixel, found {values.shape[3]} values")
    if not colours:
        if values.shape[3] == 3 and (values != values[..., :1]).any():
            raise VolumeError(
                "expected labels as numbers, found colours; list the colour of each label in "
                "data.pictures.label_colours, such as {cell: '#ff0000'}"
            )
        return values[..., 0]
    return _looked_up(values, colours)


def _looked_up(values: ndarray, colours: Mapping[Rgb, int]) -> ndarray:
    if values.dtype.kind not in "ui" or values.max() > 255 or values.min() < 0:
        raise VolumeError(
            "expected colours of 8 bits because data.pictures.label_colours is set, found values "
            f"from {values.min():g} to {values.max():g}; convert it to 8 bits"
        )
    wide = np.broadcast_to(values, (*values.shape[:3], 3)).astype(np.int32)
    codes = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    table = {
        red << 16 | green << 8 | blue: number for (red, green, blue), number in colours.items()
    }
    known = np.array(sorted(table), np.int32)
    places = np.minimum(np.searchsorted(known, codes), len(known) - 1)
    if strange := np.unique(codes[known[places] != codes]).tolist():
        listed = ", ".join(f"#{code:06x}" for code in strange[:MOST_COLOURS_SHOWN])
        more = f" and {len(strange) - MOST_COLOURS_SHOWN} more" * (
            len(strange) > MOST_COLOURS_SHOWN
        )
        raise VolumeError(
            f"expected the colours of data.pictures.label_colours, found also {listed}{more}; add "
            f"them there, or save the picture without smoothed edges"
        )
    numbers = np.array([table[code] for code in known.tolist()])
    return numbers.astype(np.min_scalar_type(numbers.max()))[places]


def scale_of(resolution: Sequence[float], per_mm: float) -> tuple[float, float] | None:
    """The pixel size (mm) from a resolution, or None if the resolution is not a real scale.

    A resolution is not a scale if it is zero or a program's default (`NOT_A_SCALE`).

    Args:
        resolution: pixels per unit of length, along columns and rows.
        per_mm: length of the unit in mm.
    """
    x, y = (float(value) for value in resolution)
    if not (np.isfinite([x, y]).all() and min(x, y) > 0):
        return None
    per_inch = np.array([x, y]) * 25.4 / per_mm
    if any(np.allclose(per_inch, known, rtol=2e-3) for known in NOT_A_SCALE) or x == y == 1:
        return None
    return per_mm / x, per_mm / y


def with_size_of(
    grid: Grid, facts: PictureFacts | None, other: Grid, others: PictureFacts | None
) -> tuple[Grid, PictureFacts | None]:
    """The grid and facts of a picture, with the pixel size of another if only one of them is known.

    If the size of the other is not known, the result has none.

    Args:
        grid: grid of the picture.
        facts: facts of the picture; None if it is not a picture.
        other: grid of the other picture.
        others: facts of the other picture.
    """
    if facts is None or others is None or facts.sized == others.sized:
        return grid, facts
    # Sizes are along the axes as they are shown, because either picture may be stored turned.
    theirs, own = (np.abs(each.affine[:3, :3]).sum(axis=1) for each in (other, grid))
    affine = np.diag([*(theirs / own), 1.0]) @ grid.affine
    return Grid(grid.shape, affine), replace(facts, unit=others.unit, source=others.source)
