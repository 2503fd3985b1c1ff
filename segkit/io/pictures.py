"""Pictures of volumes: planes with labels or maps on them, drawn by Pillow.

Planes are shown in radiological convention: head or front up, and the patient's right on the left.
A millimetre has the same length along every axis of one picture. Inputs that are pictures are shown
in the orientation of their files. A volume of one slice is shown as one plane.
"""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray

from segkit.errors import SegkitError
from segkit.geometry.grid import Grid, Orientation
from segkit.io.atomic import whole

PLANES = ("sagittal", "coronal", "axial")
PAGES = ("columns", "rows", "page")
"""Names of the three planes of a stack of pictures, by the axis across which each lies."""
LABEL_COLOURS = ["#4c9be8", "#f2a33a", "#e0507a", "#8800ff", "#885511", "#dddd99"]
"""Colours of labels 1 to 6. People who lack one kind of cone can tell any two of them apart."""
GOLDEN_RATIO = 0.618034
# Matplotlib's colour map of this name, sampled at steps of 1/16.
INFERNO = (
    *("#000004", "#0b0724", "#210c4a", "#3d0965", "#57106e", "#71196e", "#8a226a", "#a32c61"),
    *("#bc3754", "#d24644", "#e45a31", "#f1731d", "#f98e09", "#fcac11", "#f9cb35", "#f2ea69"),
    "#fcffa4",
)
PANEL = 240
"""Length in pixels of the longest side among three planes."""
GAP = 4
"""Pixels between planes of one panel; three times as many lie between panels."""
CAPTION = 24
"""Height in pixels of a line of text."""
OPACITY = 0.4
MAP_OPACITY = 0.8
WHITE, PALE = (255, 255, 255), (190, 190, 190)

Panel = tuple[str, ndarray | None, Literal["labels", "map"]]
"""A title, an overlay on the scan (or None), and whether the overlay is labels or a map."""
Pixels = Integer[ndarray, "height width 3"]


@dataclass(frozen=True)
class CasePicture:
    """A case's caption and its planes as pictures: three planes, or the only slice."""

    caption: str
    images: tuple[Float[ndarray, "height width"], ...]
    references: tuple[Integer[ndarray, "height width"], ...]
    predictions: tuple[Integer[ndarray, "height width"], ...]
    shapes: tuple[tuple[int, int], ...]
    """Height and width in pixels."""


def label_colour(number: int) -> str:
    """The colour of a label in all of segkit's pictures, pages and DICOM segmentations.

    People with any kind of colour blindness can tell the colours of labels 1 to 6 apart. The hues
    of later labels are 0.618 of the colour circle apart (the golden ratio), so that neighbouring
    numbers differ clearly.

    Args:
        number: the number of the label in files; 0 is black.

    Returns:
        The colour as '#rrggbb'.

    Raises:
        ValueError: the number is negative.

    Example:
        >>> label_colour(1)
        '#4c9be8'
    """
    if number < 0:
        raise ValueError(f"expected a number of a label from 0 on, found {number}")
    if number == 0:
        return "#000000"
    if number <= len(LABEL_COLOURS):
        return LABEL_COLOURS[number - 1]
    hue = number * GOLDEN_RATIO % 1.0
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.6, 0.55))
    return f"#{red:02x}{green:02x}{blue:02x}"


def label_rgb(number: int) -> tuple[int, int, int]:
    """The colour of `label_colour` as red, green and blue from 0 to 255."""
    return _rgb(label_colour(number))


