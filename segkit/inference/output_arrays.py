"""Results on the volume's own grid that fill up row by row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from segkit.data.preprocess import Prepared
from segkit.io.disk_arrays import Allocate, release
from segkit.io.volume import Volume


@dataclass(frozen=True, eq=False)
class Results:
    """Arrays by name, filled by what stands beyond the body's box, which the network never sees.

    They are laid out as they are walked over, turned to RAS+ and a channel after the other, so that
    rows of a class lie together in a file.
    """

    source: Volume
    """The volume that they are results of."""
    prepared: Prepared
    """The image made of it."""
    allocate: Allocate
    """Makes the arrays."""
    arrays: dict[str, ndarray] = field(default_factory=dict)

    def add(self, name: str, kind: np.dtype[Any], beyond: Sequence[float]) -> None:
        """Begin a result, of as many channels as there are values `beyond` the box."""
        shape = self.prepared.orientation.turn_grid(self.source.grid).shape
        array = self.arrays[name] = self.allocate((*shape, len(beyond)), kind)
        for channel, value in enumerate(beyond):
            if value:
                array[..., channel] = value
        release(array)

    def put(self, name: str, rows: slice, values: Float[Tensor, "channel x y rows"]) -> None:
        """Fill rows of the box."""
        place = self.arrays[name][self.prepared.box][:, :, rows]
        for channel, found in enumerate(values.cpu().numpy()):
            place[..., channel] = found
        release(place)

    def volume(self, name: str) -> Volume | None:
        """A result in the volume's own axes, the channels last where there are several; or none."""
        if name not in self.arrays:
            return None
        back = self.prepared.orientation.turn_back(self.arrays[name])
        return self.source.like(back if back.shape[3] > 1 else back[..., 0])
