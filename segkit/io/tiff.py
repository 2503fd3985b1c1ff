"""TIFF files by tifffile, as rasters and written back, with their pixel size.

The first image series of a file is read: its pages are slices unless the file (OME, ImageJ) or the
settings say that they are channels. The pixel size is OME's, ImageJ's or the resolution's. What
tifffile cannot decompress without its extra, Pillow decompresses, if it does so without loss.
"""

import html
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import tifffile
from numpy import ndarray
from PIL import TiffImagePlugin

from segkit.errors import VolumeError
from segkit.io.bitmap import CHANNELS_OF_MODE, ORIENTATION_TAG, palette_of, pillow_values
from segkit.io.picture_rules import IN_LENGTHS, PictureFacts, PictureRules
from segkit.io.raster import Raster, scale_of

OME_SUFFIXES = (".ome.tif", ".ome.tiff")
TIFF_SUFFIXES = (".tif", ".tiff", *OME_SUFFIXES)
PER_MM = {2: 25.4, 3: 10.0}
"""Millimetres of TIFF's units of resolution, the inch and the centimetre."""
ATTRIBUTE = re.compile(r'(\w+)\s*=\s*"([^"]*)"')
PIXELS_OF_OME = re.compile(r"<(?:\w+:)?Pixels\b([^>]*)>")
READABLE = {"MINISWHITE", "MINISBLACK", "RGB", "PALETTE", "YCBCR"}
PAGE_AXES = "ZIQ"
"""tifffile's letters of slices, of a sequence, and of what the file does not name."""
Had = TypeVar("Had")

# tifffile logs what it reads over; what matters is refused below.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def read_tiff_header(path: Path, rules: PictureRules) -> tuple[Raster, int | None]:
    """What the header says, and the most bytes of pixels that the file can hold, if that is known.

    Raises VolumeError for pictures that are not read, and ValueError for damaged ones.
    """
    return _had(lambda: _header(path, rules))


def _header(path: Path, rules: PictureRules) -> tuple[Raster, int | None]:
    with tifffile.TiffFile(path) as file:
        series, page = _only_series(file)
        photometric = _name(page.photometric)
        if photometric not in READABLE:
            raise VolumeError(f"its colours are {photometric}; convert it to grey or RGB")
        kind = np.dtype(page.dtype) if page.dtype is not None else np.dtype("V1")
        if kind.kind not in "biuf":
            raise VolumeError(f"expected one real number per value, found {kind}")
        kind = np.dtype(np.uint8) if kind.kind == "b" else kind.newbyteorder("=")
        order = _order(series.axes, series.shape, rules.pages)
        slices, channels = (_product(series, letters) for letters in order)
        samples = series.shape[series.axes.index("S")] if "S" in series.axes else 1
        size = (
            series.shape[series.axes.index("X")],
            series.shape[series.axes.index("Y")],
            slices,
            channels,
        )
        pixel, source = _pixel(file, page, series.axes)
        extra = [int(value) for value in page.extrasamples]
        alpha = None
        if extra and extra[-1] in (1, 2):
            if channels != samples:
                raise VolumeError("it has channels and opacity (alpha) too; save it without alpha")
            alpha = channels - 1
        inverted = photometric == "MINISWHITE" and kind.kind in "ui"
        palette = None
        if photometric == "PALETTE":
            palette = (np.asarray(page.colormap) >> 8).T.astype(np.uint8)
        held = _held(series, path.stat().st_size)
        compressed = int(page.compression) != 1
        orientation = int(page.tags.valueof(ORIENTATION_TAG, default=1))

    def load() -> ndarray:
        values = _pixels(path, page_count=len(series.pages), compressed=compressed)
        values = values.reshape(series.shape)
        axes = series.axes
        wanted = "XY" + order[0] + order[1]
        wanted += "".join(axis for axis in axes if axis not in wanted)  # of size 1
        values = values.transpose([axes.index(axis) for axis in wanted]).reshape(size)
        return values.astype(kind, copy=False)

    raster = Raster(
        size,
        kind,
        load,
        pixel,
        source,
        orientation if orientation in range(1, 9) else 1,
        (),
        palette,
        alpha,
        inverted_from=2 ** int(page.bitspersample) - 1 if inverted else None,
    )
    return raster, held


