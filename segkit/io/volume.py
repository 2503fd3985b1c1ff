"""Volumes: voxels with their grid, read from files and written back without loss.

`nifti`, `nrrd` and `metaimage` read headers, and refuse those that they do not understand.
`voxel_bytes` reads voxels, and allocates no more than the file can hold. `bitmap` and `tiff` read
and write pictures, and `raster` places their pixels. nibabel writes NIfTI; SimpleITK writes NRRD
and MetaImage. SimpleITK does not read them, because it crashes on some damaged files and returns
wrong voxels for others (docs/volumes.md has the counts).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.spatialimages import HeaderDataError
from numpy import ndarray

from segkit.errors import VolumeError
from segkit.geometry.grid import LPS_TO_RAS, Grid, Orientation
from segkit.io.atomic import whole
from segkit.io.dicom import arranged, read_series
from segkit.io.dicom_labels import paint_structures, structure_kind
from segkit.io.dicom_listing import is_dicom, series_at
from segkit.io.gridded import Volume as Volume
from segkit.io.itk import itk_image, simple_itk
from segkit.io.metaimage import read_metaimage_header
from segkit.io.nifti import read_nifti_header
from segkit.io.nrrd import read_nrrd_header
from segkit.io.picture_files import (
    picture_channels,
    picture_grid,
    read_picture,
    spacing_file,
    write_picture,
)
from segkit.io.picture_rules import LARGEST_MM, SMALLEST_MM, PictureFacts, PictureRules
from segkit.io.structure_rules import StructureRules
from segkit.io.volume_names import (
    NIFTI_SUFFIXES,
    ONE_FILE,
    check_writable,
    has_volume_suffix,
    is_picture,
    suffix_of,
)
from segkit.io.voxel_bytes import Layout, read_voxels
from segkit.io.whole_numbers import in_full, whole_numbers
from segkit.io.write_nifti import write_nifti

BYTES_OF_SCALED = np.dtype(np.float32).itemsize
BYTES_OF_LABEL = 8
"""Bytes per label in the result of `read_labels`."""
BYTES_OF_IMAGE = 12
"""Bytes per voxel that preparing an image needs: two copies of a channel, and labels."""
AS_IT_SAYS = PictureRules()
"""The default rules, by which pictures are read as their files say."""
Read = TypeVar("Read")


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
        VolumeError: the file does not exist, is damaged, is not a volume, or does not fit into
            free memory; or the folder holds several series.
        SegkitError: a DICOM file with several frames needs pydicom, which is not installed.

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
            rules give its classes and the image on whose grid they are painted.
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
    """The rules that turn the structures of a file into labels, and the grid of the labels."""
    structures = rules.structures
    if structures is None or structures.image is None:
        raise VolumeError(
            f"{path}: is a DICOM structure set or segmentation; name its structures with "
            "data.dicom.structures in a dataset's YAML file, and pass that file"
        )
    return structures, read_grid(structures.image)


def read_labels(
    path: str | Path, *, rules: PictureRules = AS_IT_SAYS, working: float = 0
) -> Volume:
    """A volume of labels, read from a file.

    Args:
        path: a file that `read_volume` can read.
        rules: as for `read_volume`; if it has colours, they give the labels of a picture.
        working: as for `read_volume`.

    Returns:
        The labels, (x, y, z), int64, with the numbers in the file.

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
            write_nifti(unfinished, volume)
        elif is_picture(path):
            data, grid = volume.data, volume.grid
            if volume.picture is None:
                data, grid = _as_shown(data, grid)
            try:
                write_picture(unfinished, path.name, data, grid.spacing, volume.picture)
            except VolumeError as error:
                raise VolumeError(f"{path}: {error}") from None
        else:
            image = itk_image(volume)
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
    # NIfTI rounds the limits to float32.
    if not ((spacing >= SMALLEST_MM * 0.999) & (spacing <= LARGEST_MM * 1.001)).all():
        raise VolumeError(
            f"expected voxel sizes from {SMALLEST_MM:g} to {LARGEST_MM:g} mm, "
            f"found {spacing.tolist()}; repair its header"
        )
    if np.abs(affine[:3, 3]).max() > LARGEST_MM:
        raise VolumeError(
            f"expected its first voxel within {LARGEST_MM:g} mm of the origin, found it at "
            f"{affine[:3, 3].tolist()}; repair its header"
        )
    if abs(np.linalg.det(directions / spacing)) < 1e-3:
        raise VolumeError("its affine is singular: its axes lie in one plane; repair its header")
    return affine
