"""Channel attention: f(x) weights the channels of a block's features x.

Each module returns its map, and `Modulated` multiplies the features by it. Only `GlobalContext` is
different: it returns features, to which it has added a vector.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.nn.blocks import CONV, Features, sigmoid_in_float32
from segkit.nn.map_tap import MapTap


class Excitation(nn.Module):
    """Two linear layers with a ReLU between them. The hidden layer has fewer channels."""

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
    """Map with a weight for each channel: sigmoid(W2 relu(W1 mean(x))).

    Hu et al. (2018, arXiv:1709.01507, Eq. 2-3). They reduce the channels by 16. We reduce them by
    2, like Roy et al. (2018), because segmentation networks have few channels.
    """

    def __init__(self, channels: int, *, reduction: int = 2) -> None:
        super().__init__()
        self.excitation = Excitation(channels, reduction=reduction)
        self.tap = MapTap("channel")

    def forward(self, features: Features) -> Float[Tensor, "batch channel *ones"]:
        """The map in (0, 1), one value for each channel."""
        logits = self.excitation(features.flatten(2).mean(dim=2))
        return _per_channel(self.tap, logits, features)


class PooledChannelAttention(nn.Module):
    """Map with a weight for each channel: sigmoid(MLP(mean(x)) + MLP(max(x))), with one MLP.

    This is the channel attention of CBAM, Woo et al. (2018, arXiv:1807.06521, Eq. 2).
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        self.excitation = Excitation(channels, reduction=reduction)
        self.tap = MapTap("channel")

    def forward(self, features: Features) -> Float[Tensor, "batch channel *ones"]:
        """The map in (0, 1), one value for each channel."""
        voxels = features.flatten(2)
        logits = self.excitation(voxels.mean(dim=2)) + self.excitation(voxels.amax(dim=2))
        return _per_channel(self.tap, logits, features)


class EfficientChannelAttention(nn.Module):
    """Map with a weight for each channel: the sigmoid of a convolution over the channels' means.

    ECA, Wang et al. (2020, arXiv:1910.03151, Eq. 5-9). The convolution has no bias. Its kernel
    grows with the number of channels C: its size is (log2(C) + 1) / 2 without the fraction, plus 1
    if that number is even.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        size = int((math.log2(channels) + 1) / 2)
        size += 1 - size % 2
        self.convolution = nn.Conv1d(1, 1, kernel_size=size, padding=size // 2, bias=False)
        self.tap = MapTap("channel")

    def forward(self, features: Features) -> Float[Tensor, "batch channel *ones"]:
        """The map in (0, 1), one value for each channel."""
        means = features.flatten(2).mean(dim=2)
        return _per_channel(self.tap, self.convolution(means[:, None])[:, 0], features)


class ContextPooling(nn.Module):
    """Mean of the features over all voxels, weighted by attention: the softmax of w x over voxels.

    This is the context of Cao et al. (2019, arXiv:1904.11492, Eq. 3). If w is 0, it is the plain
    mean.
    """

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        self.logits = CONV[spatial_dims](channels, 1, kernel_size=1, bias=False)
        nn.init.kaiming_normal_(self.logits.weight)
        self.tap = MapTap("pool")

    def forward(self, features: Features) -> Float[Tensor, "batch channel"]:
        """One value for each channel."""
        logits = self.logits(features)
        shares = self.tap(logits.float().flatten(2).softmax(dim=2).view(logits.shape))
        # If there are very many voxels, the share of each is too small for half precision.
        with torch.autocast(features.device.type, enabled=False):
            context = torch.einsum("bcn,bon->bc", features.flatten(2).float(), shares.flatten(2))
        return context.to(features.dtype)


class GlobalContextExcitation(nn.Module):
    """Map of squeeze-and-excitation, computed from `ContextPooling` instead of the plain mean.

    This is the "scale" fusion of Cao et al. (2019, Table 4e). `GlobalContext` is their default.
    """

    def __init__(self, spatial_dims: int, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        self.context = ContextPooling(spatial_dims, channels)
        self.excitation = Excitation(channels, reduction=reduction)
        self.tap = MapTap("channel")

    def forward(self, features: Features) -> Float[Tensor, "batch channel *ones"]:
        """The map in (0, 1), one value for each channel."""
        return _per_channel(self.tap, self.excitation(self.context(features)), features)


class GlobalContext(nn.Module):
    """Features plus a vector computed from `ContextPooling`: x + W2 relu(norm(W1 context)).

    Global context block of Cao et al. (2019, Eq. 4 and Fig. 4d). The normalisation is over
    channels. W2 starts at 0, so that the block starts as the identity, as in their code.
    """

    def __init__(self, spatial_dims: int, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        squeezed = max(channels // reduction, 1)
        self.context = ContextPooling(spatial_dims, channels)
        self.squeeze = nn.Linear(channels, squeezed)
        # The layer normalisation of a single value is always 0.
        self.norm = nn.LayerNorm(squeezed) if squeezed > 1 else nn.Identity()
        self.expand = nn.Linear(squeezed, channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)
        self.branch = MapTap("branch")

    def forward(self, features: Features) -> Features:
        """The features, with a number added to each channel that depends on the context."""
        context = self.context(features)
        shift = self.expand(torch.relu(self.norm(self.squeeze(context))))
        if self.branch.edit is not None:
            shift = shift * self.branch(shift.new_ones(len(shift), 1))
        return features + shift.view(*shift.shape, *[1] * (features.ndim - 2))


def _per_channel(tap: MapTap, logits: Tensor, features: Tensor) -> Tensor:
    ones = [1] * (features.ndim - 2)
    attention_map: Tensor = tap(sigmoid_in_float32(logits).reshape(*logits.shape, *ones))
    return attention_map.to(features.dtype)
