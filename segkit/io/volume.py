"""Volumes: voxels with their grid, read from files and written back without loss.

`nifti`, `nrrd` and `metaimage` read headers, and refuse those that they do not understand.
`voxel_bytes` reads voxels, and allocates no more than the file can hold. `bitmap` and `tiff` read
and write pictures, and `raster` places their pixels. nibabel writes NIfTI; SimpleITK writes NRRD
and MetaImage. SimpleITK does not read them, because it crashes on some damaged files and returns
wrong voxels for others (docs/volumes.md has the counts).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.nifti2 import Nifti2Header, Nifti2Image
from nibabel.spatialimages import HeaderDataError
from numpy import ndarray

from segkit.errors import VolumeError, counted
from segkit.geometry.grid import LPS_TO_RAS, Grid, Orientation
from segkit.io.atomic import whole
from segkit.io.deflate import gzip_file
from segkit.io.dicom import arranged, is_dicom, read_series, series_at
from segkit.io.dicom_labels import paint_structures, structure_kind
from segkit.io.disk_arrays import release
from segkit.io.gridded import Volume as Volume
from segkit.io.gridded import turn_onto as turn_onto
from segkit.io.itk import simple_itk
from segkit.io.metaimage import read_metaimage_header
from segkit.io.nifti import millimetre_affine, read_nifti_header
from segkit.io.nrrd import read_nrrd_header
from segkit.io.picture_files import (
    PICTURE_SUFFIXES,
    picture_channels,
    picture_grid,
    read_picture,
    spacing_file,
    write_picture,
)
from segkit.io.picture_rules import PictureFacts, PictureRules
from segkit.io.structure_rules import StructureRules
from segkit.io.tiff import TIFF_SUFFIXES
from segkit.io.voxel_bytes import Layout, read_voxels

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ONE_FILE = {".nhdr": ".nrrd", ".mhd": ".mha"}
"""Suffix of each header that may name a data file, and that of the same format in one file."""
NOT_PICTURES = (*NIFTI_SUFFIXES, ".nrrd", ".mha", *ONE_FILE)
"""Suffixes of the volumes that segkit reads and that are not pictures."""
KEPT_AS = {".jpg": ".png", ".jpeg": ".png", ".bmp": ".png"}
"""Suffix of each picture format that cannot store labels, and that of the results instead."""
WRITTEN_SUFFIXES = (*NIFTI_SUFFIXES, ".nrrd", ".mha")
"""Suffixes of the volumes that segkit writes and that are not pictures."""
WRITTEN_PICTURES = (".png", *TIFF_SUFFIXES)
"""Suffixes of the pictures that segkit writes."""
SUFFIXES = (*NOT_PICTURES, *PICTURE_SUFFIXES)
"""Suffixes of all volumes that segkit reads."""
SMALLEST, LARGEST = 1e-6, 1e6
"""Limits in mm of voxel sizes and of the first voxel's coordinates: a nanometre, a kilometre."""
QFORM_TOLERANCE = 0.01
"""Distance in mm by which a qform may differ from the sform; a shear makes a larger difference."""
BYTES_OF_SCALED = np.dtype(np.float32).itemsize
BYTES_OF_LABEL = 8
"""Bytes per label in the result of `read_labels`."""
BYTES_OF_IMAGE = 12
"""Bytes per voxel that preparing an image needs: two copies of a channel, and labels."""
FARTHEST_VALUE = 1e30
"""Largest absolute value of an image; larger ones would overflow sums in single precision."""
ROUNDING, ROUNDING_OF_SIZE, LARGEST_ROUNDING = 1e-3, 5e-7, 0.1
"""Rounding errors that labels may have: always, as a fraction of the number, and at most."""
AS_IT_SAYS = PictureRules()
"""The default rules, by which pictures are read as their files say."""
Read = TypeVar("Read")
logger = logging.getLogger(__name__)


def suffix_of(path: Path) -> str:
    """The volume suffix of a file name, such as '.nii.gz'.

    Raises VolumeError if segkit cannot read files with this suffix.
    """
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return path.name[-len(suffix) :]
    raise VolumeError(f"{path}: expected a volume named *{', *'.join(SUFFIXES)}; convert it first")


