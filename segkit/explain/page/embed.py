"""Volumes as text inside a page: codes of one or two bytes, compressed with gzip, in base64.

    value = low + step * code;   if `missing` is set, this code means NaN or infinity

Whole numbers with a range of at most 65534 are exact; other values are off by at most half a step.
Codes are in RAS+ order, x fastest. In two-byte codes, all low bytes come first, then all high
bytes; this compresses better.
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
"""A larger scan is thinned to every second voxel along its finest axes, or every third, …"""
WIDEST_PICTURE = 65534
"""Largest range of whole numbers in two bytes; one code is kept for values that are not finite."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """A volume as text, and the numbers that decode it."""

    text: str
    grid: Grid
    """The grid in RAS+ order."""
    num_bytes: int
    low: float
    step: float
    missing: int | None

    def description(self) -> dict[str, Any]:
        """The numbers that decode the text, for JSON."""
        return {
            "shape": list(self.grid.shape),
            "bytes": self.num_bytes,
            "low": self.low,
            "step": self.step,
            "missing": self.missing,
        }


def embed(values: ndarray, grid: Grid, *, fine: bool = True) -> Embedded:
    """Encode values (x, y, z) of any real type.

    Args:
        values: the values; NaN and infinity are kept as missing.
        grid: their grid.
        fine: whether values that one byte cannot hold exactly take two bytes. Whole numbers take
            two bytes in any case if one byte is too small.
    """
    turned, turned_grid = _turned(values, grid)
    finite = np.isfinite(turned)
    numbers = turned[finite].astype(np.float64)
    low, high = spread(turned)
    exact = high - low <= WIDEST_PICTURE and np.array_equal(numbers, np.rint(numbers))
    num_bytes = 1 if (high - low < 255 if exact else not fine) else 2
    top = 256**num_bytes - 1  # the code for values that are not finite
    step = 1.0 if exact else (high - low) / (top - 1)
    codes = np.full(turned.shape, top, f"u{num_bytes}")
    codes[finite] = np.rint((numbers - low) / (step or 1.0))
    missing = None if finite.all() else top
    return Embedded(_packed(codes), turned_grid, num_bytes, low, step, missing)


def embed_labels(labels: ndarray, grid: Grid) -> Embedded:
    """Encode labels (x, y, z) exactly.

    Raises:
        VolumeError: if a label is above 65535.
    """
    turned, turned_grid = _turned(labels, grid)
    highest = int(turned.max(initial=0))
    if highest > 65535:
        raise VolumeError(
            f"expected labels of at most 65535 for a page, found {highest}; renumber them"
        )
    codes = turned.astype(np.uint8 if highest <= 255 else np.uint16)
    return Embedded(_packed(codes), turned_grid, codes.itemsize, 0.0, 1.0, None)


def spread(values: ndarray) -> tuple[float, float]:
    """The lowest and highest finite value; 0 and 0 if there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def thinning(grid: Grid, most: int = MOST_VOXELS_ON_PAGE) -> tuple[int, int, int]:
    """The steps along each axis with which voxels are kept; 1, 1, 1 if a page can hold all."""
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
    # Without a time stamp, so that the same page gives the same file.
    return base64.b64encode(gzip.compress(planes.tobytes(), compresslevel=6, mtime=0)).decode()
