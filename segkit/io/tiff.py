"""TIFF files, read with tifffile as rasters, and written with their pixel size.

A file may hold one image series. Its pages are slices unless the file (OME, ImageJ) or the settings
say that they are channels. The pixel size comes from OME metadata, ImageJ metadata or the
resolution. If tifffile cannot decompress a file without imagecodecs, Pillow decompresses it, but
only if the values stay the same.
"""

import hashlib
import html
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar
from uuid import NAMESPACE_OID, uuid5

import numpy as np
import tifffile
from numpy import ndarray
from PIL import TiffImagePlugin

from segkit.errors import VolumeError, counted
from segkit.io.bitmap import CHANNELS_OF_MODE, ORIENTATION_TAG, palette_of, pillow_values
from segkit.io.picture_rules import IN_LENGTHS, PictureFacts, PictureRules
from segkit.io.raster import Raster, scale_of

OME_SUFFIXES = (".ome.tif", ".ome.tiff")
TIFF_SUFFIXES = (".tif", ".tiff", *OME_SUFFIXES)
PER_MM = {2: 25.4, 3: 10.0}
"""Length in mm of TIFF's units of resolution: inch and centimetre."""
ATTRIBUTE = re.compile(r"""(\w+)\s*=\s*(["'])(.*?)\2""", re.DOTALL)
PIXELS_OF_OME = re.compile(r"<(?:\w+:)?Pixels\b([^>]*)>")
READABLE = {"MINISWHITE", "MINISBLACK", "RGB", "PALETTE", "YCBCR"}
PAGE_AXES = "ZIQ"
"""tifffile's letters for axes of slices, of a sequence, and of unknown meaning."""
Parsed = TypeVar("Parsed")

# tifffile logs faults that it ignores; faults that matter are refused below.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def read_tiff_header(path: Path, rules: PictureRules) -> tuple[Raster, int | None]:
    """The header as a raster, and the most bytes of pixels that the file can hold, if known.

    Raises VolumeError for unsupported pictures, and ValueError for damaged ones.
    """
    return _decoded(lambda: _header(path, rules))


def _header(path: Path, rules: PictureRules) -> tuple[Raster, int | None]:
    with tifffile.TiffFile(path) as file:
        series, page = _only_series(file)
        photometric = _name(page.photometric)
        if photometric not in READABLE:
            raise VolumeError(f"expected grey or RGB, found the colours {photometric}; convert it")
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
                raise VolumeError(
                    "expected channels or opacity (alpha), found both; save it without alpha"
                )
            alpha = channels - 1
        inverted = photometric == "MINISWHITE" and kind.kind in "ui"
        palette = None
        if photometric == "PALETTE":
            colours = np.asarray(page.colormap)
            # Some programs write 8 bits instead of TIFF's 16, as libtiff knows.
            palette = (colours if colours.max() < 256 else colours >> 8).T.astype(np.uint8)
        capacity = _capacity(series, path.stat().st_size)
        compressed = int(page.compression) != 1
        orientation = int(page.tags.valueof(ORIENTATION_TAG, default=1))

    def load() -> ndarray:
        values = _pixels(path, page_count=len(series.pages), compressed=compressed)
        values = values.reshape(series.shape)
        axes = series.axes
        wanted = "XY" + order[0] + order[1]
        wanted += "".join(axis for axis in axes if axis not in wanted)  # axes of size 1
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
    return raster, capacity


def write_tiff(
    path: Path, name: str, data: ndarray, spacing: tuple[float, float, float], facts: PictureFacts
) -> None:
    """Write a picture with its pixel size as a TIFF file.

    Args:
        path: the file to write.
        name: the final name of the file. `.ome.tif` files get OME metadata, others ImageJ metadata.
        data: (column, row, slice) or (column, row, slice, channel); float16 and float64 values are
            converted to float32.
        spacing: distance between pixels along columns, rows and slices, in mm.
        facts: whether the pixel size is known, the EXIF orientation, and the label colours.
    """
    values = data[..., None] if data.ndim == 3 else data
    values = np.ascontiguousarray(np.transpose(values, (2, 3, 1, 0)))  # ZCYX
    if values.dtype.kind == "f":
        values = values.astype(np.float32)
    elif values.dtype == bool:
        values = values.astype(np.uint8)
    scale = 1e3  # µm per mm
    per_unit = (1 / (spacing[0] * scale), 1 / (spacing[1] * scale)) if facts.sized else (1, 1)
    orientation = [(ORIENTATION_TAG, "H", 1, facts.orientation, True)]
    options: dict[str, Any] = {"photometric": "minisblack"}
    if facts.orientation != 1:
        options["extratags"] = orientation
    if name.lower().endswith(OME_SUFFIXES):
        # tifffile's own UUID holds the time and the network address of the machine.
        content = hashlib.sha256(values.data).hexdigest()
        metadata: dict[str, Any] = {"axes": "ZCYX", "UUID": str(uuid5(NAMESPACE_OID, content))}
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
    # All six axes are given; otherwise tifffile mistakes columns of a narrow picture for channels.
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


