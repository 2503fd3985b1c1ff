"""Patches of stored cases, each drawn only by its number.

Patch i of a run depends only on the seed and on i, not on earlier patches. So the order of workers
does not matter, and a resumed run continues with the same patches.
"""

import math
import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch.utils.data import Dataset as TorchDataset

from segkit.data.prepared_cache import StoredCase

Patch = dict[str, Any]


PatchSampler = Callable[
    [Sequence[StoredCase], int, np.random.Generator], tuple[StoredCase, Sequence[int]]
]
"""A function that draws the place of a patch, from all cases, the number of the patch and a
generator that only this patch uses. It returns a case and the voxel (x, y, z) at the centre.

Part of the patch must lie in the volume. The result must depend only on the arguments, because
patches are drawn ahead, in a thread or in other processes. With `data.workers` the sampler is
pickled, so it must be a function or class at the top level of a module.
"""


@dataclass(frozen=True)
class ForegroundSampler:
    """Draws cases evenly, and centres a share of the patches on the foreground.

    For foreground patches, a class of the case is drawn evenly, and then one of its voxels (Isensee
    et al. 2021). Other patches lie anywhere in the volume, or contain all of it if it is smaller.
    In a case with ignored voxels, their centre is a voxel that is not ignored.
    """

    patch_size: tuple[int, ...]
    foreground_share: float

    def __call__(
        self, cases: Sequence[StoredCase], index: int, random: np.random.Generator
    ) -> tuple[StoredCase, Sequence[int]]:
        """A case and the voxel at the centre of the patch."""
        case = cases[int(random.integers(len(cases)))]
        return _centred(case, random, self.patch_size, self.foreground_share)


def _centred(
    case: StoredCase, random: np.random.Generator, patch_size: Sequence[int], share: float
) -> tuple[StoredCase, Sequence[int]]:
    """A case and the centre of a patch: with probability `share` on its foreground, or anywhere.

    Args:
        case: the prepared case.
        random: the generator of the patch.
        patch_size: size of a patch, in voxels.
        share: probability that the patch is centred on the foreground.
    """
    wants_foreground = random.random() < share
    centre: Sequence[int] = [
        _anywhere(random, size, patch) + patch // 2
        for size, patch in zip(case.label.shape, patch_size, strict=True)
    ]
    positions = case.positions
    classes = sorted(number for number in positions if number)
    voxels = positions.get(0)
    if wants_foreground and classes:
        voxels = positions[classes[int(random.integers(len(classes)))]]
    if voxels is not None and len(voxels):
        centre = voxels[random.integers(len(voxels))].tolist()
    return case, centre


def _anywhere(random: np.random.Generator, size: int, patch: int) -> int:
    lowest, highest = min(0, size - patch), max(0, size - patch)
    return int(random.integers(lowest, highest + 1))


@dataclass(frozen=True)
class WeightedSampler:
    """Draws cases by weights, and centres a share of the patches on classes by weights.

    Without groups, a case is drawn first and then one of its classes, evenly, as in
    `ForegroundSampler`. With groups, a foreground patch draws a group by its weight, among the
    groups that are in some case. Then it draws a case with this group, by the weights of cases;
    then a label of the group in this case, evenly; and then one of the label's voxels.

    So N * share * w / sum(w) of N patches are expected on a group, no matter how many cases have
    it.
    """

    patch_size: tuple[int, ...]
    foreground_share: float
    case_weights: tuple[float, ...]
    """The weight of each case, in order; at least one is above 0."""
    groups: tuple[tuple[int, ...], ...] = ()
    """The labels of each class or region; may be empty."""
    group_weights: tuple[float, ...] = ()
    """The weight of each group, in order."""
    holders: tuple[tuple[int, ...], ...] = ()
    """For each group, numbers of the cases that contain it and have a weight above 0."""

    def __call__(
        self, cases: Sequence[StoredCase], index: int, random: np.random.Generator
    ) -> tuple[StoredCase, Sequence[int]]:
        """A case and the voxel at the centre of the patch."""
        wants_foreground = random.random() < self.foreground_share
        held = [number for number, holders in enumerate(self.holders) if holders]
        weights = [self.group_weights[number] for number in held]
        if not (wants_foreground and sum(weights) > 0):
            case = cases[_drawn(self.case_weights, random)]
            # Without groups, a foreground patch is centred on a class of the case.
            share = float(wants_foreground and not self.groups)
            return _centred(case, random, self.patch_size, share)
        group = held[_drawn(weights, random)]
        holders = self.holders[group]
        case = cases[holders[_drawn([self.case_weights[one] for one in holders], random)]]
        positions = case.positions
        labels = [label for label in self.groups[group] if label in positions]
        voxels = positions[labels[int(random.integers(len(labels)))]]
        return case, voxels[random.integers(len(voxels))].tolist()


