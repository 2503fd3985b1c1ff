"""Headers of NIfTI files, of which only the fixed bytes are read.

Extensions, which may hold anything from XML to DICOM, are skipped. Voxels begin at vox_offset; some
programs write 0 to mean "right after the header". Voxels are placed in the order of precedence of
the standard: by the sform if its code is set, otherwise by the qform if its code is set. If neither
is set, they are placed by the voxel sizes, around the image's centre and with x from right to left
(the standard would put the first voxel at 0). Affines are in mm, whatever the file's unit.
"""

import itertools
import logging
import math
from pathlib import Path
from typing import Literal

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from numpy import ndarray

from segkit.errors import VolumeError
from segkit.io.voxel_bytes import GZIP, Layout, inflated

# Keys are the three lowest bits of xyzt_units; a code that the standard does not define means mm.
MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}
CODES = range(6)
"""Valid codes of a qform or sform."""
LONGEST_QUATERNION = 1.0001
"""Largest length of a quaternion that counts as a unit quaternion with rounded decimals."""
LENGTH = 544
"""Bytes of a NIfTI-2 header, the longer one, and of the extension flags after it."""
# By header length, which is a header's first number: class, place of the magic, and the magic of a
# single file and of a pair of files.
VERSIONS: dict[int, tuple[type[Nifti1Header], int, bytes, bytes]] = {
    348: (Nifti1Header, 344, b"n+1\0", b"ni1\0"),
    540: (Nifti2Header, 4, b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n"),
}
BYTE_ORDERS: tuple[tuple[Literal["little", "big"], str], ...] = (("little", "<"), ("big", ">"))

# nibabel logs its repairs of headers; important faults are refused here before that.
_silent = logging.getLogger(f"{__name__}.repairs")
_silent.disabled = True


def read_nifti_header(path: Path) -> tuple[Nifti1Header, Layout, tuple[float, float]]:
    """The header of a file, the layout of its voxels, and the slope and intercept of their values.

    Raises VolumeError for an unsupported volume, and ValueError or nibabel's errors for a damaged
    header.
    """
    compressed = path.name.lower().endswith(".gz")
    block = _first_bytes(path, compressed)
    header = _parsed(block)
    shape = _checked_shape(header)
    _check_placing(header, len(shape))
    _shorten_quaternion(header)
    header.check_fix(logger=_silent)
    kind = header.get_data_dtype()
    if kind.kind not in "iuf" or kind.itemsize > 8:
        raise VolumeError(f"expected one real number per voxel, found {kind}")
    offset = _offset(header, block)
    if np.isinf(float(header["scl_slope"])):
        raise VolumeError("expected a finite scl_slope, found an infinite one; repair its header")
    slope, intercept = header.get_slope_inter()
    header["vox_offset"] = 0  # it is only valid for this file
    x, y, z = (*shape, 1)[:3]
    layout = Layout(
        (x, y, z),
        kind,
        millimetre_affine(header),
        offset,
        stream=0 if compressed else None,
        channels=math.prod(shape[3:]),
    )
    scaling = (1.0 if slope is None else slope, 0.0 if intercept is None else intercept)
    return header, layout, scaling


def millimetre_affine(header: Nifti1Header) -> ndarray:
    """The affine by which a header places its voxels, in mm."""
    return _in_millimetres(header, header.get_best_affine())


def placement(header: Nifti1Header) -> str:
    """A phrase that names the source of the positions, and how far sform and qform differ."""
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    used = "sform" if sform else "qform" if qform else "voxel sizes only"
    text = f"placed by its {used} (sform code {sform}, qform code {qform})"
    if not (sform and qform):
        return text
    try:
        other = _in_millimetres(header, header.get_qform())
    except ValueError as error:  # its quaternion is invalid
        return f"{text}; its qform is invalid: {error}"
    sizes = [(0, size - 1) for size in (*header.get_data_shape(), 1)[:3]]
    corners = np.array([(*corner, 1) for corner in itertools.product(*sizes)])
    apart = np.linalg.norm(corners @ (millimetre_affine(header) - other)[:3].T, axis=1).max()
    return text if apart < 0.01 else f"{text}; its qform differs by up to {apart:.4g} mm"


def _first_bytes(path: Path, compressed: bool) -> bytes:
    """The first bytes of a file: as many as the longest header has, or fewer."""
    if compressed:
        with path.open("rb") as file:
            if file.read(2) != GZIP:
                raise ValueError("it is not compressed by gzip; rename it to .nii")
        block = b""
        for piece in inflated(path):
            block += piece[:LENGTH]
            if len(block) >= LENGTH:
                break
    else:
        with path.open("rb") as file:
            block = file.read(LENGTH)
        if block.startswith(GZIP):
            raise ValueError("it is compressed by gzip; rename it to .nii.gz")
    return block


def _parsed(block: bytes) -> Nifti1Header:
    for byte_order, sign in BYTE_ORDERS:
        length = int.from_bytes(block[:4], byte_order)
        if length not in VERSIONS:
            continue
        kind, place, single, paired = VERSIONS[length]
        magic = block[place : place + len(single)]
        if len(block) < length:
            raise ValueError(f"its header has only {len(block)} of {length} bytes")
        if magic == paired:
            raise VolumeError("its voxels are in another file; convert both files to one .nii")
        if magic != single:
            raise ValueError(f"expected {single!r} in its header, found {magic!r}")
        return kind(block[:length], sign, check=False)
    raise ValueError("it does not begin with a NIfTI header")


def _checked_shape(header: Nifti1Header) -> tuple[int, ...]:
    """The shape: two or three spatial axes, then at most one axis larger than 1, of channels."""
    if not 1 <= int(header["dim"][0]) <= 7:
        raise ValueError(f"expected 1 to 7 axes, found {int(header['dim'][0])}")
    shape = tuple(int(size) for size in header.get_data_shape())
    if len(shape) < 2 or sum(size > 1 for size in shape[3:]) > 1 or min(shape) < 1:
        raise VolumeError(
            f"expected two or three spatial axes and at most one of channels, found shape {shape}"
        )
    return shape


def _check_placing(header: Nifti1Header, num_axes: int) -> None:
    """Raise VolumeError for unknown codes, or for invalid voxel sizes if they place the voxels."""
    for form in ("sform", "qform"):
        code = int(header[f"{form}_code"])
        if code not in CODES:
            raise VolumeError(
                f"expected a {form}_code from 0 to {CODES[-1]}, found {code}; repair its header"
            )
    sizes = header["pixdim"][1 : 1 + min(num_axes, 3)].astype(float)
    if int(header["sform_code"]) == 0 and not ((sizes > 0) & np.isfinite(sizes)).all():
        raise VolumeError(
            f"expected voxel sizes above zero, found {sizes.tolist()} mm; repair its header"
        )


def _offset(header: Nifti1Header, block: bytes) -> int:
    """The byte at which voxels begin. A vox_offset of 0 means right after the header."""
    stated = float(header["vox_offset"])
    if stated != 0:
        if not stated.is_integer():
            raise ValueError(f"expected a vox_offset that is a whole number, found {stated:g}")
        return header.get_data_offset()
    length = header.sizeof_hdr
    if any(block[length : length + 1]):
        raise VolumeError(
            f"its vox_offset is 0 although extensions follow its header, so its first voxel may be "
            f"anywhere after byte {length + 4}; repair its header"
        )
    return length + 4


def _shorten_quaternion(header: Nifti1Header) -> None:
    """Scale a quaternion that rounding has made too long to length 1, as ITK and FSL do.

    nibabel accepts lengths slightly above 1; such headers are not changed.
    """
    names = ("quatern_b", "quatern_c", "quatern_d")
    length = math.hypot(*(float(header[name]) for name in names))
    accepted = math.sqrt(1 + float(header.quaternion_threshold))
    if int(header["qform_code"]) == 0 or not length >= accepted:
        return
    if length <= LONGEST_QUATERNION:
        for name in names:
            header[name] = float(header[name]) / length
    elif int(header["sform_code"]) == 0:
        raise VolumeError(
            f"expected a qform with a quaternion of length 1, found {length:g}; repair its header"
        )


def _in_millimetres(header: Nifti1Header, affine: ndarray) -> ndarray:
    scaled = affine.copy()
    scaled[:3] *= MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    return scaled