def write_tiff(
    path: Path, name: str, data: ndarray, spacing: tuple[float, float, float], facts: PictureFacts
) -> None:
    """Write (column, row, slice) or (column, row, slice, channel), with its pixel size.

    Args:
        path: of the file.
        name: the name that it will have; OME metadata is written into `.ome.tif`, ImageJ's into
            others.
        data: float16 and float64 become float32.
        spacing: along its axes, mm.
        facts: whether that is a pixel size, and the colours of labels.
    """
    values = data[..., None] if data.ndim == 3 else data
    values = np.ascontiguousarray(np.transpose(values, (2, 3, 1, 0)))  # ZCYX
    if values.dtype.kind == "f":
        values = values.astype(np.float32)
    elif values.dtype == bool:
        values = values.astype(np.uint8)
    scale = 1e3  # of mm in µm
    per_unit = (1 / (spacing[0] * scale), 1 / (spacing[1] * scale)) if facts.sized else (1, 1)
    orientation = [(ORIENTATION_TAG, "H", 1, facts.orientation, True)]
    options: dict[str, Any] = {"photometric": "minisblack"}
    if facts.orientation != 1:
        options["extratags"] = orientation
    if name.lower().endswith(OME_SUFFIXES):
        metadata: dict[str, Any] = {"axes": "ZCYX"}
        if facts.sized:
            for axis, size in zip("XYZ", spacing, strict=True):
                metadata[f"PhysicalSize{axis}"] = size * scale
                metadata[f"PhysicalSize{axis}Unit"] = "µm"
        tifffile.imwrite(path, values, ome=True, metadata=metadata, compression="zlib", **options)
        return
    if facts.colours and values.dtype == np.uint8 and values.shape[:2] == (1, 1):
        per_cm = tuple(10 / size for size in spacing[:2])
        if facts.sized:
            options |= {"resolution": per_cm, "resolutionunit": 3}
        table = palette_of(dict(facts.colours)).T.astype(np.uint16)
        options |= {"photometric": "palette", "colormap": table << 8 | table}
        tifffile.imwrite(path, values[0, 0], metadata=None, compression="zlib", **options)
        return
    # With all six axes, tifffile takes no column of a narrow picture for a channel.
    metadata = {"axes": "TZCYXS"}
    if facts.sized:
        metadata |= {"spacing": spacing[2] * scale, "unit": "um"}
    imagej = values.dtype in (np.uint8, np.uint16, np.float32)
    tifffile.imwrite(
        path,
        values[None, ..., None],
        imagej=imagej,
        resolution=per_unit,
        metadata=metadata,
        compression="zlib",
        **options,
    )


def _had(give: Callable[[], Had]) -> Had:
    """What tifffile gives. Raises ValueError for whatever it raises for damaged files."""
    try:
        return give()
    except (MemoryError, OSError, VolumeError):
        raise
    except Exception as error:  # it lets through whatever a damaged file leads to
        reason = " ".join(str(error).split())
        raise ValueError(f"it is damaged: {reason or type(error).__name__}") from None


def _only_series(file: tifffile.TiffFile) -> tuple[Any, Any]:
    """The series of images, and its first page. Raises VolumeError if there are several."""
    found = [series for series in file.series if series.kind != "thumbnail"]
    if not found:
        raise ValueError("it holds no image")
    series = found[0]
    shapes = sorted({tuple(one.shape) for one in found})
    if len(found) > 1:
        told = ", ".join("x".join(map(str, shape)) for shape in shapes[:3])
        raise VolumeError(
            f"it holds {len(found)} pictures ({told}); save each as a file of its own"
        )
    missing = [page for page in series.pages if page is None or page.parent is not file]
    if missing:
        raise VolumeError("some of its planes lie in other files; save all of them in one")
    return series, series.keyframe


def _order(
    axes: str, shape: tuple[int, ...], pages: Literal["slices", "channels"] | None
) -> tuple[str, str]:
    """The axes, by tifffile's letters, that become slices and channels. Raises VolumeError."""
    if "X" not in axes or "Y" not in axes:
        raise VolumeError(f"expected columns and rows, found the axes {axes}")
    slices, channels, strange = "", "", ""
    for axis, size in zip(axes, shape, strict=True):
        if axis in "XY" or size == 1:
            continue
        if axis in PAGE_AXES or (axis == "T" and pages):
            slices, channels = (
                (slices, channels + axis) if pages == "channels" else (slices + axis, channels)
            )
        elif axis in "CS":
            channels += axis
        else:
            strange += axis
    if strange or len(slices) > 1:
        what = "times" if strange == "T" else f"the axes {axes}"
        raise VolumeError(
            f"expected slices and channels, found {what}; say by data.pictures.pages what its "
            f"pages are, slices or channels, or save each as a file of its own"
        )
    return slices, channels


def _product(series: Any, letters: str) -> int:
    return int(np.prod([series.shape[series.axes.index(axis)] for axis in letters], dtype=object))