def result_suffix(path: Path) -> str:
    """The suffix of results for a volume: its own, or that of a format that can store labels."""
    suffix = suffix_of(path)
    return {**ONE_FILE, **KEPT_AS}.get(suffix.lower(), suffix)


def is_picture(path: Path) -> bool:
    """Whether a file is a picture, by its suffix."""
    return path.name.lower().endswith(PICTURE_SUFFIXES)


def numbers_suffix(suffix: str) -> str:
    """Suffix of results that are not labels, such as maps, if labels have `suffix`."""
    if suffix.lower() not in PICTURE_SUFFIXES or suffix.lower() in TIFF_SUFFIXES:
        return suffix
    return ".tif"


def volumes_among(files: Iterable[Path]) -> list[Path]:
    """The volumes among files, sorted. Pictures only count if there are no other volumes."""
    found = [file for file in sorted(files) if file.name.lower().endswith(SUFFIXES)]
    scans = [file for file in found if not is_picture(file)]
    return scans or found


def check_writable(path: Path) -> None:
    """Raise VolumeError if segkit cannot write a volume with this suffix."""
    written = (*WRITTEN_SUFFIXES, *WRITTEN_PICTURES)
    if not path.name.lower().endswith(written):
        raise VolumeError(f"{path}: expected a name in *{', *'.join(written)}; change its suffix")


def stem_of(path: Path) -> str:
    """The file name without its volume suffix, such as 'scan' for 'scan.nii.gz'."""
    return path.name[: -len(suffix_of(path))]


def has_volume_suffix(path: Path) -> bool:
    """Whether a name is that of a volume in a file, and not of a DICOM file or a folder."""
    return path.name.lower().endswith(SUFFIXES)


def case_name_of(path: Path) -> str:
    """The name of a case from one of its files: without the suffix if it is that of a volume."""
    return stem_of(path) if has_volume_suffix(path) else path.name


def check_readable(path: Path) -> None:
    """Raise VolumeError if a path names neither a volume by its suffix nor DICOM by its content."""
    if not is_dicom_path(path):
        suffix_of(path)


def is_dicom_path(path: Path) -> bool:
    """Whether a path is a folder of DICOM images or a DICOM file, and no volume by its name."""
    return (path.is_dir() or not has_volume_suffix(path)) and is_dicom(path)


def read_volume(
    path: str | Path, *, rules: PictureRules = AS_IT_SAYS, working: float = 0
) -> Volume:
    """A volume with its grid, read from a file, or from the files of a DICOM series.

    Args:
        path: a NIfTI (`.nii`, `.nii.gz`), NRRD (`.nrrd`, `.nhdr`) or MetaImage (`.mha`, `.mhd`)
            file, or a picture (`.png`, `.tif`, `.ome.tif`, `.jpg`, `.bmp`). A `.nhdr` or `.mhd`
            header may name a data file in its own folder. Or the folder of a DICOM series; if it
            holds several series, any file of one.
        rules: settings for reading pictures, such as the pixel size.
        working: bytes per voxel (x, y, z) that the caller will need in addition to the values. A
            volume that does not fit into free memory with them is refused before anything is
            allocated.

    Returns:
        The voxels, (x, y, z) or (x, y, z, channel), in the file's axis order and type (float32 if
        the file scales them). A 2D image has one slice. Axes of size 1 beyond the third are
        dropped. The grid is in mm, RAS+. A picture is (column, row, slice) or (column, row, slice,
        channel), without opacity; a palette is converted to grey or RGB.

    Raises:
        VolumeError: the file does not exist, is damaged, or is not a volume.

    Example:
        >>> scan = read_volume("scan.nii.gz")
        >>> scan.data.shape, scan.grid.spacing
        ((256, 256, 170), (1.0, 1.0, 1.2))
    """
    path = Path(path)
    if is_dicom_path(path):
        return read_series(series_at(path), working=working)
    return _open(path, partial(_read, rules=rules, working=working))


