"""Patches drawn from stored cases, each by its number alone.

Patch i of a run depends on the seed and on i, and on nothing that came before it: the order of
workers does not matter, and a run that is resumed goes on with the patch it would have drawn.
"""

from collections.abc import Callable, Sequence
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
"""Where a patch is cut: from all cases, the patch's number and a generator that belongs to this
patch alone, the case and the voxel (x, y, z) at the patch's centre.

Part of the patch must lie in the volume. With `data.workers` a sampler is pickled, so that it must
be a function or a class of a module.
"""


@dataclass(frozen=True)
class ForegroundSampler:
    """Draws cases evenly, and centres a share of their patches on the foreground.

    For that share a class is drawn evenly among those of the case, and then one of its voxels
    (Isensee et al. 2021). The other patches lie anywhere in the volume, or hold all of it if it is
    smaller; in a case with ignored voxels they are centred on one that is not ignored.
    """

    patch_size: tuple[int, ...]
    foreground_share: float

    def __call__(
        self, cases: Sequence[StoredCase], index: int, random: np.random.Generator
    ) -> tuple[StoredCase, Sequence[int]]:
        """The case, and the voxel at the patch's centre."""
        case = cases[int(random.integers(len(cases)))]
        return _centred(case, random, self.patch_size, self.foreground_share)


def _centred(
    case: StoredCase, random: np.random.Generator, patch_size: Sequence[int], share: float
) -> tuple[StoredCase, Sequence[int]]:
    """A case and the centre of a patch in it: on its foreground in this share, or anywhere."""
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

    Without groups the case is drawn first, and then a class evenly among its own, as
    `ForegroundSampler` does. With groups, a patch on the foreground draws a group by its weight
    among those that some case holds, then a case that holds it by the cases' weights, then one of
    the group's labels in the case, evenly, and one of its voxels.

    So of N patches N * share * w / sum(w) are expected on a group, whether one case holds it or
    all.
    """

    patch_size: tuple[int, ...]
    foreground_share: float
    case_weights: tuple[float, ...]
    """Of each case, in order; some are above 0."""
    groups: tuple[tuple[int, ...], ...] = ()
    """The labels of each class or region; or none."""
    group_weights: tuple[float, ...] = ()
    holders: tuple[tuple[int, ...], ...] = ()
    """Numbers of the cases that hold each group and have a weight above 0."""

    def __call__(
        self, cases: Sequence[StoredCase], index: int, random: np.random.Generator
    ) -> tuple[StoredCase, Sequence[int]]:
        """The case, and the voxel at the patch's centre."""
        wants_foreground = random.random() < self.foreground_share
        held = [number for number, holders in enumerate(self.holders) if holders]
        weights = [self.group_weights[number] for number in held]
        if not (wants_foreground and sum(weights) > 0):
            case = cases[_drawn(self.case_weights, random)]
            # Of patches on the foreground, those of a case's own classes; else none.
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
    """A number drawn by weights."""
    ends = np.cumsum(weights)
    return int(np.searchsorted(ends, random.random() * ends[-1], side="right"))


class PatchDataset(TorchDataset[Patch]):
    """Patch number i of a run: `name` of its case, `image` (channel, *cut), `label` (*cut).

    Images are float16 if all cases are stored so, else float32. No case's array is kept.

    The `sampler` says where each patch lies. It is cut with a `margin` (voxels) beyond either end,
    for the augmentation to turn it in. Beyond the volume stand its outermost voxels again. There is
    no last patch: the loader decides how many are drawn.
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
        """Of all patches, so that a batch of several cases has one."""
        half = all(case.image.dtype == np.float16 for case in self.cases)
        return torch.float16 if half else torch.float32

    def place(
        self, index: int, cases: Sequence[StoredCase] | None = None
    ) -> tuple[StoredCase, list[int]]:
        """The case of patch number `index`, and the first voxel of its cut; of these very cases."""
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
    """Labels in a type that PyTorch can gather: of its unsigned types only the smallest is one."""
    return labels if labels.dtype.itemsize == 1 else labels.astype(np.int32)


def cut(array: ndarray, start: Sequence[int], size: Sequence[int]) -> ndarray:
    """A copy of the block of the last three axes that begins at `start`.

    Beyond the array the block repeats the array's outermost voxels; some of it lies within.
    """
    inside: list[slice] = []
    beyond: list[tuple[int, int]] = []
    for first, count, extent in zip(start, size, array.shape[-3:], strict=True):
        low, high = max(first, 0), min(first + count, extent)
        inside.append(slice(low, high))
        beyond.append((low - first, first + count - high))
    lead = array.ndim - 3
    block = array[(*[slice(None)] * lead, *inside)]
    return np.pad(block, [*[(0, 0)] * lead, *beyond], mode="edge")
