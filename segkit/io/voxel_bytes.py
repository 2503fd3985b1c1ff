"""Voxels as files hold them, read without taking a header's word for how many there are.

A header may claim any size. What is not compressed must be there byte by byte before it is mapped;
of what is compressed, no more is allocated than deflate could have packed into the file, and the
stream is read to its end, where its checksum stands. Whatever is claimed must fit into free memory,
with all that will be made of it. A file that holds more than its header claims is refused as well:
a size or the type is wrong, and each voxel would lie in another place.
"""

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from numpy import ndarray

from segkit.errors import VolumeError
from segkit.system.memory import free_memory, in_words

DEFLATE_RATIO = 1032
"""The most bytes that a byte of deflate stands for (zlib's technical details)."""
PIECE_OF_FILE = 2**20
GZIP = b"\x1f\x8b"
EITHER_HEADER = 32 + zlib.MAX_WBITS
"""To zlib: a stream of gzip or of its own, whichever it is."""


@dataclass(frozen=True)
class Layout:
    """What a header says of its file's voxels."""

    space: tuple[int, int, int]
    """Voxels along x, y and z, of which x is stored fastest."""
    kind: np.dtype[Any]
    affine: ndarray
    """In mm, RAS+, as a grid has it."""
    offset: int
    """Of the first voxel's first byte: in the file, or in what its stream inflates to.

    -1, for voxels that are not compressed: they are the last bytes of the file.
    """
    stream: int | None = None
    """Where in the file a compressed stream begins, if one does."""
    channels: int | None = None
    """The size of an axis of channels, if there is one; one of size 1 is dropped."""
    channels_first: bool = False
    """Whether channels are stored faster than x; else they are slower than z."""
    file: Path | None = None
    """The file that holds the voxels, if it is not the header's own."""
    part: bool = False
    """Whether the voxels are a part of a larger file, so that others may follow them."""

    @property
    def claimed(self) -> int:
        """Bytes that the voxels take, uncompressed."""
        return math.prod(self.space) * (self.channels or 1) * self.kind.itemsize

    @property
    def spare(self) -> int:
        """Bytes fewer than which may follow the voxels: as many as a wrong size would leave."""
        return self.claimed // max(*self.space, self.channels or 1)


def file_beside(header: Path, name: str) -> Path:
    """The data file that a header names, which must lie in the header's folder or below it.

    Args:
        header: the file whose text names the other.
        name: the name as the header has it, decoded as Latin-1.

    Returns:
        The file's path, with no links left in it.

    Raises:
        VolumeError: the name is absolute, holds `..`, leads out of the folder by a link, or is not
            that of a plain file.
    """
    name = os.fsdecode(name.encode("latin-1"))
    windows = PureWindowsPath(name)
    folder = Path(os.path.realpath(header.parent))
    file = Path(os.path.realpath(folder / name))
    if windows.anchor or ".." in windows.parts or not file.is_relative_to(folder):
        raise VolumeError(
            f"expected its voxels in a file of its own folder, found {name[:60]!r}; put both into "
            f"one folder"
        )
    if not file.is_file():
        raise VolumeError(
            f"expected its voxels in {name[:60]!r}, which is not a file of its folder; bring it, "
            f"or convert the volume to one file"
        )
    return file


def read_voxels(header: Path, layout: Layout, *, working: float = 0) -> ndarray:
    """The voxels, (x, y, z) or (x, y, z, channel), of the machine's own byte order.

    What is not compressed is mapped from the file, and changes to it stay in memory.

    Args:
        header: the file that the layout was read from.
        layout: what it says of the voxels.
        working: bytes for each of (x, y, z) that the caller will need beside the voxels.

    Raises:
        VolumeError: the file cannot hold so many voxels, or holds more, or all that will be made of
            them does not fit into free memory.
        ValueError, EOFError: a stream is damaged or cut short.
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
            f"its header claims {claimed} bytes of voxels and the file can hold {max(held, 0)}; "
            f"it is cut short or damaged"
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
    """Raise VolumeError if a volume and what will be made of it do not fit into free memory.

    Args:
        space: its voxels along x, y and z.
        held: bytes that its values take as they are read.
        working: bytes for each of (x, y, z) that are needed beside them.
    """
    needed, free = held + working * math.prod(space), free_memory()
    if needed > free:
        raise VolumeError(
            f"its header claims {' x '.join(map(str, space))} voxels, and what is made of them "
            f"takes {in_words(needed)} where {in_words(free)} are free; free some memory, crop it, "
            f"or repair its header"
        )


def _too_much(claimed: int, held: str) -> VolumeError:
    return VolumeError(
        f"its header claims {claimed} bytes of voxels and the file holds {held}, so that a size or "
        f"the type is wrong; repair its header"
    )


def inflated(path: Path, start: int = 0) -> Iterator[bytes]:
    """What the gzip or zlib stream holds that begins at a byte of a file, a piece at a time.

    Several gzip streams in a row count as one, and zeros may follow the last. Raises ValueError
    where a stream is damaged, which its checksum tells at the end, and EOFError where it has none.
    """
    with path.open("rb") as file:
        file.seek(start)
        packed = file.read(PIECE_OF_FILE)
        while packed:
            engine = zlib.decompressobj(EITHER_HEADER)
            while not engine.eof:
                try:
                    piece = engine.decompress(packed, PIECE_OF_FILE)
                except zlib.error as error:
                    raise ValueError(f"its compressed data are damaged ({error})") from None
                if piece:
                    yield piece
                packed = engine.unconsumed_tail
                if not (engine.eof or packed):
                    packed = file.read(PIECE_OF_FILE)
                    if not (packed or piece):
                        raise EOFError("its compressed data are cut short")
            packed = engine.unused_data.lstrip(b"\0")
            while len(packed) < len(GZIP) and (more := file.read(PIECE_OF_FILE)):
                packed = (packed + more).lstrip(b"\0")
            if packed and not packed.startswith(GZIP):
                raise ValueError("something else follows its compressed data")


def _fill(values: ndarray, pieces: Iterator[bytes], skipped: int, spare: int | None) -> None:
    """Fill bytes with those of a stream, all but so many at its beginning, and see to its end.

    Raises VolumeError as soon as `spare` bytes or more follow them, unless it is None.
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
            f"its header claims {len(values)} bytes of voxels and the file holds "
            f"{max(filled, 0)}; it is cut short or damaged"
        )