def write_montage(
    path: str | Path,
    scan: ndarray,
    grid: Grid,
    panels: Sequence[Panel],
    *,
    label_names: Mapping[int, str],
    through: ndarray | None = None,
    planes: Sequence[str] = PLANES,
    quantities: Mapping[str, str] | None = None,
) -> None:
    """Draw the scan's middle planes with titles and overlays, and save them as a PNG file.

    Three planes are drawn, or the only plane of a scan of one slice.

    Args:
        path: the PNG file to write.
        scan: values, (x, y, z), on the grid. Grey levels span percentiles 0.5 to 99.5 of the
            values that are not 0.
        grid: the grid of the scan and of the overlays.
        panels: the columns of the picture: a title, an overlay of the scan's shape or None, and
            'labels' or 'map'. In a label map each label has a colour, and 0 is transparent. The
            colours of a map span percentiles 1 to 99 of its values, and NaN is transparent.
        label_names: names of the labels for the legend; 0 is left out.
        through: an array, such as labels; the planes go through the middle of its non-zero voxels.
            If it is None or empty, they go through the middle of the scan's non-zero voxels.
        planes: names of the three planes.
        quantities: what the values of a map are, by its panel's title; written under its colours.

    Raises:
        SegkitError: Pillow is not installed.
        OSError: the file cannot be written.

    Example:
        >>> panels = [("scan", None, "labels"), ("mine", labels.data, "labels")]
        >>> write_montage("x.png", scan.data, scan.grid, panels, label_names={1: "liver"})
    """
    sheet = _Sheet()
    orientation = Orientation.of(grid.affine)
    turned = orientation.turn(scan)
    middle = _middle(turned if through is None or not through.any() else orientation.turn(through))
    low, high = _percentiles(turned[turned != 0], 0.5, 99.5)
    axes = _shown_axes(turned.shape)
    shapes = _pixel_shapes(turned.shape, orientation.turn_grid(grid).spacing)
    left = GAP
    for column, (title, overlay, kind) in enumerate(panels):
        width = max(sheet.length(title), *(shape[1] for shape in shapes))
        sheet.write(left, 5, title, WHITE)
        values = None if overlay is None else orientation.turn(overlay)
        ends = (0.0, 1.0)
        if values is not None and kind == "map":
            ends = _percentiles(values[np.isfinite(values)], 1, 99)
        top = CAPTION
        for axis, shape in zip(axes, shapes, strict=True):
            panel = _grey(_cut(turned, axis, middle[axis]), shape, low, high)
            if values is not None:
                plane = _resized(_cut(values, axis, middle[axis]), shape)
                panel = _tinted(panel, plane) if kind == "labels" else _mapped(panel, plane, *ends)
            sheet.put(left + (width - shape[1]) // 2, top, panel)
            if column == 0 and len(axes) > 1:
                sheet.write(left, top, planes[axis], PALE)
            top += shape[0] + GAP
        if values is not None and kind == "map":
            bar = np.linspace(*ends, width)[None].repeat(2 * GAP, axis=0)
            sheet.put(left, top, _mapped(np.zeros((*bar.shape, 3)), bar, *ends))
            sheet.write(left, top + 2 * GAP, f"{ends[0]:.3g}", PALE)
            most = f"{ends[1]:.3g}"
            sheet.write(left + width - sheet.length(most), top + 2 * GAP, most, PALE)
            sheet.write(left, top + CAPTION, (quantities or {}).get(title, ""), PALE)
        left += width + 3 * GAP
    has_maps = any(kind == "map" for _, _, kind in panels)
    left, top = GAP, CAPTION * (3 if has_maps else 1) + sum(shape[0] + GAP for shape in shapes)
    for number, name in label_names.items():
        if number:
            left = sheet.write(left, top, f"{name}   ", label_rgb(number))
    save_picture(Path(path), sheet.drawn())


def planes_of(
    image: Float[ndarray, "x y z"],
    label: Integer[ndarray, "x y z"],
    prediction: Integer[ndarray, "x y z"],
    *,
    spacing: Sequence[float],
    caption: str,
) -> CasePicture:
    """The sagittal, coronal and axial planes through the middle of the reference.

    A case of one slice has this plane only. If the reference is empty, the planes go through the
    middle of the image. Axes are RAS+.

    Args:
        image: values of the scan.
        label: the reference labels.
        prediction: the predicted labels.
        spacing: distance between voxels along each axis, in mm.
        caption: text above the planes.
    """
    foreground = np.argwhere(label)
    at = (
        np.median(foreground, axis=0).astype(int) if len(foreground) else np.array(label.shape) // 2
    )

    def cut(values: ndarray) -> tuple[ndarray, ...]:
        return tuple(_cut(values, axis, at[axis]) for axis in _shown_axes(label.shape))

    shapes = _pixel_shapes(label.shape, spacing)
    return CasePicture(caption, cut(image), cut(label), cut(prediction), shapes)


def draw_cases(rows: Sequence[CasePicture], *, title: str, classes: Sequence[str]) -> Pixels:
    """A picture (uint8) with a title, a legend of the classes, and one row for each case.

    Each plane is drawn twice: without an overlay, then with the prediction filled and the reference
    outlined. Raises SegkitError if Pillow is not installed.
    """
    sheet = _Sheet()
    left = sheet.write(GAP, 5, title + " " * 6, WHITE)
    for number, name in enumerate(classes):
        if number:
            left = sheet.write(left, 5, f"{name}   ", label_rgb(number))
    sheet.write(left, 5, "filled: predicted   outlined: reference", PALE)
    top = CAPTION
    for row in rows:
        sheet.write(GAP, top + 5, row.caption, PALE)
        strip = _strip(row)
        sheet.put(GAP, top + CAPTION, strip)
        top += CAPTION + strip.shape[0] + GAP
    return sheet.drawn()


def save_picture(path: Path, picture: Pixels) -> None:
    """Write a PNG file, complete or not at all."""
    image, *_ = _pillow()
    with whole(path) as partial:
        image.fromarray(picture).save(partial, format="PNG", compress_level=3)


def overlaid(
    bare: Pixels,
    reference: Integer[ndarray, "rows columns"],
    prediction: Integer[ndarray, "rows columns"],
) -> Pixels:
    """The picture with predicted classes tinted and reference classes outlined."""
    predicted, true = (_resized(labels, bare.shape[:2]) for labels in (prediction, reference))
    panel = _tinted(bare, predicted)
    edge = outline(true)
    edge |= outline(np.where(edge, 0, true))
    panel[edge] = _colours_of(true[edge])
    return panel


def outline(labels: Integer[ndarray, "height width"]) -> ndarray:
    """Mask of the pixels of a class that touch another class or the background."""
    edge = np.zeros(labels.shape, bool)
    for axis in range(2):
        changes = np.diff(labels, axis=axis) != 0
        before = [(1, 0) if other == axis else (0, 0) for other in range(2)]
        after = [(0, 1) if other == axis else (0, 0) for other in range(2)]
        edge |= np.pad(changes, before) | np.pad(changes, after)
    return edge & (labels > 0)


class _Sheet:
    """A black canvas that grows to hold the pictures and texts that are placed on it."""

    def __init__(self) -> None:
        self.image, self.draw, fonts = _pillow()
        self.font = fonts.load_default(14)
        self.pictures: list[tuple[int, int, ndarray]] = []
        self.words: list[tuple[int, int, str, tuple[int, int, int]]] = []

    def length(self, text: str) -> int:
        """Width of a text in pixels."""
        return int(np.ceil(self.font.getlength(text)))

    def put(self, left: int, top: int, picture: ndarray) -> None:
        self.pictures.append((left, top, picture))

    def write(self, left: int, top: int, text: str, colour: tuple[int, int, int]) -> int:
        """Place a text and return the column at which it ends."""
        self.words.append((left, top, text, colour))
        return left + self.length(text)

    def drawn(self) -> Pixels:
        """The finished picture, uint8."""
        widths = [left + picture.shape[1] for left, _, picture in self.pictures]
        widths += [left + self.length(text) for left, _, text, _ in self.words]
        heights = [top + picture.shape[0] for _, top, picture in self.pictures]
        heights += [top + CAPTION - 5 for _, top, _, _ in self.words]
        canvas = self.image.new("RGB", (max(widths) + GAP, max(heights) + GAP))
        for left, top, picture in self.pictures:
            canvas.paste(self.image.fromarray(picture), (left, top))
        pen = self.draw.Draw(canvas)
        for left, top, text, colour in self.words:
            pen.text((left, top), text, colour, self.font, stroke_width=1, stroke_fill=(0, 0, 0))
        return np.asarray(canvas)


def _pillow() -> tuple[Any, Any, Any]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise SegkitError("pictures need Pillow; run pip install 'segkit[report]'") from None
    return Image, ImageDraw, ImageFont


def _strip(row: CasePicture) -> Pixels:
    """The planes of a case side by side, two panels each, centred vertically."""
    values = np.concatenate([image.ravel() for image in row.images])
    low, high = np.percentile(values, [0.5, 99.5])
    width = sum(2 * w + 4 * GAP for _, w in row.shapes) - 3 * GAP
    strip = np.zeros((max(h for h, _ in row.shapes), width, 3), np.uint8)
    left = 0
    for image, reference, prediction, shape in zip(
        row.images, row.references, row.predictions, row.shapes, strict=True
    ):
        bare = _grey(image, shape, low, high)
        top = (strip.shape[0] - shape[0]) // 2
        for panel in (bare, overlaid(bare, reference, prediction)):
            strip[top : top + shape[0], left : left + shape[1]] = panel
            left += shape[1] + GAP
        left += 2 * GAP
    return strip


def _middle(values: ndarray) -> list[int]:
    """Index of the middle of the non-zero voxels along each axis."""
    if not values.any():
        return [size // 2 for size in values.shape]
    found = np.nonzero(values)
    return [int(indices.min() + indices.max()) // 2 for indices in found]


def _percentiles(values: ndarray, first: float, last: float) -> tuple[float, float]:
    """Two percentiles, or 0 and 1 if there are no values."""
    low, high = np.percentile(values, [first, last]) if values.size else (0.0, 1.0)
    return float(low), float(high)


def _cut(values: ndarray, axis: int, index: int) -> ndarray:
    """A plane of a RAS+ array in radiological convention."""
    return np.take(values, index, axis=axis).T[::-1, ::-1]


def _shown_axes(shape: Sequence[int]) -> list[int]:
    """The axes across which planes are shown: all three, or only that of a single slice."""
    flat = [axis for axis in range(3) if shape[axis] == 1]
    return flat if len(flat) == 1 else [0, 1, 2]


def _pixel_shapes(shape: Sequence[int], spacing: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """Height and width of each plane in pixels, at one scale; a single plane is twice as large."""
    axes = _shown_axes(shape)
    lengths = [size * step for size, step in zip(shape, spacing, strict=True)]
    seen = [length for axis, length in enumerate(lengths) if len(axes) > 1 or axis not in axes]
    scale = PANEL * (1 if len(axes) > 1 else 2) / max(seen)
    sides = ((2, 1), (2, 0), (1, 0))
    return tuple(
        (max(round(lengths[up] * scale), 1), max(round(lengths[across] * scale), 1))
        for up, across in (sides[axis] for axis in axes)
    )


def _grey(plane: ndarray, shape: tuple[int, int], low: float, high: float) -> Pixels:
    """A plane as a grey picture of this shape: black at the value `low`, white at `high`."""
    image, *_ = _pillow()
    grey = np.clip((plane - low) / max(high - low, 1e-8), 0, 1) * 255
    source = image.fromarray(np.ascontiguousarray(np.nan_to_num(grey).astype(np.uint8)))
    sized = np.asarray(source.resize(shape[::-1], image.Resampling.BICUBIC))
    return sized[..., None].repeat(3, axis=2)


def _resized(plane: ndarray, shape: tuple[int, ...]) -> ndarray:
    """A plane resized to this shape by the nearest pixel."""
    rows, columns = (
        ((np.arange(size) + 0.5) * old / size).astype(int)
        for size, old in zip(shape, plane.shape, strict=True)
    )
    return plane[rows[:, None], columns]


def _tinted(bare: Pixels, labels: Integer[ndarray, "height width"]) -> Pixels:
    """The picture tinted in the colours of the labels; 0 is transparent."""
    return _blended(bare, _colours_of(labels), labels > 0, OPACITY)


def _mapped(
    bare: Pixels, values: Float[ndarray, "height width"], low: float, high: float
) -> Pixels:
    """The picture tinted in the colours of a map; NaN is transparent."""
    shown = np.isfinite(values)
    place = np.clip((np.where(shown, values, low) - low) / max(high - low, 1e-30), 0, 1)
    anchors = np.array([_rgb(colour) for colour in INFERNO])
    steps = np.linspace(0, 1, len(INFERNO))
    colours = np.stack([np.interp(place, steps, channel) for channel in anchors.T], axis=-1)
    return _blended(bare, colours, shown, MAP_OPACITY)


def _blended(bare: ndarray, colours: ndarray, shown: ndarray, opacity: float) -> Pixels:
    share = opacity * shown[..., None]
    return np.round(bare * (1 - share) + share * colours).astype(np.uint8)


def _colours_of(labels: ndarray) -> ndarray:
    """Red, green and blue of each label; 0 is black."""
    numbers, places = np.unique(labels, return_inverse=True)
    table = np.array([label_rgb(int(number)) if number else (0, 0, 0) for number in numbers])
    return table.reshape(-1, 3)[places.reshape(labels.shape)]


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return red, green, blue
