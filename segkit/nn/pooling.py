"""Presence heads: from the coarsest features, is each class present in the image?"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.nn.blocks import Features
from segkit.nn.map_tap import MapTap


class MeanPooling(nn.Module):
    """Logit of each class's presence: a linear function of the features' mean."""

    def __init__(self, channels: int, *, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(channels, num_classes)

    def forward(self, features: Features) -> Float[Tensor, "batch classes"]:
        """One logit for each class."""
        logits: Tensor = self.classify(features.flatten(2).mean(dim=2))
        return logits


class GatedPooling(nn.Module):
    """Logit of each class's presence: a linear function of the attention-weighted mean of features.

    Gated attention of Ilse et al. (2018, arXiv:1802.04712, Eq. 9): the weight of each voxel is the
    softmax of w^T (tanh(V h) * sigmoid(U h)) over voxels. If w is 0, it is the plain mean.
    """

    def __init__(self, channels: int, *, num_classes: int, width: int = 128) -> None:
        super().__init__()
        self.content = nn.Linear(channels, width)
        self.gate = nn.Linear(channels, width)
        self.energy = nn.Linear(width, 1, bias=False)
        self.classify = nn.Linear(channels, num_classes)
        self.tap = MapTap("pool")

    def forward(self, features: Features) -> Float[Tensor, "batch classes"]:
        """One logit for each class."""
        tokens = features.flatten(2).transpose(1, 2)
        gated = torch.tanh(self.content(tokens)) * torch.sigmoid(self.gate(tokens))
        shares = self.energy(gated).transpose(1, 2).float().softmax(dim=2)
        pooled = _weighted(self.tap, shares, features)[:, 0]
        logits: Tensor = self.classify(pooled)
        return logits


class LearnedQueryPooling(nn.Module):
    """Logit of each class's presence, from attention with a learned query for each class.

    Pooling by attention with learned seeds, Lee et al. (2019, arXiv:1810.00825, Eq. 11), without
    their residual layers. Each class has one seed (the query q) and one head, and so a map of its
    own. Its logit is a linear function of the mean of W_v h, weighted by the softmax of
    q^T W_k h / sqrt(d) over voxels.
    """

    def __init__(self, channels: int, *, num_classes: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_classes, channels) / math.sqrt(channels))
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels)
        self.weight = nn.Parameter(torch.randn(num_classes, channels) / math.sqrt(channels))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.tap = MapTap("pool")

    def forward(self, features: Features) -> Float[Tensor, "batch classes"]:
        """One logit for each class."""
        tokens = features.flatten(2).transpose(1, 2)
        logits = self.queries.to(tokens.dtype) @ self.key(tokens).transpose(1, 2)
        shares = (logits.float() / math.sqrt(self.queries.shape[1])).softmax(dim=2)
        # The mean of W_v h equals W_v times the mean of h, which is much faster.
        pooled = self.value(_weighted(self.tap, shares, features))
        return (pooled * self.weight).sum(dim=2) + self.bias


def _weighted(
    tap: MapTap, shares: Float[Tensor, "batch maps cells"], features: Features
) -> Float[Tensor, "batch maps channel"]:
    """Weighted means of the features; the weights `shares` pass the tap first."""
    on_grid = tap(shares.unflatten(2, features.shape[2:]))
    return on_grid.flatten(2).to(features.dtype) @ features.flatten(2).transpose(1, 2)
