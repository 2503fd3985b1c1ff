"""Arrays for results that may outgrow memory: in memory, or in a file that nobody sees."""

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
"""Gives an array of zeros of a shape and type, its first axis fastest."""


def in_memory(shape: Sequence[int], kind: np.dtype[Any]) -> ndarray:
    """Zeros in memory."""
    return np.zeros(shape, kind, order="F")


class OnDisk:
    """Allocates arrays of zeros in files of a folder that have no name.

    A file is gone with its array, even where the process is killed. Space is taken at once, so that
    a full disk is an OSError here and no crash later.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, shape: Sequence[int], kind: np.dtype[Any]) -> ndarray:
        """Zeros on disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        size = math.prod(shape) * np.dtype(kind).itemsize
        with tempfile.TemporaryFile(dir=self.folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return np.ndarray(shape, kind, buffer=_Mapped(file.fileno(), size), order="F")


class _Mapped(mmap.mmap):
    """A file that is shared with its array. Of a private one, releasing would lose what changed."""


def release(array: ndarray) -> None:
    """Let go of the memory of an array, or a view of one, that `OnDisk` gave.

    Its file keeps what was written. Other arrays stay as they are.
    """
    owner: Any = array
    while isinstance(owner, ndarray):
        owner = owner.base
    if isinstance(owner, _Mapped) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)
