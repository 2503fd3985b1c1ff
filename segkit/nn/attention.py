"""Attention over a block's own features, f(x): which channels and which voxels count.

Each module returns its map in (0, 1); `Modulated` multiplies.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.nn.blocks import CONV, Modulated, normalisation, sigmoid_in_float32
from segkit.nn.taps import MapTap


class Excitation(nn.Module):
    """Two linear layers with a ReLU between them, through fewer channels."""

    def __init__(self, channels: int, *, reduction: int) -> None:
        super().__init__()
        squeezed = max(channels // reduction, 1)
        self.squeeze = nn.Linear(channels, squeezed)
        self.expand = nn.Linear(squeezed, channels)

    def forward(self, summary: Float[Tensor, "batch channel"]) -> Float[Tensor, "batch channel"]:
        """One logit per channel."""
        logits: Tensor = self.expand(torch.relu(self.squeeze(summary)))
        return logits


class SqueezeExcitation(nn.Module):
    """Map of how much each channel counts: sigmoid(W2 relu(W1 mean(x))).

    Hu et al. (2018, arXiv:1709.01507, Eq. 2-3). The reduction is 2, as Roy et al. (2018) use in
    segmentation networks, where channels are few, instead of 16.
    """

    def __init__(self, channels: int, *, reduction: int = 2) -> None:
        super().__init__()
        self.excitation = Excitation(channels, reduction=reduction)
        self.tap = MapTap("channel")

    def forward(
        self, features: Float[Tensor, "batch channel *space"]
    ) -> Float[Tensor, "batch channel *ones"]:
        """The map in (0, 1), one cell per channel."""
        logits = self.excitation(features.flatten(2).mean(dim=2))
        return _per_channel(self.tap, logits, features)


class PooledChannelAttention(nn.Module):
    """Map of how much each channel counts: sigmoid(MLP(mean(x)) + MLP(max(x))), the MLP shared.

    The channel half of CBAM, Woo et al. (2018, arXiv:1807.06521, Eq. 2).
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        self.excitation = Excitation(channels, reduction=reduction)
        self.tap = MapTap("channel")

    def forward(
        self, features: Float[Tensor, "batch channel *space"]
    ) -> Float[Tensor, "batch channel *ones"]:
        """The map in (0, 1), one cell per channel."""
        voxels = features.flatten(2)
        logits = self.excitation(voxels.mean(dim=2)) + self.excitation(voxels.amax(dim=2))
        return _per_channel(self.tap, logits, features)


class PooledSpatialAttention(nn.Module):
    """Map of how much each voxel counts: sigmoid(norm(conv([max over channels; mean]))).

    The spatial half of CBAM, Woo et al. (2018, Eq. 3), in the order of channels and with the batch
    normalisation of their code, for which the paper has neither word nor symbol.
    """

    def __init__(self, spatial_dims: int, *, kernel_size: int = 7) -> None:
        super().__init__()
        self.convolution = CONV[spatial_dims](
            2, 1, kernel_size=kernel_size, padding=kernel_size // 2, bias=False
        )
        self.norm = normalisation("batch", spatial_dims, 1)
        self.tap = MapTap("spatial")

    def forward(
        self, features: Float[Tensor, "batch channel *space"]
    ) -> Float[Tensor, "batch 1 *space"]:
        """The map in (0, 1), one cell per voxel."""
        pooled = [features.amax(dim=1, keepdim=True), features.mean(dim=1, keepdim=True)]
        logits = self.norm(self.convolution(torch.cat(pooled, dim=1)))
        attention_map: Tensor = self.tap(sigmoid_in_float32(logits))
        return attention_map.to(features.dtype)


def convolutional_block_attention(
    spatial_dims: int, channels: int, *, reduction: int = 16, kernel_size: int = 7
) -> Modulated:
    """CBAM, Woo et al. (2018, Eq. 1): the channel map, then the spatial map of the product."""
    return Modulated(
        PooledChannelAttention(channels, reduction=reduction),
        PooledSpatialAttention(spatial_dims, kernel_size=kernel_size),
    )


def _per_channel(tap: MapTap, logits: Tensor, features: Tensor) -> Tensor:
    ones = [1] * (features.ndim - 2)
    attention_map: Tensor = tap(sigmoid_in_float32(logits).reshape(*logits.shape, *ones))
    return attention_map.to(features.dtype)
