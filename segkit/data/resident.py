"""Prepared cases that are completely in the memory of the training device, which cuts patches.

The patches are exactly those that `PatchDataset` cuts on the CPU: the same random numbers place
them, and the same voxels are copied. Only the place of a patch is sent to the device.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Integer
from numpy import ndarray
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

from segkit.data.patches import Patch, PatchDataset, indexable
from segkit.data.prepared_cache import StoredCase
from segkit.geometry.queued_copy import queued_to
from segkit.system.resources import free_memory_of

SHARE_OF_MEMORY = 0.25
"""Cases may use this share of the device's free memory; the rest is for the training step. (A plan
for all of it needs about 0.7: nnU-Net's rule, by which it is made, counts more than a step needs in
half precision.)"""


class OpenedCase(StoredCase):
    """A stored case whose arrays stay mapped, because samplers use it for every patch."""

    @cached_property
    def image(self) -> ndarray:
        """The array of `StoredCase.image`."""
        return super().image

    @cached_property
    def label(self) -> ndarray:
        """The array of `StoredCase.label`."""
        return super().label

    @cached_property
    def positions(self) -> dict[int, Integer[ndarray, "voxels 3"]]:
        """The arrays of `StoredCase.positions`."""
        return super().positions


def bytes_of(cases: Sequence[StoredCase]) -> int:
    """Bytes of the images and labels of cases on a device.

    All images there have one type (`PatchDataset.image_type`): if one is stored in single
    precision, all take the bytes of it.
    """
    widest = max((case.image.dtype.itemsize for case in cases), default=0)
    return sum(
        case.image.size * widest + indexable(case.label[:0]).dtype.itemsize * case.label.size
        for case in cases
    )


def fits(cases: Sequence[StoredCase], device: torch.device, times: float = 1.0) -> bool:
    """Whether all cases should be loaded to the device: only to a GPU with enough free memory.

    Args:
        cases: the cases.
        device: the device.
        times: each case stands for so many cases of its size.
    """
    if device.type != "cuda":
        return False
    return times * bytes_of(cases) <= SHARE_OF_MEMORY * free_memory_of(device)


def on_device(array: ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on a device, in the same type."""
    return torch.from_numpy(np.array(array)).to(device)


class ResidentPatches:
    """The patches of a `PatchDataset`, cut on a device that holds all cases.

    Args:
        patches: the dataset of patches.
        device: the device.
    """

    def __init__(self, patches: PatchDataset, device: torch.device) -> None:
        self.patches = patches
        self.device = device
        self.cases = [OpenedCase(case.name, case.folder) for case in patches.cases]
        # The voxels of all cases are in one row, so that one index operation cuts a whole batch.
        # They are filled case by case, so that no moment needs memory for the cases twice.
        sizes = [math.prod(case.label.shape) for case in self.cases]
        channels, total = self.cases[0].image.shape[0], sum(sizes)
        self.images = torch.empty(channels, total, dtype=patches.image_type, device=device)
        kinds = [indexable(case.label[:0]).dtype for case in self.cases]
        self.labels = torch.from_numpy(np.zeros(0, np.result_type(*kinds))).new_empty(
            total, device=device
        )
        images, labels = self.images.split(sizes, dim=1), self.labels.split(sizes)
        for case, image, label in zip(self.cases, images, labels, strict=True):
            image.copy_(torch.from_numpy(np.array(case.image)).flatten(1))
            label.copy_(torch.from_numpy(np.array(indexable(case.label))).flatten())
        self.first_voxels = {
            case.folder: first
            for case, first in zip(self.cases, accumulate(sizes, initial=0), strict=False)
        }

    def batch(self, numbers: Sequence[int]) -> Patch:
        """The patches with these numbers as one batch, in the form of PyTorch's loader."""
        names, places = [], []
        for number in numbers:
            case, start = self.patches.place(number, self.cases)
            names.append(case.name)
            places.append((self.first_voxels[case.folder], start, case.label.shape))
        index = self._voxels(places)
        return {
            "name": names,
            "image": self.images[:, index].movedim(0, 1).contiguous(),
            "label": self.labels[index],
        }

    def _voxels(
        self, places: Sequence[tuple[int, Sequence[int], Sequence[int]]]
    ) -> Integer[Tensor, "batch x y z"]:
        """The index in the row of each voxel of each patch; outside a case, its outermost voxel.

        The index is a sum of one part for each axis, which the host computes.

        Args:
            places: for each patch, the index of its case's first voxel, the voxel of the case at
                which the patch starts, and the shape of the case.
        """
        size = self.patches.cut_size
        parts = np.empty((len(places), sum(size)), np.int64)
        ends = list(accumulate(size))
        for row, (first, start, shape) in zip(parts, places, strict=True):
            for axis, along in enumerate(np.split(row, ends[:-1])):
                voxels = np.arange(start[axis], start[axis] + size[axis])
                along[:] = voxels.clip(0, shape[axis] - 1) * math.prod(shape[axis + 1 :])
            row[: size[0]] += first
        x, y, z = queued_to(torch.from_numpy(parts), self.device).split(size, dim=1)
        return x[:, :, None, None] + y[:, None, :, None] + z[:, None, None, :]


class ResidentLoader:
    """A loader without workers: it cuts batches on the device, by the numbers of a sampler."""

    def __init__(self, patches: ResidentPatches, sampler: Sampler[int], batch_size: int) -> None:
        self.patches = patches
        # With the names `sampler` or `batch_sampler`, Lightning would expect a DataLoader.
        self.batches = BatchSampler(sampler, batch_size, drop_last=False)

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Patch]:
        """The batches, in order."""
        return (self.patches.batch(numbers) for numbers in self.batches)


class ResidentCases:
    """Whole held-out cases on a device: `image` (channel, x, y, z) in its stored type, `label`."""

    def __init__(self, cases: Sequence[StoredCase], sampler: Sampler[int], device: torch.device):
        self.numbers = sampler  # with the name `sampler`, Lightning would expect a DataLoader
        self.held: list[dict[str, Tensor]] = [
            {
                "image": on_device(case.image, device),
                "label": on_device(indexable(case.label), device),
            }
            for case in cases
        ]

    def __len__(self) -> int:
        """Number of cases that this process validates on."""
        return len(self.numbers)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The cases, in order."""
        return (self.held[number] for number in self.numbers)
