"""Headers of MetaImage files.

Voxels are raw or compressed by zlib. They follow the header; only a `.mhd` header may name a data
file, which must lie in the same folder. `ONCE` lists all keys that are read; other keys are
ignored.
"""

from pathlib import Path

import numpy as np
from numpy import ndarray

from segkit.errors import VolumeError, counted
from segkit.io.voxel_bytes import Layout, file_beside

_LONGEST = 2**20
"""Largest size of a header in bytes."""
KINDS = {
    "MET_CHAR": "int8",
    "MET_UCHAR": "uint8",
    "MET_SHORT": "int16",
    "MET_USHORT": "uint16",
    "MET_INT": "int32",
    "MET_UINT": "uint32",
    "MET_LONG": "int32",  # 4 bytes in MetaImage, whatever the size of a long in C
    "MET_ULONG": "uint32",
    "MET_LONG_LONG": "int64",
    "MET_ULONG_LONG": "uint64",
    "MET_FLOAT": "float32",
    "MET_DOUBLE": "float64",
}
ALIASES = {
    "Position": "Offset",
    "Origin": "Offset",
    "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
ONCE = {
    *("ObjectType", "NDims", "DimSize", "ElementType", "ElementNumberOfChannels", "BinaryData"),
    *("BinaryDataByteOrderMSB", "CompressedData", "TransformMatrix", "Offset", "ElementSpacing"),
    *("ElementSize", "HeaderSize", "DistanceUnits", "ElementToIntensityFunctionSlope"),
    *("ElementToIntensityFunctionOffset", "ElementDataFile"),
}
# Keys that would change the voxels or their positions, and the values that change nothing.
AS_IT_IS = {
    "BinaryData": ("True", "true", "1"),
    "DistanceUnits": ("mm", "?", ""),
    "ElementToIntensityFunctionSlope": ("1",),
    "ElementToIntensityFunctionOffset": ("0",),
}
# Values of the keys if the voxels are in the same file as the header.
INSIDE = {"HeaderSize": ("0",), "ElementDataFile": ("LOCAL", "Local", "local")}


def read_metaimage_header(path: Path) -> Layout:
    """The layout of the voxels, read from the header.

    Raises VolumeError for an unsupported header, and ValueError for a damaged one.
    """
    fields, end = _fields(path)
    for name in ("NDims", "DimSize", "ElementType"):
        if name not in fields:
            raise ValueError(f"expected {name} in its header, found none")
    beside = (
        path.name.lower().endswith(".mhd")
        and fields["ElementDataFile"] not in INSIDE["ElementDataFile"]
    )
    for name, values in (AS_IT_IS if beside else AS_IT_IS | INSIDE).items():
        if fields.get(name, values[0]) not in values:
            raise VolumeError(f"expected {name} to be {values[0]}, found {fields[name][:60]}")
    num = int(fields["NDims"])
    sizes = [int(word) for word in fields["DimSize"].split()]
    if num < 2 or any(size > 1 for size in sizes[3:]):
        raise VolumeError(f"expected two or three axes, found {num}")
    channels = int(fields.get("ElementNumberOfChannels", "1"))
    if len(sizes) != num or min([*sizes, channels]) < 1:
        raise ValueError(
            f"expected {counted(num, 'size')} and channels above zero, found {sizes} and {channels}"
        )
    kind = fields["ElementType"].removesuffix("_ARRAY")
    if kind not in KINDS:
        raise VolumeError(f"expected one real number per voxel, found {kind}")
    x, y, z = (*sizes, 1)[:3]  # further axes have size 1
    compressed = _is_true(fields, "CompressedData")
    start = int(fields.get("HeaderSize", "0")) if beside else end
    if start < (0 if compressed else -1):
        raise VolumeError(f"expected a HeaderSize of 0 or more, or -1 for raw data, found {start}")
    return Layout(
        (x, y, z),
        np.dtype(KINDS[kind]).newbyteorder(
            ">" if _is_true(fields, "BinaryDataByteOrderMSB") else "<"
        ),
        _affine(fields, num),
        0 if compressed else start,
        stream=start if compressed else None,
        channels=channels,
        channels_first=True,
        file=file_beside(path, fields["ElementDataFile"]) if beside else None,
        part=beside and start != 0,
    )


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The value of each key, and the byte at which the header ends."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        while (line := file.readline(_LONGEST)) and file.tell() <= _LONGEST:
            name, equals, value = (part.strip() for part in line.decode("latin-1").partition("="))
            if not equals:
                raise ValueError(f"expected KEY = VALUE in its header, found {name[:60]!r}")
            name = ALIASES.get(name, name)
            if name in ONCE and name in fields:
                raise ValueError(f"its header gives {name} twice; remove one")
            fields[name] = value
            if name == "ElementDataFile":
                return fields, file.tell()
    raise ValueError("its header has no end; it is incomplete or not a MetaImage header")


def _is_true(fields: dict[str, str], name: str) -> bool:
    value = fields.get(name, "False")
    if value.lower() not in ("true", "false", "1", "0"):
        raise ValueError(f"expected {name} to be True or False, found {value[:60]!r}")
    return value.lower() in ("true", "1")


def _affine(fields: dict[str, str], num: int) -> ndarray:
    """The affine in RAS+, mm. The default is that of axes to L, P and S from the origin."""
    affine = np.eye(4)
    spacing = _numbers(fields, "ElementSpacing" if "ElementSpacing" in fields else "ElementSize")
    if len(spacing) != num:
        raise ValueError(f"expected an ElementSpacing of {num} numbers, found {spacing}")
    if not all(0 < size < np.inf for size in spacing):
        raise VolumeError(f"expected voxel sizes above zero, found {spacing} mm")
    matrix = _numbers(fields, "TransformMatrix") or np.eye(num).ravel().tolist()
    origin = _numbers(fields, "Offset") or [0.0] * num
    if len(matrix) != num * num or len(origin) != num:
        raise ValueError(
            f"expected {num * num} numbers of a TransformMatrix and {num} of an Offset, found "
            f"{len(matrix)} and {len(origin)}"
        )
    # Each row of the matrix is the direction of one axis.
    placed = min(num, 3)
    affine[:placed, :placed] = (np.array(matrix).reshape(num, num).T * spacing)[:placed, :placed]
    affine[:placed, 3] = origin[:placed]
    affine[:2] *= -1  # from LPS to RAS
    return affine


def _numbers(fields: dict[str, str], name: str) -> list[float]:
    return [float(word) for word in fields.get(name, "").split()]
