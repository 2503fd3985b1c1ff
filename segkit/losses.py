"""Dice and cross-entropy, over one level or over every supervised one; always in float32."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

SMOOTH = 1e-5


def soft_dice(
    probabilities: Float[Tensor, "batch classes *space"],
    target: Float[Tensor, "batch classes *space"],
    *,
    pool_batch: bool,
) -> Float[Tensor, ""]:
    """Mean soft Dice over foreground classes: 2 sum(p t) / (sum p + sum t).

    Milletari et al. (2016, arXiv:1606.04797) with the sums, not the sums of squares, in the
    denominator (Drozdzal et al. 2016). Classes are averaged, and samples too unless `pool_batch`
    takes the sums over the whole batch.
    """
    axes = tuple(axis for axis in range(probabilities.ndim) if axis != 1 and (axis or pool_batch))
    overlap = (probabilities * target).sum(axes)
    total = probabilities.sum(axes) + target.sum(axes)
    dice = (2 * overlap + SMOOTH) / (total + SMOOTH)
    return dice[..., 1:].mean()


def dice_cross_entropy(
    logits: Float[Tensor, "batch classes *space"],
    label: Integer[Tensor, "batch *space"],
    *,
    pool_batch: bool,
) -> Float[Tensor, ""]:
    """Cross-entropy plus one minus soft Dice, in equal parts (Isensee et al. 2021)."""
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        target = F.one_hot(label.long(), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
        log_probabilities = F.log_softmax(logits, dim=1)
        cross_entropy = -(target * log_probabilities).sum(1).mean()
        dice = soft_dice(log_probabilities.exp(), target, pool_batch=pool_batch)
        return cross_entropy + 1 - dice


def level_weights(num_levels: int) -> list[float]:
    """Weights of deep supervision: each level half the next finer one's, together 1 (nnU-Net)."""
    raw = [0.5**level for level in range(num_levels)]
    return [weight / sum(raw) for weight in raw]


def deep_dice_cross_entropy(
    logits: Sequence[Tensor], label: Integer[Tensor, "batch *space"], *, pool_batch: bool
) -> Float[Tensor, ""]:
    """`dice_cross_entropy` of every level's logits, finest first, weighted by `level_weights`.

    The label comes down to each level by nearest neighbour.
    """
    losses = [
        dice_cross_entropy(level, _shrunk(label, level.shape[2:]), pool_batch=pool_batch)
        for level in logits
    ]
    weights = level_weights(len(losses))
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()


def _shrunk(label: Tensor, space: Sequence[int]) -> Tensor:
    """Each coarse cell's label: that of the voxel at (or first past) its centre."""
    for axis, cells in enumerate(space, start=1):
        size = label.shape[axis]
        if cells != size:
            step = size // cells
            label = label.index_select(
                axis, torch.arange(cells, device=label.device) * step + step // 2
            )
    return label


def presence_cross_entropy(
    logits: Float[Tensor, "batch classes"], label: Integer[Tensor, "batch *space"]
) -> Float[Tensor, ""]:
    """Binary cross-entropy of whether each image holds any voxel of each class but the background.

    `logits` begin with class 1.
    """
    with torch.autocast(logits.device.type, enabled=False):
        voxels = label.flatten(1)
        present = [(voxels == number).any(dim=1) for number in range(1, logits.shape[1] + 1)]
        target = torch.stack(present, dim=1).float()
        return F.binary_cross_entropy_with_logits(logits.float(), target)
