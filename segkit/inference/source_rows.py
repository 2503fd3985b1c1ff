"""Rows of the volume from slabs on the network's grid, a few at once.

    slabs      [0 1 2 3][4 5 6 7][8 9]        as the network's windows finish them
    volume      0   1   2   3   4   5         rows between two of the network's; row 2 needs 3 and 4

The volume's own grid may be much finer. So rows are resampled only when they are used, and only a
few rows or columns at once: a whole slab never exists on the volume's grid.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Integer
from numpy import ndarray
from torch import Tensor

from segkit.data.preprocess import Prepared
from segkit.geometry.resample import resample

AT_ONCE = 2**20
"""Number of logits from which labels are computed at once, so that they fit into a cache."""
AT_ONCE_ON_GPU = 2**28
"""The same on a GPU, which has more memory, and needs time for each call."""
WALK_AXIS = 2
"""Slabs follow one another from foot to head, the slowest axis in the files of most volumes."""


@dataclass(frozen=True, eq=False)
class SourceRows:
    """Logits of some rows of the volume, still on the network's grid."""

    logits: Float[Tensor, "channel x y slab_rows"]
    """Logits of the classes; with `with_spread`, the last channel is the variance between mirror
    images."""
    before: Float[Tensor, "channel x y 1"] | None
    """The row of the network's grid before these; None at the first slab."""
    positions: tuple[ndarray, ndarray, ndarray]
    """Positions of the volume's voxels in `logits` along each axis; `before` is at row -1."""
    written: Sequence[int] | None = None
    """The numbers of regions, in order; None if the outputs are classes."""
    with_spread: bool = False
    """True if the last channel is a variance."""

    @property
    def count(self) -> int:
        """Number of rows of the volume."""
        return len(self.positions[WALK_AXIS])

    @property
    def num_classes(self) -> int:
        """Number of channels that are logits."""
        return len(self.logits) - self.with_spread

    def part(self, first: int, last: int) -> "SourceRows":
        """Rows `first` to `last` - 1 of these rows."""
        x, y, rows = self.positions
        return replace(self, positions=(x, y, rows[first:last]))

    def on_host(self) -> "SourceRows":
        """The same rows in the host's memory."""
        before = None if self.before is None else self.before.cpu()
        return replace(self, logits=self.logits.cpu(), before=before)

    def labels(self) -> Tensor:
        """The class with the largest logit at each voxel; if several are equal, the lowest class.

        For regions, the number of the last region whose probability is above one half.
        """
        x, y, rows = self.positions
        at_once = AT_ONCE if self.logits.device.type == "cpu" else AT_ONCE_ON_GPU
        step = max(at_once // (len(y) * len(rows) * self.num_classes), 1)
        classes = slice(0, self.num_classes)
        blocks = []
        for first in range(0, len(x), step):
            columns = replace(self, positions=(x[first : first + step], y, rows))
            blocks.append(labels_of(columns._resampled(classes), self.written))
        return torch.cat(blocks)

    def probabilities(self) -> Float[Tensor, "classes x y rows"]:
        """Softmax of the resampled logits; for regions, their sigmoid."""
        logits = self._resampled(slice(0, self.num_classes))
        return logits.softmax(dim=0) if self.written is None else logits.sigmoid()

    def spread(self) -> Float[Tensor, "x y rows"]:
        """Variance of probabilities between mirror images, mean over classes; 0 without mirrors."""
        if not self.with_spread:
            shape = [len(samples) for samples in self.positions]
            return torch.zeros(shape, device=self.logits.device)
        return self._resampled(slice(self.num_classes, None))[0]

    def _resampled(self, channels: slice) -> Tensor:
        x, y, rows = self.positions
        left, right = np.clip((np.floor(x[0]), np.ceil(x[-1])), 0, self.logits.shape[1] - 1)
        lowest, highest = int(np.floor(rows[0])), int(np.ceil(rows[-1]))
        band = (channels, slice(int(left), int(right) + 1))
        block = self.logits[*band, :, max(lowest, 0) : highest + 1]
        if lowest < 0:
            assert self.before is not None
            both = (self.before[band].to(block.device), block)
            block = torch.cat([part.movedim(0, -1) for part in both], dim=2).movedim(-1, 0)
        return resample(block, (x - left, y, rows - lowest))


def to_source_rows(
    slabs: Iterable[Float[Tensor, "channel x y _"]],
    prepared: Prepared,
    *,
    written: Sequence[int] | None = None,
    with_spread: bool = False,
) -> Iterator[tuple[int, SourceRows]]:
    """Rows of the volume, as soon as slabs complete them.

    A row of the volume between two rows of the network's grid is complete once both are. So the
    last row of each slab is kept until the next slab.

    Args:
        slabs: logits on the network's grid, in order.
        prepared: the image from which they were computed.
        written: the numbers of regions; None if the outputs are classes.
        with_spread: True if the last channel is a variance.

    Yields:
        The first row, and the rows.
    """
    x, y, rows = prepared.positions_of_source()
    last = prepared.grid.shape[WALK_AXIS] - 1
    clamped = np.clip(rows, 0, last)
    before: Tensor | None = None
    first = done = 0
    for slab in slabs:
        newest = first + slab.shape[-1] - 1
        known = int(np.searchsorted(np.ceil(clamped), newest, side="right"))
        if known > done:
            positions = (x, y, clamped[done:known] - first)
            yield done, SourceRows(slab, before, positions, written, with_spread)
            done = known
        before = slab[..., -1:].clone()
        first = newest + 1
        del slab  # frees its memory before the next slab is made
    assert done == len(clamped), f"{done} of {len(clamped)} rows were predicted"


def pieces(rows: Sequence[SourceRows], *, voxels: int) -> Iterator[tuple[int, list[SourceRows]]]:
    """Cut the same rows of several models into pieces of at most `voxels` voxels, or of one row.

    Yields:
        The first row of the piece, and the piece of each model.
    """
    x, y, _ = rows[0].positions
    step = max(voxels // (len(x) * len(y)), 1)
    for first in range(0, rows[0].count, step):
        yield first, [member.part(first, first + step) for member in rows]


def labels_of(
    logits: Float[Tensor, "channel *space"], written: Sequence[int] | None
) -> Integer[Tensor, "*space"]:
    """The class with the largest logit, the lowest if several are equal; or `written_regions`."""
    return logits.max(dim=0).indices if written is None else written_regions(logits, written)


def written_regions(
    logits: Float[Tensor, "regions *space"], numbers: Sequence[int]
) -> Integer[Tensor, "*space"]:
    """Labels from the logits of regions: a voxel with a logit above 0 gets the region's number.

    A logit of 0 is a probability of one half. Later regions overwrite earlier ones. Voxels in no
    region are 0.
    """
    labels = torch.zeros(logits.shape[1:], dtype=torch.long, device=logits.device)
    for region, number in zip(logits, numbers, strict=True):
        labels.masked_fill_(region > 0, number)
    return labels
