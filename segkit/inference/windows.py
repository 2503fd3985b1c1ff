"""One walk over an image in overlapping windows, in memory that follows the slab.

Windows of a size-10 axis, patch 6, overlap 0.5, in multiples of 2, walked from left to right:

    image    0 1 2 3 4 5 6 7 8 9
    window 0 [─────────]             blended, rows 0-1 are finished: yielded and let go
    window 1     [─────────]         … rows 2-3
    window 2         [─────────]     … rows 4-9

A function may return several outputs of a window, each on a grid of its own that is a whole number
of times coarser. Windows start at multiples of the largest of these strides, and padding stands
only at the far end, so each output blends on one global grid of its own.

Windows may be skipped, such as those that hold nothing. They have no weight: what other windows say
of their voxels stands alone, and voxels of which no window says anything hold a value given.
"""

import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

logger = logging.getLogger(__name__)

WindowFunction = Callable[[Tensor], dict[str, Tensor]]
WindowPlace = tuple[int, ...]
"""The first voxel of a window along each axis."""


class WindowLayout(NamedTuple):
    """The size of a window and where windows stand, per axis."""

    patch_size: tuple[int, ...]
    """Voxels, multiples of `multiple`."""
    overlap: tuple[float, ...]
    """Share of a patch that neighbours have in common, from 0 to below 1."""
    multiple: tuple[int, ...]
    """Windows start at multiples of this: the network's total stride."""

    def starts(self, size: Sequence[int]) -> list[list[int]]:
        """First voxels of the windows along each axis of an image of this size."""
        return [window_starts(*numbers) for numbers in zip(size, *self, strict=True)]


@dataclass(frozen=True)
class Slab:
    """Finished rows of every output: `rows[name]` holds those from `starts[name]` on."""

    starts: dict[str, int]
    rows: dict[str, Tensor]


def window_starts(size: int, patch: int, overlap: float, multiple: int) -> list[int]:
    """First voxels of the windows that cover an axis: evenly spread multiples of `multiple`.

    Neighbours share at least `overlap` of a patch, unless a patch is a single multiple: then none.
    The last window ends at the axis's end rounded up to a multiple.
    """
    assert patch % multiple == 0, f"patch {patch} is no multiple of {multiple}"
    last = max(math.ceil(size / multiple) * multiple - patch, 0)
    step = max(math.floor(patch * (1 - overlap) / multiple), 1) * multiple
    count = math.ceil(last / step)
    return [round(index * last / max(count, 1) / multiple) * multiple for index in range(count + 1)]


def window_weight(patch: int, *, width: float = 1 / 8) -> Float[Tensor, " patch"]:
    """Weights of a window's voxels along one axis: a Gaussian of sigma `width * patch`.

    Isensee et al. (2021, nnU-Net) weigh windows so. There is no floor: in float32 even the product
    of three corners keeps its precision.
    """
    distance = torch.arange(patch, dtype=torch.float64) - (patch - 1) / 2
    return torch.exp(-0.5 * (distance / (width * patch)) ** 2).float()


