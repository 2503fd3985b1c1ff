"""Disagreement of overlapping windows about a map: the standard deviation between windows.

    variance = Σ w (m - c)² / Σ w - (Σ w m / Σ w - c)²

Here m is the value of the map in a window, w the weight of the window at the cell, and c a constant
near the map's values. Both sums are blended like the map itself. The constant c reduces rounding
errors, and a constant map has a deviation of 0. In single precision, a deviation below a thousandth
of the map's range cannot be distinguished from 0.
"""

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray
from torch import Tensor

SQUARES = "²"
"""Suffix of the name of a map's squares among the outputs."""


class WindowSpread:
    """Standard deviations of maps between windows.

    Args:
        keys: keys of the maps; all must have a position.
    """

    def __init__(self, keys: Collection[str]) -> None:
        self.keys = keys
        self.centres: dict[str, Tensor] = {}
        self.places: list[Sequence[int]] = []
        self.patch: Sequence[int] = ()

    def set_windows(self, places: Iterable[Sequence[int]], patch: Sequence[int]) -> None:
        """Set the first voxel of each window, and the size of windows."""
        self.places, self.patch = list(places), patch

    def add_squares(self, outputs: dict[str, Tensor]) -> None:
        """Add the squares of each map to the outputs."""
        for key in self.keys:
            values = outputs[key].float()
            if key not in self.centres:
                self.centres[key] = values.mean()
            outputs[key + SQUARES] = (values - self._centre(key, values)) ** 2

    def deviation(
        self,
        key: str,
        mean: Float[Tensor, "channel *cells"],
        squares: Float[Tensor, "channel *cells"],
    ) -> Float[Tensor, "channel *cells"]:
        """The standard deviation, from the blended map and the blended squares."""
        difference = mean - self._centre(key, mean)
        return (squares.to(mean.device) - difference**2).clamp(min=0).sqrt()

    def _centre(self, key: str, values: Tensor) -> Tensor:
        """The centre, where the values are: on the host if GPU memory ran out."""
        return self.centres[key].to(values.device)

    def windows_over(
        self, shape: Sequence[int], stride: Sequence[float]
    ) -> Integer[ndarray, "x y z"]:
        """Number of windows that cover each cell of a map."""
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
    """Mean deviation over channels; NaN at cells that fewer than two windows cover."""
    return np.where(windows > 1, deviation.mean(axis=3), np.float32(np.nan))
