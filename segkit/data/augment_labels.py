"""Labels of a first stage made worse at random, so that a second learns not to trust them blindly.

Kinds and probabilities are those of nnU-Net's cascade (Isensee et al. 2021). All of it runs on the
labels' device, but for finding connected components; what is not drawn costs nothing. A voxel keeps
one label: were each class's channel changed by itself, the network would be told of two at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
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
            if not mask.any():
                continue
            changed = reshape(mask, int(radii[sample, index]))
            labels[sample].masked_fill_(mask, 0).masked_fill_(changed, index + 1)
        for sample in removed.nonzero().flatten().tolist():
            for index in range(num_classes):
                mask = labels[sample] == index + 1
                if not mask.any():
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
    parts, _ = ndimage.label(mask.cpu().numpy())
    sizes = np.bincount(parts.ravel())
    small = np.flatnonzero(sizes < largest * parts.size)
    small = small[(small > 0) & (sizes[small] > 0)]
    if len(small) == 0:
        return torch.zeros_like(mask)
    return torch.from_numpy(parts == small[int(draw * len(small))]).to(mask.device)


def _beside(mask: Mask, axis: int) -> Mask:
    """The mask, and each voxel before or behind one of it along an axis."""
    inner = mask.shape[axis] - 1
    grown = mask.clone()
    grown.narrow(axis, 1, inner).logical_or_(mask.narrow(axis, 0, inner))
    grown.narrow(axis, 0, inner).logical_or_(mask.narrow(axis, 1, inner))
    return grown


RESHAPINGS: tuple[Callable[[Mask, int], Mask], ...] = (dilate, erode, opened, closed)
