"""Multi-head attention at the skips, between the decoder's signal and the skip."""

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segkit.nn.blocks import CONV, LINEAR_MODE, NormalisationKind, normalisation, sigmoid_in_float32
from segkit.nn.map_tap import MapTap
from segkit.nn.multihead import MultiHeadAttention
from segkit.nn.positions import sincos


class AttentionToSkip(nn.Module):
    """What attention between the decoder's signal and the skip is made of, on the signal's grid.

    The skip comes down to the coarser signal by a convolution whose kernel equals its stride; both
    are normalised over channels; what queries take is interpolated linearly to the skip's grid.
    """

    signal: Literal["coarse", "upsampled"] = "coarse"
    keys_of: Literal["skip", "signal"] = "skip"

    def __init__(
        self,
        spatial_dims: int,
        *,
        skip_channels: int,
        signal_channels: int,
        stride: Sequence[int],
        heads: int,
        head_channels: int,
    ) -> None:
        super().__init__()
        self.from_skip = CONV[spatial_dims](
            skip_channels, skip_channels, kernel_size=tuple(stride), stride=tuple(stride)
        )
        self.norm_skip = nn.LayerNorm(skip_channels)
        self.norm_signal = nn.LayerNorm(signal_channels)
        self.attention = MultiHeadAttention(
            signal_channels,
            key_channels=skip_channels if self.keys_of == "skip" else signal_channels,
            value_channels=skip_channels,
            out_channels=skip_channels,
            heads=heads,
            head_channels=head_channels,
        )
        self.matrix = MapTap("received", stride=tuple(stride), highest=math.inf)
        self.mode = LINEAR_MODE[spatial_dims]

    def _take(self, skip: Tensor, signal: Tensor) -> Tensor:
        """What the queries take from the skip, as features on the signal's grid."""
        cells = signal.shape[2:]
        query = _placed(_tokens(signal, self.norm_signal), cells)
        value = _tokens(self.from_skip(skip), self.norm_skip)
        key = _placed(value, cells) if self.keys_of == "skip" else query
        taken, share = self.attention(query, key, value, matrix=self.matrix)
        if share is not None:
            self.matrix.record(share.unflatten(2, cells))
        features: Tensor = taken.transpose(1, 2).unflatten(2, cells)
        return features

    def _on_skip(self, coarse: Tensor, skip: Tensor) -> Tensor:
        return F.interpolate(coarse, size=skip.shape[2:], mode=self.mode, align_corners=False)


class CrossAttention(AttentionToSkip):
    """What the decoder asks of the skip: queries from the signal, keys and values from the skip.

    Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762, Sec. 3.2.3, where the decoder
    attends to the encoder) on the coarser signal's grid: the skip comes down to it by a convolution
    whose kernel equals its stride (as Wang et al. 2021, arXiv:2102.12122, Eq. 3 reduce keys and
    values). What the queries take is interpolated linearly to the skip's grid and added to the
    skip; at first it is 0. Sines and cosines tell both sides where they lie.
    """

    def forward(
        self,
        skip: Float[Tensor, "batch skip_channel *space"],
        signal: Float[Tensor, "batch signal_channel *coarse"],
    ) -> Float[Tensor, "batch skip_channel *space"]:
        """What to add to the skip."""
        return self._on_skip(self._take(skip, signal), skip)

    def let_through(self, skip: Tensor, signal: Tensor) -> Tensor:
        """The skip with what the decoder asked for."""
        return skip + self(skip, signal).to(skip.dtype)


class UTransformerGate(AttentionToSkip):
    """Map of how much of each skip channel and voxel to let through, made by attention.

    Multi-head cross-attention of U-Transformer, Petit et al. (2021, arXiv:2103.06104, Sec. 2.2):
    queries and keys are of the coarser signal, values of the skip, which comes down to the signal's
    grid; a 1x1 convolution (here the attention's own W_o), a normalisation and a sigmoid make the
    gate, which is interpolated to the skip's grid. Sines and cosines tell queries and keys where
    they lie.

    We depart from it in three places. The gate starts open: the bias before the sigmoid starts at
    `initial_bias`. Both sides are first normalised over channels. The skip comes down by a
    convolution whose kernel equals its stride.
    """

    keys_of: Literal["skip", "signal"] = "signal"

    def __init__(
        self,
        spatial_dims: int,
        *,
        skip_channels: int,
        signal_channels: int,
        stride: Sequence[int],
        heads: int,
        head_channels: int,
        initial_bias: float = 3.0,
        norm: NormalisationKind = "instance",
    ) -> None:
        super().__init__(
            spatial_dims,
            skip_channels=skip_channels,
            signal_channels=signal_channels,
            stride=stride,
            heads=heads,
            head_channels=head_channels,
        )
        # Not 0 as where attention is added: the normalisation would have nothing to work on.
        nn.init.xavier_uniform_(self.attention.out.weight)
        self.norm = normalisation(norm, spatial_dims, skip_channels)
        # The normalisation's own bias where there is one: two would be one too many.
        self.bias = (
            nn.Parameter(torch.full((skip_channels,), initial_bias)) if norm == "none" else None
        )
        if norm != "none":
            nn.init.constant_(cast(Tensor, self.norm.bias), initial_bias)
        self.tap = MapTap("gate", stride=tuple(stride), mean=True)

    def forward(
        self,
        skip: Float[Tensor, "batch skip_channel *space"],
        signal: Float[Tensor, "batch signal_channel *coarse"],
    ) -> Float[Tensor, "batch skip_channel *space"]:
        """The map in (0, 1) on the skip's grid; recorded as its mean over channels."""
        logits = self.norm(self._take(skip, signal))
        if self.bias is not None:
            logits = logits + self.bias.view(-1, *[1] * (logits.ndim - 2))
        coarse = self.tap(sigmoid_in_float32(logits))
        return self._on_skip(coarse, skip).to(skip.dtype)

    def let_through(self, skip: Tensor, signal: Tensor) -> Tensor:
        """The gated skip."""
        gated: Tensor = skip * self(skip, signal)
        return gated


def _tokens(features: Tensor, norm: nn.Module) -> Tensor:
    tokens: Tensor = norm(features.flatten(2).transpose(1, 2))
    return tokens


def _placed(tokens: Tensor, cells: Sequence[int]) -> Tensor:
    return tokens + sincos(cells, tokens.shape[2], tokens.device).to(tokens.dtype)
