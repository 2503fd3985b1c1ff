"""Labels of a first stage made worse at random, so that a second learns not to trust them blindly.

Kinds and probabilities are those of nnU-Net's cascade (Isensee et al. 2021). All of it runs on the
labels' device, which nothing waits for; what is not drawn costs nothing. A voxel keeps one label:
were each class's channel changed by itself, the network would be told of two at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Integer
from scipy import ndimage
from torch import Generator, Tensor

Mask = Bool[Tensor, "*space"]


@dataclass(frozen=True)
class LabelCorruption:
    """How often, and how much, labels are made worse."""

    reshaping_probability: float = 0.4
    """Of each class of each sample: grown, shrunk, opened or closed."""
    radii: tuple[int, int] = (1, 8)
    """Of the ball that does so, in voxels."""
    removal_probability: float = 0.2
    """Of each sample: that each class loses one of its small parts."""
    largest_removed: float = 0.15
    """Of the patch, the share that a small part stays below."""

    def __call__(
        self, labels: Integer[Tensor, "batch *space"], num_classes: int, generator: Generator
    ) -> Integer[Tensor, "batch *space"]:
        """Labels 0 … `num_classes`, changed at random.

        What a class gains, others lose; what it loses is background.
        """
        samples = len(labels)
        reshaped = torch.rand(samples, num_classes, generator=generator)
        kinds = torch.randint(len(RESHAPINGS), (samples, num_classes), generator=generator)
        low, high = self.radii
        radii = torch.randint(low, high + 1, (samples, num_classes), generator=generator)
        removed = torch.rand(samples, generator=generator) < self.removal_probability
        which = torch.rand(samples, num_classes, generator=generator).tolist()
        labels = labels.clone()
        for sample, index in (reshaped < self.reshaping_probability).nonzero().tolist():
            reshape = RESHAPINGS[int(kinds[sample, index])]
            mask = labels[sample] == index + 1
            if _known_empty(mask):
                continue
            changed = reshape(mask, int(radii[sample, index]))
            labels[sample].masked_fill_(mask, 0).masked_fill_(changed, index + 1)
        for sample in removed.nonzero().flatten().tolist():
            for index in range(num_classes):
                mask = labels[sample] == index + 1
                if _known_empty(mask):
                    continue
                part = small_part(mask, which[sample][index], largest=self.largest_removed)
                labels[sample].masked_fill_(part, 0)
        return labels


def dilate(mask: Mask, radius: int) -> Mask:
    """All voxels that a ball of `radius` voxels about a voxel of the mask reaches.

    The ball is made of steps to the neighbours across a face and, every second time, to those
    across a corner as well, which are a few operations each: it is exact along the axes, and
    reaches up to a fifth too far elsewhere.
    """
    for step in range(radius):
        if step % 2:
            for axis in range(mask.ndim):
                mask = _beside(mask, axis)
        else:
            grown = mask.clone()
            for axis in range(mask.ndim):
                grown |= _beside(mask, axis)
            mask = grown
    return mask


def erode(mask: Mask, radius: int) -> Mask:
    """The voxels about which the ball lies in the mask, wherever it lies in the image."""
    return ~dilate(~mask, radius)


def opened(mask: Mask, radius: int) -> Mask:
    """The mask without what is narrower than the ball."""
    return dilate(erode(mask, radius), radius)


def closed(mask: Mask, radius: int) -> Mask:
    """The mask with what is narrower than the ball between its parts."""
    return erode(dilate(mask, radius), radius)


def small_part(mask: Mask, draw: float, *, largest: float) -> Mask:
    """One connected component, across faces, of less than the share `largest` of the image.

    `draw` in [0, 1) picks it, each as likely as the next; nothing where there is none.
    """
    if mask.device.type == "cpu":
        found, _ = ndimage.label(mask.numpy())
        roots = torch.from_numpy(found).flatten().long()
    else:
        roots = components(mask)
    # Numbers of voxels by component, in the order of their first voxels; 0 is no component.
    sizes = torch.zeros(mask.numel() + 1, dtype=torch.long, device=mask.device)
    sizes.scatter_add_(0, roots, torch.ones_like(roots))
    sizes[0] = 0
    small = (sizes > 0) & (sizes < largest * mask.numel())
    order = small.cumsum(0)
    wanted = (draw * order[-1].double()).floor() + 1
    picked = small & (order == wanted)
    return picked[roots].view(mask.shape)


def components(mask: Mask, rounds: int = 16) -> Integer[Tensor, " voxels"]:
    """For each voxel, 1 + the index of the first voxel of its component across faces; else 0.

    Every voxel takes the lowest number of its neighbours and of the voxel that this names, so that
    paths halve in each round (after FastSV, Zhang et al. 2020, arXiv:1910.05971). A fixed number of
    rounds, as the host would have to wait to know whether another is needed: components that wind
    more than that allows come in several parts.
    """
    none = mask.numel()
    at = torch.arange(none, device=mask.device).view(mask.shape)
    number = torch.where(mask, at, none)
    for _ in range(rounds):
        lowest = number.clone()
        for axis in range(mask.ndim):
            inner = mask.shape[axis] - 1
            ahead, behind = number.narrow(axis, 1, inner), number.narrow(axis, 0, inner)
            low = lowest.narrow(axis, 0, inner)
            torch.minimum(low, ahead, out=low)
            low = lowest.narrow(axis, 1, inner)
            torch.minimum(low, behind, out=low)
        # What a voxel is known by so far may itself be known by less.
        table = torch.cat([lowest.flatten(), lowest.new_full((1,), none)])
        table.scatter_reduce_(0, number.flatten(), lowest.flatten(), "amin")
        number = torch.where(mask, table[table[lowest]], none)
    return torch.where(mask, number + 1, 0).flatten()


def _known_empty(mask: Mask) -> bool:
    """Whether a mask is empty, on a CPU; a GPU would have to be waited for, and is not asked."""
    return mask.device.type == "cpu" and not bool(mask.any())


def _beside(mask: Mask, axis: int) -> Mask:
    """The mask, and each voxel before or behind one of it along an axis."""
    inner = mask.shape[axis] - 1
    grown = mask.clone()
    grown.narrow(axis, 1, inner).logical_or_(mask.narrow(axis, 0, inner))
    grown.narrow(axis, 0, inner).logical_or_(mask.narrow(axis, 1, inner))
    return grown


RESHAPINGS: tuple[Callable[[Mask, int], Mask], ...] = (dilate, erode, opened, closed)
