"""Volumes: voxels with the grid they lie on, read from files and written back without loss.

NIfTI goes through nibabel, NRRD and MetaImage through SimpleITK. The affine is nibabel's, in
millimetres whatever the file's unit: the sform if its code is set, else the qform, as the NIfTI-1
standard has it; with neither, voxel sizes about the image's centre with x from right to left, where
the standard would put the first voxel at 0.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.nifti2 import Nifti2Header, Nifti2Image
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError
from numpy import ndarray

from segkit.errors import VolumeError
from segkit.files import whole
from segkit.geometry import Grid
from segkit.scratch import release

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".nrrd", ".mha")
SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES
# By the three lowest bits of xyzt_units; a code that the standard leaves undefined counts as mm.
MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}
Result = TypeVar("Result")
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxel values and where they lie.

    `data` is (x, y, z) or (x, y, z, channel) in the file's own axis order; `grid` places its first
    three axes. `header` is the NIfTI header it was read with, which keeps codes and units for
    whatever is written on the same grid.
    """

    data: ndarray
    grid: Grid
    header: Nifti1Header | None = None

    def __post_init__(self) -> None:
        if self.data.shape[:3] != self.grid.shape:
            raise ValueError(f"data of shape {self.data.shape} on a grid of {self.grid.shape}")

    def like(self, data: ndarray) -> "Volume":
        """Other values on the same grid, with the same codes and units."""
        return replace(self, data=data)

    def on(self, grid: Grid, data: ndarray) -> "Volume":
        """Values on another grid of the same world, such as a coarser one."""
        return Volume(data, grid, self.header)


def suffix_of(path: Path) -> str:
    """The volume suffix of a file name, such as '.nii.gz'.

    Raises VolumeError where it is none that segkit reads.
    """
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return path.name[-len(suffix) :]
    raise VolumeError(f"{path}: expected a volume named *{', *'.join(SUFFIXES)}; convert it first")


def stem_of(path: Path) -> str:
    """The file name without its volume suffix: 'scan' for 'scan.nii.gz'."""
    return path.name[: -len(suffix_of(path))]


def read_volume(path: Path) -> Volume:
    """Read a volume with its grid.

    Values keep the file's type unless the file scales them (float32 then). A 2D image becomes one
    slice; a 4D one has its channels last.

    Raises VolumeError, in one sentence, for anything that is not such a file.
    """
    return _open(path, _read_nifti, _read_itk)


def read_labels(path: Path) -> Volume:
    """A volume of labels, int64. Raises VolumeError for anything but whole numbers from 0 on."""
    volume = read_volume(path)
    with np.errstate(invalid="ignore"):
        whole = volume.data.astype(np.int64)
    if volume.data.ndim != 3 or not np.array_equal(whole, volume.data) or whole.min() < 0:
        raise VolumeError(f"{path}: expected whole numbers from 0 on, one per voxel, as labels")
    return volume.like(whole)


def read_grid(path: Path) -> Grid:
    """The grid of a volume, from its header alone.

    Raises VolumeError as `read_volume` does, save for damage that only the voxels show.
    """
    return _open(path, lambda p: _nifti_grid(p, _load_nifti(p)), lambda p: _read_itk(p).grid)


def write_volume(path: Path, volume: Volume) -> None:
    """Write a volume whole or not at all.

    On the grid that its header describes, affine, qform, sform, their codes and units are the
    header's own, bit for bit; on another grid both forms are set from the grid's affine, in mm.
    Float16, which no format knows, becomes float32. NIfTI is written channel by channel; for NRRD
    and MetaImage the whole is put together in memory.
    """
    suffix = suffix_of(path).lower()
    with whole(path) as partial:
        if suffix in NIFTI_SUFFIXES:
            _write_nifti(partial, volume)
        else:
            _sitk().WriteImage(_to_itk(volume), str(partial), useCompression=True)


