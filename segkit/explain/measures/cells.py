"""A scan and its labels on a map's own grid: the mean over what each cell covers.

Measuring there asks of each cell once what it knows. On the scan's voxels the same few values,
interpolated, would count hundreds of times.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from segkit.geometry.grid import Grid, Orientation
from segkit.io.volume import Volume


class Cells:
    """The cells of a map over the part of a scan that the network saw.

    Args:
        grid: of the map; its axes run as those of `seen`.
        seen: the part of the scan, in RAS+ order.
    """

    def __init__(self, grid: Grid, seen: Grid) -> None:
        self.grid = grid
        self.shares: list[Float[ndarray, "cells voxels"]] = []
        """Along each axis, how much of a cell each voxel covers; the rows sum to 1."""
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
        """Those whose centre lies in the scan; others saw what it was padded with."""

    def mean(self, values: Float[ndarray, "x y z"]) -> Float[ndarray, "cells_x cells_y cells_z"]:
        """The mean of the voxels that each cell covers, each by how much of it."""
        for share in self.shares:  # each pass takes the first axis and gives back the last
            values = np.tensordot(values, share.astype(np.float32), axes=(0, 1))
        return values


def seen_part(values: ndarray, grid: Grid, seen: Grid) -> ndarray:
    """What lies in the part that the network saw of an array (x, y, z, …) on a scan's grid."""
    orientation = Orientation.of(grid.affine)
    first = orientation.turn_grid(grid).index(seen.affine[:3, 3]).round().astype(int)
    box = tuple(slice(low, low + size) for low, size in zip(first, seen.shape, strict=True))
    return orientation.turn(values)[box]


def pictures(scan: Volume, seen: Grid, channels: list[str]) -> Mapping[str, ndarray]:
    """What a map must tell more than: intensity and its gradient, by name, on the seen part.

    Raw values, and the length of their gradient per mm. Of several channels each has its own,
    named after it.
    """
    parts = seen_part(scan.data.reshape(*scan.grid.shape, -1), scan.grid, seen)
    found: dict[str, ndarray] = {}
    for number, channel in enumerate(channels):
        values = np.array(parts[..., number], np.float32)
        named = f" of {channel}" if len(channels) > 1 else ""
        found[f"intensity{named}"] = values
        found[f"gradient{named}"] = gradient_length(values, seen.spacing)
    return found


def gradient_length(
    values: Float[ndarray, "x y z"], spacing: tuple[float, float, float]
) -> Float[ndarray, "x y z"]:
    """The length of the gradient per mm, by central differences; an axis of one voxel has none."""
    squares = np.zeros_like(values)
    for axis, step in enumerate(spacing):
        if values.shape[axis] > 1:
            squares += np.gradient(values, step, axis=axis) ** 2
    return np.sqrt(squares)