def read_label_values(
    path: str | Path, *, rules: PictureRules = AS_IT_SAYS, working: float = 0
) -> Volume:
    """The values of a label file, which are not checked; a picture gives one number per pixel.

    Args:
        path: a file that `read_volume` can read, or a DICOM structure set or segmentation if the
            rules give its classes and its series.
        rules: as for `read_volume`; if it has colours, they give the labels of a picture.
        working: as for `read_volume`.

    Raises:
        VolumeError: as for `read_volume`, or a picture cannot be labels.
    """
    path = Path(path)
    if is_dicom_path(path):
        if structure_kind(path) is None:
            return read_series(series_at(path), working=working)
        structures, grid = _placed_structures(path, rules)
        return Volume(paint_structures(path, grid, structures), grid)
    return _open(path, partial(_read, rules=rules, as_labels=True, working=working))


def _placed_structures(path: Path, rules: PictureRules) -> tuple[StructureRules, Grid]:
    """How the structures of a file become labels, and the grid that they are painted on."""
    structures = rules.structures
    if structures is None or path not in structures.images:
        raise VolumeError(
            f"{path}: is a DICOM structure set or segmentation; name its structures with "
            "data.dicom.structures in a dataset's YAML file, and pass that file"
        )
    return structures, read_grid(structures.images[path])


def read_labels(
    path: str | Path, *, rules: PictureRules = AS_IT_SAYS, working: float = 0
) -> Volume:
    """A volume of labels, read from a file.

    Args:
        path: a file that `read_volume` can read.
        rules: as for `read_volume`; if it has colours, they give the labels of a picture.
        working: as for `read_volume`.

    Returns:
        The labels, (x, y, z), int64, with 0 for the background.

    Raises:
        VolumeError: as for `read_volume`, or the values are not whole numbers (up to rounding
            errors), or a voxel has several values.

    Example:
        >>> num_voxels = (read_labels("labels.nii.gz").data == 1).sum()
    """
    volume = read_label_values(path, rules=rules, working=BYTES_OF_LABEL + working)
    expected = f"{path}: expected whole numbers, one per voxel, as labels"
    advice = "convert it, or pass another file"
    if volume.data.ndim != 3:
        raise VolumeError(f"{expected}, found {volume.data.shape[3]} values per voxel; {advice}")
    values = whole_numbers(volume.data, path)
    whole = np.empty(values.shape, np.int64, order="F")
    for z in range(values.shape[2]):
        found, here = values[..., z], whole[..., z]
        with np.errstate(invalid="ignore"):
            here[...] = found
        strange = found[here != found]
        if len(strange):
            raise VolumeError(f"{expected}, found {in_full(strange[0])}; {advice}")
    return volume.like(whole)


_ROUNDED: ContextVar[dict[str, float] | None] = ContextVar("rounded", default=None)


@contextmanager
def noting_rounded_labels() -> Iterator[dict[str, float]]:
    """Note the label files whose values are rounded to whole numbers in this block.

    Yields:
        The largest difference from a whole number, by the path of each such file.
    """
    noted: dict[str, float] = {}
    before = _ROUNDED.set(noted)
    try:
        yield noted
    finally:
        _ROUNDED.reset(before)


def whole_numbers(values: ndarray, path: str | Path) -> ndarray:
    """The values of a label file, with rounding errors removed.

    A file that scales its values, or a program that saves them again, may turn 3 into 2.9999999993.
    Values within 0.001 of a whole number are rounded to it; large numbers may differ by 5e-7 of
    their size, a few last digits of single precision. Other values are not changed, and the caller
    refuses them.

    Args:
        values: the values of the file.
        path: the file, for the log and for `noting_rounded_labels`.
    """
    if values.dtype.kind != "f":
        return values
    whole, farthest = values, 0.0
    for plane in np.ndindex(values.shape[2:]):
        here = (..., *plane)
        with np.errstate(invalid="ignore"):
            nearest = np.rint(values[here])
            off = np.abs(values[here] - nearest)
            near = off <= np.clip(ROUNDING_OF_SIZE * np.abs(nearest), ROUNDING, LARGEST_ROUNDING)
        if not (apart := float(off.max(where=near, initial=0))):
            continue
        if whole is values:
            whole = values.copy(order="F")
        whole[here] = np.where(near, nearest, values[here])
        farthest = max(farthest, apart)
    if farthest:
        logger.info("%s: rounded labels that were up to %.2g off whole numbers", path, farthest)
        if (noted := _ROUNDED.get()) is not None:
            noted[str(path)] = farthest
    return whole


