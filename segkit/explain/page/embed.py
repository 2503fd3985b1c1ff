"""Volumes as text inside a page: codes of one or two bytes, gzip, base64.

    value = low + step * code;   the code `missing`, where there is one, stands for no number

Whole numbers that span no more than 65534 are kept exactly, all others to half a step. Codes are in
RAS+ order, x fastest. Of two-byte codes all low bytes come first, then all high ones, which packs
better.
"""

import base64
import gzip
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from segkit.errors import VolumeError
from segkit.geometry.grid import Grid, Orientation

MOST_VOXELS_ON_PAGE = 2**25
"""Of a scan of more, every second voxel along its finest axes is kept, or every third, …"""
WIDEST_PICTURE = 65534
"""The span of whole numbers that two bytes hold, beside a code for what is no number."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """A volume's text, and what a reader needs to know to get its values back."""

    text: str
    grid: Grid
    """In RAS+ order."""
    num_bytes: int
    low: float
    step: float
    missing: int | None

    def description(self) -> dict[str, Any]:
        """For the reader, as plain JSON."""
        return {
            "shape": list(self.grid.shape),
            "bytes": self.num_bytes,
            "low": self.low,
            "step": self.step,
            "missing": self.missing,
        }


def embed(values: ndarray, grid: Grid, *, fine: bool = True) -> Embedded:
    """Values (x, y, z) of any real type, in two bytes where `fine` and one byte does not do."""
    turned, turned_grid = _turned(values, grid)
    finite = np.isfinite(turned)
    numbers = turned[finite].astype(np.float64)
    low, high = spread(turned)
    exact = high - low <= WIDEST_PICTURE and np.array_equal(numbers, np.rint(numbers))
    num_bytes = 1 if (high - low < 255 if exact else not fine) else 2
    top = 256**num_bytes - 1  # kept for what is no number
    step = 1.0 if exact else (high - low) / (top - 1)
    codes = np.full(turned.shape, top, f"u{num_bytes}")
    codes[finite] = np.rint((numbers - low) / (step or 1.0))
    missing = None if finite.all() else top
    return Embedded(_packed(codes), turned_grid, num_bytes, low, step, missing)


def embed_labels(labels: ndarray, grid: Grid) -> Embedded:
    """Labels (x, y, z), exactly. Raises VolumeError for a label past 65535."""
    turned, turned_grid = _turned(labels, grid)
    highest = int(turned.max(initial=0))
    if highest > 65535:
        raise VolumeError(f"a page shows labels up to 65535 and found {highest}; renumber them")
    codes = turned.astype(np.uint8 if highest <= 255 else np.uint16)
    return Embedded(_packed(codes), turned_grid, codes.itemsize, 0.0, 1.0, None)


def spread(values: ndarray) -> tuple[float, float]:
    """The lowest and highest of the values that are numbers; 0 and 0 where none is."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def thinning(grid: Grid, most: int = MOST_VOXELS_ON_PAGE) -> tuple[int, int, int]:
    """Of how many voxels one is kept along each axis: 1, 1, 1 where a page holds them all."""
    every = np.ones(3, int)
    while math.prod(kept := np.ceil(np.array(grid.shape) / every).astype(int).tolist()) > most:
        pitch = np.where(np.array(kept) > 1, np.array(grid.spacing) * every, np.inf)
        every[pitch <= pitch.min() * 1.01] += 1
    x, y, z = every.tolist()
    return x, y, z


def _turned(values: ndarray, grid: Grid) -> tuple[ndarray, Grid]:
    every = thinning(grid)
    kept = values[tuple(slice(None, None, step) for step in every)]
    orientation = Orientation.of(grid.affine)
    return orientation.turn(kept), orientation.turn_grid(grid.placed(kept.shape, every, (0, 0, 0)))


def _packed(codes: ndarray) -> str:
    flat = codes.ravel(order="F")
    planes = flat.astype("<u2").view(np.uint8).reshape(-1, 2).T if codes.itemsize == 2 else flat
    # No time stamp, so that the same page is the same file.
    return base64.b64encode(gzip.compress(planes.tobytes(), compresslevel=6, mtime=0)).decode()
