"""Values on one grid, read at the cell centres of another whose axes run alike.

Such grids differ by a stride and an offset per axis, so resampling is separable: one axis after the
other, each a gather and a linear blend, on any device.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer
from numpy import ndarray
from torch import Tensor


def sample_axis(
    values: Float[Tensor, "*shape"], positions: Float[ndarray, " samples"], axis: int
) -> Float[Tensor, "..."]:
    """Values at fractional indices along one axis, linear in between, constant beyond the ends."""
    last = values.shape[axis] - 1
    clamped = torch.from_numpy(positions).clamp(0, last)
    lower = clamped.floor().long()
    weight = (clamped - lower).to(values.dtype)
    shape = [1] * values.ndim
    shape[axis] = -1
    below = values.index_select(axis, lower.to(values.device))
    if not bool(weight.any()):
        return below
    above = values.index_select(axis, (lower + 1).clamp(max=last).to(values.device))
    return torch.lerp(below, above, weight.to(values.device).view(shape))


def resample(
    values: Float[Tensor, "channel x y z"], positions: Sequence[Float[ndarray, " _"]]
) -> Float[Tensor, "channel new_x new_y new_z"]:
    """Values at the grid of fractional indices `positions` (one vector per axis), trilinearly.

    The axis that shrinks most goes first, so that the others have less to do.
    """
    ratios = [
        len(samples) / size for samples, size in zip(positions, values.shape[1:], strict=True)
    ]
    for axis in sorted(range(len(positions)), key=lambda axis: ratios[axis]):
        values = sample_axis(values, positions[axis], axis + 1)
    return values


def resample_labels(
    labels: Integer[Tensor, "x y z"], positions: Sequence[Float[ndarray, " _"]]
) -> Integer[Tensor, "new_x new_y new_z"]:
    """The label with the largest trilinear share at each position; the lowest where shares tie."""
    shape = tuple(len(samples) for samples in positions)
    winner = torch.zeros(shape, dtype=labels.dtype, device=labels.device)
    best = torch.zeros(shape, device=labels.device)
    for label in torch.unique(labels).tolist():
        share = resample((labels == label)[None].float(), positions)[0]
        winner = torch.where(share > best, torch.tensor(label, dtype=labels.dtype), winner)
        best = torch.maximum(best, share)
    return winner
