"""Reading of voxels from files, with checks of the size that the header claims.

A header may claim any size. Raw voxels are only mapped if the file has all their bytes. For
compressed voxels, no more memory is allocated than deflate could have packed into the file, and the
stream is read to the checksum at its end. The voxels, and the caller's work on them, must fit into
free memory. A file that holds more than its header claims is refused too: a size or the type in the
header is wrong, and every voxel would be misplaced.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from numpy import ndarray

from segkit.errors import VolumeError, counted
from segkit.io.deflate import STREAM_ERRORS, inflater
from segkit.system.memory import free_memory, in_words

DEFLATE_RATIO = 1032
"""Largest number of bytes that one byte of deflate can decompress to (zlib's technical details)."""
PIECE_OF_FILE = 2**20
GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Layout:
    """The layout of voxels in a file, as its header describes it."""

    space: tuple[int, int, int]
    """Number of voxels along x, y and z; x is stored fastest."""
    kind: np.dtype[Any]
    affine: ndarray
    """Affine of the grid, in mm, RAS+."""
    offset: int
    """Byte of the first voxel, in the file or in its decompressed stream.

    -1 is only for raw voxels: they are the last bytes of the file.
    """
    stream: int | None = None
    """Byte of the file at which the compressed stream begins; None for raw voxels."""
    channels: int | None = None
    """Size of the axis of channels, if there is one; an axis of size 1 is dropped."""
    channels_first: bool = False
    """Whether channels are stored faster than x; otherwise they are slower than z."""
    file: Path | None = None
    """The file that holds the voxels, if it is not the header's own file."""
    part: bool = False
    """Whether the voxels are part of a larger file, so that other data may follow them."""

    @property
    def claimed(self) -> int:
        """Bytes of the uncompressed voxels."""
        return math.prod(self.space) * (self.channels or 1) * self.kind.itemsize

    @property
    def spare(self) -> int:
        """If at least this many bytes follow the voxels, a size in the header is wrong."""
        return self.claimed // max(*self.space, self.channels or 1)


def file_beside(header: Path, name: str) -> Path:
    """The data file that a header names, which must lie in the header's folder or below it.

    Args:
        header: the file whose text names the other.
        name: the name in the header, decoded as Latin-1.

    Returns:
        The path of the file, with links resolved.

    Raises:
        VolumeError: the name is absolute, contains `..`, leads out of the folder by a link, or is
            not the name of a plain file.
    """
    name = os.fsdecode(name.encode("latin-1"))
    windows = PureWindowsPath(name)
    folder = Path(os.path.realpath(header.parent))
    file = Path(os.path.realpath(folder / name))
    if windows.anchor or ".." in windows.parts or not file.is_relative_to(folder):
        raise VolumeError(
            f"expected its voxels in a file in the same folder, found {name[:60]!r}; put both "
            f"files into one folder"
        )
    if not file.is_file():
        raise VolumeError(
            f"expected its voxels in {name[:60]!r} in the same folder, found no such file; copy it "
            f"there, or convert the volume to one file"
        )
    return file


def read_voxels(header: Path, layout: Layout, *, working: float = 0) -> ndarray:
    """The voxels, (x, y, z) or (x, y, z, channel), in the machine's own byte order.

    Raw voxels are mapped from the file; changes to them stay in memory.

    Args:
        header: the file from which the layout was read.
        layout: the layout of the voxels.
        working: bytes per voxel (x, y, z) that the caller will need in addition to the values.

    Raises:
        VolumeError: the file holds fewer or more voxels than its header claims, or the voxels and
            the caller's work on them do not fit into free memory.
        ValueError: the compressed data are damaged.
        EOFError: the compressed data are incomplete.
    """
    path = layout.file or header
    claimed = layout.claimed
    count = claimed // layout.kind.itemsize
    size = path.stat().st_size
    offset = layout.offset if layout.offset >= 0 else max(size - claimed, 0)
    if layout.stream is None:
        held = size - offset
    else:
        held = (size - layout.stream) * DEFLATE_RATIO - offset
    if claimed > held:
        raise VolumeError(
            f"its header claims {counted(claimed, 'byte')} of voxels, but the file can only hold "
            f"{max(held, 0)}; it is incomplete or damaged, so get a new copy"
        )
    channels = layout.channels or 1
    ordered = layout.kind.isnative and not (channels > 1 and layout.channels_first)
    copies = (layout.stream is not None) + (not ordered)
    refuse_beyond_memory(layout.space, copies * claimed, working=working)
    values: ndarray
    if layout.stream is None:
        if not layout.part and held - claimed >= layout.spare:
            raise _too_much(claimed, str(held))
        values = np.memmap(path, layout.kind, "c", offset, (count,))
    else:
        values = np.empty(count, layout.kind)
        spare = None if layout.part else layout.spare
        _fill(values.view(np.uint8), inflated(path, layout.stream), offset, spare)
    values = values.astype(layout.kind.newbyteorder("="), copy=False)
    if channels == 1:
        return values.reshape(layout.space, order="F")
    if layout.channels_first:
        mixed = values.reshape((channels, *layout.space), order="F")
        return np.asfortranarray(np.moveaxis(mixed, 0, 3))
    return values.reshape((*layout.space, channels), order="F")


def refuse_beyond_memory(space: Sequence[int], held: float, *, working: float = 0) -> None:
    """Raise VolumeError if a volume and the work on it do not fit into free memory.

    Args:
        space: number of voxels along x, y and z.
        held: bytes of its values as they are read.
        working: bytes per voxel (x, y, z) that are needed in addition.
    """
    needed, free = held + working * math.prod(space), free_memory()
    if needed > free:
        raise VolumeError(
            f"its header claims {' x '.join(map(str, space))} voxels, which need "
            f"{in_words(needed)} of memory, but only {in_words(free)} are free; free some memory, "
            f"crop it, or repair its header"
        )


def _too_much(claimed: int, held: str) -> VolumeError:
    return VolumeError(
        f"its header claims {counted(claimed, 'byte')} of voxels, but the file holds {held}, so "
        f"a size or the "
        f"type is wrong; repair its header"
    )


def inflated(path: Path, start: int = 0) -> Iterator[bytes]:
    """The decompressed bytes of a gzip or zlib stream in a file, in pieces.

    Several gzip streams in a row count as one, and zeros may follow the last.

    Args:
        path: the file.
        start: the byte at which the stream begins.

    Raises:
        ValueError: the stream is damaged, which its checksum may show only at the end.
        EOFError: the stream is incomplete.
    """
    with path.open("rb") as file:
        file.seek(start)
        packed = file.read(PIECE_OF_FILE)
        while packed:
            engine = inflater()
            while not engine.eof:
                try:
                    piece = engine.decompress(packed, PIECE_OF_FILE)
                except STREAM_ERRORS as error:
                    raise ValueError(f"its compressed data are damaged ({error})") from None
                if piece:
                    yield piece
                packed = engine.unconsumed_tail
                if not (engine.eof or packed):
                    packed = file.read(PIECE_OF_FILE)
                    if not (packed or piece):
                        raise EOFError("its compressed data are incomplete")
            packed = engine.unused_data.lstrip(b"\0")
            while len(packed) < len(GZIP) and (more := file.read(PIECE_OF_FILE)):
                packed = (packed + more).lstrip(b"\0")
            if packed and not packed.startswith(GZIP):
                raise ValueError("unknown data follow its compressed data")


def _fill(values: ndarray, pieces: Iterator[bytes], skipped: int, spare: int | None) -> None:
    """Copy a stream into `values`, without its first `skipped` bytes, and read it to its end.

    Raises VolumeError if `spare` bytes or more follow the values, unless `spare` is None. Raises
    EOFError if the stream is too short.

    Args:
        values: the bytes of the voxels, which are filled.
        pieces: the decompressed stream, in pieces.
        skipped: number of bytes before the voxels.
        spare: number of bytes after the voxels that is an error; None if any number is allowed.
    """
    filled = -skipped
    for piece in pieces:
        first = max(-filled, 0)
        start = max(filled, 0)
        filled += len(piece)
        if first < len(piece) and start < len(values):
            wanted = np.frombuffer(piece, np.uint8)[first:][: len(values) - start]
            values[start : start + len(wanted)] = wanted
        if spare is not None and filled - len(values) >= spare:
            raise _too_much(len(values), f"{filled} or more")
    if filled < len(values):
        raise EOFError(
            f"its header claims {counted(len(values), 'byte')} of voxels, but the file holds only "
            f"{max(filled, 0)}; it is incomplete or damaged, so get a new copy"
        )