def rounded_in_words(rounded: Mapping[str, float]) -> str | None:
    """A sentence about label files whose values were rounded; None if there are none.

    Args:
        rounded: the largest difference from a whole number, by file.
    """
    if not rounded:
        return None
    worst = max(rounded, key=lambda path: rounded[path])
    return (
        f"rounded the labels of {counted(len(rounded), 'file')} to whole numbers; the largest "
        f"difference was {rounded[worst]:.2g}, in {worst}"
    )


def in_full(value: Any) -> str:
    """A number as text with all its digits; whole numbers have no decimal point."""
    return str(value).removesuffix(".0")


def read_grid(path: str | Path, *, rules: PictureRules = AS_IT_SAYS) -> Grid:
    """The grid of a volume (mm, RAS+), read from its header only.

    Raises VolumeError as `read_volume` does, but damaged voxels are not noticed.
    """
    path = Path(path)
    if is_dicom_path(path):
        if structure_kind(path) is not None:
            return _placed_structures(path, rules)[1]
        return arranged(series_at(path))[1]
    if is_picture(path):
        return read_picture_facts(path, rules=rules)[0]
    return _open(path, lambda path: _grid(_layout(path)[1]))


def read_picture_facts(
    path: str | Path, *, rules: PictureRules = AS_IT_SAYS
) -> tuple[Grid, PictureFacts]:
    """The grid and the facts of a picture, read from its header only. Raises VolumeError."""
    grid, facts = _open(Path(path), partial(picture_grid, rules=rules))
    return Grid(grid.shape, _checked_affine(grid.affine)), facts


def read_num_channels(path: str | Path, *, rules: PictureRules = AS_IT_SAYS) -> int:
    """Number of values per voxel, read from the header only. Raises as `read_grid` does."""
    path = Path(path)
    if is_dicom_path(path):
        return 1
    if is_picture(path):
        return _open(path, partial(picture_channels, rules=rules))
    return _open(path, lambda path: _layout(path)[1].channels or 1)


def files_of(path: Path) -> tuple[Path, ...]:
    """The files of a volume: the file itself, and the data file if its header names one.

    The files of a DICOM series are those of all slices. The header is only read if its format can
    name a data file; VolumeError as in `read_grid`.
    """
    if is_dicom_path(path):
        return (path,) if structure_kind(path) else series_at(path).files
    if is_picture(path):
        beside = spacing_file(path)
        return (path, beside) if beside else (path,)
    if not path.name.lower().endswith(tuple(ONE_FILE)):
        return (path,)
    beside = _open(path, lambda path: _layout(path)[1].file)
    return (path, beside) if beside else (path,)


def value_problem(values: ndarray) -> str | None:
    """A phrase 'holds …' that says why the image's values cannot be used, or None if they can."""
    if values.dtype.kind != "f":
        return None
    with np.errstate(invalid="ignore"):
        low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        planes = [np.isfinite(plane).sum(axis=(0, 1)) for plane in np.moveaxis(values, 2, 0)]
        numbers = np.sum(planes, axis=0)  # of each channel
        if not np.all(numbers):
            where = " in one of its channels" if values.ndim > 3 else ""
            return f"holds only NaN or infinite values{where}; make the file again, or leave it out"
        strange = values.size - int(np.sum(numbers))
        return (
            f"holds {strange:,} NaN or infinite values among {values.size:,}; if they lie outside "
            f"a mask, set them to 0 in the file, or train with data.nan: background, which does so"
        )
    if max(-low, high) > FARTHEST_VALUE:
        return (
            f"holds values from {low:g} to {high:g}, expected none beyond {FARTHEST_VALUE:g}; "
            f"rescale them"
        )
    return None


