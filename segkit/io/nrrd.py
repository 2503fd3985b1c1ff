"""Headers of NRRD files, as medical images use the format.

Voxels are raw or compressed by gzip, with at most one axis of channels. They follow the header;
only a `.nhdr` header may name a data file, which must lie in the same folder. Unknown fields are
refused, because a misspelt field could place the image wrongly.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from segkit.errors import VolumeError, counted
from segkit.io.voxel_bytes import Layout, file_beside

_LONGEST = 2**24
"""Largest size of a header in bytes; it may hold tables of diffusion directions and segments."""
TYPES = {
    "int8": ("signed char", "int8", "int8_t"),
    "uint8": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "int16": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "uint16": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "int32": ("int", "signed int", "int32", "int32_t"),
    "uint32": ("uint", "unsigned int", "uint32", "uint32_t"),
    "int64": (
        *("longlong", "long long", "long long int", "signed long long"),
        *("signed long long int", "int64", "int64_t"),
    ),
    "uint64": (
        *("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    ),
    "float32": ("float",),
    "float64": ("double",),
}
KIND_OF = {name: kind for kind, names in TYPES.items() for name in names}
SPACE = ("domain", "space", "time", "???", "none")
"""Kinds of spatial axes, in lower case."""
_CHANNELS = (
    *("list", "vector", "2-vector", "3-vector", "4-vector", "covariant-vector", "3-color"),
    *("rgb-color", "4-color", "rgba-color", "point", "3-normal", "3-gradient", "scalar"),
)
# Signs that convert the axes of a space to RAS+. A space without patient directions means LPS.
SIGNS = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
    "scanner-xyz": (-1, -1, 1),
    "3d-right-handed": (-1, -1, 1),
}
SPELLINGS = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip"}
DETACHED = {"data file", "datafile"}
"""Names of the field that only a `.nhdr` header may have."""
UNUSED = {
    *("content", "number", "min", "max", "old min", "oldmin", "old max", "oldmax", "block size"),
    *("blocksize", "sample units", "sampleunits", "measurement frame"),
    *("thicknesses", "centers", "centerings", "labels", "units"),
}
USED = {
    *("type", "dimension", "sizes", "encoding", "endian", "space", "space dimension"),
    *("space directions", "space origin", "space units", "spacings", "kinds"),
    *("line skip", "lineskip", "byte skip", "byteskip"),
}


def read_nrrd_header(path: Path) -> Layout:
    """The layout of the voxels, read from the header.

    Raises VolumeError for an unsupported header, and ValueError or EOFError for a damaged one.
    """
    fields, end = _fields(path)
    missing = {"type", "dimension", "sizes", "encoding"} - set(fields)
    if missing:
        raise ValueError(f"expected the field {min(missing)} in its header, found none")
    sizes = [int(word) for word in fields["sizes"].split()]
    if len(sizes) != int(fields["dimension"]) or min(sizes, default=0) < 1:
        raise ValueError(
            f"expected {counted(int(fields['dimension']), 'size')} above zero, found "
            f"{fields['sizes']}"
        )
    places = _channel_axes(fields, len(sizes))
    along = [axis for axis in range(len(sizes)) if axis not in places]
    if len(along) < 2 or any(sizes[axis] > 1 for axis in along[3:]):
        raise VolumeError(f"expected two or three axes, found {len(along)}")
    places = [axis for axis in places if sizes[axis] > 1]
    if len(places) > 1 or (places and places[0] not in (0, len(sizes) - 1)):
        raise VolumeError(
            f"expected one axis of channels, the first or last, found the axes {places}"
        )
    x, y, z = (*(sizes[axis] for axis in along), 1)[:3]
    encoding = fields["encoding"].lower()
    if encoding not in ("raw", "gz", "gzip"):
        raise VolumeError(f"expected the encoding raw or gzip, found {encoding}; convert it first")
    file, start, skipped = _data(path, fields, end)
    raw = encoding == "raw"
    if skipped < (-1 if raw else 0):
        raise VolumeError(f"expected a byte skip of 0 or more, or -1 for raw, found {skipped}")
    return Layout(
        (x, y, z),
        _kind(fields),
        _affine(fields, along, len(sizes)),
        start + skipped if raw and skipped >= 0 else skipped,
        stream=None if raw else start,
        channels=sizes[places[0]] if places else None,
        channels_first=places == [0],
        file=file,
        part=file is not None and start + skipped != 0,
    )


def _data(path: Path, fields: dict[str, str], end: int) -> tuple[Path | None, int, int]:
    """The data file, if there is one, the byte at which the data begin, and the bytes to skip."""
    file = file_beside(path, fields["data file"]) if "data file" in fields else None
    start = 0 if file else end
    if lines := int(fields.get("line skip", "0")):
        with (file or path).open("rb") as content:
            content.seek(start)
            while lines > 0 and (line := content.readline(_LONGEST)):
                lines -= line.endswith(b"\n")
            start = content.tell()
        if lines:
            raise EOFError(
                f"its data file has fewer than the "
                f"{counted(int(fields['line skip']), 'line')} to skip"
            )
    return file, start, int(fields.get("byte skip", "0"))


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The value of each field, and the byte at which the header ends."""
    fields: dict[str, str] = {}
    known = UNUSED | USED | (DETACHED if path.name.lower().endswith(".nhdr") else set())
    with path.open("rb") as file:
        if not re.match(rb"NRRD000[1-5]\s*$", file.readline(100)):
            raise ValueError("it does not begin with an NRRD header")
        while line := file.readline(_LONGEST):
            text = line.decode("latin-1").strip()
            if not text:
                return fields, file.tell()
            if file.tell() > _LONGEST:
                break
            if text.startswith("#") or ":=" in text.partition(": ")[0]:
                continue  # a comment, or a custom key
            name, colon, value = text.partition(": ")
            name = name.lower()
            if not colon or name not in known:
                raise ValueError(f"expected a known field in its header, found {text[:60]!r}")
            name = SPELLINGS.get(name, name)
            if name in fields:
                raise ValueError(f"its header gives {name} twice; remove one")
            fields[name] = value.strip()
        if "data file" in fields and not line:
            return fields, file.tell()
    raise ValueError("its header has no end; it is incomplete")


