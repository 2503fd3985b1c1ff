"""Result arrays on the volume's own grid, filled row by row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from numpy import ndarray
from torch import Tensor

from segkit.data.preprocess import Prepared
from segkit.geometry.memory_order import slowest_first
from segkit.io.disk_arrays import Allocate, release
from segkit.io.volume import Volume
from segkit.system.host_copy import HostCopy


@dataclass(frozen=True, eq=False)
class Results:
    """Result arrays by name.

    Voxels outside the body's box, which the network does not see, have a fixed value. The arrays
    are in RAS+ order, one channel after another, so that the rows of a class lie together in a
    file.
    """

    source: Volume
    """The volume that is predicted."""
    prepared: Prepared
    """The image that was prepared from it."""
    allocate: Allocate
    """Makes the arrays."""
    arrays: dict[str, ndarray] = field(default_factory=dict)

    def add(self, name: str, kind: np.dtype[Any], beyond: Sequence[float]) -> None:
        """Add a result; `beyond` holds, for each channel, the value outside the body's box.

        Args:
            name: name of the result.
            kind: data type.
            beyond: for each channel, the value outside the body's box.
        """
        shape = self.prepared.orientation.turn_grid(self.source.grid).shape
        array = self.arrays[name] = self.allocate((*shape, len(beyond)), kind)
        for channel, value in enumerate(beyond):
            if value:
                array[..., channel] = value
        release(array)

    def put(self, name: str, rows: slice, values: Float[Tensor, "channel x y rows"]) -> None:
        """Write rows of the body's box.

        Args:
            name: name of the result.
            rows: the rows, within the box.
            values: their values.
        """
        place = self.arrays[name][self.prepared.box][:, :, rows]
        for channel, found in enumerate(values.cpu().numpy()):
            place[..., channel] = found
        release(place)

    def volume(self, name: str) -> Volume | None:
        """A result in the volume's own axes, several channels last; None if it was not added."""
        if name not in self.arrays:
            return None
        back = self.prepared.orientation.turn_back(self.arrays[name])
        return self.source.like(back if back.shape[3] > 1 else back[..., 0])


class LateLabels:
    """Writes rows of labels into an array, each when the next ones are queued for the device.

    So a GPU computes while the host writes. The device converts and sorts the labels first, so that
    less is copied, and in the order in memory.

    Args:
        target: the array, which may be a view of any strides.
    """

    def __init__(self, target: Integer[ndarray, "x y z"]) -> None:
        self.target = target
        self.order = slowest_first(target.strides)
        self.pending: tuple[slice, HostCopy] | None = None

    def put(self, rows: slice, labels: Integer[Tensor, "x y rows"]) -> None:
        """Start to copy the labels of some rows, and write those of the call before."""
        small = torch.uint8 if self.target.dtype.itemsize == 1 else torch.int32
        copy = HostCopy(labels.to(small).permute(self.order).contiguous())
        self.finish()
        self.pending = rows, copy

    def finish(self) -> None:
        """Write the labels that are left."""
        if self.pending is not None:
            rows, labels = self.pending
            self.target[:, :, rows].transpose(self.order)[...] = labels.values().numpy()
            self.pending = None
