"""Values on one grid, read at the cell centres of another whose axes run alike.

Such grids differ by a stride and an offset per axis, so resampling is separable: one axis after the
other, on any device. Each axis has an order: 0 takes the nearest voxel; 1 is linear; 3 is the
interpolating cubic B-spline (Unser 1999, doi:10.1109/79.799930). The latter two are products with a
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

Order = Literal[0, 1, 3]

# The spline through a 1 among zeros: at whole distance k its B-spline's coefficient is √3 · POLE^k.
POLE = math.sqrt(3) - 2
REACH = {torch.float32: 14, torch.float64: 28}
"""Voxels beyond which a spline's share of a voxel is less than the type can tell."""
BLOCK = 64
"""Samples that share one band of voxels, a product of matrices each."""


def nearest(positions: Float[ndarray, " samples"]) -> Float[ndarray, " samples"]:
    """The whole number nearest to each fractional index; the lower one if two are equally near."""
    return np.ceil(positions - 0.5)


def sample_axis(
    values: Float[Tensor, "*shape"],
    positions: Float[ndarray, " samples"],
    axis: int,
    order: Order = 1,
) -> Float[Tensor, "..."]:
    """Values at fractional indices along one axis; at whole indices the voxels themselves.

    Linear values lie between their neighbours; cubic ones may overshoot at an edge. The result has
    the memory order of `values`; it is a view of them if the indices are consecutive and whole.
    """
    lie = sorted(range(values.ndim), key=values.stride, reverse=True)
    sampled = _sampled(values.permute(lie), positions, lie.index(axis), order)
    return sampled.permute([lie.index(dimension) for dimension in range(values.ndim)])


def _sampled(values: Tensor, positions: ndarray, axis: int, order: Order) -> Tensor:
    if order == 0:
        positions = nearest(positions)
    size = values.shape[axis]
    clamped = np.clip(positions, 0, size - 1)
    if order == 3 and (positions % 1 != 0).any():
        kind = torch.promote_types(values.dtype, torch.float32)
        return _by_shares(values, cubic_shares(positions, size), positions, axis, REACH[kind])
    if (clamped % 1 != 0).any():
        return _by_shares(values, linear_shares(clamped, size), clamped, axis, 0)
    indices = clamped.astype(int)
    if len(indices) > 0 and (np.diff(indices) == 1).all():
        return values.narrow(axis, int(indices[0]), len(indices))
    return values.index_select(axis, torch.from_numpy(indices).to(values.device))


def resample(
    values: Float[Tensor, "channel x y z"],
    positions: Sequence[Float[ndarray, " _"]],
    orders: Sequence[Order] = (1, 1, 1),
) -> Float[Tensor, "channel new_x new_y new_z"]:
    """Values at the grid of fractional indices `positions` (one vector per axis).

    The axis that shrinks most goes first, so that the others have less to do.
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
    """`resample` of values of which some are NaN: linear between the others.

    The result is NaN where the nearest value is. Elsewhere a NaN among the neighbours is left out,
    and the others' shares make up for it.
    """
    known = ~values.isnan()
    if bool(known.all()):
        return resample(values, positions)
    total = resample(values.nan_to_num(0.0), positions)
    share = resample(known.to(values.dtype), positions)
    there = resample(known.to(values.dtype), positions, (0, 0, 0)) > 0
    return torch.where(there, total / share, torch.nan)


SELDOM_KNOWN = (torch.uint16, torch.uint32, torch.uint64)
"""Types of labels that few of PyTorch's operations take."""


