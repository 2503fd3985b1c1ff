"""Self-attention among the voxels of the coarsest level.

Both kinds add their result to the features and start as the identity. Their map, `received`, is
the attention that each voxel receives from all others.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segkit.nn.blocks import Features
from segkit.nn.map_tap import MapTap, Stage
from segkit.nn.multihead import (
    MultiHeadAttention,
    blocks,
    gather_windows,
    numbers_in,
    received,
    windows_over,
)
from segkit.nn.positions import ROTARY_BASE, PositionKind, RelativeBias, rotate, sincos


class SelfAttention(nn.Module):
    """Features plus multi-head attention among them: x + W_o heads(norm(x)).

    The attention part of a pre-norm transformer layer (Vaswani et al. 2017, arXiv:1706.03762;
    Xiong et al. 2020, arXiv:2002.04745). With a window it is the attention of Liu et al. (2021,
    arXiv:2103.14030). `shifted_pair` makes two, the second with shifted windows.

    Args:
        channels: number of channels of the features.
        heads: number of heads.
        head_channels: number of channels of each head.
        positions: how positions are encoded: not at all (`none`), by sines and cosines added to the
            tokens (`sincos`), by a learned bias for each offset (`relative`), or by rotating
            queries and keys (`rotary`).
        window: size of the windows in cells; each cell attends only to cells of its own window. If
            None, each cell attends to the whole grid. `relative` needs a window.
        shift: cells by which the windows are shifted along each axis; 0 if not given.
        rotary_base: base of the angles of `rotary`.
        inner_norm: True if LayerNorm comes before W_o.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_channels: int,
        positions: PositionKind = "none",
        window: Sequence[int] | None = None,
        shift: Sequence[int] | None = None,
        rotary_base: float = ROTARY_BASE,
        inner_norm: bool = False,
    ) -> None:
        super().__init__()
        self.window = None if window is None else tuple(window)
        self.shift = None if shift is None else tuple(shift)
        self.rotary_base = rotary_base
        self.positions = positions
        self.norm = nn.LayerNorm(channels)
        self.attention = MultiHeadAttention(
            channels,
            key_channels=channels,
            value_channels=channels,
            out_channels=channels,
            heads=heads,
            head_channels=head_channels,
            inner_norm=inner_norm,
        )
        self.bias: RelativeBias | None = None
        if positions == "relative":
            assert self.window is not None, "relative positions need a window"
            self.bias = RelativeBias(self.window, heads=heads)
        self.matrix = MapTap("received", highest=math.inf, window=self.window, shift=self.shift)

    def forward(self, features: Features) -> Features:
        """The features plus the result of the attention."""
        return features + self.taken(features).to(features.dtype)

    def taken(self, features: Features) -> Features:
        """The result of the attention, W_o heads(norm(x))."""
        batch_size, space = features.shape[0], features.shape[2:]
        windows = windows_over(space, self.window, self.shift)
        placed = self.norm(features.movedim(1, -1))
        if self.positions == "sincos":
            waves = sincos(space, features.shape[1], features.device)
            placed = placed + waves.view(*space, -1).to(placed.dtype)
        # The axis is counted from the front because ONNX's exporter accepts no negative axis here.
        tokens = windows.cut(placed.movedim(placed.ndim - 1, 1))
        taken, share = self.attention(
            tokens,
            tokens,
            tokens,
            matrix=self.matrix,
            turn=(
                partial(rotate, shape=windows.window, base=self.rotary_base)
                if self.positions == "rotary"
                else None
            ),
            bias=None if self.bias is None else self.bias()[None],
            inside=windows.inside(batch_size, features.device),
            pairs=windows.pairs(batch_size, features.device),
            samples=batch_size,
        )
        if share is not None:
            self.matrix.record(windows.join(share.transpose(1, 2), batch_size))
        return windows.join(taken, batch_size)


def shifted_pair(
    channels: int,
    *,
    heads: int,
    head_channels: int,
    positions: PositionKind,
    window: Sequence[int],
) -> Stage:
    """Attention within windows, then within windows that are shifted by half their size.

    Two consecutive layers of Liu et al. (2021, arXiv:2103.14030, Eq. 3) without their MLPs. Cells
    in different windows of the first layer can share a window of the second.

    Args:
        channels: number of channels of the features.
        heads, head_channels, positions: as for `SelfAttention`.
        window: size of the windows, in cells.
    """
    shifts = ([0] * len(window), [size // 2 for size in window])
    return Stage(
        *[
            SelfAttention(
                channels,
                heads=heads,
                head_channels=head_channels,
                positions=positions,
                window=window,
                shift=shift,
            )
            for shift in shifts
        ]
    )


class AdditiveSelfAttention(nn.Module):
    """Features plus one head of additive attention among them.

    The weights are softmax_j v^T tanh(W_q q_i + W_k k_j + b) (Bahdanau et al. 2015,
    arXiv:1409.0473, Sec. A.1.2); q_i and k_j are the normalised features of two voxels. If v is 0,
    the result is the plain mean. Memory grows with the number of pairs times the width, so queries
    are computed in blocks. Training does not keep the blocks; the backward pass computes them
    again.
    """

    def __init__(self, channels: int, *, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, width)
        self.key = nn.Linear(channels, width, bias=False)
        self.energy = nn.Linear(width, 1, bias=False)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.out.weight)
        self.branch = MapTap("branch")
        self.matrix = MapTap("received", highest=math.inf)

    def forward(self, features: Features) -> Features:
        """The features plus the result of the attention."""
        space = features.shape[2:]
        tokens = self.norm(features.flatten(2).transpose(1, 2))
        query, key, value = self.query(tokens), self.key(tokens), self.value(tokens)

        rows, num_cells = partial(self._rows, query, key), key.shape[1]
        share: Tensor | None = None
        if self.matrix.edit is not None:
            taken, share = gather_windows(rows, value[:, None], num_cells, self.matrix.edit)
            taken = taken[:, 0]
        else:
            taken = self._attend(query, key, value)
            if self.matrix.sink is not None:
                with torch.no_grad():
                    share = received(rows, key[:, None], num_cells)
        if share is not None:
            self.matrix.record(share.unflatten(2, space))
        if self.branch.edit is not None:
            taken = taken * self.branch(taken.new_ones(len(taken), 1))[:, :, None]
        added = self.out(taken).transpose(1, 2).unflatten(2, space)
        return features + added.to(features.dtype)

    def _rows(self, query: Tensor, key: Tensor, first: int, last: int) -> Tensor:
        return self._weights(query[:, first:last], key)[:, None]

    def _weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Rows of weights in float32, computed from a few queries at a time to save memory."""
        parts = [
            self.energy(torch.tanh(query[:, first:last, None] + key[:, None]))[..., 0]
            for first, last in blocks(query.shape[1], numbers_in(key.shape))
        ]
        return torch.cat(parts, dim=1).float().softmax(dim=-1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = list(blocks(query.shape[1], numbers_in(key.shape)))
        if len(parts) == 1:
            return self._mean(query, key, value)
        if not torch.is_grad_enabled():
            means = [self._mean(query[:, first:last], key, value) for first, last in parts]
        else:
            means = [
                checkpoint(
                    self._mean,
                    query[:, first:last],
                    key,
                    value,
                    use_reentrant=False,
                    preserve_rng_state=False,  # nothing is random, and a recorded step has no state
                )
                for first, last in parts
            ]
        return torch.cat(means, dim=1)

    def _mean(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._weights(query, key).to(value.dtype) @ value
