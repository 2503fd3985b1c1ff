"""Pictures as data: what their files say, their pixel size, and where their pixels lie.

A picture is a volume of one slice, (column, row, 1), or of several if its file has several pages.
World coordinates are mm, with the columns running along -x and the rows along -y, so that a
picture is shown as its file shows it; this is also where ITK places it. An EXIF orientation turns
the grid, never the pixels: results for a turned picture are stored as its file stores it.
Without a pixel size, a pixel counts as 1 mm long, and lengths are told in pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy import ndarray

from segkit.errors import VolumeError
from segkit.geometry.grid import Grid
from segkit.io.picture_rules import PictureFacts, PictureRules, Rgb, Unit

NOT_A_SCALE = (1.0, 72.0, 96.0)
"""Pixels per inch that programs write if nobody told them a scale, as ImageJ has it."""
ACROSS_MM = 1.0
"""Thickness of a picture, which has none: the step along an axis of one slice."""
MICROSCOPIC_MM = 0.1
"""Smaller pixels are told in µm."""
MOST_COLOURS_TOLD = 3
MOST_DEFLATED = 1032
"""Bytes that a byte of a deflated stream may hold at most."""


@dataclass(frozen=True)
class Raster:
    """What the header of a picture says, and how its pixels are had.

    `size` is columns, rows, slices and channels, as stored; `load` gives an array of this shape.
    Of a palette picture, pixels are indices of `palette`, (entry, 3), and `size` has one channel.
    """

    size: tuple[int, int, int, int]
    kind: np.dtype
    load: Callable[[], ndarray]
    pixel_mm: tuple[float, float, float | None] | None = None
    """Along columns, rows and slices as stored; None if the file does not say."""
    source: str = "its file does not tell a pixel size"
    orientation: int = 1
    notes: tuple[str, ...] = ()
    palette: ndarray | None = None
    alpha: int | None = None
    """The channel that tells how opaque a pixel is."""
    lossy: bool = False
    inverted_from: int | None = None
    """The value of black if 0 is white, so that an image, but no label, is inverted."""

    @property
    def num_channels(self) -> int:
        """Channels of the image that it makes."""
        if self.palette is not None:
            return 1 if (self.palette == self.palette[:, :1]).all() else 3
        return self.size[3] - (self.alpha is not None)

    @property
    def image_notes(self) -> tuple[str, ...]:
        """What of the file is left out or changed in an image, each a sentence about 'it'."""
        notes = []
        if self.palette is not None:
            kind = "grey" if self.num_channels == 1 else "red, green and blue"
            notes.append(f"its palette is read as {kind}")
        if self.alpha is not None:
            notes.append("its opacity (alpha) is left out")
        if self.inverted_from is not None:
            notes.append("white is its 0, so that it is inverted")
        return tuple(notes)

    @property
    def num_bytes(self) -> int:
        """Bytes that its pixels take in memory."""
        return int(np.prod(self.size, dtype=object)) * self.kind.itemsize

    def grid(self, rules: PictureRules) -> tuple[Grid, PictureFacts]:
        """Where the pixels lie, and what is known beside that. Raises VolumeError."""
        columns, rows, slices, _ = self.size
        pixel, source, notes = self.pixel_mm, self.source, self.notes
        if rules.in_pixels:
            pixel, source = None, "a pixel counts as 1"
        elif rules.pixel_mm is not None:
            x, y, z = (*rules.pixel_mm, None)[:3]
            assert x is not None and y is not None
            across = z if z is not None else pixel[2] if pixel else None
            # What is said of a picture is said of it as it is shown.
            pixel = (x, y, across) if self.orientation < 5 else (y, x, across)
            source = "the settings give it"
        unit: Unit = "pixel"
        across_mm: float | None = ACROSS_MM
        if pixel is not None:
            unit = "µm" if max(pixel[:2]) < MICROSCOPIC_MM else "mm"
            across_mm = pixel[2] if slices > 1 else ACROSS_MM
            if across_mm is None:
                across_mm = max(pixel[:2])
                notes += ("it does not tell the distance of its slices; a pixel's size is taken",)
        assert across_mm is not None
        x, y = (1.0, 1.0) if pixel is None else pixel[:2]
        affine = turned_by(self.orientation, columns, rows) @ np.diag([x, y, across_mm, 1.0])
        # The corner that is shown top left stays at the origin, whatever the pixel size.
        corners = np.array([(i, j, 0.0) for i in (0, columns - 1) for j in (0, rows - 1)])
        affine[:3, 3] = 0
        affine[:2, 3] = -(corners @ affine[:3, :3].T).max(axis=0)[:2]
        if self.orientation != 1:
            notes += (
                f"it is turned as its EXIF orientation, {self.orientation}, says; labels must lie "
                f"on it as viewers show it",
            )
        written = {number: colour for colour, number in reversed(list(rules.colours.items()))}
        facts = PictureFacts(unit, source, notes, self.orientation, written)
        return Grid((columns, rows, slices), affine), facts


def turned_by(orientation: int, columns: int, rows: int) -> ndarray:
    """The affine, of steps of 1, of a stored picture with this EXIF orientation.

    Raises VolumeError for an orientation that EXIF does not know.
    """
    # Where a step along the columns and along the rows leads on the screen: right and down.
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


def check_room(raster: Raster, held: int | None, free: int) -> None:
    """Raise VolumeError if a picture claims more bytes than its file can hold, or than are free.

    Args:
        raster: its header.
        held: the most bytes that its file can hold, if that is known.
        free: bytes of memory.
    """
    columns, rows, slices, _ = raster.size
    claim = f"it claims {columns} x {rows} pixels" + f" in {slices} slices" * (slices > 1)
    if held is not None and raster.num_bytes > held:
        raise VolumeError(
            f"{claim}, {raster.num_bytes} bytes, and its file can hold {held}; it is cut short or "
            f"damaged"
        )
    if 2 * raster.num_bytes > free:
        raise VolumeError(
            f"{claim}, which need {2 * raster.num_bytes / 1e9:.3g} GB to read, and "
            f"{free / 1e9:.3g} GB of memory are free; cut it into tiles"
        )


def image_of(raster: Raster) -> ndarray:
    """The values of a picture as an image, (column, row, slice, channel).

    A palette becomes grey or red, green and blue, and a channel of opacity is left out.
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

    With colours, each pixel's colour is looked up; without them grey values are the numbers, and so
    are the indices of a palette. Raises VolumeError for colours that nothing explains.
    """
    if raster.lossy:
        raise VolumeError("JPEG changes the numbers of labels; save them as PNG or TIFF")
    values = raster.load()
    if raster.alpha is not None:
        opacity = values[..., raster.alpha]
        if (opacity != opacity.max()).any():
            raise VolumeError("expected labels without transparent pixels; save it without alpha")
        values = np.delete(values, raster.alpha, axis=3)
    if raster.palette is not None and colours:
        values = raster.palette[np.minimum(values[..., 0], len(raster.palette) - 1)]
    if values.shape[3] not in (1, 3):
        raise VolumeError(f"expected one label per pixel, found {values.shape[3]} values")
    if not colours:
        if values.shape[3] == 3 and (values != values[..., :1]).any():
            raise VolumeError(
                "holds labels in colours; give each label its colour in "
                "data.pictures.label_colours, such as {cell: '#ff0000'}"
            )
        return values[..., 0]
    return _looked_up(values, colours)


def _looked_up(values: ndarray, colours: Mapping[Rgb, int]) -> ndarray:
    if values.dtype.kind not in "ui" or values.max() > 255 or values.min() < 0:
        raise VolumeError(
            "expected colours of 8 bits, for data.pictures.label_colours, found "
            f"values from {values.min():g} to {values.max():g}"
        )
    wide = np.broadcast_to(values, (*values.shape[:3], 3)).astype(np.int32)
    codes = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    table = {
        red << 16 | green << 8 | blue: number for (red, green, blue), number in colours.items()
    }
    known = np.array(sorted(table), np.int32)
    places = np.minimum(np.searchsorted(known, codes), len(known) - 1)
    if strange := np.unique(codes[known[places] != codes]).tolist():
        told = ", ".join(f"#{code:06x}" for code in strange[:MOST_COLOURS_TOLD])
        more = f" and {len(strange) - MOST_COLOURS_TOLD} more" * (len(strange) > MOST_COLOURS_TOLD)
        raise VolumeError(
            f"holds the colours {told}{more}, which data.pictures.label_colours does not list; "
            f"list them, or save it without smoothed edges"
        )
    numbers = np.array([table[code] for code in known.tolist()])
    return numbers.astype(np.min_scalar_type(numbers.max()))[places]


def scale_of(resolution: Sequence[float], per_mm: float) -> tuple[float, float] | None:
    """The pixel size (mm) by a resolution in pixels per unit of so many mm.

    None for a resolution that is no scale: zero, or what programs write if nobody told them one.
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
    """The grid of a picture, at the pixel size of another if only that one's is known."""
    if facts is None or others is None or facts.sized or not others.sized:
        return grid, facts
    # Along the axes as they are shown: either may be stored turned.
    sizes = np.abs(other.affine[:3, :3]).sum(axis=1)
    affine = np.diag([*sizes, 1.0]) @ grid.affine
    return Grid(grid.shape, affine), replace(facts, unit=others.unit, source=others.source)
