"""What a NIfTI header says, taken from its fixed bytes alone.

Extensions, which hold anything from XML to DICOM, are skipped unread. Voxels begin at vox_offset;
one of 0, which some programs write for "right after the header", is taken so. A voxel is placed by
the standard's precedence: by the sform if its code is set; else by the qform if its code is; and
with neither by the voxel sizes, about the image's centre and with x from right to left, where the
standard would put the first voxel at 0. Spacing is in mm, whatever the file's unit.
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

# By the three lowest bits of xyzt_units; a code that the standard leaves undefined counts as mm.
MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}
CODES = range(6)
"""Of a qform or sform, from unknown to a template's space."""
LONGEST_QUATERNION = 1.0001
"""Of what is left of 1 by rounding to a few decimals."""
LENGTH = 544
"""Of a NIfTI-2 header, the longer, in bytes, and of the four after it that tell of extensions."""
# The length of each version's header, which is its first number; its magic, and where that stands.
VERSIONS: dict[int, tuple[type[Nifti1Header], int, bytes, bytes]] = {
    348: (Nifti1Header, 344, b"n+1\0", b"ni1\0"),
    540: (Nifti2Header, 4, b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n"),
}
BYTE_ORDERS: tuple[tuple[Literal["little", "big"], str], ...] = (("little", "<"), ("big", ">"))

# What nibabel puts right without a word is refused beforehand or of no account.
_unheard = logging.getLogger(f"{__name__}.repairs")
_unheard.disabled = True


def read_nifti_header(path: Path) -> tuple[Nifti1Header, Layout, tuple[float, float]]:
    """A header, what it says of the voxels, and the slope and intercept that scale them.

    Raises VolumeError for what no volume is, ValueError or nibabel's errors for what no header is.
    """
    compressed = path.name.lower().endswith(".gz")
    block = _first_bytes(path, compressed)
    header = _parsed(block)
    shape = _checked_shape(header)
    _check_placing(header, len(shape))
    _shorten_quaternion(header)
    header.check_fix(logger=_unheard)
    kind = header.get_data_dtype()
    if kind.kind not in "iuf" or kind.itemsize > 8:
        raise VolumeError(f"expected one real number per voxel, found {kind}")
    offset = _offset(header, block)
    if np.isinf(float(header["scl_slope"])):
        raise VolumeError("expected a finite scl_slope, found an infinite one; repair its header")
    slope, intercept = header.get_slope_inter()
    header["vox_offset"] = 0  # it holds for this file alone
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
    """Where a header places its voxels, in mm."""
    return _in_millimetres(header, header.get_best_affine())


def placement(header: Nifti1Header) -> str:
    """What places the voxels and, where sform and qform disagree, how far they are apart."""
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    used = "sform" if sform else "qform" if qform else "voxel sizes alone"
    said = f"placed by its {used} (sform code {sform}, qform code {qform})"
    if not (sform and qform):
        return said
    try:
        other = _in_millimetres(header, header.get_qform())
    except ValueError as error:  # of its quaternion
        return f"{said}; its qform cannot be understood: {error}"
    sizes = [(0, size - 1) for size in (*header.get_data_shape(), 1)[:3]]
    corners = np.array([(*corner, 1) for corner in itertools.product(*sizes)])
    apart = np.linalg.norm(corners @ (millimetre_affine(header) - other)[:3].T, axis=1).max()
    return said if apart < 0.01 else f"{said}; its qform lies up to {apart:.4g} mm elsewhere"


def _first_bytes(path: Path, compressed: bool) -> bytes:
    """As many as the longest header has, or fewer."""
    if compressed:
        with path.open("rb") as file:
            if file.read(2) != GZIP:
                raise ValueError("it is not compressed by gzip, in spite of its name")
        block = b""
        for piece in inflated(path):
            block += piece[:LENGTH]
            if len(block) >= LENGTH:
                break
    else:
        with path.open("rb") as file:
            block = file.read(LENGTH)
        if block.startswith(GZIP):
            raise ValueError("it is compressed by gzip, in spite of its name")
    return block


def _parsed(block: bytes) -> Nifti1Header:
    for byte_order, sign in BYTE_ORDERS:
        length = int.from_bytes(block[:4], byte_order)
        if length not in VERSIONS:
            continue
        kind, place, alone, paired = VERSIONS[length]
        magic = block[place : place + len(alone)]
        if len(block) < length:
            raise ValueError(f"its header has {len(block)} of {length} bytes; it is cut short")
        if magic == paired:
            raise VolumeError("its voxels are in another file; put both into one .nii")
        if magic != alone:
            raise ValueError(f"expected {alone!r} in its header, found {magic!r}")
        return kind(block[:length], sign, check=False)
    raise ValueError("it does not begin as a NIfTI header does")


def _checked_shape(header: Nifti1Header) -> tuple[int, ...]:
    """Two or three axes of space, and at most one of channels among axes of size 1."""
    if not 1 <= int(header["dim"][0]) <= 7:
        raise ValueError(f"expected 1 to 7 axes, found {int(header['dim'][0])}")
    shape = tuple(int(size) for size in header.get_data_shape())
    if len(shape) < 2 or sum(size > 1 for size in shape[3:]) > 1 or min(shape) < 1:
        raise VolumeError(
            f"expected two or three axes and at most one of channels, found shape {shape}"
        )
    return shape


def _check_placing(header: Nifti1Header, num_axes: int) -> None:
    """Codes that the standard knows, and voxel sizes above zero where they place the voxels."""
    for form in ("sform", "qform"):
        code = int(header[f"{form}_code"])
        if code not in CODES:
            raise VolumeError(f"expected a {form}_code from 0 to {CODES[-1]}, found {code}")
    sizes = header["pixdim"][1 : 1 + min(num_axes, 3)].astype(float)
    if int(header["sform_code"]) == 0 and not ((sizes > 0) & np.isfinite(sizes)).all():
        raise VolumeError(
            f"expected voxel sizes above zero, found {sizes.tolist()} mm; repair its header"
        )


def _offset(header: Nifti1Header, block: bytes) -> int:
    """The byte of the first voxel. Without extensions, 0 stands for the first that it may be."""
    stated = float(header["vox_offset"])
    if stated != 0:
        if not stated.is_integer():
            raise ValueError(f"expected a vox_offset that is a whole number, found {stated:g}")
        return header.get_data_offset()
    length = header.sizeof_hdr
    if any(block[length : length + 1]):
        raise VolumeError(
            f"its vox_offset is 0 and extensions follow its header, so that its first voxel may "
            f"lie anywhere from byte {length + 4} on; repair its header"
        )
    return length + 4


def _shorten_quaternion(header: Nifti1Header) -> None:
    """Bring to length 1 the quaternion of a qform that is longer by rounding, as ITK and FSL do.

    nibabel takes a little more than 1 itself; the header then stays as it is.
    """
    names = ("quatern_b", "quatern_c", "quatern_d")
    length = math.hypot(*(float(header[name]) for name in names))
    taken = math.sqrt(1 + float(header.quaternion_threshold))
    if int(header["qform_code"]) == 0 or not length >= taken:
        return
    if length <= LONGEST_QUATERNION:
        for name in names:
            header[name] = float(header[name]) / length
    elif int(header["sform_code"]) == 0:
        raise VolumeError(
            f"expected a qform whose quaternion has the length 1, found {length:g}; repair its "
            f"header"
        )


def _in_millimetres(header: Nifti1Header, affine: ndarray) -> ndarray:
    scaled = affine.copy()
    scaled[:3] *= MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    return scaled
