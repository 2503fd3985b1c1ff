"""Attention gates at the skips, f(skip, signal): how much of each skip voxel to let through.

A gate returns its map; the network multiplies, `skip * gate(skip, signal)`, and then applies the
gate's `output_transform`, which is the identity unless asked for.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segkit.nn.blocks import (
    CONV,
    CONV_FUNCTION,
    LINEAR_MODE,
    ConvolutionBlock,
    NormalisationKind,
    convolution,
    normalisation,
    sigmoid_in_float32,
)
from segkit.nn.taps import MapTap


class Coefficients(nn.Module):
    """The last 1x1 convolution of an additive gate, and the sigmoid: one map in (0, 1).

    It is never normalised: instance normalisation would fix the mean of its one channel, and batch
    normalisation cancels the bias. Weights start at N(0, 0.01^2), so that a gate starts at
    sigmoid(initial_bias) everywhere. Both steps run in float32 under autocast.
    """

    def __init__(self, spatial_dims: int, in_channels: int, *, initial_bias: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, in_channels, *[1] * spatial_dims))
        self.bias = nn.Parameter(torch.full((1,), initial_bias))
        nn.init.normal_(self.weight, std=0.01)
        self.convolve = CONV_FUNCTION[spatial_dims]

    def forward(
        self, features: Float[Tensor, "batch channel *cells"]
    ) -> Float[Tensor, "batch 1 *cells"]:
        """The map in (0, 1), float32."""
        with torch.autocast(features.device.type, enabled=False):
            weight, bias = self.weight.float(), self.bias.float()
            return sigmoid_in_float32(self.convolve(features.float(), weight, bias))


class AdditiveGridGate(nn.Module):
    """Map of how much of each skip voxel to let through, computed on the coarser signal's grid.

    Additive gate of Oktay et al. (2018, arXiv:1804.03999, Eq. 1-2) as their published CT network
    runs it: the skip goes through a convolution whose kernel equals its stride, down to the grid of
    the signal, which is the decoder's output one level below; the map is interpolated linearly back
    to the skip's grid. At the deepest skip the signal is the bottleneck, first through a 1x1
    convolution, a normalisation and an activation.

    We depart from their code in three places. The gate starts open (`initial_bias`), as the paper
    says and the code does not. The stride is the level's own, so it may be anisotropic. The 1x1
    convolution and normalisation after the product, which are in the code and not in the paper, are
    off unless `output_transform` is set.
    """

    signal: Literal["coarse", "upsampled"] = "coarse"

    def __init__(
        self,
        spatial_dims: int,
        *,
        skip_channels: int,
        signal_channels: int,
        stride: Sequence[int],
        deepest: bool,
        initial_bias: float = 3.0,
        output_transform: bool = False,
        norm: NormalisationKind = "instance",
    ) -> None:
        super().__init__()
        kernel = [1] * spatial_dims
        conv = CONV[spatial_dims]
        self.prepare_signal = (
            ConvolutionBlock(
                spatial_dims, signal_channels, widths=[signal_channels], kernel=kernel, norm=norm
            )
            if deepest
            else nn.Identity()
        )
        self.from_skip = conv(
            skip_channels,
            skip_channels,
            kernel_size=tuple(stride),
            stride=tuple(stride),
            bias=False,
        )
        self.from_signal = conv(signal_channels, skip_channels, kernel_size=1)
        self.coefficients = Coefficients(spatial_dims, skip_channels, initial_bias=initial_bias)
        self.tap = MapTap("gate", stride=tuple(stride))
        self.output_transform = (
            nn.Sequential(
                convolution(spatial_dims, skip_channels, skip_channels, kernel=kernel),
                normalisation(norm, spatial_dims, skip_channels),
            )
            if output_transform
            else nn.Identity()
        )
        self.mode = LINEAR_MODE[spatial_dims]

    def forward(
        self,
        skip: Float[Tensor, "batch skip_channel *space"],
        signal: Float[Tensor, "batch signal_channel *coarse"],
    ) -> Float[Tensor, "batch 1 *space"]:
        """The map in (0, 1) on the skip's grid. The skip is a whole number of strides in size."""
        query = self.from_signal(self.prepare_signal(signal))
        coarse = self.tap(self.coefficients(F.relu(self.from_skip(skip) + query)))
        # Cell centres stay where they are, and a convex combination stays in (0, 1).
        fine = F.interpolate(coarse, size=skip.shape[2:], mode=self.mode, align_corners=False)
        return fine.to(skip.dtype)


class AdditiveSameLevelGate(nn.Module):
    """Map of how much of each skip voxel to let through, computed on the skip's own grid.

    The widespread variant of Oktay et al. (2018): the signal first comes up to the skip's grid,
    and both go through a 1x1 convolution and a normalisation to half the skip's channels. MONAI's
    attention block is the same but for a batch normalisation on the map itself, which we leave out
    (see `Coefficients`).
    """

    signal: Literal["coarse", "upsampled"] = "upsampled"

    def __init__(
        self,
        spatial_dims: int,
        *,
        skip_channels: int,
        signal_channels: int,
        initial_bias: float = 3.0,
        norm: NormalisationKind = "instance",
    ) -> None:
        super().__init__()
        between = math.ceil(skip_channels / 2)
        kernel = [1] * spatial_dims
        self.from_skip = nn.Sequential(
            convolution(spatial_dims, skip_channels, between, kernel=kernel),
            normalisation(norm, spatial_dims, between),
        )
        self.from_signal = nn.Sequential(
            convolution(spatial_dims, signal_channels, between, kernel=kernel),
            normalisation(norm, spatial_dims, between),
        )
        self.coefficients = Coefficients(spatial_dims, between, initial_bias=initial_bias)
        self.tap = MapTap("gate")
        self.output_transform = nn.Identity()

    def forward(
        self,
        skip: Float[Tensor, "batch skip_channel *space"],
        signal: Float[Tensor, "batch signal_channel *space"],
    ) -> Float[Tensor, "batch 1 *space"]:
        """The map in (0, 1) on the skip's grid."""
        features = F.relu(self.from_skip(skip) + self.from_signal(signal))
        attention_map: Tensor = self.tap(self.coefficients(features))
        return attention_map.to(skip.dtype)
