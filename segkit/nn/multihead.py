"""Attention between tokens: every query takes a weighted mean of all values.

The matrix of weights has a row for each query and is not kept: it is made a few rows at a time,
and only where somebody looks (`rows`) or edits. Otherwise torch's fused kernel runs, which has no
matrix unless there is a bias for each pair.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from segkit.nn.map_tap import Edit, MapTap

LARGEST_BLOCK = 2**24
"""Weights that are held at once, where a matrix is made row by row."""

ScoreRows = Callable[[int, int], Tensor]
"""Weights (batch, heads, queries, keys) of the queries from one number to another."""


def softmax_rows(
    query: Float[Tensor, "batch heads queries channels"],
    key: Float[Tensor, "batch heads keys channels"],
    bias: Float[Tensor, "#batch #heads #queries keys"] | None,
    first: int,
    last: int,
) -> Float[Tensor, "batch heads rows keys"]:
    """Weights softmax(q k^T / sqrt(channels) + bias) of some queries, in float32."""
    with torch.autocast(query.device.type, enabled=False):
        logits = query[:, :, first:last].float() @ key.float().transpose(-2, -1)
        logits = logits / math.sqrt(query.shape[-1])
        if bias is not None:
            logits = logits + (bias if bias.shape[2] == 1 else bias[:, :, first:last]).float()
        return logits.softmax(dim=-1)


def blocks(num_queries: int, numbers_per_query: int) -> Iterator[tuple[int, int]]:
    """The first and last query of each block of rows that is held at once."""
    step = max(LARGEST_BLOCK // numbers_per_query, 1)
    for first in range(0, num_queries, step):
        yield first, min(first + step, num_queries)


def numbers_in(sizes: torch.Size) -> int:
    """The product of sizes; without the first, the batch, while a network is exported for any.

    Such a graph has its blocks of rows for good, and none may depend on the batch.
    """
    return math.prod(sizes[1:] if isinstance(sizes[0], torch.SymInt) else sizes)


def gather_windows(
    rows: ScoreRows,
    value: Float[Tensor, "batch heads keys channels"],
    num_queries: int,
    edit: Edit,
    inside: Bool[Tensor, "batch keys"] | None = None,
    pairs: Bool[Tensor, "batch queries keys"] | None = None,
) -> tuple[Float[Tensor, "batch heads queries channels"], Float[Tensor, "batch heads keys"]]:
    """Each query's mean of the values by edited weights, and what each key receives of them.

    Rows of queries that are not `inside` are 0, and so are weights of such keys and of what is not
    among the `pairs`, whatever the edit.
    """

    def edited(first: int, last: int) -> Tensor:
        weights = rows(first, last)
        if inside is not None:
            weights = weights * inside[:, None, first:last, None]
        weights = edit(weights)
        if inside is not None:
            weights = weights * inside[:, None, None]
        if pairs is not None:
            weights = weights * pairs[:, None, first:last]
        with torch.autocast(value.device.type, enabled=False):
            taken.append(weights @ value.float())
        return weights

    taken: list[Tensor] = []
    share = received(edited, value, num_queries, inside)
    return torch.cat(taken, dim=2).to(value.dtype), share


def received(
    rows: ScoreRows,
    key: Float[Tensor, "batch heads keys channels"],
    num_queries: int,
    inside: Bool[Tensor, "batch keys"] | None = None,
) -> Float[Tensor, "batch heads keys"]:
    """What each key gets of all queries' attention: 1 where it gets its fair share.

    With `inside`, queries and keys are the same cells, and only those inside count.
    """
    # Not begun with zeros: ONNX's exporter would fix the length of the batch by their shape.
    total: Tensor | None = None
    for first, last in blocks(num_queries, numbers_in(key.shape[:3])):
        weights = rows(first, last).detach()
        if inside is not None:
            weights = weights * inside[:, None, first:last, None]
        part = weights.sum(dim=2)
        total = part if total is None else total + part
    assert total is not None, "there are queries"
    return total if inside is not None else total * (key.shape[2] / num_queries)


class MultiHeadAttention(nn.Module):
    """Every query's weighted mean of the values, several times over, each head by its own weights.

    Vaswani et al. (2017, arXiv:1706.03762, Eq. 1 and Sec. 3.2.2): heads of softmax(Q K^T / sqrt(d))
    V, concatenated, through W_o. Queries and values have biases; that of keys the softmax would not
    notice. W_o has none and starts at 0: without heads nothing is added, and attention that is
    added to features starts as nothing. With `inner_norm`, LayerNorm over all heads' channels comes
    before W_o (Fang et al. 2023, arXiv:2303.11331).
    """

    def __init__(
        self,
        query_channels: int,
        *,
        key_channels: int,
        value_channels: int,
        out_channels: int,
        heads: int,
        head_channels: int,
        inner_norm: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * head_channels
        self.heads = heads
        self.query = nn.Linear(query_channels, inner)
        self.key = nn.Linear(key_channels, inner, bias=False)
        self.value = nn.Linear(value_channels, inner)
        self.inner_norm = nn.LayerNorm(inner) if inner_norm else nn.Identity()
        self.out = nn.Linear(inner, out_channels, bias=False)
        nn.init.zeros_(self.out.weight)
        self.branch = MapTap("branch")

    def forward(
        self,
        query: Float[Tensor, "batch queries query_channels"],
        key: Float[Tensor, "batch keys key_channels"],
        value: Float[Tensor, "batch keys value_channels"],
        *,
        matrix: MapTap,
        turn: Callable[[Tensor], Tensor] | None = None,
        bias: Float[Tensor, "#batch #heads #queries keys"] | None = None,
        inside: Bool[Tensor, "batch keys"] | None = None,
        pairs: Bool[Tensor, "batch queries keys"] | None = None,
        samples: int | None = None,
    ) -> tuple[
        Float[Tensor, "batch queries out_channels"], Float[Tensor, "batch heads keys"] | None
    ]:
        """What the queries take from the values, and what each key receives if `matrix` records.

        `turn` encodes positions in queries and keys, `bias` is added to the logits, and keys that
        are not `inside` get no attention, nor does what is not among the `pairs` of a query and a
        key. The batch holds a whole number of windows of each of so many samples.
        """
        queries, keys = self._split(self.query(query)), self._split(self.key(key))
        values = self._split(self.value(value))
        if turn is not None:
            queries, keys = turn(queries), turn(keys)
        attended = pairs if inside is None or pairs is not None else inside[:, None]
        if attended is not None:
            shut = torch.zeros_like(attended, dtype=queries.dtype)
            shut = shut.masked_fill(~attended, -math.inf)[:, None]
            bias = shut if bias is None else bias + shut
        rows = partial(softmax_rows, queries, keys, bias)
        share: Tensor | None = None
        if matrix.edit is not None:
            taken, share = gather_windows(
                rows, values, queries.shape[2], matrix.edit, inside, pairs
            )
        else:
            mask = None if bias is None else bias.to(queries.dtype)
            taken = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
            if matrix.sink is not None:
                with torch.no_grad():
                    share = received(rows, keys, queries.shape[2], inside)
        joined = self.inner_norm(taken.transpose(1, 2).flatten(2))
        if self.branch.edit is not None:
            count = samples or len(joined)
            switches = self.branch(joined.new_ones(count, self.heads))
            switches = switches.repeat_interleave(len(joined) // count, dim=0)
            switches = switches.repeat_interleave(joined.shape[2] // self.heads, dim=1)
            joined = joined * switches[:, None].to(joined.dtype)
        return self.out(joined), share

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


def windows_over(
    space: Sequence[int], window: Sequence[int] | None, shift: Sequence[int] | None = None
) -> "Windows":
    """Windows of a size over a grid; one of the grid's own size where None.

    They are moved by `shift` cells, but not along an axis that one window covers.
    """
    space = [int(size) for size in space]  # while torch traces, sizes are tensors
    sizes = tuple(window or space)
    counts = tuple(-(-size // width) for size, width in zip(space, sizes, strict=True))
    moved = shift or [0] * len(counts)
    shifts = tuple(step if n > 1 else 0 for step, n in zip(moved, counts, strict=True))
    return Windows(tuple(space), sizes, counts, shifts)


class Windows(NamedTuple):
    """A grid cut into windows of one size, the last ones filled up beyond the grid's far ends.

    Windows that are moved are those of Liu et al. (2021, arXiv:2103.14030, Fig. 4): the grid is
    rolled, so that their number stays, and the last ones hold cells of both ends, which must not
    attend to one another: see `pairs`.
    """

    space: tuple[int, ...]
    window: tuple[int, ...]
    counts: tuple[int, ...]
    """Windows along each axis."""
    shift: tuple[int, ...]
    """Cells by which they are moved towards the far end of each axis."""

    @property
    def padded(self) -> tuple[int, ...]:
        """The grid, filled up."""
        return tuple(n * width for n, width in zip(self.counts, self.window, strict=True))

    def cut(
        self, features: Float[Tensor, "batch channel *space"]
    ) -> Float[Tensor, "windows cells channel"]:
        """The windows' cells as tokens, all windows of a sample beside one another."""
        dims = len(self.space)
        missing = [full - size for full, size in zip(self.padded, self.space, strict=True)]
        if any(missing):
            features = F.pad(features, [n for size in reversed(missing) for n in (0, size)])
        features = self._rolled(features, -1)
        split = [n for pair in zip(self.counts, self.window, strict=True) for n in pair]
        parts = features.reshape(*features.shape[:2], *split)
        order = [0, *range(2, 2 + 2 * dims, 2), *range(3, 3 + 2 * dims, 2), 1]
        return parts.permute(order).reshape(-1, math.prod(self.window), features.shape[1])

    def join(
        self, tokens: Float[Tensor, "windows cells channel"], batch_size: int
    ) -> Float[Tensor, "batch channel *space"]:
        """Tokens back on the grid; the inverse of `cut`."""
        dims = len(self.space)
        parts = tokens.reshape(batch_size, *self.counts, *self.window, tokens.shape[-1])
        pairs = [
            axis for pair in zip(range(dims), range(dims, 2 * dims), strict=True) for axis in pair
        ]
        whole = parts.permute(0, 2 * dims + 1, *[axis + 1 for axis in pairs])
        features = whole.reshape(batch_size, tokens.shape[-1], *self.padded)
        features = self._rolled(features, 1)
        return features[(slice(None), slice(None), *[slice(size) for size in self.space])]

    def inside(self, batch_size: int, device: torch.device) -> Bool[Tensor, "windows cells"] | None:
        """Which of the windows' cells lie on the grid; None where all do."""
        if self.padded == self.space:
            return None
        return self._inside(device).repeat(batch_size, 1)

    def pairs(
        self, batch_size: int, device: torch.device
    ) -> Bool[Tensor, "windows cells cells"] | None:
        """Which cells of a window attend to which; None if all on the grid do.

        Cells beyond the grid attend to all on it, or their softmax would be of nothing.
        """
        if not any(self.shift):
            return None
        side = torch.zeros(1, 1, *self.padded, device=device)
        for axis, step in enumerate(self.shift):
            near = torch.arange(self.padded[axis], device=device) < step
            others = [1] * (len(self.space) - axis - 1)
            side = side + near.to(side.dtype).view(-1, *others) * 2**axis
        whole = self._replace(space=self.padded)
        sides = whole.cut(side)[..., 0]
        inside = self._inside(device)
        together = sides[:, :, None] == sides[:, None, :]
        attended = (together | ~inside[:, :, None]) & inside[:, None, :]
        return attended.repeat(batch_size, 1, 1)

    def _inside(self, device: torch.device) -> Tensor:
        return self.cut(torch.ones(1, 1, *self.space, device=device))[..., 0].bool()

    def _rolled(self, features: Tensor, direction: int) -> Tensor:
        if not any(self.shift):
            return features
        steps = [direction * step for step in self.shift]
        return features.roll(steps, dims=list(range(2, 2 + len(steps))))