class Blend:
    """The running weighted sum of one output over the rows that are not finished yet.

    The channels of a cell lie side by side: what is done to all of them alike, such as resampling
    or the choice of a class, then goes through memory in one sweep.
    """

    def __init__(
        self,
        window: Float[Tensor, "batch channel *cells"],
        *,
        image_size: Sequence[int],
        layout: WindowLayout,
        axis: int,
        unseen: Float[Tensor, " channel"] | None = None,
    ) -> None:
        """`unseen` is the value of cells that no window covers; only if windows are skipped."""
        cells, starts = window.shape[2:], layout.starts(image_size)
        self.axis = axis
        self.stride: list[int] = []
        self.size: list[int] = []
        self.weights: list[dict[int, Tensor]] = []
        extent: list[int] = []
        for size, patch, count, axis_starts in zip(
            image_size, layout.patch_size, cells, starts, strict=True
        ):
            step = patch // count
            if patch % count:
                raise ValueError(f"a window of {layout.patch_size} gave {tuple(cells)} cells")
            if any(start % step for start in axis_starts):
                raise ValueError(
                    f"an output has a cell every {step} voxels, but windows start at "
                    f"{axis_starts}; give `multiple` as a multiple of {step}"
                )
            kernel = window_weight(patch).view(count, -1).mean(dim=1).to(window.device)
            places = [start // step for start in axis_starts]
            total = torch.zeros(places[-1] + count, device=window.device)
            for place in places:
                total[place : place + count] += kernel
            # Windows are a product, and so is the sum of their weights at a cell: divided by it
            # before they are summed, their sum is the mean. If some are skipped it is no product.
            self.weights.append(
                {
                    place: kernel if unseen is not None else kernel / total[place : place + count]
                    for place in places
                }
            )
            self.stride.append(step)
            self.size.append(-(-size // step))
            extent.append(len(total))
        extent[axis] = cells[axis]
        try:
            zeros = torch.zeros((*extent, window.shape[1]), device=window.device)
        except torch.OutOfMemoryError:
            logger.warning("the device's memory ran out; sums over windows are kept on the host")
            zeros = torch.zeros((*extent, window.shape[1]))
        self.sum = zeros.movedim(-1, 0)
        self.unseen = unseen
        self.counted = None if unseen is None else torch.zeros(extent, device=self.sum.device)
        self.first_row = self.finished = 0

    def add(self, window: Float[Tensor, "channel *cells"], start: Sequence[int]) -> None:
        """Add one window's output, its first voxel at `start` of the image.

        The sum lies where the first output came from. Once either is on the host, the sum stays
        there.
        """
        if window.device != self.sum.device:
            window, self.sum = window.cpu(), self.sum.cpu()
            self.weights = [
                {start: weight.cpu() for start, weight in axis.items()} for axis in self.weights
            ]
            self.counted = None if self.counted is None else self.counted.cpu()
        cells = [first // step for first, step in zip(start, self.stride, strict=True)]
        weight, *others = (
            weights[first] for weights, first in zip(self.weights, cells, strict=True)
        )
        for along in others:
            weight = weight[..., None] * along
        cells[self.axis] -= self.first_row
        region = tuple(
            slice(first, first + count)
            for first, count in zip(cells, window.shape[1:], strict=True)
        )
        self.sum[(slice(None), *region)].addcmul_(window.float(), weight)
        if self.counted is not None:
            self.counted[region] += weight

    def finish(self, next_start: int | None) -> tuple[int, Float[Tensor, "channel *space"]]:
        """First row and values of the rows that no window from `next_start` on touches.

        They are the sum's own, and are gone with `advance`.
        """
        axis = self.axis + 1
        held, first = self.sum.shape[axis], self.first_row
        count = held
        if next_start is not None:
            count = min(next_start // self.stride[self.axis] - first, held)
        rows = self.sum.narrow(axis, 0, count)
        if self.counted is not None and self.unseen is not None:
            unseen = self.unseen.to(rows).view(-1, *[1] * (len(self.size) - 1))
            weights = self.counted.narrow(self.axis, 0, count)
            # A plane at a time, as each takes a copy.
            for values, weight in zip(rows.movedim(1, 0), weights, strict=True):
                values.copy_(torch.where(weight == 0, unseen, values / weight))
        self.finished = count
        inside = [slice(0, size) for size in self.size]
        inside[self.axis] = slice(0, max(self.size[self.axis] - first, 0))
        return first, rows[(slice(None), *inside)]

    def advance(self) -> None:
        """Let the finished rows go."""
        _advance(self.sum, self.axis + 1, self.finished)
        if self.counted is not None:
            _advance(self.counted, self.axis, self.finished)
        self.first_row += self.finished
        self.finished = 0


def _advance(rows: Tensor, axis: int, count: int) -> None:
    """Drop the first `count` rows of a running sum, in place, and begin as many new ones."""
    kept = rows.shape[axis] - count
    for first in range(0, kept, count):  # so few at a time that none overlaps its new place
        part = min(count, kept - first)
        rows.narrow(axis, first, part).copy_(rows.narrow(axis, first + count, part))
    rows.narrow(axis, kept, count).zero_()


def stream(
    image: Float[Tensor, "channel *space"],
    function: WindowFunction,
    layout: WindowLayout,
    *,
    axis: int = 0,
    batch_size: int = 1,
    skip: Collection[WindowPlace] = (),
    unseen: Mapping[str, Float[Tensor, " _"]] | None = None,
) -> Iterator[Slab]:
    """Slabs of the function's blended outputs, along one axis, each as soon as it is finished.

    A slab holds until the next is asked for: its rows then make room for those.

    Args:
        image: the windows are cut from it; beyond its far ends they repeat its last voxels.
        function: from (batch, channel, *patch) to named outputs (batch, channel, *cells).
        layout: size and places of the windows.
        axis: the spatial axis to walk along.
        batch_size: windows per call of the function.
        skip: windows that the function is not asked about. (If it is asked about no window of the
            first slab, it gets one of them, only for the form of its outputs.)
        unseen: by output, the value of cells that only skipped windows cover; 0 if not given.
    """
    size = image.shape[1:]
    starts = layout.starts(size)
    across = [axis_starts if other != axis else [0] for other, axis_starts in enumerate(starts)]
    blends: dict[str, Blend] = {}

    def answers(batch: Sequence[WindowPlace]) -> dict[str, Tensor]:
        outputs = function(
            torch.stack([_window(image, place, layout.patch_size) for place in batch])
        )
        for name, output in outputs.items():
            if name not in blends:
                told = (unseen or {}).get(name, torch.zeros(output.shape[1])) if skip else None
                blends[name] = Blend(output, image_size=size, layout=layout, axis=axis, unseen=told)
        return outputs

    for row, next_row in itertools.pairwise([*starts[axis], None]):
        assert row is not None
        places = [
            tuple(row if other == axis else first for other, first in enumerate(place))
            for place in itertools.product(*across)
        ]
        asked = [place for place in places if place not in skip]
        if not asked and not blends:
            answers(places[:1])
        for first in range(0, len(asked), batch_size):
            batch = asked[first : first + batch_size]
            for name, output in answers(batch).items():
                for window, place in zip(output, batch, strict=True):
                    blends[name].add(window, place)
        finished = {name: blend.finish(next_row) for name, blend in blends.items()}
        yield Slab(
            {name: first for name, (first, _) in finished.items()},
            {name: rows for name, (_, rows) in finished.items()},
        )
        if next_row is not None:
            for blend in blends.values():
                blend.advance()


def slide(
    image: Float[Tensor, "channel *space"],
    function: WindowFunction,
    layout: WindowLayout,
    *,
    axis: int = 0,
    batch_size: int = 1,
) -> dict[str, Float[Tensor, "_ ..."]]:
    """The function's blended outputs over the whole image, by name. Arguments as for `stream`."""
    parts: dict[str, list[Tensor]] = {}
    for slab in stream(image, function, layout, axis=axis, batch_size=batch_size):
        for name, rows in slab.rows.items():
            parts.setdefault(name, []).append(rows.clone())
    return {name: torch.cat(rows, dim=axis + 1) for name, rows in parts.items()}


def _window(image: Tensor, start: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    region = tuple(
        slice(first, first + size) for first, size in zip(start, patch_size, strict=True)
    )
    window = image[(slice(None), *region)]
    missing = [size - held for size, held in zip(patch_size, window.shape[1:], strict=True)]
    padding = [amount for size in reversed(missing) for amount in (0, size)]
    # The batch axis is there because torch pads no image by replication without one.
    return F.pad(window[None], padding, mode="replicate")[0] if any(missing) else window
