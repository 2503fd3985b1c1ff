"""Losses of one level or of all supervised levels, in float32.

Dice plus cross-entropy is the default. `SummedLoss` adds any terms of `segkit.nn.loss_terms`. No
loss counts voxels whose label is `ignore`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from segkit.nn.loss_terms import SMOOTH, LossInputs, constants

Term = Callable[[LossInputs], Tensor]
"""A term of a loss: a function from probabilities and targets to a scalar."""


def soft_dice(
    probabilities: Float[Tensor, "batch classes *space"],
    target: Float[Tensor, "batch classes *space"],
    *,
    pool_batch: bool,
) -> Float[Tensor, ""]:
    """Mean soft Dice over foreground classes: 2 sum(p t) / (sum p + sum t).

    Milletari et al. (2016, arXiv:1606.04797), but with sums instead of sums of squares in the
    denominator (Drozdzal et al. 2016).

    Args:
        probabilities: probabilities of each class, the background first.
        target: 1 if the voxel belongs to the class, else 0.
        pool_batch: take the sums over the whole batch, instead of averaging the Dice of each
            sample.
    """
    return _dice(probabilities, target, pool_batch=pool_batch)[..., 1:].mean()


def _dice(probabilities: Tensor, target: Tensor, *, pool_batch: bool) -> Tensor:
    """Soft Dice of each class, (classes) if `pool_batch`, else (batch, classes)."""
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
    """Cross-entropy plus one minus soft Dice, in equal parts (Isensee et al. 2021).

    Args:
        logits: logits of each class, the background first.
        label: the label of each voxel.
        pool_batch: take the sums of Dice over the whole batch.
        ignore: label of voxels that do not count.
    """
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
    """Binary cross-entropy plus one minus soft Dice, in equal parts (nnU-Net).

    Both terms are means over regions, which may overlap. `regions` lists the labels of each. (If
    there are ignored voxels, nnU-Net adds the cross-entropies of the regions instead.)

    Args:
        logits: logits of each region.
        label: the label of each voxel.
        regions: the labels in each region.
        pool_batch: take the sums of Dice over the whole batch.
        ignore: label of voxels that do not count.
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
    """True at each voxel whose label is one of the numbers."""
    found = label == numbers[0]
    for number in numbers[1:]:
        found = found | (label == number)
    return found


def level_weights(num_levels: int) -> list[float]:
    """Weights of deep supervision (nnU-Net): each is half that of the finer level; the sum is 1."""
    raw = [0.5**level for level in range(num_levels)]
    return [weight / sum(raw) for weight in raw]


def deep_dice_cross_entropy(
    logits: Sequence[Tensor],
    label: Integer[Tensor, "batch *space"],
    *,
    pool_batch: bool,
    ignore: int | None = None,
) -> Float[Tensor, ""]:
    """Sum of `dice_cross_entropy` over levels, the finest first, weighted by `level_weights`.

    The label is resampled to the grid of each level by nearest neighbour.
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
    """Sum of `dice_binary_cross_entropy` over levels, weighted as in `deep_dice_cross_entropy`."""
    loss = partial(dice_binary_cross_entropy, regions=regions, pool_batch=pool_batch, ignore=ignore)
    return _deep(lambda level, truth, _: loss(level, truth), logits, label)


@dataclass(frozen=True)
class SummedLoss:
    """A loss that is a weighted sum of terms, over every supervised level.

        loss = SummedLoss(((1.0, dice), (1.0, partial(focal, gamma=2.0))), weights=(1.0, 1.0, 3.0))
        loss([logits], label)

    It is called with the logits (batch, output, *space) of each supervised level, the finest first,
    and with a label (batch, *space). It returns a scalar.
    """

    terms: tuple[tuple[float, Term], ...]
    """Pairs of a weight and a term."""
    weights: tuple[float, ...]
    """Weight of each output: of each class, the background first, or of each region."""
    regions: tuple[tuple[int, ...], ...] = ()
    """The labels in each region; empty if the outputs are classes 0, 1, …."""
    spacing: tuple[float, ...] | None = None
    """Spacing of the label's voxels in mm, for distances; 1 along each axis if not given."""
    levels: tuple[float, ...] | None = None
    """Weight of each supervised level, the finest first; `level_weights` if not given."""
    pool_batch: bool = False
    """Compute an overlap over the whole batch instead of over each sample."""
    ignore: int | None = None
    """Voxels with this label do not count."""

    def __call__(
        self, logits: Sequence[Tensor], label: Integer[Tensor, "batch *space"]
    ) -> Float[Tensor, ""]:
        """The weighted sum, in float32."""
        return _deep(self._of_level, logits, label, self.levels)

    def _of_level(self, logits: Tensor, label: Tensor, stride: tuple[float, ...]) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            inputs = self.inputs(logits.float(), label, stride)
            return torch.stack([weight * term(inputs) for weight, term in self.terms]).sum()

    def inputs(
        self,
        logits: Float[Tensor, "batch outputs *space"],
        label: Integer[Tensor, "batch *space"],
        stride: tuple[float, ...],
    ) -> LossInputs:
        """Probabilities and targets of a level whose cells are `stride` voxels wide."""
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
        return LossInputs(
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
    """Weighted sum over levels of loss(logits, label, size of a cell in voxels).

    Args:
        loss: the loss of one level.
        logits: logits of each level, the finest first.
        label: label of each voxel on the finest grid.
        weights: weight of each level; those of `level_weights` if None.
    """
    weights = weights or level_weights(len(logits))
    losses = []
    for weight, level in zip(weights, logits, strict=True):
        cells = level.shape[2:]
        stride = tuple(size / fewer for size, fewer in zip(label.shape[1:], cells, strict=True))
        losses.append(weight * loss(level, shrunk(label, cells), stride))
    return torch.stack(losses).sum()


def shrunk(label: Tensor, space: Sequence[int]) -> Tensor:
    """The label on a coarser grid: that of the voxel at each cell's centre, or first after it."""
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
    """Binary cross-entropy of the presence of each class in each image.

    Args:
        logits: logits of each class, beginning with class 1; with `regions`, of each region.
        label: labels. An image contains a class if any voxel has its label.
        regions: the labels in each region.
        ignore: the label of ignored voxels, which might belong to any class. So in an image with
            such voxels, only classes that are present count.
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