def _drawn(weights: Sequence[float], random: np.random.Generator) -> int:
    """The index of a weight, drawn with a probability proportional to the weight."""
    ends = np.cumsum(weights)
    return int(np.searchsorted(ends, random.random() * ends[-1], side="right"))


class PatchDataset(TorchDataset[Patch]):
    """Patch number i of a run: `name` of its case, `image` (channel, *cut), `label` (*cut).

    Images are float16 if all cases are stored in float16, and otherwise float32. The arrays of
    cases are not kept in memory. The number of patches has no limit; the loader decides how many
    are drawn.

    Args:
        cases: the prepared cases.
        patch_size: size of a patch, in voxels.
        margin: number of voxels that are cut in addition at each end, for rotation. Outside the
            volume, its outermost voxels are repeated.
        sampler: draws the place of each patch.
        seed: seed of all patches.
    """

    def __init__(
        self,
        cases: Sequence[StoredCase],
        *,
        patch_size: Sequence[int],
        margin: Sequence[int] = (0, 0, 0),
        sampler: PatchSampler,
        seed: int,
    ) -> None:
        self.cases = cases
        self.patch_size = tuple(patch_size)
        self.margin = tuple(margin)
        self.cut_size = tuple(
            patch + 2 * beyond for patch, beyond in zip(patch_size, margin, strict=True)
        )
        self.sampler = sampler
        self.seed = seed

    @cached_property
    def image_type(self) -> torch.dtype:
        """The type of all images. It is the same for all cases, because they share batches."""
        half = all(case.image.dtype == np.float16 for case in self.cases)
        return torch.float16 if half else torch.float32

    def place(
        self, index: int, cases: Sequence[StoredCase] | None = None
    ) -> tuple[StoredCase, list[int]]:
        """The case of patch number `index`, out of `cases`, and the first voxel of its cut."""
        random = np.random.default_rng([self.seed, index])
        case, centre = self.sampler(self.cases if cases is None else cases, index, random)
        return case, [int(c) - size // 2 for c, size in zip(centre, self.cut_size, strict=True)]

    def __getitem__(self, index: int) -> Patch:
        """Patch number `index`."""
        case, start = self.place(index)
        return {
            "name": case.name,
            "image": torch.from_numpy(cut(case.image, start, self.cut_size)).to(self.image_type),
            "label": torch.from_numpy(indexable(cut(case.label, start, self.cut_size))),
        }


def indexable(labels: ndarray) -> ndarray:
    """Labels in a type that PyTorch can gather: uint8 is kept, others become int32."""
    return labels if labels.dtype.itemsize == 1 else labels.astype(np.int32)


def cut(array: ndarray, start: Sequence[int], size: Sequence[int]) -> ndarray:
    """A copy of a block of the last three axes.

    Outside the array, its outermost voxels are repeated.

    Args:
        array: an array whose last axes are x, y and z.
        start: index of the first voxel; may be negative.
        size: size of the block. A part of it must lie inside the array.
    """
    inside: list[slice] = []
    beyond: list[tuple[int, int]] = []
    for first, count, extent in zip(start, size, array.shape[-3:], strict=True):
        low, high = max(first, 0), min(first + count, extent)
        inside.append(slice(low, high))
        beyond.append((low - first, first + count - high))
    lead = array.ndim - 3
    read_ahead(array, inside)
    block = array[(*[slice(None)] * lead, *inside)]
    return np.pad(block, [*[(0, 0)] * lead, *beyond], mode="edge")


def read_ahead(array: ndarray, region: Sequence[slice]) -> None:
    """Have the kernel read a block of a mapped file at once, in the background.

    Otherwise each row of a block that is not in memory is read from the disk only when the row
    before it has arrived. Other arrays than mapped files of numbers in C order are left as they
    are.

    Args:
        array: an array whose last axes are x, y and z.
        region: the block: a slice of each of these axes.
    """
    file = getattr(array, "_mmap", None)
    if file is None or not array.flags.c_contiguous or not hasattr(mmap, "MADV_WILLNEED"):
        return
    assert isinstance(array, np.memmap)
    begin = array.offset % mmap.ALLOCATIONGRANULARITY  # of the array in its mapping
    x, y, z = region
    plane = array.shape[-2] * array.shape[-1] * array.itemsize
    row = array.shape[-1] * array.itemsize
    first = y.start * row + z.start * array.itemsize
    length = (y.stop - y.start - 1) * row + (z.stop - z.start) * array.itemsize
    # It is only advice: a kernel or a file system that refuses it reads the block all the same.
    with suppress(OSError):
        for channel in range(math.prod(array.shape[:-3])):
            for number in range(x.start, x.stop):
                at = begin + (channel * array.shape[-3] + number) * plane + first
                page = at - at % mmap.PAGESIZE
                file.madvise(mmap.MADV_WILLNEED, page, at + length - page)