def write_volume(path: str | Path, volume: Volume) -> None:
    """Write a volume, complete or not at all.

    If the volume lies on the grid of its header, the file gets the header's affine, qform, sform,
    codes and units, bit for bit. On another grid both forms are set from the grid's affine, in mm.
    A qform cannot represent sheared axes: its code is then 0, so that no reader uses it. No format
    has float16, so these values become float32. NIfTI is written channel by channel; other formats
    need a copy of the volume in memory.

    PNG can hold one slice, of whole numbers from 0 to 65535 or of RGB; TIFF can hold any volume.
    Both store the pixel size, if it is known, and the EXIF orientation, but no other position.

    Args:
        path: a name in `.nii`, `.nii.gz`, `.nrrd`, `.mha`, `.png`, `.tif` or `.ome.tif`; its folder
            is made if it does not exist.
        volume: the voxels and their grid.

    Raises:
        VolumeError: the name has another suffix, or the format cannot hold the volume.
        OSError: the file cannot be written.

    Example:
        >>> scan = read_volume("scan.nii.gz")
        >>> write_volume("bright.nii.gz", scan.like((scan.data > 100).astype("uint8")))
    """
    path = Path(path)
    check_writable(path)
    with whole(path) as unfinished:
        if path.name.lower().endswith(NIFTI_SUFFIXES):
            _write_nifti(unfinished, volume)
        elif is_picture(path):
            data, grid = volume.data, volume.grid
            if volume.picture is None:
                data, grid = _as_shown(data, grid)
            try:
                write_picture(unfinished, path.name, data, grid.spacing, volume.picture)
            except VolumeError as error:
                raise VolumeError(f"{path}: {error}") from None
        else:
            image = _to_itk(volume)
            try:
                simple_itk().WriteImage(image, str(unfinished), useCompression=True)
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise VolumeError(
                    f"{path}: cannot be written by SimpleITK: {reason}; choose another format"
                ) from None


