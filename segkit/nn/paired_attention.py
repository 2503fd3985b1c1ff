"""Attention over channels and attention over voxels, with the same queries and keys, f(x)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segkit.nn.blocks import Features
from segkit.nn.map_tap import MapTap
from segkit.nn.multihead import windows_over
from segkit.nn.transformer import LayerScale


class PairedAttention(nn.Module):
    """Features plus the outputs of attention over voxels and attention over channels.

        t       = norm x + p                          tokens, with learned positions
        Q, K    = W_Q t, W_K t                        shared by both
        voxels  : softmax(τ_v Q̂ (E K)ᵀ) E V_v           E: from N voxels to 64 mixtures of them
        channels: softmax(τ_c Q̂ᵀ K̂) V_cᵀ               Q̂, K̂: each channel of length 1 over voxels
        x + λ ⊙ [W_v voxels; W_c channels]

    EPA of Shaker et al. (2022, arXiv:2212.04497, Sec. 3.2), for each head. Each W gives half of the
    channels. λ is a number for each channel, 10⁻⁶ at first. The cost grows with the number of
    voxels, not with its square.

    We differ from their code in four points. Positions are added only to the input of the
    attention. There is no dropout. The convolutions of the block are left out, because the U-Net
    has its own. The result over voxels keeps its order of voxels and heads; their code reorders
    channels there.

    E has a weight for each voxel of a grid of one size. On a larger or smaller grid, attention is
    computed within windows of that size; the last windows are filled up with zeros.

    The map is the attention that each channel receives from the channels of its head; 1 is an equal
    share. Attention over voxels has no map, because no voxel has its own weight.

    Args:
        channels: number of channels of the features, even and a multiple of `heads`.
        grid: number of cells along each axis.
        heads: number of heads.
        projected: number of mixtures of voxels.
        layer_scale: the first value of λ.
    """

    def __init__(
        self,
        channels: int,
        *,
        grid: Sequence[int],
        heads: int = 4,
        projected: int = 64,
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__()
        assert channels % heads == 0 and channels % 2 == 0
        self.grid = tuple(grid)
        self.heads = heads
        cells = math.prod(self.grid)
        self.norm = nn.LayerNorm(channels)
        self.positions = nn.Parameter(torch.zeros(1, cells, channels))
        self.tokens = nn.Linear(channels, 4 * channels, bias=False)
        self.projection = nn.Linear(cells, projected)
        self.voxel_temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.channel_temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.of_voxels = nn.Linear(channels, channels // 2)
        self.of_channels = nn.Linear(channels, channels // 2)
        self.scale = LayerScale(channels, initial=layer_scale)
        self.branch = MapTap("branch")
        self.matrix = MapTap("channel", highest=math.inf)

    def forward(self, features: Features) -> Features:
        """The features plus the outputs of both attentions."""
        batch_size, space = features.shape[0], features.shape[2:]
        windows = windows_over(space, self.grid)
        placed = self.norm(features.movedim(1, features.ndim - 1))
        tokens = windows.cut(placed.movedim(features.ndim - 1, 1)) + self.positions
        inside = windows.inside(batch_size, features.device)
        if inside is not None:
            tokens = tokens * inside[..., None].to(tokens.dtype)
        added = self.scale(windows.join(self._taken(tokens, batch_size), batch_size))
        if self.branch.edit is not None:
            switches = self.branch(added.new_ones(batch_size, 1))
            added = added * switches.view(-1, *[1] * (added.ndim - 1)).to(added.dtype)
        return features + added.to(features.dtype)

    def _taken(self, tokens: Tensor, batch_size: int) -> Tensor:
        """The output of attention for the tokens of windows (windows, cells, channels)."""
        channels = tokens.shape[2]
        split = (*tokens.shape[:2], 4, self.heads, channels // self.heads)
        # Each (windows, heads, channels of a head, cells).
        query, key, by_channel, by_voxel = self.tokens(tokens).view(split).permute(2, 0, 3, 4, 1)
        mixed_key, mixed_value = self.projection(key), self.projection(by_voxel)
        # A channel's length over very many voxels is too long for half precision.
        query, key = (F.normalize(one.float(), dim=-1).to(key.dtype) for one in (query, key))

        over_channels = query @ key.transpose(-2, -1) * self.channel_temperature
        over_channels = over_channels.float().softmax(dim=-1)
        if self.matrix.edit is not None:
            over_channels = self.matrix.edit(over_channels)
        self._record(over_channels, batch_size)
        of_channels = (over_channels.to(by_channel.dtype) @ by_channel).permute(0, 3, 1, 2)

        over_voxels = query.transpose(-2, -1) @ mixed_key * self.voxel_temperature
        over_voxels = over_voxels.float().softmax(dim=-1).to(mixed_value.dtype)
        of_voxels = (over_voxels @ mixed_value.transpose(-2, -1)).permute(0, 2, 1, 3)
        halves = self.of_voxels(of_voxels.flatten(2)), self.of_channels(of_channels.flatten(2))
        return torch.cat(halves, dim=2)

    def _record(self, over_channels: Tensor, batch_size: int) -> None:
        """Record the attention that each channel receives, as the mean over a sample's windows."""
        received = over_channels.sum(dim=2).reshape(batch_size, -1, self.positions.shape[2])
        ones = [1] * len(self.grid)
        self.matrix.record(received.mean(dim=1).view(batch_size, -1, *ones))
