"""Transformer blocks over the coarsest level's voxels, and the small layers in them."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segkit.nn.blocks import Features
from segkit.nn.map_tap import Stage
from segkit.nn.self_attention import SelfAttention

ROTARY_BASE_OF_TOKENS = 10_000.0
"""Base of the angles, as in Primus."""
WEIGHT_DEVIATION = 0.02
"""Standard deviation of a transformer's first weights."""


class LayerScale(nn.Module):
    """Features times a learned number for each channel; all numbers start equal.

    Touvron et al. (2021, arXiv:2103.17239, Eq. 4).
    """

    def __init__(self, channels: int, *, initial: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), initial))

    def forward(self, features: Features) -> Features:
        """The features, each channel multiplied by its number."""
        return features * self.weight.view(-1, *[1] * (features.ndim - 2)).to(features.dtype)


class DropPath(nn.Module):
    """In training, 0 instead of the features of some samples; the expected value does not change.

    Stochastic depth of Huang et al. (2016, arXiv:1603.09382), drawn for each sample: with
    probability `rate` its features become 0; otherwise they are divided by 1 - rate. In prediction
    the features do not change.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, features: Features) -> Features:
        """The features of the samples that are kept."""
        if not self.training or self.rate == 0:
            return features
        kept = torch.rand(features.shape[0], *[1] * (features.ndim - 1), device=features.device)
        return features * ((kept >= self.rate).to(features.dtype) / (1 - self.rate))


class GatedPerceptron(nn.Module):
    """W_2 norm(silu(W_g x) * W_1 x), computed for each token separately.

    SwiGLU of Shazeer (2020, arXiv:2002.05202, Eq. 6), with biases, and with LayerNorm before W_2
    (Fang et al. 2023, arXiv:2303.11331).
    """

    def __init__(self, channels: int, *, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, hidden)
        self.value = nn.Linear(channels, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, channels)

    def forward(
        self, tokens: Float[Tensor, "batch *cells channel"]
    ) -> Float[Tensor, "batch *cells channel"]:
        """The vector that is added to each token."""
        added: Tensor = self.out(self.norm(F.silu(self.gate(tokens)) * self.value(tokens)))
        return added


class TransformerBlock(nn.Module):
    """Features plus attention among them, then plus a perceptron of each: a token block of Primus.

        x ← x + drop(λ₁ ⊙ W_o norm(heads(norm x)))        queries and keys rotated by positions
        x ← x + drop(λ₂ ⊙ W₂ norm(silu(W_g norm x) ⊙ W₁ norm x))

    Wald et al. (2025, arXiv:2503.01835, Sec. 4; the block of EVA-02, Fang et al. 2023), with the
    settings of the third version of their code: rotary positions of base 10,000, with the channels
    divided evenly among the axes; LayerNorm before W_o; a perceptron 8/3 times as wide as the
    token; λ of 0.1 at first. Queries and values have biases, W_o has none.

    Args:
        spatial_dims: 2 or 3.
        channels: number of channels of the features.
        heads: number of heads.
        head_channels: number of channels of each head, a multiple of twice the number of axes.
        expansion: width of the perceptron's hidden layer, divided by `channels`.
        layer_scale: the first value of λ.
        drop_path: probability that a sample skips a half of the block in training.
        number: number of blocks before this one. The first values of W_o and W₂ are divided by the
            root of twice the number of blocks up to and including this one.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        *,
        heads: int,
        head_channels: int,
        expansion: float = 8 / 3,
        layer_scale: float = 0.1,
        drop_path: float = 0.0,
        number: int = 0,
    ) -> None:
        super().__init__()
        assert head_channels % (2 * spatial_dims) == 0, "all channels of a head are turned"
        self.attention = SelfAttention(
            channels,
            heads=heads,
            head_channels=head_channels,
            positions="rotary",
            rotary_base=ROTARY_BASE_OF_TOKENS,
            inner_norm=True,
        )
        self.attention_scale = LayerScale(channels, initial=layer_scale)
        self.norm = nn.LayerNorm(channels)
        self.perceptron = GatedPerceptron(channels, hidden=max(int(expansion * channels), 1))
        self.perceptron_scale = LayerScale(channels, initial=layer_scale)
        self.drop_path = DropPath(drop_path)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=WEIGHT_DEVIATION)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        with torch.no_grad():
            for last in (self.attention.attention.out, self.perceptron.out):
                last.weight.div_(math.sqrt(2 * (number + 1)))

    def forward(self, features: Features) -> Features:
        """The features after attention and perceptron."""
        taken = self.attention_scale(self.attention.taken(features))
        features = features + self.drop_path(taken).to(features.dtype)
        # Axes are counted from the front because ONNX's exporter cannot count from the back.
        added = self.perceptron(self.norm(features.movedim(1, features.ndim - 1)))
        scaled = self.perceptron_scale(added.movedim(features.ndim - 1, 1))
        return features + self.drop_path(scaled).to(features.dtype)


def transformer_stage(
    spatial_dims: int,
    channels: int,
    *,
    depth: int,
    heads: int,
    head_channels: int,
    expansion: float = 8 / 3,
    layer_scale: float = 0.1,
    drop_path: float = 0.0,
) -> Stage:
    """Token blocks one after another.

    Blocks are dropped in training with a probability that grows evenly from 0 for the first block
    to `drop_path` for the last (Huang et al. 2016, Sec. 3); a single block is never dropped. Two
    parts of Primus are left out: learned absolute positions, which would fix the size of the grid,
    and the LayerNorm after the last block. So blocks that add nothing leave the features unchanged.

    Args:
        spatial_dims: 2 or 3.
        channels: number of channels of the features.
        depth: number of blocks.
        heads, head_channels, expansion, layer_scale: as for `TransformerBlock`.
        drop_path: probability with which the last block is dropped.
    """
    return Stage(
        *[
            TransformerBlock(
                spatial_dims,
                channels,
                heads=heads,
                head_channels=head_channels,
                expansion=expansion,
                layer_scale=layer_scale,
                drop_path=drop_path * number / max(depth - 1, 1),
                number=number,
            )
            for number in range(depth)
        ]
    )
