"""Spatial attention: f(x) weights the voxels of a block's features x.

Each module returns its map, and `Modulated` multiplies the features by it. `BottleneckAttention`
and `ConcurrentExcitation` combine it with channel attention; the latter returns features.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.nn.blocks import (
    CONV,
    NEGATIVE_SLOPE,
    Features,
    Modulated,
    NormalisationKind,
    convolution,
    normalisation,
    sigmoid_in_float32,
)
from segkit.nn.channel_attention import Excitation, PooledChannelAttention, SqueezeExcitation
from segkit.nn.map_tap import MapTap


class PooledSpatialAttention(nn.Module):
    """Map with a weight for each voxel: sigmoid(norm(conv([max over channels; mean]))).

    This is the spatial attention of CBAM, Woo et al. (2018, arXiv:1807.06521, Eq. 3). The order of
    the two channels and the batch normalisation are those of their code; the paper does not mention
    the normalisation.
    """

    def __init__(self, spatial_dims: int, *, kernel_size: int = 7) -> None:
        super().__init__()
        self.convolution = CONV[spatial_dims](
            2, 1, kernel_size=kernel_size, padding=kernel_size // 2, bias=False
        )
        self.norm = normalisation("batch", spatial_dims, 1)
        self.tap = MapTap("spatial")

    def forward(self, features: Features) -> Float[Tensor, "batch 1 *space"]:
        """The map in (0, 1), one value for each voxel."""
        pooled = [features.amax(dim=1, keepdim=True), features.mean(dim=1, keepdim=True)]
        logits = self.norm(self.convolution(torch.cat(pooled, dim=1)))
        attention_map: Tensor = self.tap(sigmoid_in_float32(logits))
        return attention_map.to(features.dtype)


class SpatialExcitation(nn.Module):
    """Map with a weight for each voxel: the sigmoid of a 1x1 convolution.

    sSE, Roy et al. (2018, arXiv:1803.02579, Sec. 2.2).
    """

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        self.convolution = CONV[spatial_dims](channels, 1, kernel_size=1)
        self.tap = MapTap("spatial")

    def forward(self, features: Features) -> Float[Tensor, "batch 1 *space"]:
        """The map in (0, 1), one value for each voxel."""
        attention_map: Tensor = self.tap(sigmoid_in_float32(self.convolution(features)))
        return attention_map.to(features.dtype)


def convolutional_block_attention(
    spatial_dims: int, channels: int, *, reduction: int = 16, kernel_size: int = 7
) -> Modulated:
    """CBAM, Woo et al. (2018, Eq. 1): channel attention, then spatial attention.

    Args:
        spatial_dims: 2 or 3.
        channels: number of channels of the features.
        reduction: factor by which the channel attention reduces the channels.
        kernel_size: kernel size of the spatial attention.
    """
    return Modulated(
        PooledChannelAttention(channels, reduction=reduction),
        PooledSpatialAttention(spatial_dims, kernel_size=kernel_size),
    )


class BottleneckAttention(nn.Module):
    """Map with a weight for each channel and voxel: 1 + sigmoid(M_c + M_s), in (1, 2).

    BAM, Park et al. (2018, arXiv:1807.06514, Eq. 1-4). M_c is an MLP of the channels' means. M_s is
    a 1x1 convolution to C/r channels, two 3x3 convolutions of dilation 4, and a 1x1 convolution to
    one channel with batch normalisation. M_c and M_s are added, as in the paper; the released code
    multiplies them. M_c is not normalised, because a batch of one vector has no statistics. Each
    convolution but the last is followed by the network's kind of normalisation and a leaky ReLU.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        *,
        reduction: int = 16,
        dilation: int = 4,
        norm: NormalisationKind = "instance",
    ) -> None:
        super().__init__()
        squeezed = max(channels // reduction, 1)
        conv = CONV[spatial_dims]
        self.excitation = Excitation(channels, reduction=reduction)
        layers: list[nn.Module] = [
            convolution(spatial_dims, channels, squeezed, kernel=[1] * spatial_dims),
            normalisation(norm, spatial_dims, squeezed),
            nn.LeakyReLU(NEGATIVE_SLOPE),
        ]
        for _ in range(2):
            layers += [
                conv(squeezed, squeezed, kernel_size=3, padding=dilation, dilation=dilation),
                normalisation(norm, spatial_dims, squeezed),
                nn.LeakyReLU(NEGATIVE_SLOPE),
            ]
        self.spatial = nn.Sequential(
            *layers, conv(squeezed, 1, kernel_size=1), normalisation("batch", spatial_dims, 1)
        )
        self.tap = MapTap("spatial", lowest=1.0, highest=2.0, mean=True)

    def forward(self, features: Features) -> Features:
        """The map in (1, 2), for each channel and voxel. The tap records its mean over channels."""
        by_channel = self.excitation(features.flatten(2).mean(dim=2))
        by_voxel = self.spatial(features)
        logits = by_channel.view(*by_channel.shape, *[1] * (features.ndim - 2)) + by_voxel
        attention_map: Tensor = self.tap(1 + sigmoid_in_float32(logits))
        return attention_map.to(features.dtype)


class ConcurrentExcitation(nn.Module):
    """Features times a channel map, combined with features times a spatial map.

    scSE, Roy et al. (2018, Sec. 2.3, and 2019, arXiv:1808.08127, Sec. III-D). The two products are
    combined by their maximum, by their sum (`aggregation="add"`), or by a concatenation, which a
    1x1 convolution brings back to the same number of channels (`"concat"`).
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        *,
        reduction: int = 2,
        aggregation: Literal["max", "add", "concat"] = "max",
    ) -> None:
        super().__init__()
        self.channel = SqueezeExcitation(channels, reduction=reduction)
        self.spatial = SpatialExcitation(spatial_dims, channels)
        self.aggregation = aggregation
        self.merge = (
            convolution(spatial_dims, 2 * channels, channels, kernel=[1] * spatial_dims)
            if aggregation == "concat"
            else nn.Identity()
        )

    def forward(self, features: Features) -> Features:
        """The combined products."""
        by_channel = features * self.channel(features)
        by_voxel = features * self.spatial(features)
        match self.aggregation:
            case "max":
                joined = torch.maximum(by_channel, by_voxel)
            case "add":
                joined = by_channel + by_voxel
            case "concat":
                joined = torch.cat([by_channel, by_voxel], dim=1)
        output: Tensor = self.merge(joined)
        return output
