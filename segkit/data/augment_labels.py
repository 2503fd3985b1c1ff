"""Random errors in the labels of a first stage, so that a second stage does not trust them blindly.

Kinds and probabilities are those of nnU-Net's cascade (Isensee et al. 2021). Everything runs on the
device of the labels without waiting for it; a change that is not drawn takes no time. A voxel
always has exactly one label. That would not hold if each class were changed in its own channel.
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
    """Random errors in labels, with the probability and the size of each kind."""

    reshaping_probability: float = 0.4
    """Probability that a class of a sample is dilated, eroded, opened or closed."""
    radii: tuple[int, int] = (1, 8)
    """Smallest and largest radius of the ball for this, in voxels."""
    removal_probability: float = 0.2
    """Probability that each class of a sample loses one of its small components."""
    largest_removed: float = 0.15
    """A small component has less than this share of the patch."""

    def __call__(
        self, labels: Integer[Tensor, "batch *space"], num_classes: int, generator: Generator
    ) -> Integer[Tensor, "batch *space"]:
        """Labels from 0 to `num_classes` with random errors.

        A class that grows overwrites others; voxels that it loses become background.

        Args:
            labels: label maps; 0 is the background.
            num_classes: number of classes besides the background.
            generator: the generator of all random numbers.
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
                part = small_component(mask, which[sample][index], largest=self.largest_removed)
                labels[sample].masked_fill_(part, 0)
        return labels


def dilate(mask: Mask, radius: int) -> Mask:
    """The mask, dilated by a ball of `radius` voxels.

    The ball is approximated by steps to the neighbours across faces and, in every second step, also
    across edges and corners. It is exact along the axes; in other directions the radius is up to a
    fifth too large.
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
    """The mask, eroded by the ball of `dilate`. Voxels outside the image do not erode it."""
    return ~dilate(~mask, radius)


def opened(mask: Mask, radius: int) -> Mask:
    """The mask without parts that are narrower than the ball."""
    return dilate(erode(mask, radius), radius)


def closed(mask: Mask, radius: int) -> Mask:
    """The mask with gaps filled that are narrower than the ball."""
    return erode(dilate(mask, radius), radius)


def small_component(mask: Mask, draw: float, *, largest: float) -> Mask:
    """One small connected component of a mask, as a mask; empty if there is none.

    Voxels are connected across faces.

    Args:
        mask: the mask.
        draw: a random number in [0, 1) that picks one of the small components.
        largest: a component is small if it has less than this share of the image.
    """
    if mask.device.type == "cpu":
        found, _ = ndimage.label(mask.numpy())
        roots = torch.from_numpy(found).flatten().long()
    else:
        roots = components(mask)
    # Size of each component, indexed by 1 + its first voxel; index 0 is outside the mask.
    sizes = torch.zeros(mask.numel() + 1, dtype=torch.long, device=mask.device)
    sizes.scatter_add_(0, roots, torch.ones_like(roots))
    sizes[:1].zero_()  # `sizes[0] = 0` would copy the 0 from the host, and wait for the GPU
    small = (sizes > 0) & (sizes < largest * mask.numel())
    order = small.cumsum(0)
    wanted = (draw * order[-1].double()).floor() + 1
    picked = small & (order == wanted)
    return picked[roots].view(mask.shape)


def components(mask: Mask, rounds: int = 16) -> Integer[Tensor, " voxels"]:
    """For each voxel, 1 + the index of the first voxel of its component; 0 outside the mask.

    Voxels are connected across faces. In each round, every voxel takes the lowest number among its
    neighbours and the voxels that these numbers point to, so that paths halve (after FastSV, Zhang
    et al. 2020, arXiv:1910.05971). The number of rounds is fixed, because the CPU would have to
    wait for the device to learn whether another round is needed. A component with a very winding
    shape may therefore be split into several.
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
        # The voxel that a number points to may itself have a lower number by now.
        table = torch.cat([lowest.flatten(), lowest.new_full((1,), none)])
        table.scatter_reduce_(0, number.flatten(), lowest.flatten(), "amin")
        number = torch.where(mask, table[table[lowest]], none)
    return torch.where(mask, number + 1, 0).flatten()


def _known_empty(mask: Mask) -> bool:
    """Whether a mask on a CPU is empty. For a GPU always False, because asking it means waiting."""
    return mask.device.type == "cpu" and not bool(mask.any())


def _beside(mask: Mask, axis: int) -> Mask:
    """The mask, grown by one voxel in both directions along an axis."""
    inner = mask.shape[axis] - 1
    grown = mask.clone()
    grown.narrow(axis, 1, inner).logical_or_(mask.narrow(axis, 0, inner))
    grown.narrow(axis, 0, inner).logical_or_(mask.narrow(axis, 1, inner))
    return grown


RESHAPINGS: tuple[Callable[[Mask, int], Mask], ...] = (dilate, erode, opened, closed)
