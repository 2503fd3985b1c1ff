"""PNG, JPEG and BMP files, read with Pillow as rasters, and PNG files, written."""

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
# Image.open would limit the number of pixels whatever memory is free, so the classes are used.
PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    ".png": PngImagePlugin.PngImageFile,
    ".jpg": JpegImagePlugin.JpegImageFile,
    ".jpeg": JpegImagePlugin.JpegImageFile,
    ".bmp": BmpImagePlugin.BmpImageFile,
}
CHANNELS_OF_MODE = {"1": 1, "L": 1, "P": 1, "LA": 2, "PA": 2, "RGB": 3, "RGBA": 4, "I": 1, "F": 1}
GREY = 0
"""Colour type of grey pixels in the header of a PNG."""
ORIENTATION_TAG = 0x0112
SMALLEST_IN_PNG_MM = 1000 / (2**31 - 1)
"""The smallest pixel that PNG can store, in whole pixels per metre: about 0.47 nm."""
Decoded = TypeVar("Decoded")


def read_bitmap_header(path: Path) -> tuple[Raster, int | None]:
    """The header as a raster, and the most bytes of pixels that the file can hold, if known.

    Raises VolumeError for unsupported pictures, and ValueError for damaged ones.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        image = _decoded(lambda: PLUGINS[suffix](file))
        mode, (columns, rows) = image.mode, image.size
        if mode == "CMYK":
            raise VolumeError("expected grey or RGB, found the printing colours CMYK; convert it")
        if getattr(image, "n_frames", 1) > 1:
            raise VolumeError("expected one picture, found an animation; save one of its frames")
        if mode not in CHANNELS_OF_MODE and not mode.startswith("I;16"):
            raise VolumeError(f"expected grey or RGB, found the mode {mode}; convert it")
        orientation = _decoded(lambda: _orientation(image))
        notes: list[str] = []
        pixel, source = None, "its file does not give a pixel size"
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
        if expanded:  # Pillow scaled the values to the range of 8 bits
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
    capacity = None
    if suffix == ".png":
        # A byte holds several pixels of fewer than 8 bits.
        capacity = path.stat().st_size * MOST_DEFLATED * max(8 // depth, 1)
    return raster, capacity


def png_bytes_kind(values: ndarray) -> np.dtype:
    """The type of a PNG that holds these whole numbers. Raises VolumeError if none can."""
    if values.dtype.kind not in "uib" or (values.size and values.min() < 0) or values.max() > 65535:
        raise VolumeError(
            f"a PNG file can only hold whole numbers from 0 to 65535, found {values.dtype} from "
            f"{values.min():g} to {values.max():g}; write a .tif or .nii.gz file"
        )
    return np.dtype(np.uint8 if values.max() <= 255 else np.uint16)


def write_png(
    path: Path, data: ndarray, pixel_mm: tuple[float, float], facts: PictureFacts
) -> None:
    """Write one slice, (column, row, 1) or (column, row, 1, channel), as a PNG file.

    Labels with colours become a palette picture, whose indices are the label numbers.

    Args:
        path: the file to write.
        data: whole numbers from 0 to 65535.
        pixel_mm: size of a pixel along columns and rows.
        facts: whether the pixel size is known, the EXIF orientation, and the label colours.
    """
    if data.shape[2] != 1 or (data.ndim == 4 and data.shape[3] not in (1, 3)):
        raise VolumeError(
            f"a PNG file can only hold one slice, grey or RGB, found the shape {data.shape}; write "
            f"a .tif file"
        )
    stored = np.asarray(data).astype(png_bytes_kind(data))
    stored = np.ascontiguousarray(np.moveaxis(stored, 0, 1).reshape(*data.shape[1::-1], -1))
    if stored.shape[2] == 3 and stored.dtype != np.uint8:
        raise VolumeError("expected 8 bits per colour for PNG, found 16; write a .tif file")
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
    """EXIF metadata with an orientation and nothing else."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return exif


def palette_of(colours: dict[int, Rgb] | Any) -> ndarray:
    """256 colours, uint8 (number, 3); numbers without a colour are black."""
    table = np.zeros((256, 3), np.uint8)
    for number, colour in colours.items():
        if number < 256:
            table[number] = colour
    return table


def pillow_values(image: Image.Image) -> ndarray:
    """Pixels of an open picture, (row, column) or (row, column, channel)."""
    values = _decoded(lambda: np.asarray(image))
    return values.astype(np.uint8) if values.dtype == bool else values


def _pixels(path: Path, suffix: str) -> ndarray:
    with path.open("rb") as file:
        return pillow_values(_decoded(lambda: PLUGINS[suffix](file)))


def _decoded(call: Callable[[], Decoded]) -> Decoded:
    """The result of a call to Pillow. Its errors for damaged files are raised as ValueError."""
    try:
        return call()
    except (SyntaxError, struct.error, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"it is damaged: {error}") from None


def _depth(path: Path) -> tuple[int, int]:
    """Bits per channel and colour type, from the first chunk of a PNG."""
    with path.open("rb") as file:
        head = file.read(26)
    if len(head) < 26:
        raise ValueError("its header is incomplete")
    return head[24], head[25]


def _png_pixel(image: Any) -> tuple[tuple[float, float] | None, str]:
    resolution = image.info.get("dpi")
    if resolution is None:
        return None, "its file does not give a pixel size"
    size = scale_of(resolution, 25.4)
    if size is None:
        return None, f"its {resolution[0]:.3g} dpi are a screen's and not a pixel size"
    # PNG stores whole pixels per metre, which Pillow converts to dots per inch.
    per_metre = [round(1000 / step) for step in size]
    if min(per_metre) < 1:
        return None, "its resolution is not a pixel size"
    return (1000 / per_metre[0], 1000 / per_metre[1]), "its pHYs chunk"


def _orientation(image: Any) -> int:
    """The EXIF orientation, read without the pixels."""
    exif = Image.Exif()
    exif.load(image.info.get("exif") or b"")
    return int(exif.get(ORIENTATION_TAG, 1))


def _palette(image: Any) -> ndarray:
    """The colours of a palette, (entry, 3), read without the pixels."""
    order, entries = _decoded(image.palette.getdata)
    values = np.frombuffer(bytes(entries), np.uint8)
    width = len(order.split(";")[0])
    colours = values[: len(values) // width * width].reshape(-1, width)
    if not len(colours):
        raise ValueError("its palette is empty")
    return colours[:, [order.index(part) for part in "RGB"]]