def _open(path: Path, nifti: Callable[[Path], Result], itk: Callable[[Path], Result]) -> Result:
    suffix = suffix_of(path).lower()
    if not path.exists():
        raise VolumeError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise VolumeError(f"{path}: expected a file, found a folder")
    try:
        return nifti(path) if suffix in NIFTI_SUFFIXES else itk(path)
    except (
        ImageFileError,
        HeaderDataError,
        OSError,
        EOFError,
        ValueError,
        OverflowError,
        MemoryError,
        RuntimeError,  # what SimpleITK raises for everything
        zlib.error,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise VolumeError(f"{path}: cannot be read as {suffix}: {reason}") from None


def _load_nifti(path: Path) -> Nifti1Image | Nifti2Image:
    image = nib.load(path)
    if not isinstance(image, Nifti1Image | Nifti2Image):
        raise VolumeError(f"{path}: expected NIfTI, found {type(image).__name__}")
    return image


def _nifti_grid(path: Path, image: Nifti1Image | Nifti2Image) -> Grid:
    shape = image.shape
    if not 2 <= len(shape) <= 5 or (len(shape) == 5 and shape[3] != 1) or min(shape) < 1:
        raise VolumeError(
            f"{path}: expected two or three axes and at most one of channels, found shape {shape}"
        )
    x, y, z = (*shape, 1)[:3]
    return Grid((x, y, z), _checked_affine(path, _millimetre_affine(image.header)))


def _millimetre_affine(header: Nifti1Header) -> ndarray:
    affine: ndarray = header.get_best_affine().copy()
    affine[:3] *= MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    return affine


def _read_nifti(path: Path) -> Volume:
    image = _load_nifti(path)
    grid = _nifti_grid(path, image)
    # The header has forgotten its scaling by now; what applies it to the voxels has not.
    proxy: Any = image.dataobj
    data = np.asanyarray(proxy.get_unscaled())
    if data.dtype.kind not in "biuf":
        raise VolumeError(f"{path}: expected one real number per voxel, found {data.dtype}")
    if (proxy.slope, proxy.inter) != (1, 0):
        data = _scaled(data, proxy.slope, proxy.inter)
    data = data.astype(data.dtype.newbyteorder("="), copy=False)
    channels = data.shape[3:][-1:]
    return Volume(data.reshape(grid.shape + channels, order="A"), grid, image.header)


def _scaled(stored: ndarray, slope: float, intercept: float) -> ndarray:
    """Float32, worked out in float64 a part at a time."""
    values = np.empty(stored.shape, np.float32, order="F")
    for part in range(stored.shape[-1]):
        values[..., part] = stored[..., part] * np.float64(slope) + np.float64(intercept)
    return values


def _checked_affine(path: Path, affine: ndarray) -> ndarray:
    directions = affine[:3, :3]
    spacing = np.linalg.norm(directions, axis=0)
    if not np.isfinite(affine).all():
        raise VolumeError(
            f"{path}: its affine holds values that are not numbers; repair its header"
        )
    if not (spacing > 0).all():
        raise VolumeError(f"{path}: expected voxel sizes above zero, found {spacing.tolist()} mm")
    if abs(np.linalg.det(directions / spacing)) < 1e-3:
        raise VolumeError(f"{path}: its affine is singular: two of its axes point one way")
    return affine


def _write_nifti(path: Path, volume: Volume) -> None:
    image = _to_nifti(volume)
    data = np.asanyarray(image.dataobj)
    kind = image.get_data_dtype()
    with ImageOpener(str(path), "wb") as file:
        image.header.set_slope_inter(1, 0)
        image.header.write_to(file)
        for channel in np.moveaxis(data, 3, 0) if data.ndim == 4 else [data]:
            stored: Any = np.asarray(channel, kind, order="F").T
            file.write(stored)  # without a copy, as its first axis is the slowest now
            release(data)


def _to_nifti(volume: Volume) -> Nifti1Image:
    source = volume.header
    shape = volume.data.shape
    header = source.copy() if source is not None else Nifti1Header()
    same_grid = source is not None and np.array_equal(
        _millimetre_affine(source), volume.grid.affine
    )
    if same_grid and len(header.get_data_shape()) == 2 and shape[2:] == (1,):
        shape = shape[:2]
    kind = volume.data.dtype
    header.set_data_dtype(np.float32 if kind == np.float16 else kind)
    pixdim = header["pixdim"].copy()
    header.set_data_shape(shape)
    header["pixdim"] = pixdim  # of a 2D image, the shape makes the slice 1 mm thick
    header.set_slope_inter(None, None)
    for field in ("cal_min", "cal_max", "slice_start", "slice_end", "slice_code", "slice_duration"):
        header[field] = 0
    header["descrip"] = b"segkit"
    header["intent_code"] = 0
    # A header without codes has an affine that depends on its shape, which is set by now.
    if not np.array_equal(_millimetre_affine(header), volume.grid.affine):
        code = max(int(header["sform_code"]), int(header["qform_code"])) or 2
        header.set_xyzt_units("mm")
        header.set_sform(volume.grid.affine, code)
        header.set_qform(volume.grid.affine, code, strip_shears=True)
    data = volume.data.reshape(shape, order="A")
    if isinstance(header, Nifti2Header):
        return Nifti2Image(data, None, header)
    return Nifti1Image(data, None, header)


def _sitk() -> Any:
    # Imported where it is called for: it takes 0.1 GiB, a third of all that segkit imports to
    # segment a NIfTI file, which needs none of it.
    import SimpleITK

    return SimpleITK


def _read_itk(path: Path) -> Volume:
    sitk = _sitk()
    image = sitk.ReadImage(str(path))
    if image.GetDimension() not in (2, 3):
        raise VolumeError(f"{path}: expected two or three axes, found {image.GetDimension()}")
    affine = np.eye(4)
    num_axes = image.GetDimension()
    directions = np.array(image.GetDirection()).reshape(num_axes, num_axes) * image.GetSpacing()
    affine[:num_axes, :num_axes] = directions
    affine[:num_axes, 3] = image.GetOrigin()
    array = sitk.GetArrayViewFromImage(image)
    axes = [*reversed(range(num_axes)), *range(num_axes, array.ndim)]
    data = array.transpose(axes).copy(order="F")
    if data.dtype.kind not in "biuf":
        raise VolumeError(f"{path}: expected one real number per voxel, found {data.dtype}")
    x, y, z = (*image.GetSize(), 1)[:3]
    data = data.reshape((x, y, z, *data.shape[num_axes:]), order="A")
    return Volume(data, Grid((x, y, z), _checked_affine(path, LPS_TO_RAS @ affine)))


def _to_itk(volume: Volume) -> Any:
    affine = LPS_TO_RAS @ volume.grid.affine
    spacing = volume.grid.spacing
    axes = (2, 1, 0, *range(3, volume.data.ndim))
    array = np.ascontiguousarray(volume.data.transpose(axes))
    image = _sitk().GetImageFromArray(
        array.astype(np.float32) if array.dtype == np.float16 else array,
        isVector=volume.data.ndim == 4,
    )
    image.SetSpacing(spacing)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / np.array(spacing)).ravel().tolist())
    return image
