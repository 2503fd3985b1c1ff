"""MedNeXt's block: depthwise convolutions, an inverted bottleneck, and a shortcut.

It has the design of a transformer block, but convolutions instead of attention. So it serves as a
control in comparisons with transformers.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.nn.blocks import Features, NormalisationKind, convolution, normalisation

LEAST_MEAN = 1e-6
"""Added to a mean before a division by it."""


class ResponseNormalisation(nn.Module):
    """Features, each channel weighted by its strength relative to the other channels.

    Global response normalisation of Woo et al. (2023, arXiv:2301.00808, Eq. 1-3 and Alg. 1):
    x + γ x n + β with n_c = ‖x_c‖ / mean over channels of ‖x‖. Each norm is over all voxels of a
    sample. γ and β start at 0, so the module starts as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, features: Features) -> Features:
        """The weighted features. Strong channels become stronger if their γ is above 0."""
        ones = [1] * (features.ndim - 2)
        # A norm over very many voxels is too large for half precision.
        strength = torch.linalg.vector_norm(features.flatten(2).float(), dim=2)
        share = strength / (strength.mean(dim=1, keepdim=True) + LEAST_MEAN)
        factor = 1 + self.weight * share
        shift = self.bias.view(-1, *ones).to(features.dtype)
        return features * factor.view(*factor.shape, *ones).to(features.dtype) + shift


class MedNeXtBlock(nn.Module):
    """A shortcut plus W₂ grn(gelu(W₁ norm(conv x))); conv is depthwise.

    Roy et al. (2023, arXiv:2303.09975, Sec. 2.1), with the global response normalisation of their
    second release. W₁ increases the number of channels, W₂ reduces it. If the grid or the number of
    channels changes, the shortcut is a 1x1 convolution with the stride, as in their blocks that
    resample. Otherwise it is x itself.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
        norm: NormalisationKind = "instance",
        expansion: int = 2,
        response_norm: bool = True,
    ) -> None:
        super().__init__()
        ones, hidden = [1] * spatial_dims, expansion * in_channels
        self.depthwise = convolution(
            spatial_dims, in_channels, in_channels, kernel=kernel, stride=stride, groups=in_channels
        )
        self.norm = normalisation(norm, spatial_dims, in_channels)
        self.expand = convolution(spatial_dims, in_channels, hidden, kernel=ones)
        self.activation = nn.GELU()
        self.response = ResponseNormalisation(hidden) if response_norm else nn.Identity()
        self.compress = convolution(spatial_dims, hidden, out_channels, kernel=ones)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels or any(step > 1 for step in stride or ()):
            self.shortcut = convolution(
                spatial_dims, in_channels, out_channels, kernel=ones, stride=stride
            )

    def forward(
        self, features: Float[Tensor, "batch in_channel *space"]
    ) -> Float[Tensor, "batch out_channel *strided"]:
        """The features plus the output of the block."""
        expanded = self.activation(self.expand(self.norm(self.depthwise(features))))
        output: Tensor = self.shortcut(features) + self.compress(self.response(expanded))
        return output


class MedNeXtLevel(nn.Sequential):
    """MedNeXt's blocks instead of a level's convolutions; only the first may have a stride.

    If the features have fewer channels than the output of the first block, and this block has no
    stride, a 1x1 convolution before it adds the channels: the stem of Roy et al. (2023).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        widths: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
        norm: NormalisationKind = "instance",
        expansion: int = 2,
        response_norm: bool = True,
    ) -> None:
        layers: list[nn.Module] = []
        if in_channels < widths[0] and stride is None:
            layers.append(
                convolution(spatial_dims, in_channels, widths[0], kernel=[1] * spatial_dims)
            )
            in_channels = widths[0]
        for width in widths:
            layers.append(
                MedNeXtBlock(
                    spatial_dims,
                    in_channels,
                    width,
                    kernel=kernel,
                    stride=stride,
                    norm=norm,
                    expansion=expansion,
                    response_norm=response_norm,
                )
            )
            in_channels, stride = width, None
        super().__init__(*layers)
