"""Arrays for large results: in memory, or in temporary files without a name."""

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

Allocate = Callable[[Sequence[int], np.dtype[Any]], ndarray]
"""A function that returns an array of zeros of a shape and type, with its first axis fastest."""


def in_memory(shape: Sequence[int], kind: np.dtype[Any]) -> ndarray:
    """An array of zeros in memory."""
    return np.zeros(shape, kind, order="F")


class OnDisk:
    """Allocates arrays of zeros in unnamed files in a folder.

    A file disappears with its array, even if the process is killed. The space is reserved at once,
    so that a full disk raises OSError here and does not crash the process later.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, shape: Sequence[int], kind: np.dtype[Any]) -> ndarray:
        """An array of zeros on disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        size = math.prod(shape) * np.dtype(kind).itemsize
        with tempfile.TemporaryFile(dir=self.folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return np.ndarray(shape, kind, buffer=_Mapped(file.fileno(), size), order="F")


class _Mapped(mmap.mmap):
    """A shared memory map of an array's file. `release` would lose the changes of a private map."""


def release(array: ndarray) -> None:
    """Free the memory of an array from `OnDisk`, or of a view of it.

    The file keeps the values. Arrays from elsewhere are not changed.
    """
    owner: Any = array
    while isinstance(owner, ndarray):
        owner = owner.base
    if isinstance(owner, _Mapped) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)
