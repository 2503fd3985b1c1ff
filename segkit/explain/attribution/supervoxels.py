"""Parts of an image that are replaced together: boxes, or supervoxels of any shape."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from numpy import ndarray
from scipy.ndimage import find_objects
from torch import Tensor

from segkit.explain.attribution.target import SummedOutput
from segkit.geometry.grid import Grid, Placement


@dataclass(frozen=True, eq=False)
class Supervoxels:
    """A partition of an image into parts 0, 1, 2, …; a voxel of -1 is in no part."""

    numbers: Integer[Tensor, "x y z"]
    """The part of each voxel."""
    boxes: tuple[tuple[slice, ...] | None, ...]
    """The smallest box around each part; None if it has no voxel."""
    grid: Grid
    """The grid of the result: that of the boxes, or the image's own."""
    placement: Placement
    """The same in voxels of the image."""
    are_boxes: bool
    """Whether each part is a cell of `grid`."""

    @classmethod
    def boxes_of(cls, image: Grid, size: Sequence[int]) -> "Supervoxels":
        """Boxes of `size` voxels along each axis; the last ones are cut off by the image's end."""
        x, y, z = (
            np.arange(voxels) // step for voxels, step in zip(image.shape, size, strict=True)
        )
        shape = [-(-voxels // step) for voxels, step in zip(image.shape, size, strict=True)]
        numbers = np.ravel_multi_index(np.ix_(x, y, z), shape).astype(np.int32)
        stride = tuple(float(step) for step in size)
        place = Placement(stride, tuple((step - 1) / 2 for step in size))
        return cls(
            torch.from_numpy(numbers),
            tuple(find_objects(numbers + 1)),
            image.placed(shape, place.stride, place.offset),
            place,
            are_boxes=True,
        )

    @classmethod
    def of(cls, numbers: Integer[ndarray, "x y z"], image: Grid) -> "Supervoxels":
        """Supervoxels of any shape: the voxels of each number above 0. Others have no part."""
        present, places = np.unique(numbers, return_inverse=True)
        held = (places.reshape(numbers.shape) - np.searchsorted(present, 1)).astype(np.int32)
        held = np.maximum(held, -1)
        boxes = tuple(find_objects(held + 1))
        return cls(torch.from_numpy(held), boxes, image, Placement.identity(3), are_boxes=False)

    def __len__(self) -> int:
        return len(self.boxes)

    def replaced(
        self,
        image: Float[Tensor, "channel x y z"],
        replacement: Float[Tensor, "channel x y z"],
        chosen: Integer[ndarray, " chosen"],
        box: tuple[slice, ...] = (),
    ) -> Float[Tensor, "channel box_x box_y box_z"]:
        """A copy of the image, or of the voxels in a box, with the chosen parts replaced.

        Args:
            image: the image.
            replacement: the image from which replaced voxels come.
            chosen: numbers of the parts that are replaced.
            box: the voxels to return; all if empty.
        """
        table = torch.zeros(len(self) + 1, dtype=torch.bool)  # the last entry is for voxels of -1
        table[torch.from_numpy(chosen.astype(np.int64))] = True
        place = (slice(None), *box)
        return torch.where(table[self.numbers[box].long()], replacement[place], image[place])

    def in_windows(self, target: SummedOutput) -> list[Integer[ndarray, " parts"]]:
        """The parts with a voxel in each window of a target."""
        size = self.numbers.shape
        found = []
        for share in target.windows:
            parts = self.numbers[target.box(share.place, size)].unique()
            found.append(parts[parts >= 0].numpy())
        return found

    def placed(
        self, values: Float[ndarray, " parts"], computed: Bool[Tensor, "x y z"]
    ) -> Float[ndarray, "x y z"]:
        """The value of each part on the result's grid.

        It is NaN at voxels in no part, and at parts without a voxel that the network processed.
        """
        known = np.zeros(len(self) + 1, bool)
        known[self.numbers[computed].unique().numpy()] = True
        found: ndarray = np.where(known, np.append(values, np.nan), np.nan)
        found[-1] = np.nan  # for voxels of -1
        if self.are_boxes:
            return found[:-1].reshape(self.grid.shape)
        return found[self.numbers.numpy()]
