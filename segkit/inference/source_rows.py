"""From slabs on the network's grid to rows of the volume, a few at a time.

    slabs      [0 1 2 3][4 5 6 7][8 9]        as the network's windows finish them
    volume      0   1   2   3   4   5         rows between two of the network's; row 2 needs 3 and 4

Nothing is resampled until it is looked at, and then a few rows, or columns of them, at a time: what
a slab becomes on the volume's own grid, which may be far finer, is never whole.
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
"""Numbers, one for each voxel and class, of which labels are made at once: a cache holds them."""
AT_ONCE_ON_GPU = 2**28
"""The same on a GPU, where each piece costs a call and a gigabyte is little."""
WALK_AXIS = 2
"""Slabs advance from foot to head, along which most volumes are stored slowest."""


@dataclass(frozen=True, eq=False)
class SourceRows:
    """Logits of some rows of the volume, still on the network's grid."""

    logits: Float[Tensor, "channel x y slab_rows"]
    """Of the classes; behind them, where `with_spread`, how far the mirrors' answers differ."""
    before: Float[Tensor, "channel x y 1"] | None
    """The network's row before these."""
    positions: tuple[ndarray, ndarray, ndarray]
    """Where the volume's voxels lie in `logits`, per axis; those after `before`, from -1 to 0."""
    written: Sequence[int] | None = None
    """The numbers of regions, in order; None where outputs are classes."""
    with_spread: bool = False

    @property
    def count(self) -> int:
        """How many rows of the volume these are."""
        return len(self.positions[WALK_AXIS])

    @property
    def num_classes(self) -> int:
        """Of the logits."""
        return len(self.logits) - self.with_spread

    def part(self, first: int, last: int) -> "SourceRows":
        """The rows from `first` up to `last`, counted from these rows' own first."""
        x, y, rows = self.positions
        return replace(self, positions=(x, y, rows[first:last]))

    def on_host(self) -> "SourceRows":
        """The same rows in the host's memory."""
        before = None if self.before is None else self.before.cpu()
        return replace(self, logits=self.logits.cpu(), before=before)

    def labels(self) -> Tensor:
        """The class with the largest logit at each voxel; the lowest where they tie.

        Of regions, the number of the last whose probability is above one half.
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
        """The softmax of the resampled logits; of regions, the sigmoid."""
        logits = self._resampled(slice(0, self.num_classes))
        return logits.softmax(dim=0) if self.written is None else logits.sigmoid()

    def spread(self) -> Float[Tensor, "x y rows"]:
        """Mean over classes of the variance of what mirrors of each window say; 0 without any."""
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
    """The first row and the logits of the rows of the volume that each slab makes known.

    A row between two of the network's is known as soon as both are; until then one row is held.
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
        del slab  # or it would live on beside the next
    assert done == len(clamped), f"{done} of {len(clamped)} rows were predicted"


def pieces(rows: Sequence[SourceRows], *, voxels: int) -> Iterator[tuple[int, list[SourceRows]]]:
    """The same rows of several members, few enough at a time, and the first of each piece.

    A piece has at least one row, and no more than make up so many voxels.
    """
    x, y, _ = rows[0].positions
    step = max(voxels // (len(x) * len(y)), 1)
    for first in range(0, rows[0].count, step):
        yield first, [member.part(first, first + step) for member in rows]


def labels_of(
    logits: Float[Tensor, "channel *space"], written: Sequence[int] | None
) -> Integer[Tensor, "*space"]:
    """The class with the largest logit, the lowest if they tie; or `written_regions`."""
    return logits.max(dim=0).indices if written is None else written_regions(logits, written)


def written_regions(
    logits: Float[Tensor, "regions *space"], numbers: Sequence[int]
) -> Integer[Tensor, "*space"]:
    """Each region's number wherever its logit is above 0, its probability above one half.

    Later regions are written over earlier ones; what is in none is 0.
    """
    labels = torch.zeros(logits.shape[1:], dtype=torch.long, device=logits.device)
    for region, number in zip(logits, numbers, strict=True):
        labels.masked_fill_(region > 0, number)
    return labels
