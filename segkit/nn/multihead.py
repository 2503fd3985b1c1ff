"""Attention between tokens: the output of each query is a weighted mean of all values.

The matrix of weights has a row for each query. It is too large to keep, so it is computed a few
rows at a time, and only if a tap records or edits it. Otherwise PyTorch's fused kernel runs, which
builds no matrix unless there is a bias for each pair of tokens.
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
"""Largest number of weights in memory at once, if a matrix is computed a few rows at a time."""

ScoreRows = Callable[[int, int], Tensor]
"""A function of (first, last): weights (batch, heads, queries, keys) of these queries."""


def softmax_rows(
    query: Float[Tensor, "batch heads queries channels"],
    key: Float[Tensor, "batch heads keys channels"],
    bias: Float[Tensor, "#batch #heads #queries keys"] | None,
    first: int,
    last: int,
) -> Float[Tensor, "batch heads rows keys"]:
    """Weights softmax(q k^T / sqrt(channels) + bias) of queries first to last - 1, in float32."""
    with torch.autocast(query.device.type, enabled=False):
        logits = query[:, :, first:last].float() @ key.float().transpose(-2, -1)
        logits = logits / math.sqrt(query.shape[-1])
        if bias is not None:
            logits = logits + (bias if bias.shape[2] == 1 else bias[:, :, first:last]).float()
        return logits.softmax(dim=-1)


def blocks(num_queries: int, numbers_per_query: int) -> Iterator[tuple[int, int]]:
    """Blocks of queries, (first, last + 1), whose weights fit into memory at once."""
    step = max(LARGEST_BLOCK // numbers_per_query, 1)
    for first in range(0, num_queries, step):
        yield first, min(first + step, num_queries)


def numbers_in(sizes: torch.Size) -> int:
    """The product of sizes; without the batch if a network is exported for any batch size.

    The blocks of rows are fixed in an exported graph, so they must not depend on the batch.
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
    """Weighted mean of the values for each query, and the attention that each key receives.

    Args:
        rows: computes the weights before they are edited.
        value: values of the keys.
        num_queries: number of queries.
        edit: function that changes the weights.
        inside: True for each cell on the grid, if queries and keys are the same cells. The edit
            sees weights of 0 for other queries, and other keys have weights of 0 after the edit.
        pairs: False for each query and key that must not attend; their weights are 0 after the
            edit.
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
    """Attention that each key receives from all queries; 1 is an equal share.

    With `inside`, queries and keys are the same cells, and only cells that are inside count.

    Args:
        rows: computes the weights of some queries.
        key: keys, for their number.
        num_queries: number of queries.
        inside: True for each cell on the grid.
    """
    # The sum does not start from zeros: ONNX's exporter would take the batch size from their shape.
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
    """Multi-head attention: each head computes a weighted mean of the values for every query.

    Vaswani et al. (2017, arXiv:1706.03762, Eq. 1 and Sec. 3.2.2): the heads
    softmax(Q K^T / sqrt(d)) V are concatenated and multiplied by W_o. Queries and values have
    biases; a bias of keys would not change the softmax. W_o has no bias and starts at 0. So
    attention that is added to features adds nothing when training starts, and nothing if all heads
    are switched off. With `inner_norm`, LayerNorm comes before W_o (Fang et al. 2023,
    arXiv:2303.11331).
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
        """The result of the attention, and the attention that each key receives.

        Args:
            query, key, value: tokens.
            matrix: tap that may record or edit the weights. The second result is None if it does
                neither.
            turn: function that encodes positions in queries and keys; none if not given.
            bias: added to the logits.
            inside: keys that are False get no attention.
            pairs: queries and keys that are False get no attention from each other.
            samples: number of samples in the batch, which holds equally many windows of each; the
                batch size if not given.
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
    """Windows of a size over a grid; if `window` is None, one window that holds the whole grid.

    They are shifted by `shift` cells, but not along an axis that one window covers.

    Args:
        space: size of the grid.
        window: size of the windows.
        shift: cells by which windows are shifted along each axis; 0 if None.
    """
    space = [int(size) for size in space]  # while torch traces, sizes are tensors
    sizes = tuple(window or space)
    counts = tuple(-(-size // width) for size, width in zip(space, sizes, strict=True))
    moved = shift or [0] * len(counts)
    shifts = tuple(step if n > 1 else 0 for step, n in zip(moved, counts, strict=True))
    return Windows(tuple(space), sizes, counts, shifts)


class Windows(NamedTuple):
    """A grid cut into windows of one size, and padded at the end of each axis to fill the last.

    Shifted windows are those of Liu et al. (2021, arXiv:2103.14030, Fig. 4): the grid is rolled, so
    the number of windows does not change. The last windows then hold cells of both ends, which must
    not attend to one another; see `pairs`.
    """

    space: tuple[int, ...]
    window: tuple[int, ...]
    counts: tuple[int, ...]
    """Number of windows along each axis."""
    shift: tuple[int, ...]
    """Cells by which the windows are shifted towards the end of each axis."""

    @property
    def padded(self) -> tuple[int, ...]:
        """Size of the padded grid."""
        return tuple(n * width for n, width in zip(self.counts, self.window, strict=True))

    def cut(
        self, features: Float[Tensor, "batch channel *space"]
    ) -> Float[Tensor, "windows cells channel"]:
        """The cells of each window as tokens. The windows of a sample follow one another."""
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
        """Tokens put back on the grid, the inverse of `cut`."""
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
        """True for each cell of a window that lies on the grid; None if all do."""
        if self.padded == self.space:
            return None
        return self._inside(device).repeat(batch_size, 1)

    def pairs(
        self, batch_size: int, device: torch.device
    ) -> Bool[Tensor, "windows cells cells"] | None:
        """Which cells of a window attend to which; None if all on the grid do.

        Cells beyond the grid attend to all cells on it; otherwise their softmax would be empty.
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
