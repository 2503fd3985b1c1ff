"""A scan and its labels on a map's own grid.

A cell is one element of a map; it covers many voxels of the scan. Each cell takes the mean of the
voxels that it covers. Measuring on this grid counts each map value once. On the scan's voxels, each
value would be interpolated and counted hundreds of times.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy.ndimage import maximum_filter, minimum_filter

from segkit.geometry.grid import Grid, Orientation, are_sheared
from segkit.io.volume import Volume

THINNED = 2**20
"""About so many voxels are counted to find the most common value of a channel."""


class Cells:
    """The cells of a map, over the part of a scan that the network processed.

    Args:
        grid: the map's grid, with its axes in the order of `seen`.
        seen: grid of the processed part of the scan, in RAS+ order.
    """

    def __init__(self, grid: Grid, seen: Grid) -> None:
        self.grid = grid
        self.shares: list[Float[ndarray, "cells voxels"]] = []
        """For each axis, the share of each cell that each voxel covers; each row sums to 1."""
        within: list[Bool[ndarray, " cells"]] = []
        for positions, count, pitch, step in zip(
            seen.positions_of(grid), seen.shape, grid.spacing, seen.spacing, strict=True
        ):
            low, high = positions[:, None] - pitch / step / 2, positions[:, None] + pitch / step / 2
            voxel = np.arange(count)
            covered = np.minimum(high, voxel + 0.5) - np.maximum(low, voxel - 0.5)
            covered = np.maximum(covered, 0)
            total = covered.sum(axis=1, keepdims=True)
            self.shares.append(covered / np.where(total > 0, total, 1))
            within.append((positions >= -0.5) & (positions <= count - 0.5))
        x, y, z = within
        self.counted: Bool[ndarray, "x y z"] = (
            x[:, None, None] & y[None, :, None] & z[None, None, :]
        )
        """Whether the centre of each cell lies in the scan; the other cells cover padding."""

    def mean(self, values: Float[ndarray, "x y z"]) -> Float[ndarray, "cells_x cells_y cells_z"]:
        """The mean of the voxels that each cell covers, weighted by the covered share."""
        for share in self.shares:  # each pass consumes the first axis and appends a new last axis
            values = np.tensordot(values, share.astype(np.float32), axes=(0, 1))
        return values

    def lowest(self, values: Float[ndarray, "x y z"]) -> Float[ndarray, "cells_x cells_y cells_z"]:
        """The lowest voxel that each cell covers; 0 for a cell that covers none."""
        for share in self.shares:  # as in `mean`
            lowest = [
                values[covered].min(axis=0) if covered.any() else np.zeros_like(values[0])
                for covered in share > 0
            ]
            values = np.stack(lowest, axis=-1)
        return values


def seen_part(values: ndarray, grid: Grid, seen: Grid) -> ndarray:
    """The part of an array (x, y, z, …) on a scan's grid that the network processed, in RAS+ order.

    Args:
        values: the array.
        grid: the scan's grid.
        seen: grid of the processed part.
    """
    orientation = Orientation.of(grid.affine)
    first = orientation.turn_grid(grid).index(seen.affine[:3, 3]).round().astype(int)
    box = tuple(slice(low, low + size) for low, size in zip(first, seen.shape, strict=True))
    return orientation.turn(values)[box]


def pictures(
    scan: Volume, seen: Grid, channels: list[str], *, across: int | None = None
) -> Mapping[str, ndarray]:
    """The baselines that a map is compared with: intensity and its gradient, by name.

    They hold raw intensities and gradient magnitudes per mm, on the part that the network
    processed. If the scan has several channels, each has its own two baselines, named after it. The
    gradient lies within slices if `across` is the axis across them.
    """
    parts = seen_part(scan.data.reshape(*scan.grid.shape, -1), scan.grid, seen)
    found: dict[str, ndarray] = {}
    for number, channel in enumerate(channels):
        values = np.array(parts[..., number], np.float32)
        named = f" of {channel}" if len(channels) > 1 else ""
        found[f"intensity{named}"] = values
        found[f"gradient{named}"] = gradient_length(
            values, seen.spacing, seen.directions, across=across
        )
    return found


def constant_background(
    channels: Sequence[Float[ndarray, "x y z"]],
) -> Bool[ndarray, "x y z"]:
    """The voxels of regions in which every channel has its most common value, such as air of 0.

    A region is a union of windows of 3 voxels along each axis. So a voxel of the body that happens
    to have this value does not belong to one.

    Args:
        channels: the intensities of each channel.
    """
    background = np.ones(channels[0].shape, bool)
    for image in channels:
        thinned = image.ravel()[:: max(1, image.size // THINNED)]
        values, counts = np.unique(thinned, return_counts=True)
        background &= image == values[counts.argmax()]
    inner = minimum_filter(background, 3, mode="nearest")
    regions: ndarray = maximum_filter(inner, 3, mode="nearest")
    return regions


def gradient_length(
    values: Float[ndarray, "x y z"],
    spacing: tuple[float, float, float],
    directions: Float[ndarray, "axis world"] | None = None,
    *,
    across: int | None = None,
) -> Float[ndarray, "x y z"]:
    """Gradient magnitude per mm, by central differences. Axes with one voxel are left out.

    Args:
        values: a value for each voxel.
        spacing: distance between voxels along each axis, in mm.
        directions: unit vector along each axis; at right angles if None. A slope along an axis is
            the gradient in the world times this vector.
        across: an axis that is also left out, such as the one across slices.
    """
    axes = [axis for axis, size in enumerate(values.shape) if size > 1 and axis != across]
    if directions is not None and are_sheared(directions):
        slopes = [np.gradient(values, spacing[axis], axis=axis) for axis in axes]
        if not slopes:
            return np.zeros_like(values)
        in_world = np.linalg.pinv(directions[axes]).astype(values.dtype)
        gradient: ndarray = np.linalg.norm(np.tensordot(in_world, np.stack(slopes), axes=1), axis=0)
        return gradient
    squares = np.zeros_like(values)
    for axis in axes:
        squares += np.gradient(values, spacing[axis], axis=axis) ** 2
    return np.sqrt(squares)
