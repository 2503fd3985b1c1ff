"""Patches drawn from stored cases, each by its number alone.

Patch i of a run depends on the seed and on i, and on nothing that came before it: the order of
workers does not matter, and a run that is resumed goes on with the patch it would have drawn.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from segkit.data.store import StoredCase

Patch = dict[str, Tensor]


class PatchDataset(TorchDataset[Patch]):
    """Patch number i of a training run: `image` (channel, *cut), `label` (*cut).

    A share of the patches is centred on a voxel of a foreground class, the class drawn evenly among
    those of the case (Isensee et al. 2021); the others lie anywhere. Where a patch reaches beyond
    the volume it holds zeros, at either end. There is no last patch: a sampler decides.
    """

    def __init__(
        self,
        cases: Sequence[StoredCase],
        *,
        cut_size: Sequence[int],
        foreground_share: float,
        seed: int,
    ) -> None:
        self.cases = cases
        self.cut_size = tuple(cut_size)
        self.foreground_share = foreground_share
        self.seed = seed

    def __getitem__(self, index: int) -> Patch:
        """Patch number `index`."""
        random = np.random.default_rng([self.seed, index])
        case = self.cases[int(random.integers(len(self.cases)))]
        wants_foreground = random.random() < self.foreground_share
        start = [
            self._anywhere(random, size, cut)
            for size, cut in zip(case.label.shape, self.cut_size, strict=True)
        ]
        if wants_foreground and case.positions:
            classes = sorted(case.positions)
            voxels = case.positions[classes[int(random.integers(len(classes)))]]
            centre = voxels[random.integers(len(voxels))]
            start = [
                int(voxel) - cut // 2 for voxel, cut in zip(centre, self.cut_size, strict=True)
            ]
        return {
            "image": torch.from_numpy(cut(case.image, start, self.cut_size)),
            "label": torch.from_numpy(cut(case.label, start, self.cut_size)),
        }

    @staticmethod
    def _anywhere(random: np.random.Generator, size: int, cut: int) -> int:
        lowest, highest = min(0, size - cut), max(0, size - cut)
        return int(random.integers(lowest, highest + 1))


def cut(array: ndarray, start: Sequence[int], size: Sequence[int]) -> ndarray:
    """A copy of the block of the last three axes that begins at `start`; zeros beyond the array."""
    block = np.zeros((*array.shape[:-3], *size), dtype=array.dtype)
    inside: list[slice] = []
    outside: list[slice] = []
    for first, count, extent in zip(start, size, array.shape[-3:], strict=True):
        low, high = max(first, 0), min(first + count, extent)
        if low >= high:
            return block
        inside.append(slice(low - first, high - first))
        outside.append(slice(low, high))
    lead = [slice(None)] * (array.ndim - 3)
    block[(*lead, *inside)] = array[(*lead, *outside)]
    return block
