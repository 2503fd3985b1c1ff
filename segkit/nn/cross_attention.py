"""Multi-head attention at the skips, between the decoder's signal and the skip's features."""

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
    """Base class of attention between the decoder's signal and the skip, on the signal's grid.

    A convolution whose kernel equals its stride brings the skip down to the coarser grid of the
    signal. Both are normalised over channels. The result of the attention is interpolated linearly
    to the skip's grid.
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
        """The result of the attention, as features on the signal's grid."""
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
    """Cross-attention: queries from the decoder's signal, keys and values from the skip.

    Multi-head attention from the decoder to the encoder (Vaswani et al. 2017, arXiv:1706.03762,
    Sec. 3.2.3), on the coarser grid of the signal. A convolution whose kernel equals its stride
    brings the skip down to that grid, as Wang et al. (2021, arXiv:2102.12122, Eq. 3) reduce keys
    and values. The result is interpolated linearly to the skip's grid and added to the skip. It is
    0 when training starts. Sines and cosines of the positions are added to queries and keys.
    """

    def forward(
        self,
        skip: Float[Tensor, "batch skip_channel *space"],
        signal: Float[Tensor, "batch signal_channel *coarse"],
    ) -> Float[Tensor, "batch skip_channel *space"]:
        """The features that `let_through` adds to the skip."""
        return self._on_skip(self._take(skip, signal), skip)

    def let_through(self, skip: Tensor, signal: Tensor) -> Tensor:
        """The skip plus the result of the attention."""
        return skip + self(skip, signal).to(skip.dtype)


class UTransformerGate(AttentionToSkip):
    """Map of how much of each skip channel and voxel to let through, made by attention.

    Multi-head cross-attention of U-Transformer, Petit et al. (2021, arXiv:2103.06104, Sec. 2.2).
    Queries and keys come from the coarser signal; values come from the skip, brought down to the
    signal's grid. A 1x1 convolution (here the attention's own W_o), a normalisation and a sigmoid
    make the gate, which is interpolated to the skip's grid. Sines and cosines of the positions are
    added to queries and keys.

    We differ from the paper in three points. The gate starts open: the bias before the sigmoid
    starts at `initial_bias`. Skip and signal are first normalised over channels. A convolution
    whose kernel equals its stride brings the skip down.
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
        # Attention that is added starts with weights of 0. These differ from 0, because a
        # constant cannot be normalised.
        nn.init.xavier_uniform_(self.attention.out.weight)
        self.norm = normalisation(norm, spatial_dims, skip_channels)
        # If there is a normalisation, its own bias is used; a second bias would do the same.
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
        """The map in (0, 1) on the skip's grid. The tap records its mean over channels."""
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
