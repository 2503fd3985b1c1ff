"""Losses over one level or over every supervised one, always in float32.

Dice and cross-entropy are the default; `SummedLoss` adds any terms of `segkit.nn.loss_terms`.
Voxels whose label is `ignore` count in none: a loss is what it would be without them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from segkit.nn.loss_terms import SMOOTH, Judged, constants

Term = Callable[[Judged], Tensor]
"""From probabilities beside what is right to a scalar."""


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
    return _dice(probabilities, target, pool_batch=pool_batch)[..., 1:].mean()


def _dice(probabilities: Tensor, target: Tensor, *, pool_batch: bool) -> Tensor:
    """Of each class, and of each sample unless `pool_batch`."""
    axes = tuple(axis for axis in range(probabilities.ndim) if axis != 1 and (axis or pool_batch))
    overlap = (probabilities * target).sum(axes)
    total = probabilities.sum(axes) + target.sum(axes)
    return (2 * overlap + SMOOTH) / (total + SMOOTH)


def dice_cross_entropy(
    logits: Float[Tensor, "batch classes *space"],
    label: Integer[Tensor, "batch *space"],
    *,
    pool_batch: bool,
    ignore: int | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy plus one minus soft Dice, in equal parts (Isensee et al. 2021)."""
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        counted = None if ignore is None else label != ignore
        classes = label.long() if counted is None else label.long().masked_fill(~counted, 0)
        target = F.one_hot(classes, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
        log_probabilities = F.log_softmax(logits, dim=1)
        probabilities = log_probabilities.exp()
        if counted is None:
            cross_entropy = -(target * log_probabilities).sum(1).mean()
        else:
            weight = counted[:, None].to(logits.dtype)
            target, probabilities = target * weight, probabilities * weight
            cross_entropy = -(target * log_probabilities).sum() / weight.sum().clamp(min=1)
        dice = soft_dice(probabilities, target, pool_batch=pool_batch)
        return cross_entropy + 1 - dice


def dice_binary_cross_entropy(
    logits: Float[Tensor, "batch regions *space"],
    label: Integer[Tensor, "batch *space"],
    *,
    regions: Sequence[Sequence[int]],
    pool_batch: bool,
    ignore: int | None = None,
) -> Float[Tensor, ""]:
    """Binary cross-entropy of each region, plus one minus its soft Dice, in equal parts (nnU-Net).

    `regions` are the labels in each; both terms are means over regions, which may overlap. (With
    ignored voxels nnU-Net takes the sum of the cross-entropy over regions.)
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        target = torch.stack([within_group(label, region) for region in regions], dim=1).to(
            logits.dtype
        )
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        probabilities = logits.sigmoid()
        if ignore is None:
            cross_entropy = each.mean()
        else:
            weight = (label != ignore)[:, None].to(logits.dtype)
            target, probabilities = target * weight, probabilities * weight
            cross_entropy = (each.mean(1, keepdim=True) * weight).sum() / weight.sum().clamp(min=1)
        dice = _dice(probabilities, target, pool_batch=pool_batch).mean()
        return cross_entropy + 1 - dice


def within_group(label: Tensor, numbers: Sequence[int]) -> Tensor:
    """Where the label is one of the numbers."""
    found = label == numbers[0]
    for number in numbers[1:]:
        found = found | (label == number)
    return found


def level_weights(num_levels: int) -> list[float]:
    """Weights of deep supervision: each level half the next finer one's, together 1 (nnU-Net)."""
    raw = [0.5**level for level in range(num_levels)]
    return [weight / sum(raw) for weight in raw]


def deep_dice_cross_entropy(
    logits: Sequence[Tensor],
    label: Integer[Tensor, "batch *space"],
    *,
    pool_batch: bool,
    ignore: int | None = None,
) -> Float[Tensor, ""]:
    """`dice_cross_entropy` of every level's logits, finest first, weighted by `level_weights`.

    The label comes down to each level by nearest neighbour.
    """
    loss = partial(dice_cross_entropy, pool_batch=pool_batch, ignore=ignore)
    return _deep(lambda level, truth, _: loss(level, truth), logits, label)


def deep_dice_binary_cross_entropy(
    logits: Sequence[Tensor],
    label: Integer[Tensor, "batch *space"],
    *,
    regions: Sequence[Sequence[int]],
    pool_batch: bool,
    ignore: int | None = None,
) -> Float[Tensor, ""]:
    """`dice_binary_cross_entropy` of every level, as `deep_dice_cross_entropy` has it."""
    loss = partial(dice_binary_cross_entropy, regions=regions, pool_batch=pool_batch, ignore=ignore)
    return _deep(lambda level, truth, _: loss(level, truth), logits, label)


@dataclass(frozen=True)
class SummedLoss:
    """A weighted sum of terms over every supervised level.

        SummedLoss(((1.0, dice), (1.0, partial(focal, gamma=2.0))), weights=(1.0, 1.0, 3.0))

    Calling it with logits (batch, output, cells …) of each supervised level, finest first, and a
    label (batch, voxels …) gives a scalar.
    """

    terms: tuple[tuple[float, Term], ...]
    """Each with its weight in the sum."""
    weights: tuple[float, ...]
    """Of each output: class, the background first, or region."""
    regions: tuple[tuple[int, ...], ...] = ()
    """The labels in each region, or none, for classes 0, 1, …."""
    spacing: tuple[float, ...] | None = None
    """Of the label's voxels, in mm, for distances; 1 along each axis if not given."""
    levels: tuple[float, ...] | None = None
    """The weight of each supervised level, finest first; `level_weights` if not given."""
    pool_batch: bool = False
    """Whether an overlap takes its sums over the whole batch."""
    ignore: int | None = None

    def __call__(
        self, logits: Sequence[Tensor], label: Integer[Tensor, "batch *space"]
    ) -> Float[Tensor, ""]:
        """The sum, in float32."""
        return _deep(self._of_level, logits, label, self.levels)

    def _of_level(self, logits: Tensor, label: Tensor, stride: tuple[float, ...]) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            judged = self.judge(logits.float(), label, stride)
            return torch.stack([weight * term(judged) for weight, term in self.terms]).sum()

    def judge(
        self,
        logits: Float[Tensor, "batch outputs *space"],
        label: Integer[Tensor, "batch *space"],
        stride: tuple[float, ...],
    ) -> Judged:
        """Probabilities beside what is right, at a level whose cells are `stride` voxels wide."""
        counted = torch.ones_like(label) if self.ignore is None else label != self.ignore
        shown = counted[:, None].to(logits.dtype)
        weights = constants(self.weights, logits.device)
        if self.regions:
            target = torch.stack([within_group(label, region) for region in self.regions], dim=1)
            target = target.to(logits.dtype)
            each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            probabilities = logits.sigmoid()
            weight = shown * weights.view(-1, *[1] * (logits.ndim - 2))
        else:
            classes = label.long() if self.ignore is None else label.long().masked_fill(~counted, 0)
            target = F.one_hot(classes, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
            log_probabilities = F.log_softmax(logits, dim=1)
            each = -(target * log_probabilities).sum(1, keepdim=True)
            probabilities = log_probabilities.exp()
            weight = shown * weights[classes][:, None]
        spacing = self.spacing or (1.0,) * len(stride)
        return Judged(
            probabilities=probabilities * shown,
            target=target * shown,
            cross_entropy=each,
            weight=weight.expand_as(each),
            weights=self.weights,
            first=0 if self.regions else 1,
            spacing=tuple(size * step for size, step in zip(spacing, stride, strict=True)),
            pool_batch=self.pool_batch,
        )


def _deep(
    loss: Callable[[Tensor, Tensor, tuple[float, ...]], Tensor],
    logits: Sequence[Tensor],
    label: Tensor,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Over levels, the weighted sum of losses, each given its cells' size in voxels too."""
    weights = weights or level_weights(len(logits))
    losses = []
    for weight, level in zip(weights, logits, strict=True):
        cells = level.shape[2:]
        stride = tuple(size / fewer for size, fewer in zip(label.shape[1:], cells, strict=True))
        losses.append(weight * loss(level, shrunk(label, cells), stride))
    return torch.stack(losses).sum()


def shrunk(label: Tensor, space: Sequence[int]) -> Tensor:
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
    logits: Float[Tensor, "batch classes"],
    label: Integer[Tensor, "batch *space"],
    *,
    regions: Sequence[Sequence[int]] = (),
    ignore: int | None = None,
) -> Float[Tensor, ""]:
    """Binary cross-entropy of whether each image holds any voxel of each class but the background.

    `logits` begin with class 1; with `regions`, they are of each region. What is not seen in an
    image with ignored voxels may lie among these, and does not count.
    """
    with torch.autocast(logits.device.type, enabled=False):
        voxels = label.flatten(1)
        groups = regions or [(number,) for number in range(1, logits.shape[1] + 1)]
        present = torch.stack([within_group(voxels, group).any(dim=1) for group in groups], dim=1)
        if ignore is None:
            return F.binary_cross_entropy_with_logits(logits.float(), present.float())
        each = F.binary_cross_entropy_with_logits(logits.float(), present.float(), reduction="none")
        known = present | ~(voxels == ignore).any(dim=1, keepdim=True)
        return (each * known).sum() / known.sum().clamp(min=1)
