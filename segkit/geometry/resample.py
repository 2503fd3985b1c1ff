"""Resampling of values from one grid to another with parallel axes.

Such grids differ by a stride and an offset per axis, so resampling is separable: one axis after the
other, on any device. Each axis has an order: 0 takes the nearest voxel; 1 is linear; 3 is the
interpolating cubic B-spline (Unser 1999, doi:10.1109/79.799930). Orders 1 and 3 are products with a
banded matrix, which a CPU computes many times faster than a gather. Beyond either end the outermost
voxel is repeated.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Integer
from numpy import ndarray
from torch import Tensor

from segkit.geometry.memory_order import slowest_first
from segkit.geometry.queued_copy import queued_to

Order = Literal[0, 1, 3]

# The spline through a 1 among zeros has the B-spline coefficients √3 · POLE^|k| at knot k.
POLE = math.sqrt(3) - 2
SPLINE_RADIUS = {torch.float32: 14, torch.float64: 28}
"""Distance in voxels beyond which a spline's weight is below the precision of the type."""
BLOCK = 64
"""Samples that one matrix product computes from one band of voxels."""


def nearest(positions: Float[ndarray, " samples"]) -> Float[ndarray, " samples"]:
    """The whole number nearest to each fractional index; the lower one if two are equally near."""
    return np.ceil(positions - 0.5)


def sample_axis(
    values: Float[Tensor, "*shape"],
    positions: Float[ndarray, " samples"],
    axis: int,
    order: Order = 1,
) -> Float[Tensor, "..."]:
    """Values at fractional indices along one axis; whole indices give the voxels unchanged.

    Linear values lie between their neighbours; cubic values may overshoot at an edge. The result
    has the memory order of `values`. It is a view of them if the indices are whole and consecutive.

    Args:
        values: an array of any shape.
        positions: fractional indices along the axis.
        axis: the axis to resample.
        order: 0 for the nearest voxel, 1 for linear, 3 for the cubic spline.
    """
    memory_order = slowest_first(values.stride())
    sampled = _sampled(values.permute(memory_order), positions, memory_order.index(axis), order)
    return sampled.permute([memory_order.index(dimension) for dimension in range(values.ndim)])


def _sampled(values: Tensor, positions: ndarray, axis: int, order: Order) -> Tensor:
    """The result of `sample_axis`, for values whose axes have the order of memory."""
    if order == 0:
        positions = nearest(positions)
    size = values.shape[axis]
    clamped = np.clip(positions, 0, size - 1)
    if order == 3 and (positions % 1 != 0).any():
        kind = torch.promote_types(values.dtype, torch.float32)
        return _weighted_sums(
            values, spline_weights(positions, size), positions, axis, SPLINE_RADIUS[kind]
        )
    if (clamped % 1 != 0).any():
        return _weighted_sums(values, linear_weights(clamped, size), clamped, axis, 0)
    indices = clamped.astype(int)
    if len(indices) > 0 and (np.diff(indices) == 1).all():
        return values.narrow(axis, int(indices[0]), len(indices))
    return values.index_select(axis, queued_to(torch.from_numpy(indices), values.device))


def resample(
    values: Float[Tensor, "channel x y z"],
    positions: Sequence[Float[ndarray, " _"]],
    orders: Sequence[Order] = (1, 1, 1),
) -> Float[Tensor, "channel new_x new_y new_z"]:
    """Values at the grid of fractional indices `positions`, with one vector per axis.

    The axis that shrinks most is resampled first, which leaves less work for the others.

    Args:
        values: the values.
        positions: fractional indices along each axis.
        orders: order along each axis: 0 for the nearest voxel, 1 for linear, 3 for the cubic
            spline.
    """
    ratios = [
        len(samples) / size for samples, size in zip(positions, values.shape[1:], strict=True)
    ]
    for axis in sorted(range(len(positions)), key=lambda axis: ratios[axis]):
        values = sample_axis(values, positions[axis], axis + 1, orders[axis])
    return values


def resample_known(
    values: Float[Tensor, "channel x y z"], positions: Sequence[Float[ndarray, " _"]]
) -> Float[Tensor, "channel new_x new_y new_z"]:
    """Linear `resample` of values that may contain NaN.

    The result is NaN if the nearest value is NaN. Otherwise NaN neighbours are ignored and the
    weights of the others are scaled to sum to 1.
    """
    known = ~values.isnan()
    if bool(known.all()):
        return resample(values, positions)
    total = resample(values.nan_to_num(0.0), positions)
    weight = resample(known.to(values.dtype), positions)
    there = resample(known.to(values.dtype), positions, (0, 0, 0)) > 0
    return torch.where(there, total / weight, torch.nan)


SELDOM_KNOWN = (torch.uint16, torch.uint32, torch.uint64)
"""Label types that few PyTorch operations support."""


