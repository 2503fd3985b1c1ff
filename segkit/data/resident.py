"""Prepared cases that lie on the training device whole, and patches that are cut there.

A patch of the device is the patch that `PatchDataset` cuts on the host, number for number: the same
draws place it, and the same voxels are copied. Nothing but its place goes to the device.
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
from torch.utils.data import Sampler

from segkit.data.patches import Patch, PatchDataset, indexable
from segkit.data.prepared_cache import StoredCase
from segkit.system.resources import free_memory_of

SHARE_OF_MEMORY = 0.4
"""Of the device's free memory, what cases may take; the rest is for the network and its step."""


class OpenedCase(StoredCase):
    """A stored case whose arrays stay mapped, as samplers look at it for every patch."""

    @cached_property
    def image(self) -> ndarray:
        """As `StoredCase.image`."""
        return super().image

    @cached_property
    def label(self) -> ndarray:
        """As `StoredCase.label`."""
        return super().label

    @cached_property
    def positions(self) -> dict[int, Integer[ndarray, "voxels 3"]]:
        """As `StoredCase.positions`."""
        return super().positions


def bytes_of(cases: Sequence[StoredCase]) -> int:
    """What the images and labels of cases take in memory, in the types they are stored in."""
    return sum(case.image.nbytes + case.label.nbytes for case in cases)


def fits(cases: Sequence[StoredCase], device: torch.device) -> bool:
    """Whether cases should lie on a device whole: on a GPU of which they take a small share."""
    if device.type != "cuda":
        return False
    return bytes_of(cases) <= SHARE_OF_MEMORY * free_memory_of(device)


def on_device(array: ndarray, device: torch.device) -> Tensor:
    """An array on a device, in its own type."""
    return torch.from_numpy(np.array(array)).to(device)


class ResidentPatches:
    """The patches of a data set, cut on a device where all of its cases lie.

    Args:
        patches: whose patches these are.
        device: where they are cut.
    """

    def __init__(self, patches: PatchDataset, device: torch.device) -> None:
        self.patches = patches
        self.device = device
        self.cases = [OpenedCase(case.name, case.folder) for case in patches.cases]
        # All voxels of all cases stand in one row, so that one index cuts a whole batch.
        kind = patches.image_type
        self.images = torch.cat(
            [on_device(case.image, device).flatten(1).to(kind) for case in self.cases], dim=1
        )
        self.labels = torch.cat(
            [on_device(indexable(case.label), device).flatten() for case in self.cases]
        )
        sizes = [math.prod(case.label.shape) for case in self.cases]
        self.first_voxels = {
            case.folder: first
            for case, first in zip(self.cases, accumulate(sizes, initial=0), strict=False)
        }

    def batch(self, numbers: Sequence[int]) -> Patch:
        """The patches of these numbers, as the host's loader puts them into one batch."""
        names, rows = [], []
        for number in numbers:
            case, start = self.patches.place(number, self.cases)
            names.append(case.name)
            rows.append([self.first_voxels[case.folder], *start, *case.label.shape])
        table = torch.tensor(rows)
        if self.device.type == "cuda":
            table = table.pin_memory()  # else the copy would be waited for
        index = self._voxels(table.to(self.device, non_blocking=True))
        return {
            "name": names,
            "image": self.images[:, index].movedim(0, 1).contiguous(),
            "label": self.labels[index],
        }

    def _voxels(self, table: Integer[Tensor, "batch 7"]) -> Integer[Tensor, "batch x y z"]:
        """Where each voxel of each patch stands in the row; beyond a case, its outermost voxel."""
        first, starts, shapes = table[:, 0], table[:, 1:4], table[:, 4:7]
        index = torch.zeros((len(table), 1, 1, 1), dtype=torch.long, device=table.device)
        for axis, count in enumerate(self.patches.cut_size):
            steps = torch.arange(count, device=table.device)
            along = (starts[:, axis, None] + steps).clamp(min=0)
            along = torch.minimum(along, shapes[:, axis, None] - 1)
            shape = [len(table), 1, 1, 1]
            shape[axis + 1] = count
            index = index * shapes[:, axis].view(-1, 1, 1, 1) + along.view(shape)
        return index + first.view(-1, 1, 1, 1)


class ResidentLoader:
    """Batches of the numbers that a sampler gives, cut on the device: a loader without workers."""

    def __init__(self, patches: ResidentPatches, sampler: Sampler[int], batch_size: int) -> None:
        self.patches = patches
        self.numbers = sampler  # Lightning takes what has a `sampler` for a DataLoader
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return math.ceil(len(self.numbers) / self.batch_size)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Patch]:
        """The batches, in order."""
        batch: list[int] = []
        for number in self.numbers:
            batch.append(number)
            if len(batch) == self.batch_size:
                yield self.patches.batch(batch)
                batch = []
        if batch:
            yield self.patches.batch(batch)


class ResidentCases:
    """Held-out cases whole, on a device: `image` (channel, x, y, z), as stored, and `label`."""

    def __init__(self, cases: Sequence[StoredCase], sampler: Sampler[int], device: torch.device):
        self.numbers = sampler  # Lightning takes what has a `sampler` for a DataLoader
        self.held: list[dict[str, Tensor]] = [
            {
                "image": on_device(case.image, device),
                "label": on_device(indexable(case.label), device),
            }
            for case in cases
        ]

    def __len__(self) -> int:
        """How many cases this process validates on."""
        return len(self.numbers)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Each case."""
        return (self.held[number] for number in self.numbers)
