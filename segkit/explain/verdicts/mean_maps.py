"""The mean map of other scans, at the cells of a scan.

A gate that is always high at the same place shows no more than the mean map of other scans.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Integer
from numpy import ndarray

from segkit.explain.measures.fixed_functions import CellValues3d
from segkit.geometry.resample import resample_known

BOX_CELLS = 32
"""Largest number of cells kept along each axis of a map, to compare it with other scans."""
BEYOND_WEIGHT = 1e-6
"""Weight of a map's outermost cell beyond its end. It counts only if no other map has the cell."""
ALIGNMENTS: dict[str, Callable[[ndarray, int, int], ndarray]] = {
    "": lambda cells, own, other: (cells + 0.5) * other / own - 0.5,
    "from the low corner": lambda cells, own, other: cells,
    "from the high corner": lambda cells, own, other: cells + other - own,
    "from the centre": lambda cells, own, other: cells + (other - own) / 2,
}
"""For each alignment of two maps: the positions of cells of one map, whose axis has `own` cells, on
the axis of another map with `other` cells. The first one aligns both ends of the axis."""


class ThinnedMap(NamedTuple):
    """A channel of a map, thinned by `boxed`."""

    values: CellValues3d
    shape: tuple[int, ...]
    """Shape of the map before it was thinned."""


def kept_cells(size: int) -> Integer[ndarray, " cells"]:
    """The cells of an axis that `boxed` keeps: at most `BOX_CELLS`, evenly spaced."""
    count = min(size, BOX_CELLS)
    cells: ndarray = ((np.arange(count) + 0.5) * size / count).astype(int)
    return cells


def boxed(values: ndarray) -> ndarray:
    """An array on a map's grid, thinned to at most `BOX_CELLS` cells along each axis."""
    for axis, size in enumerate(values.shape):
        values = values.take(kept_cells(size), axis=axis)
    return values


def mean_maps(
    others: Sequence[ThinnedMap],
    shape: Sequence[int],
    cells: Sequence[Integer[ndarray, " cells"]],
) -> dict[str, CellValues3d]:
    """The mean of thinned maps of other scans at cells of a scan, for each alignment.

    A network has no coordinates of the body: a fixed place is so many cells from an end of the
    image, or from its middle. So if a map has another shape, there are four alignments: the ends of
    all axes (''), and the low corner, the high corner and the centre of the boxes, in cells.

    NaN cells are left out of the mean; the mean is NaN if a cell is NaN in all maps. Beyond the end
    of a map, its outermost cell counts only if no other map has the cell.

    Args:
        others: the maps. Not empty.
        shape: shape of the scan's map before it was thinned.
        cells: for each axis, the cells of the scan's map at which the mean is computed.
    """
    same = all(tuple(other.shape) == tuple(shape) for other in others)
    return {
        name: _mean(_sums(others, shape, cells, place))
        for name, place in ALIGNMENTS.items()
        if not (name and same)
    }


def mean_maps_of_others(
    maps: Sequence[ThinnedMap],
) -> Iterator[tuple[int, str, CellValues3d]]:
    """The `mean_maps` of all other maps, for each of several maps at its own cells.

    Maps of one shape share what they have in common: those of other shapes are resampled once for
    all of them, and the sum of the others is that of the maps before and of the maps after it.

    Args:
        maps: thinned maps. If there is one, there is no mean.

    Yields:
        The number of a map, the name of an alignment, and the mean.
    """
    for shape in dict.fromkeys(tuple(one.shape) for one in maps) if len(maps) > 1 else ():
        cells = [kept_cells(size) for size in shape]
        alike = [number for number, one in enumerate(maps) if tuple(one.shape) == shape]
        others = [one for one in maps if tuple(one.shape) != shape]
        for name, place in ALIGNMENTS.items():
            if name and not others:
                continue
            before = [_sums(others, shape, cells, place)]
            for number in alike[:-1]:
                before.append(before[-1] + _placed(maps[number], shape, cells, place))
            after = np.zeros_like(before[0])
            for number in reversed(alike):
                yield number, name, _mean(before.pop() + after)
                after = after + _placed(maps[number], shape, cells, place)


def _sums(
    maps: Sequence[ThinnedMap],
    shape: Sequence[int],
    cells: Sequence[Integer[ndarray, " cells"]],
    place: Callable[[ndarray, int, int], ndarray],
) -> Float[ndarray, "2 x y z"]:
    """The sums of `_placed` over maps; 0 if there are none."""
    nothing = np.zeros((2, *map(len, cells)))
    return sum((_placed(one, shape, cells, place) for one in maps), start=nothing)


def _placed(
    one: ThinnedMap,
    shape: Sequence[int],
    cells: Sequence[Integer[ndarray, " cells"]],
    place: Callable[[ndarray, int, int], ndarray],
) -> Float[ndarray, "2 x y z"]:
    """A map in one alignment, multiplied by its weight, and the weight; see `mean_maps`."""
    size = tuple(len(along) for along in cells)
    values, weight = one.values, np.ones(size)
    if (tuple(one.shape), values.shape) != (tuple(shape), size):
        positions = []
        for axis, (along, own, old) in enumerate(zip(cells, shape, one.shape, strict=True)):
            there, kept = place(along, own, old), kept_cells(old)
            positions.append(np.interp(there, kept, np.arange(len(kept))))
            beyond = (there < -0.5) | (there > old - 0.5)
            weight[(slice(None),) * axis + (beyond,)] = BEYOND_WEIGHT
        held = torch.from_numpy(np.ascontiguousarray(values, np.float64))[None]
        values = resample_known(held, positions)[0].numpy()
    known = np.isfinite(values)
    return np.stack([np.where(known, weight * values, 0), weight * known])


def _mean(sums: Float[ndarray, "2 x y z"]) -> CellValues3d:
    """The mean of maps from the sums of `_placed`."""
    total, weights = sums
    mean = np.full(total.shape, np.nan)
    np.divide(total, weights, out=mean, where=weights > 0)
    return mean