def resample_labels(
    labels: Integer[Tensor, "x y z"],
    positions: Sequence[Float[ndarray, " _"]],
    orders: Sequence[Literal[0, 1]] = (1, 1, 1),
) -> Integer[Tensor, "new_x new_y new_z"]:
    """The label with the largest weight at each position; the lowest label if weights tie.

    Along an axis of order 1 the weights are linear; along an axis of order 0 the nearest voxel has
    the whole weight.

    Args:
        labels: the label map.
        positions: fractional indices along each axis.
        orders: order along each axis: 0 or 1.
    """
    if labels.dtype in SELDOM_KNOWN:
        return resample_labels(labels.long(), positions, orders).to(labels.dtype)
    shape = tuple(len(samples) for samples in positions)
    winner = torch.zeros(shape, dtype=labels.dtype, device=labels.device)
    best = torch.zeros(shape, device=labels.device)
    for label in torch.unique(labels).tolist():
        weight = resample((labels == label)[None].float(), positions, orders)[0]
        winner = torch.where(weight > best, torch.tensor(label, dtype=labels.dtype), winner)
        best = torch.maximum(best, weight)
    return winner


def spline_weights(
    positions: Float[ndarray, " samples"], size: int
) -> Float[ndarray, "samples {size}"]:
    """The weight of each of `size` voxels in the spline's value at each fractional index.

    Rows sum to 1. The weights of voxels beyond an end are added to the outermost voxel. The results
    equal scipy's order 3 with mode `nearest`, which nnU-Net's resampling uses.
    """
    radius = SPLINE_RADIUS[torch.float64]
    places = np.clip(positions, -radius, size - 1 + radius)
    beyond = 2 * radius
    weights = _spline_of_one(places[:, None] - np.arange(-beyond, size + beyond))
    inside = weights[:, beyond : beyond + size].copy()
    inside[:, 0] += weights[:, :beyond].sum(axis=1)
    inside[:, -1] += weights[:, beyond + size :].sum(axis=1)
    return inside


def linear_weights(
    positions: Float[ndarray, " samples"], size: int
) -> Float[ndarray, "samples {size}"]:
    """The weight of each of `size` voxels in the linear value at each fractional index."""
    lower = np.floor(positions).astype(int)
    weights = np.zeros((len(positions), size))
    samples = np.arange(len(positions))
    weights[samples, np.minimum(lower + 1, size - 1)] = positions - lower
    weights[samples, lower] = 1 - (positions - lower)
    return weights


def _weighted_sums(
    values: Tensor, weights: ndarray, positions: ndarray, axis: int, radius: int
) -> Tensor:
    """Weighted sums of voxels; weights are 0 further than `radius` beyond the two neighbours.

    Args:
        values: an array of any shape.
        weights: (position, voxel), the weight of each voxel of the axis.
        positions: fractional indices along the axis.
        axis: the axis to resample.
        radius: number of voxels beyond the two neighbours that may have a weight.
    """
    size, shape = values.shape[axis], values.shape
    # At least single precision: in half precision, weights of opposite signs would cancel badly.
    kind = torch.promote_types(values.dtype, torch.float32)
    matrix = queued_to(torch.from_numpy(weights).to(kind), values.device)
    rows = values.to(kind).reshape(math.prod(shape[:axis]), size, math.prod(shape[axis + 1 :]))
    sampled = rows.new_empty(rows.shape[0], len(positions), rows.shape[2])
    with torch.autocast(values.device.type, enabled=False):
        for first in range(0, len(positions), BLOCK):
            block = slice(first, first + BLOCK)
            low = math.floor(positions[block].min()) - radius
            high = math.ceil(positions[block].max()) + radius + 1
            # Far beyond an end the band still contains the outermost voxel.
            band = slice(min(max(low, 0), size - 1), min(max(high, 1), size))
            part = matrix[block, band]
            if rows.shape[2] == 1:
                sampled[:, block, 0] = rows[:, band, 0] @ part.T
            else:
                sampled[:, block] = part.expand(len(rows), -1, -1).bmm(rows[:, band])
    return sampled.view(*shape[:axis], -1, *shape[axis + 1 :]).to(values.dtype)


def _spline_of_one(distance: ndarray) -> ndarray:
    """The cubic spline that is 1 at 0 and 0 at all other whole numbers, at these distances."""
    centre = np.floor(distance)
    powers = math.sqrt(3) * POLE ** np.arange(np.abs(centre).max() + 3)
    total = np.zeros_like(distance)
    for step in (-1, 0, 1, 2):
        knot = centre + step
        total += powers[np.abs(knot).astype(int)] * _b_spline(np.abs(distance - knot))
    return total


def _b_spline(distance: ndarray) -> ndarray:
    """The cubic B-spline at these distances from its centre, which are 0 or more voxels."""
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far)
