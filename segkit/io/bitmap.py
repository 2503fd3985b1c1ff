"""PNG, JPEG and BMP files by Pillow, as rasters; and PNG written."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy import ndarray
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin

from segkit.errors import VolumeError
from segkit.io.picture_rules import PictureFacts, Rgb
from segkit.io.raster import MOST_DEFLATED, Raster, scale_of

JPEG_SUFFIXES = (".jpg", ".jpeg")
BITMAP_SUFFIXES = (".png", *JPEG_SUFFIXES, ".bmp")
# By the class and not by Image.open, whose limit is a number of pixels, whatever memory is free.
PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    ".png": PngImagePlugin.PngImageFile,
    ".jpg": JpegImagePlugin.JpegImageFile,
    ".jpeg": JpegImagePlugin.JpegImageFile,
    ".bmp": BmpImagePlugin.BmpImageFile,
}
CHANNELS_OF_MODE = {"1": 1, "L": 1, "P": 1, "LA": 2, "PA": 2, "RGB": 3, "RGBA": 4, "I": 1, "F": 1}
GREY, GREY_ALPHA = 0, 4
"""Colour types in the header of a PNG."""
ORIENTATION_TAG = 0x0112
Obtained = TypeVar("Obtained")


def read_bitmap_header(path: Path) -> tuple[Raster, int | None]:
    """What the header says, and the most bytes of pixels that the file can hold, if that is known.

    Raises VolumeError for pictures that are not read, and ValueError for damaged ones.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        image = _had(lambda: PLUGINS[suffix](file))
        mode, (columns, rows) = image.mode, image.size
        if mode == "CMYK":
            raise VolumeError("its colours are CMYK, those of a printer; convert it to RGB")
        if getattr(image, "n_frames", 1) > 1:
            raise VolumeError("it is an animation; save one of its frames")
        if mode not in CHANNELS_OF_MODE and not mode.startswith("I;16"):
            raise VolumeError(f"its mode is {mode}; convert it to grey or RGB")
        orientation = _had(lambda: _orientation(image))
        notes: list[str] = []
        pixel, source = None, "its file does not tell a pixel size"
        depth, colours = 8, None
        if suffix == ".png":
            depth, colours = _depth(path)
            pixel, source = _png_pixel(image)
            if depth == 16 and mode in ("RGB", "RGBA", "LA"):
                notes.append("its 16 bits per colour are read as 8")
            if "transparency" in image.info:
                notes.append("its transparency is left out")
        palette = _palette(image) if mode in ("P", "PA") else None
    kind = np.dtype(np.uint16 if mode.startswith("I;16") else np.uint8)
    kind = np.dtype({"I": np.int32, "F": np.float32}.get(mode, kind))
    channels = CHANNELS_OF_MODE.get(mode, 1)
    expanded = colours == GREY and depth in (2, 4)

    def load() -> ndarray:
        values = _pixels(path, suffix)
        if expanded:  # by Pillow, to the range of 8 bits
            values = values // (255 // (2**depth - 1))
        return np.moveaxis(values.reshape(rows, columns, 1, channels), 0, 1)

    raster = Raster(
        (columns, rows, 1, channels),
        kind,
        load,
        None if pixel is None else (*pixel, None),
        source,
        orientation if orientation in range(1, 9) else 1,
        tuple(notes),
        palette,
        channels - 1 if mode in ("LA", "PA", "RGBA") else None,
        suffix in JPEG_SUFFIXES,
    )
    held = None
    if suffix == ".png":
        # Pixels of fewer than 8 bits lie several in a byte.
        held = path.stat().st_size * MOST_DEFLATED * max(8 // depth, 1)
    return raster, held


def png_bytes_kind(values: ndarray) -> np.dtype:
    """The type that whole numbers take in a PNG. Raises VolumeError for what a PNG cannot hold."""
    if values.dtype.kind not in "uib" or (values.size and values.min() < 0) or values.max() > 65535:
        raise VolumeError(
            f"PNG holds whole numbers from 0 to 65535, found {values.dtype} from "
            f"{values.min():g} to {values.max():g}; name a .tif or .nii.gz file"
        )
    return np.dtype(np.uint8 if values.max() <= 255 else np.uint16)


def write_png(
    path: Path, data: ndarray, pixel_mm: tuple[float, float], facts: PictureFacts
) -> None:
    """Write one slice, (column, row, 1) or (column, row, 1, channel).

    Labels with colours become a palette picture: its indices are their numbers.
    """
    if data.shape[2] != 1 or (data.ndim == 4 and data.shape[3] not in (1, 3)):
        raise VolumeError(f"PNG holds one slice, grey or RGB, found {data.shape}; name a .tif file")
    stored = np.asarray(data).astype(png_bytes_kind(data))
    stored = np.ascontiguousarray(np.moveaxis(stored, 0, 1).reshape(*data.shape[1::-1], -1))
    if stored.shape[2] == 3 and stored.dtype != np.uint8:
        raise VolumeError("PNG is written with 8 bits per colour, found 16; name a .tif file")
    image = Image.fromarray(stored if stored.shape[2] == 3 else stored[..., 0])
    if facts.colours and stored.shape[2] == 1 and stored.dtype == np.uint8:
        image.putpalette(palette_of(facts.colours).tobytes())
    options: dict[str, Any] = {}
    if facts.sized:
        options["dpi"] = tuple(25.4 / size for size in pixel_mm)
    if facts.orientation != 1:
        options["exif"] = exif_of(facts.orientation)
    image.save(path, format="PNG", **options)


def exif_of(orientation: int) -> Image.Exif:
    """EXIF that holds an orientation only."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return exif


def palette_of(colours: dict[int, Rgb] | Any) -> ndarray:
    """256 colours, uint8 (number, 3), black where a number has none."""
    table = np.zeros((256, 3), np.uint8)
    for number, colour in colours.items():
        if number < 256:
            table[number] = colour
    return table


def pillow_values(image: Image.Image) -> ndarray:
    """The pixels of an open picture, (row, column) or (row, column, channel)."""
    values = _had(lambda: np.asarray(image))
    return values.astype(np.uint8) if values.dtype == bool else values


def _pixels(path: Path, suffix: str) -> ndarray:
    with path.open("rb") as file:
        return pillow_values(_had(lambda: PLUGINS[suffix](file)))


def _had(give: Callable[[], Obtained]) -> Obtained:
    """What Pillow gives. Raises ValueError for each of the errors that it has for damaged files."""
    try:
        return give()
    except (SyntaxError, struct.error, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"it is damaged: {error}") from None


def _depth(path: Path) -> tuple[int, int]:
    """Bits per channel and colour type, by the first chunk of a PNG."""
    with path.open("rb") as file:
        head = file.read(26)
    if len(head) < 26:
        raise ValueError("its header is cut short")
    return head[24], head[25]


def _png_pixel(image: Any) -> tuple[tuple[float, float] | None, str]:
    resolution = image.info.get("dpi")
    if resolution is None:
        return None, "its file does not tell a pixel size"
    size = scale_of(resolution, 25.4)
    if size is None:
        return None, f"its {resolution[0]:.3g} dpi are a screen's, which is no scale"
    # Pixels per metre are whole numbers, of which Pillow makes dots per inch.
    per_metre = [round(1000 / step) for step in size]
    if min(per_metre) < 1:
        return None, "its resolution is no scale"
    return (1000 / per_metre[0], 1000 / per_metre[1]), "its pHYs chunk"


def _orientation(image: Any) -> int:
    """The EXIF orientation, without a look at the pixels."""
    exif = Image.Exif()
    exif.load(image.info.get("exif") or b"")
    return int(exif.get(ORIENTATION_TAG, 1))


def _palette(image: Any) -> ndarray:
    """The colours of a palette, (entry, 3), without a look at the pixels."""
    order, entries = _had(image.palette.getdata)
    values = np.frombuffer(bytes(entries), np.uint8)
    width = len(order.split(";")[0])
    colours = values[: len(values) // width * width].reshape(-1, width)
    if not len(colours):
        raise ValueError("its palette is empty")
    return colours[:, [order.index(part) for part in "RGB"]]
