"""Run a function over an image in overlapping windows and blend its outputs, slab by slab.

Only one slab is in memory at a time. Windows of an axis of size 10, with patch 6, overlap 0.5 and
multiple 2, from left to right:

    image    0 1 2 3 4 5 6 7 8 9
    window 0 [─────────]             blended, rows 0-1 are finished: yielded and freed
    window 1     [─────────]         … rows 2-3
    window 2         [─────────]     … rows 4-9

The function may return several outputs, each on its own grid, which is coarser by a whole number.
Windows start at multiples of the largest of these strides, and padding is only at the end of an
axis. So the outputs of all windows lie on one grid, on which they are blended.

Windows may be skipped, for example empty ones. They have no weight, so their voxels get only the
outputs of other windows. Voxels that only skipped windows cover get a given value.
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
    """Size and positions of windows along each axis."""

    patch_size: tuple[int, ...]
    """Size of a window in voxels, a multiple of `multiple`."""
    overlap: tuple[float, ...]
    """Share of a window that neighbours have in common, in [0, 1)."""
    multiple: tuple[int, ...]
    """Windows start at multiples of this, the network's total stride."""

    def starts(self, size: Sequence[int]) -> list[list[int]]:
        """First voxels of the windows along each axis of an image of this size."""
        return [window_starts(*numbers) for numbers in zip(size, *self, strict=True)]


@dataclass(frozen=True)
class Slab:
    """Finished rows of every output: the first row of `rows[name]` is row `starts[name]`."""

    starts: dict[str, int]
    rows: dict[str, Tensor]


def window_starts(size: int, patch: int, overlap: float, multiple: int) -> list[int]:
    """First voxels of the windows that cover an axis, evenly spaced multiples of `multiple`.

    Neighbours share at least `overlap` of a patch. Only if the patch equals `multiple`, they share
    nothing. The last window ends at the end of the axis, rounded up to a multiple.

    Args:
        size: number of voxels of the axis.
        patch: size of a window in voxels, a multiple of `multiple`.
        overlap: share of a window that neighbours have in common at least.
        multiple: number of which all starts are multiples.
    """
    assert patch % multiple == 0, f"patch {patch} is not a multiple of {multiple}"
    last = max(math.ceil(size / multiple) * multiple - patch, 0)
    step = max(math.floor(patch * (1 - overlap) / multiple), 1) * multiple
    count = math.ceil(last / step)
    return [round(index * last / max(count, 1) / multiple) * multiple for index in range(count + 1)]


def window_weight(patch: int, *, width: float = 1 / 8) -> Float[Tensor, " patch"]:
    """Weights of a window's voxels along one axis: a Gaussian of sigma `width * patch`.

    These are the weights of nnU-Net (Isensee et al. 2021). They need no lower limit: in float32
    even the product of three weights at a corner keeps its precision.
    """
    distance = torch.arange(patch, dtype=torch.float64) - (patch - 1) / 2
    return torch.exp(-0.5 * (distance / (width * patch)) ** 2).float()