def _held(series: Any, size: int) -> int | None:
    """Bytes that the file can hold; raises ValueError if it is cut short."""
    for page in series.pages:
        if not page.dataoffsets or 0 in page.databytecounts:
            raise ValueError("some of its pixels are not in the file; it is cut short")
        ends = [at + n for at, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if max(ends) > size:
            raise ValueError(f"its pixels end {max(ends) - size} bytes behind the file's end")
    # Whatever the method, a TIFF of 65535 times its size is no picture.
    return size * 2**16


def _pixels(path: Path, *, page_count: int, compressed: bool) -> ndarray:
    try:
        with _had(lambda: tifffile.TiffFile(path)) as file:
            return _had(lambda: _only_series(file)[0].asarray())
    except ValueError as error:
        if not compressed or "imagecodecs" not in str(error):
            raise
        try:
            return _by_pillow(path, page_count)
        except ValueError:
            raise VolumeError(
                "its compression needs imagecodecs; run pip install 'segkit[tiff]', or save it "
                "without compression"
            ) from None


def _by_pillow(path: Path, page_count: int) -> ndarray:
    """All pages one after the other. Raises ValueError where Pillow would change the values."""
    with _had(lambda: tifffile.TiffFile(path)) as file:
        page: Any = file.pages[0]
        kind, channels = np.dtype(page.dtype), int(page.samplesperpixel)
        if page.tags.valueof(ORIENTATION_TAG, default=1) != 1:
            raise ValueError("Pillow turns the pixels")
    with path.open("rb") as opened:
        image = _had(lambda: TiffImagePlugin.TiffImageFile(opened))
        pages = []
        for number in range(page_count):
            _had(lambda number=number: image.seek(number))  # type: ignore[misc]
            if CHANNELS_OF_MODE.get(image.mode, 1) != channels:
                raise ValueError(f"Pillow reads it as {image.mode}")
            values = pillow_values(image)
            if values.dtype.newbyteorder("=") != (np.uint8 if kind.kind == "b" else kind):
                raise ValueError(f"Pillow reads it as {values.dtype}")
            pages.append(values)
    return np.stack(pages)


def _pixel(
    file: tifffile.TiffFile, page: Any, axes: str
) -> tuple[tuple[float, float, float | None] | None, str]:
    """The pixel size in mm along columns, rows and slices, and where it comes from."""
    if file.ome_metadata and (found := PIXELS_OF_OME.search(file.ome_metadata)):
        told = {key: html.unescape(value) for key, value in ATTRIBUTE.findall(found[1])}
        sizes = [_ome_size(told, axis) for axis in "XYZ"]
        if sizes[0] is not None and sizes[1] is not None:
            return (sizes[0], sizes[1], sizes[2]), "its OME metadata"
    about: dict[str, Any] = file.imagej_metadata or {}
    unit = PER_MM.get(int(page.tags.valueof("ResolutionUnit", default=1)))
    resolution = [_ratio(page.tags.valueof(f"{axis}Resolution", default=0)) for axis in "XY"]
    named = str(about.get("unit", "")).replace("\\u00B5", "µ").replace("\u03bc", "µ").lower()
    source = "its resolution"
    if named in IN_LENGTHS:
        unit, source = IN_LENGTHS[named], "its ImageJ metadata"
        if min(resolution) <= 0:
            return None, "its file does not tell a pixel size"
        scale: tuple[float, float] | None = (unit / resolution[0], unit / resolution[1])
    elif unit is None or min(resolution) <= 0:
        return None, "its file does not tell a pixel size"
    else:
        scale = scale_of(resolution, unit)
    if scale is None:
        return None, f"its resolution, {resolution[0] * 25.4 / (unit or 1):.3g} dpi, is no scale"
    across = about.get("spacing")
    known = isinstance(across, int | float) and named in IN_LENGTHS and across > 0
    return (*scale, float(across) * IN_LENGTHS[named] if known and across else None), source


def _ome_size(told: dict[str, str], axis: str) -> float | None:
    unit = told.get(f"PhysicalSize{axis}Unit", "µm").replace("\u03bc", "µ").lower()
    try:
        size = float(told[f"PhysicalSize{axis}"]) * IN_LENGTHS[unit]
    except (KeyError, ValueError):
        return None
    return size if size > 0 else None


def _ratio(value: Any) -> float:
    if isinstance(value, tuple):
        return float(value[0]) / float(value[1]) if len(value) == 2 and value[1] else 0.0
    return float(value)


def _name(value: Any) -> str:
    return str(getattr(value, "name", value))