def _channel_axes(fields: dict[str, str], num_axes: int) -> list[int]:
    """Axes of channels, along which a voxel's several values lie."""
    kinds = fields.get("kinds", "").lower().split() or ["???"] * num_axes
    if len(kinds) != num_axes:
        raise ValueError(f"expected {counted(num_axes, 'kind')} of axes, found {fields['kinds']}")
    strange = [kind for kind in kinds if kind not in SPACE + _CHANNELS]
    if strange:
        raise VolumeError(f"expected one real number per voxel, found {strange[0]}")
    found = [axis for axis, kind in enumerate(kinds) if kind in _CHANNELS]
    if "space directions" in fields:
        vectors = _vectors(fields["space directions"])
        nowhere = [axis for axis, vector in enumerate(vectors) if vector is None]
        if found and nowhere != found:
            raise ValueError("its kinds and its space directions disagree about channels")
        return nowhere
    return found


def _kind(fields: dict[str, str]) -> np.dtype[Any]:
    name = fields["type"].lower()
    if name not in KIND_OF:
        raise VolumeError(f"expected one real number per voxel, found {name}")
    kind = np.dtype(KIND_OF[name])
    endian = fields.get("endian", "").lower()
    if kind.itemsize > 1 and endian not in ("little", "big"):
        raise ValueError(f"expected the endian little or big, found {endian or 'none'}")
    return kind.newbyteorder(">" if endian == "big" else "<")


def _affine(fields: dict[str, str], along: list[int], num_axes: int) -> ndarray:
    """The affine in RAS+, mm. Voxels are 1 mm apart if an old header gives no spacing.

    Args:
        fields: the fields of the header.
        along: the axes of space, in order.
        num_axes: number of all axes, those of channels included.
    """
    affine = np.eye(4)
    num, placed = len(along), min(len(along), 3)
    space = fields.get("space", "lps").lower().removesuffix("-time")
    if space not in SIGNS:
        raise VolumeError(
            f"expected a space such as left-posterior-superior, found {space}; repair its header"
        )
    units = re.findall(r'"([^"]*)"', fields.get("space units", ""))
    if strange := [unit for unit in units if unit.lower() not in ("", "mm")]:
        raise VolumeError(f"expected space units of mm, found {strange[0]}; convert it to mm")
    if "space directions" in fields:
        vectors = _vectors(fields["space directions"])
        if len(vectors) != num_axes:
            raise ValueError(
                f"expected {counted(num_axes, 'space direction')}, found {len(vectors)}"
            )
        for column, axis in enumerate(along[:3]):
            affine[:placed, column] = _of_length(num, vectors[axis])[:placed]
        if "space origin" in fields:
            affine[:placed, 3] = _of_length(num, *_vectors(fields["space origin"]))[:placed]
    elif "space" in fields or "space origin" in fields:
        raise ValueError("expected space directions beside its space, found none")
    elif "spacings" in fields:
        sizes = [float(word) for word in fields["spacings"].split()]
        if len(sizes) != num_axes:
            raise ValueError(f"expected {counted(num_axes, 'spacing')}, found {len(sizes)}")
        if not all(0 < sizes[axis] < np.inf for axis in along):
            raise VolumeError(f"expected voxel sizes above zero, found {sizes} mm")
        affine[range(placed), range(placed)] = [sizes[axis] for axis in along[:3]]
    return np.array([*SIGNS[space], 1])[:, None] * affine


def _vectors(text: str) -> list[list[float] | None]:
    """Vectors in parentheses; None for the word "none"."""
    words = re.findall(r"none|\([^()]*\)", text)
    if re.sub(r"none|\([^()]*\)", "", text).strip():
        raise ValueError(f"expected vectors in parentheses, found {text[:60]!r}")
    return [
        None if word == "none" else [float(number) for number in word[1:-1].split(",")]
        for word in words
    ]


def _of_length(num: int, *vectors: list[float] | None) -> list[float]:
    """The only vector, which must have `num` numbers."""
    if len(vectors) != 1 or vectors[0] is None or len(vectors[0]) != num:
        raise ValueError(f"expected a vector of {counted(num, 'number')}, found {vectors}")
    return vectors[0]