class Blend:
    """Weighted sum of one output over windows, for the rows that are not finished yet.

    The channels of a cell are stored side by side. So operations on all channels, such as
    resampling or argmax, read memory in order.
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
        """Start a sum.

        Args:
            window: the output of a batch of windows, for its shape and device.
            image_size: size of the image.
            layout: the windows over the image.
            axis: the axis along which windows follow one another.
            unseen: the value of cells that no window covers; None if no window is skipped.
        """
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
                raise ValueError(
                    f"expected an output whose size divides a window of {layout.patch_size}, found "
                    f"{tuple(cells)}; return outputs on the window's grid or on a coarser one"
                )
            if any(start % step for start in axis_starts):
                raise ValueError(
                    f"expected windows that start at multiples of {step}, the stride of an output, "
                    f"found {axis_starts}; set `multiple` to a multiple of {step}"
                )
            kernel = window_weight(patch).view(count, -1).mean(dim=1)
            kernel = kernel.to(window.device, non_blocking=True)
            places = [start // step for start in axis_starts]
            total = torch.zeros(places[-1] + count, device=window.device)
            for place in places:
                total[place : place + count] += kernel
            # The sum of all windows' weights at a cell is a product over axes. So each weight can
            # be divided by it along each axis in advance, and the sum is then the weighted mean. If
            # windows are skipped, this is not a product, so `finish` divides.
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
            logger.warning("out of GPU memory; sums over windows are kept in host memory")
            zeros = torch.zeros((*extent, window.shape[1]))
        self.sum = zeros.movedim(-1, 0)
        self.unseen = unseen
        self.counted = None if unseen is None else torch.zeros(extent, device=self.sum.device)
        self.first_row = self.finished = 0

    def add(self, window: Float[Tensor, "channel *cells"], start: Sequence[int]) -> None:
        """Add the output of one window, whose first voxel is at `start` of the image.

        The sum is on the device of the first output. If any output is in host memory, the sum moves
        there and stays there.
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
        """The rows that no later window touches, and the first of them.

        The values share memory with the sum, so they are valid only until `advance`.

        Args:
            next_start: first voxel of the next windows along the axis; None after the last.
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
            # One plane at once, because each needs a copy.
            for values, weight in zip(rows.movedim(1, 0), weights, strict=True):
                values.copy_(torch.where(weight == 0, unseen, values / weight))
        self.finished = count
        inside = [slice(0, size) for size in self.size]
        inside[self.axis] = slice(0, max(self.size[self.axis] - first, 0))
        return first, rows[(slice(None), *inside)]

    def advance(self) -> None:
        """Remove the finished rows from the sum."""
        _advance(self.sum, self.axis + 1, self.finished)
        if self.counted is not None:
            _advance(self.counted, self.axis, self.finished)
        self.first_row += self.finished
        self.finished = 0


def _advance(rows: Tensor, axis: int, count: int) -> None:
    """Remove the first `count` rows of a sum, in place, and append as many rows of 0."""
    kept = rows.shape[axis] - count
    for first in range(0, kept, count):  # at most `count` rows, so that source and target differ
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
    """Slabs of the function's blended outputs, each as soon as it is finished.

    A slab is valid only until the next one is requested, which uses the same memory.

    Args:
        image: image from which the windows are cut; beyond its end, its last voxels are repeated.
        function: maps windows (batch, channel, *patch) to outputs by name, (batch, channel,
            *cells).
        layout: size and positions of the windows.
        axis: the spatial axis along which slabs follow one another.
        batch_size: number of windows in each call of the function.
        skip: positions of windows on which the function does not run. (If all windows of the first
            slab are skipped, it runs on one of them, only to learn the shape of the outputs.)
        unseen: for each output, the value of cells that only skipped windows cover; 0 if not given.

    Yields:
        The finished rows of all outputs.
    """
    size = image.shape[1:]
    starts = layout.starts(size)
    across = [axis_starts if other != axis else [0] for other, axis_starts in enumerate(starts)]
    blends: dict[str, Blend] = {}

    def outputs_of(batch: Sequence[WindowPlace]) -> dict[str, Tensor]:
        outputs = function(
            torch.stack([cut_window(image, place, layout.patch_size) for place in batch])
        )
        for name, output in outputs.items():
            if name not in blends:
                value = (unseen or {}).get(name, torch.zeros(output.shape[1])) if skip else None
                blends[name] = Blend(
                    output, image_size=size, layout=layout, axis=axis, unseen=value
                )
        return outputs

    for row, next_row in itertools.pairwise([*starts[axis], None]):
        assert row is not None
        places = [
            tuple(row if other == axis else first for other, first in enumerate(place))
            for place in itertools.product(*across)
        ]
        wanted = [place for place in places if place not in skip]
        if not wanted and not blends:
            outputs_of(places[:1])
        for first in range(0, len(wanted), batch_size):
            batch = wanted[first : first + batch_size]
            for name, output in outputs_of(batch).items():
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
    """The function's blended outputs for the whole image, by name. `stream` explains the arguments.

    logits = slide(image, lambda windows: {"logits": network(windows)}, layout)["logits"]
    """
    parts: dict[str, list[Tensor]] = {}
    for slab in stream(image, function, layout, axis=axis, batch_size=batch_size):
        for name, rows in slab.rows.items():
            parts.setdefault(name, []).append(rows.clone())
    return {name: torch.cat(rows, dim=axis + 1) for name, rows in parts.items()}


def cut_window(image: Tensor, start: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    """The window of an image (channel, *space) that begins at `start`.

    Beyond the end of the image, its last voxels are repeated.
    """
    region = tuple(
        slice(first, first + size) for first, size in zip(start, patch_size, strict=True)
    )
    window = image[(slice(None), *region)]
    missing = [size - held for size, held in zip(patch_size, window.shape[1:], strict=True)]
    padding = [amount for size in reversed(missing) for amount in (0, size)]
    # With a batch axis, because PyTorch needs one to pad by replication.
    return F.pad(window[None], padding, mode="replicate")[0] if any(missing) else window