def _open(path: Path, read: Callable[[Path], Read]) -> Read:
    suffix = suffix_of(path).lower()
    if not path.exists():
        raise VolumeError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise VolumeError(f"{path}: expected a file, found a folder; check the path")
    try:
        return read(path)
    except VolumeError as error:
        raise VolumeError(f"{path}: {_with_advice(str(error))}") from None
    except MemoryError:
        raise VolumeError(
            f"{path}: does not fit into memory; free some memory, or crop it"
        ) from None
    except (HeaderDataError, OSError, EOFError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise VolumeError(f"{path}: cannot be read as {suffix}: {_with_advice(reason)}") from None


def _with_advice(reason: str) -> str:
    return reason if ";" in reason else f"{reason}; repair or convert it, or get a new copy"


def _layout(path: Path) -> tuple[Nifti1Header | None, Layout, tuple[float, float]]:
    match suffix_of(path).lower():
        case ".nrrd" | ".nhdr":
            return None, read_nrrd_header(path), (1.0, 0.0)
        case ".mha" | ".mhd":
            return None, read_metaimage_header(path), (1.0, 0.0)
    return read_nifti_header(path)


def _read(
    path: Path,
    rules: PictureRules = AS_IT_SAYS,
    as_labels: bool = False,
    *,
    working: float = 0,
) -> Volume:
    if is_picture(path):
        data, grid, facts = read_picture(path, rules, as_labels=as_labels)
        return Volume(data, Grid(grid.shape, _checked_affine(grid.affine)), picture=facts)
    header, layout, scaling = _layout(path)
    grid = _grid(layout)
    scaled = scaling != (1, 0)
    if scaled:
        working += BYTES_OF_SCALED * (layout.channels or 1)
    data = read_voxels(path, layout, working=working)
    if scaled:
        data = _scaled(data, *scaling)
    return Volume(data, grid, header)


def _as_shown(data: ndarray, grid: Grid) -> tuple[ndarray, Grid]:
    """Data and grid turned for a picture: columns run to the patient's left, rows to the back."""
    left_back = Grid((1, 1, 1), LPS_TO_RAS)
    turn = Orientation.between(grid, left_back)
    return turn.turn(data), turn.turn_grid(grid)


def _grid(layout: Layout) -> Grid:
    return Grid(layout.space, _checked_affine(layout.affine))


def _scaled(stored: ndarray, slope: float, intercept: float) -> ndarray:
    """Scaled values in float32, computed in float64 one part at a time."""
    values = np.empty(stored.shape, np.float32, order="F")
    with np.errstate(over="ignore", invalid="ignore"):  # callers refuse values that are not finite
        for part in range(stored.shape[-1]):
            values[..., part] = stored[..., part] * np.float64(slope) + np.float64(intercept)
    return values


def _checked_affine(affine: ndarray) -> ndarray:
    directions = affine[:3, :3]
    with np.errstate(over="ignore"):
        spacing = np.linalg.norm(directions, axis=0)
    if not np.isfinite(affine).all():
        raise VolumeError("its affine holds NaN or infinite values; repair its header")
    if not (spacing > 0).all():
        raise VolumeError(
            f"expected voxel sizes above zero, found {spacing.tolist()} mm; repair its header"
        )
    if not ((spacing >= SMALLEST) & (spacing <= LARGEST)).all():
        raise VolumeError(
            f"expected voxel sizes from {SMALLEST:g} to {LARGEST:g} mm, found {spacing.tolist()}; "
            f"repair its header"
        )
    if np.abs(affine[:3, 3]).max() > LARGEST:
        raise VolumeError(
            f"expected its first voxel within {LARGEST:g} mm of the origin, found it at "
            f"{affine[:3, 3].tolist()}; repair its header"
        )
    if abs(np.linalg.det(directions / spacing)) < 1e-3:
        raise VolumeError("its affine is singular: its axes lie in one plane; repair its header")
    return affine


def _write_nifti(path: Path, volume: Volume) -> None:
    image = _to_nifti(volume)
    data = np.asanyarray(image.dataobj)
    kind = image.get_data_dtype()
    with gzip_file(path) if path.name.lower().endswith(".gz") else path.open("wb") as file:
        image.header.set_slope_inter(1, 0)
        image.header.write_to(file)
        for channel in np.moveaxis(data, 3, 0) if data.ndim == 4 else [data]:
            stored: Any = np.asarray(channel, kind, order="F").T
            file.write(stored)  # not copied, because its first axis is now the slowest
            release(data)


def _to_nifti(volume: Volume) -> Nifti1Image:
    source = volume.header
    shape = volume.data.shape
    header = source.copy() if source is not None else Nifti1Header()
    same_grid = source is not None and np.array_equal(millimetre_affine(source), volume.grid.affine)
    if same_grid and len(header.get_data_shape()) == 2 and shape[2:] == (1,):
        shape = shape[:2]
    kind = volume.data.dtype
    header.set_data_dtype(np.float32 if kind == np.float16 else kind)
    pixdim = header["pixdim"].copy()
    header.set_data_shape(shape)
    header["pixdim"] = pixdim  # setting a 2D shape has reset the slice thickness to 1 mm
    header.set_slope_inter(None, None)
    for field in ("cal_min", "cal_max", "slice_start", "slice_end", "slice_code", "slice_duration"):
        header[field] = 0
    # Text fields may contain names of patients.
    for field in ("data_type", "db_name", "aux_file", "intent_name"):
        if field in header.structarr.dtype.names:
            header[field] = b""
    header["descrip"] = b"segkit"
    header["intent_code"] = 0
    # The affine of a header without codes depends on its shape, so it is compared after set_shape.
    if not np.array_equal(millimetre_affine(header), volume.grid.affine):
        code = max(int(header["sform_code"]), int(header["qform_code"])) or 2
        header.set_xyzt_units("mm")
        header.set_sform(volume.grid.affine, code)
        header.set_qform(volume.grid.affine, code, strip_shears=True)
        by_sform = Grid(volume.grid.shape, header.get_sform())
        by_qform = Grid(volume.grid.shape, header.get_qform())
        if not by_qform.agrees_with(by_sform, tolerance=QFORM_TOLERANCE):
            header["qform_code"] = 0
    data = volume.data.reshape(shape, order="A")
    if isinstance(header, Nifti2Header):
        return Nifti2Image(data, None, header)
    return Nifti1Image(data, None, header)


def _to_itk(volume: Volume) -> Any:
    affine = LPS_TO_RAS @ volume.grid.affine
    spacing = volume.grid.spacing
    axes = (2, 1, 0, *range(3, volume.data.ndim))
    array = np.ascontiguousarray(volume.data.transpose(axes))
    image = simple_itk().GetImageFromArray(
        array.astype(np.float32) if array.dtype == np.float16 else array,
        isVector=volume.data.ndim == 4,
    )
    image.SetSpacing(spacing)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / np.array(spacing)).ravel().tolist())
    return image
