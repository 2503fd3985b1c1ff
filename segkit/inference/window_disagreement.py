"""How far overlapping windows disagree about a map: blended moments, streamed beside the map.

    variance = Σ w (m - c)² / Σ w - (Σ w m / Σ w - c)²

with each window's weight w at a cell, and c about where the map's values lie, so that little is
lost to rounding and a constant map has a deviation of 0. In single precision a deviation below a
thousandth of the map's range is not to be told from 0.
"""

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray
from torch import Tensor

SQUARES = "²"
"""What the name of a map's squares ends with, among outputs."""


class WindowSpread:
    """Standard deviations of maps between windows.

    Args:
        keys: of the maps, all with a place.
    """

    def __init__(self, keys: Collection[str]) -> None:
        self.keys = keys
        self.centres: dict[str, float] = {}
        self.places: list[Sequence[int]] = []
        self.patch: Sequence[int] = ()

    def will_see(self, places: Iterable[Sequence[int]], patch: Sequence[int]) -> None:
        """Be told the first voxel of each window, and their size."""
        self.places, self.patch = list(places), patch

    def add_squares(self, outputs: dict[str, Tensor]) -> None:
        """Put the squares of each map beside it."""
        for key in self.keys:
            values = outputs[key].float()
            if key not in self.centres:
                self.centres[key] = float(values.mean())
            outputs[key + SQUARES] = (values - self.centres[key]) ** 2

    def deviation(
        self,
        key: str,
        mean: Float[Tensor, "channel *cells"],
        squares: Float[Tensor, "channel *cells"],
    ) -> Float[Tensor, "channel *cells"]:
        """The standard deviation, from the blended map and the blended squares."""
        return (squares - (mean - self.centres[key]) ** 2).clamp(min=0).sqrt()

    def windows_over(
        self, shape: Sequence[int], stride: Sequence[float]
    ) -> Integer[ndarray, "x y z"]:
        """How many windows said something of each cell of a map."""
        count = np.zeros(tuple(shape), np.int32)
        for place in self.places:
            box = tuple(
                slice(int(first // step), int((first + size) // step))
                for first, size, step in zip(place, self.patch, stride, strict=True)
            )
            count[box] += 1
        return count


def where_windows_meet(
    deviation: Float[ndarray, "x y z channel"], windows: Integer[ndarray, "x y z"]
) -> Float[ndarray, "x y z"]:
    """The deviation, mean over channels, and no number where fewer than two windows looked."""
    return np.where(windows > 1, deviation.mean(axis=3), np.float32(np.nan))