def _decoded(call: Callable[[], Parsed]) -> Parsed:
    """The result of a call to tifffile. Its errors for damaged files are raised as ValueError."""
    try:
        return call()
    except (MemoryError, OSError, VolumeError):
        raise
    except Exception as error:  # tifffile raises many types for damaged files
        reason = " ".join(str(error).split())
        raise ValueError(f"it is damaged: {reason or type(error).__name__}") from None


def _only_series(file: tifffile.TiffFile) -> tuple[Any, Any]:
    """The only image series, and its first page. Raises VolumeError if there are several."""
    found = [series for series in file.series if series.kind != "thumbnail"]
    if not found:
        raise ValueError("it holds no image")
    series = found[0]
    shapes = sorted({tuple(one.shape) for one in found})
    if len(found) > 1:
        listed = ", ".join("x".join(map(str, shape)) for shape in shapes[:3])
        raise VolumeError(
            f"expected one picture, found {len(found)} ({listed}); save each as a separate file"
        )
    missing = [page for page in series.pages if page is None or page.parent is not file]
    if missing:
        raise VolumeError("some of its planes are in other files; save all planes in one file")
    return series, series.keyframe


def _order(
    axes: str, shape: tuple[int, ...], pages: Literal["slices", "channels"] | None
) -> tuple[str, str]:
    """The axes, in tifffile's letters, that are slices, and those that are channels.

    Raises VolumeError for any other axes.
    """
    if "X" not in axes or "Y" not in axes:
        raise VolumeError(f"expected columns and rows, found the axes {axes}; save it as a picture")
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
        named = "time points" if strange == "T" else f"the axes {axes}"
        raise VolumeError(
            f"expected slices and channels, found {named}; set data.pictures.pages to slices or "
            f"channels, or save each page as a separate file"
        )
    return slices, channels


def _product(series: Any, letters: str) -> int:
    return int(np.prod([series.shape[series.axes.index(axis)] for axis in letters], dtype=object))


def _capacity(series: Any, size: int) -> int | None:
    """The most bytes of pixels that the file can hold. Raises ValueError if it is truncated."""
    for page in series.pages:
        if not page.dataoffsets or 0 in page.databytecounts:
            raise ValueError("it is incomplete: some of its pixels are missing")
        ends = [at + n for at, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if max(ends) > size:
            raise ValueError(
                f"it is incomplete: its pixels lack {counted(max(ends) - size, 'byte')}"
            )
    # No method of compression makes a real picture 65535 times smaller.
    return size * 2**16


def _pixels(path: Path, *, page_count: int, compressed: bool) -> ndarray:
    try:
        with _decoded(lambda: tifffile.TiffFile(path)) as file:
            return _decoded(lambda: _only_series(file)[0].asarray())
    except ValueError as error:
        if not compressed or "imagecodecs" not in str(error):
            raise
        try:
            return _by_pillow(path, page_count)
        except ValueError:
            raise VolumeError(
                "its compression needs the package imagecodecs; run pip install 'segkit[tiff]', or "
                "save it without compression"
            ) from None


def _by_pillow(path: Path, page_count: int) -> ndarray:
    """All pages, stacked. Raises ValueError if Pillow would change the values."""
    with _decoded(lambda: tifffile.TiffFile(path)) as file:
        page: Any = file.pages[0]
        kind, channels = np.dtype(page.dtype), int(page.samplesperpixel)
        if page.tags.valueof(ORIENTATION_TAG, default=1) != 1:
            raise ValueError("Pillow turns the pixels")
    with path.open("rb") as opened:
        image = _decoded(lambda: TiffImagePlugin.TiffImageFile(opened))
        pages = []
        for number in range(page_count):
            _decoded(lambda number=number: image.seek(number))  # type: ignore[misc]
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
    """The pixel size in mm along columns, rows and slices, and its source as a phrase."""
    if file.ome_metadata and (found := PIXELS_OF_OME.search(file.ome_metadata)):
        attributes = {key: html.unescape(value) for key, _, value in ATTRIBUTE.findall(found[1])}
        sizes = [_ome_size(attributes, axis) for axis in "XYZ"]
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
            return None, "its file does not give a pixel size"
        scale: tuple[float, float] | None = (unit / resolution[0], unit / resolution[1])
    elif unit is None or min(resolution) <= 0:
        return None, "its file does not give a pixel size"
    else:
        scale = scale_of(resolution, unit)
    if scale is None:
        dpi = resolution[0] * 25.4 / (unit or 1)
        return None, f"its resolution, {dpi:.3g} dpi, is not a pixel size"
    across = about.get("spacing")
    known = isinstance(across, int | float) and named in IN_LENGTHS and across > 0
    return (*scale, float(across) * IN_LENGTHS[named] if known and across else None), source


def _ome_size(attributes: dict[str, str], axis: str) -> float | None:
    unit = attributes.get(f"PhysicalSize{axis}Unit", "µm").replace("\u03bc", "µ").lower()
    try:
        size = float(attributes[f"PhysicalSize{axis}"]) * IN_LENGTHS[unit]
    except (KeyError, ValueError):
        return None
    return size if size > 0 else None


def _ratio(value: Any) -> float:
    if isinstance(value, tuple):
        return float(value[0]) / float(value[1]) if len(value) == 2 and value[1] else 0.0
    return float(value)


def _name(value: Any) -> str:
    return str(getattr(value, "name", value))
