"""Writing of volumes as NIfTI."""

from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.nifti2 import Nifti2Header, Nifti2Image

from segkit.geometry.grid import Grid
from segkit.io.deflate import gzip_file
from segkit.io.disk_arrays import release
from segkit.io.gridded import Volume
from segkit.io.nifti import millimetre_affine

QFORM_TOLERANCE = 0.01
"""Distance in mm by which a qform may differ from the sform; a shear makes a larger difference."""


def write_nifti(path: Path, volume: Volume) -> None:
    """Write a volume channel by channel; `write_volume` describes the content of the file."""
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