def resample_labels(
    labels: Integer[Tensor, "x y z"],
    positions: Sequence[Float[ndarray, " _"]],
    orders: Sequence[Literal[0, 1]] = (1, 1, 1),
) -> Integer[Tensor, "new_x new_y new_z"]:
    """The label with the largest share at each position; the lowest where shares tie.

    Shares are linear along an axis of order 1; along one of order 0 the nearest voxel has it all.
    """
    if labels.dtype in SELDOM_KNOWN:
        return resample_labels(labels.long(), positions, orders).to(labels.dtype)
    shape = tuple(len(samples) for samples in positions)
    winner = torch.zeros(shape, dtype=labels.dtype, device=labels.device)
    best = torch.zeros(shape, device=labels.device)
    for label in torch.unique(labels).tolist():
        share = resample((labels == label)[None].float(), positions, orders)[0]
        winner = torch.where(share > best, torch.tensor(label, dtype=labels.dtype), winner)
        best = torch.maximum(best, share)
    return winner


def cubic_shares(
    positions: Float[ndarray, " samples"], size: int
) -> Float[ndarray, "samples {size}"]:
    """The weight of each of `size` voxels in the spline's value at each fractional index.

    Rows sum to 1. Weights of voxels beyond an end go to the outermost voxel. The values are those
    of scipy's order 3 with the mode `nearest`, and so of nnU-Net's resizing.
    """
    reach = REACH[torch.float64]
    places = np.clip(positions, -reach, size - 1 + reach)
    beyond = 2 * reach
    shares = _spline_of_one(places[:, None] - np.arange(-beyond, size + beyond))
    inside = shares[:, beyond : beyond + size].copy()
    inside[:, 0] += shares[:, :beyond].sum(axis=1)
    inside[:, -1] += shares[:, beyond + size :].sum(axis=1)
    return inside


def linear_shares(
    positions: Float[ndarray, " samples"], size: int
) -> Float[ndarray, "samples {size}"]:
    """The weight of each of `size` voxels in the linear value at each fractional index."""
    lower = np.floor(positions).astype(int)
    shares = np.zeros((len(positions), size))
    samples = np.arange(len(positions))
    shares[samples, np.minimum(lower + 1, size - 1)] = positions - lower
    shares[samples, lower] = 1 - (positions - lower)
    return shares


def _by_shares(
    values: Tensor, shares: ndarray, positions: ndarray, axis: int, reach: int
) -> Tensor:
    """Sums of voxels by their shares, which are 0 further than `reach` beyond the neighbours."""
    size, shape = values.shape[axis], values.shape
    # Single precision at least: half would lose what the shares of opposite signs leave.
    kind = torch.promote_types(values.dtype, torch.float32)
    weights = torch.from_numpy(shares).to(kind).to(values.device)
    rows = values.to(kind).reshape(math.prod(shape[:axis]), size, math.prod(shape[axis + 1 :]))
    sampled = rows.new_empty(rows.shape[0], len(positions), rows.shape[2])
    with torch.autocast(values.device.type, enabled=False):
        for first in range(0, len(positions), BLOCK):
            block = slice(first, first + BLOCK)
            low = math.floor(positions[block].min()) - reach
            high = math.ceil(positions[block].max()) + reach + 1
            # Far beyond an end the band still holds the outermost voxel.
            band = slice(min(max(low, 0), size - 1), min(max(high, 1), size))
            part = weights[block, band]
            if rows.shape[2] == 1:
                sampled[:, block, 0] = rows[:, band, 0] @ part.T
            else:
                sampled[:, block] = part.expand(len(rows), -1, -1).bmm(rows[:, band])
    return sampled.view(*shape[:axis], -1, *shape[axis + 1 :]).to(values.dtype)


def _spline_of_one(distance: ndarray) -> ndarray:
    """The cubic spline through a 1 at 0 and zeros at all other whole numbers, at a distance."""
    centre = np.floor(distance)
    powers = math.sqrt(3) * POLE ** np.arange(np.abs(centre).max() + 3)
    total = np.zeros_like(distance)
    for step in (-1, 0, 1, 2):
        knot = centre + step
        total += powers[np.abs(knot).astype(int)] * _b_spline(np.abs(distance - knot))
    return total


def _b_spline(distance: ndarray) -> ndarray:
    """The cubic B-spline at a distance from its middle, 0 or more, in voxels."""
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far)
