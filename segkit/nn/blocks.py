"""Layers that all networks of segkit use; tables give the 2D or the 3D version of each."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from segkit.nn.normalisation import (
    GroupNormalisation,
    InstanceNormalisation,
    cancels_bias,
    normalise_and_activate,
)

Features: TypeAlias = Float[Tensor, "batch channel *space"]
"""Features on a 2D or 3D grid. A cell is one element of such a grid."""
NormalisationKind = Literal["instance", "batch", "group", "none"]

CONV: dict[int, Callable[..., nn.Conv2d | nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED_CONV: dict[int, Callable[..., nn.Module]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
CONV_FUNCTION: dict[int, Callable[..., Tensor]] = {2: F.conv2d, 3: F.conv3d}
MAX_POOL: dict[int, Callable[..., nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
LINEAR_MODE = {2: "bilinear", 3: "trilinear"}
NEGATIVE_SLOPE = 0.01


def normalisation(kind: NormalisationKind, spatial_dims: int, channels: int) -> nn.Module:
    """A normalisation layer. Instance and group normalisation work well with small batches."""
    match kind:
        case "instance":
            return InstanceNormalisation(channels)
        case "batch":
            return {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[spatial_dims](channels)
        case "group":
            # At most 8 groups, of at least 4 channels each: one channel a group would be instance
            # normalisation.
            return GroupNormalisation(math.gcd(8, max(channels // 4, 1), channels), channels)
        case "none":
            return nn.Identity()


def convolution(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    *,
    kernel: Sequence[int],
    stride: Sequence[int] | None = None,
    groups: int = 1,
) -> nn.Conv2d | nn.Conv3d:
    """A padded convolution with He-normal weights (He et al. 2015).

    The kernel size must be odd along every axis. Then the output has the size of the input divided
    by the stride, and the centre of output cell j lies at input cell `stride * j`.

    Args:
        spatial_dims: 2 or 3.
        in_channels, out_channels: numbers of channels.
        kernel: kernel size along each axis, odd.
        stride: stride along each axis; 1 if None.
        groups: number of groups of channels that are convolved separately.
    """
    layer = CONV[spatial_dims](
        in_channels,
        out_channels,
        kernel_size=tuple(kernel),
        stride=tuple(stride or (1,) * spatial_dims),
        padding=tuple(size // 2 for size in kernel),
        groups=groups,
    )
    nn.init.kaiming_normal_(layer.weight, a=NEGATIVE_SLOPE)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ConvolutionBlock(nn.Module):
    """Convolutions, each followed by a normalisation and a leaky ReLU.

    Only the first convolution uses `stride`.
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
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [
                convolution(spatial_dims, in_channels, width, kernel=kernel, stride=stride),
                normalisation(norm, spatial_dims, width),
                nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
            ]
            in_channels, stride = width, None
        self.layers = nn.Sequential(*layers)

    def forward(
        self, features: Float[Tensor, "batch in_channel *space"]
    ) -> Float[Tensor, "batch out_channel *strided"]:
        """The convolved features."""
        layers = iter(self.layers)
        for convolve in layers:
            norm, activation = next(layers), next(layers)
            features = normalise_and_activate(
                norm, activation, _convolved(convolve, norm, features)
            )
        return features


def _convolved(convolve: nn.Module, norm: nn.Module, features: Tensor) -> Tensor:
    """The convolution of features, without its bias if the normalisation after it cancels it.

    On a GPU, cuDNN adds a bias in a second pass over the features, and its gradient takes another.
    """
    if not cancels_bias(norm, features):
        return convolve(features)
    # Only PyTorch's own layers, of which nobody watches or replaces the forward or backward pass.
    watched = (
        convolve._forward_hooks
        or convolve._forward_pre_hooks
        or convolve._backward_hooks
        or convolve._backward_pre_hooks
    )
    if type(convolve) not in (nn.Conv2d, nn.Conv3d) or convolve.bias is None or watched:
        return convolve(features)
    assert isinstance(convolve, nn.Conv2d | nn.Conv3d)
    output = convolve._conv_forward(features, convolve.weight, None)  # it knows the kind of padding
    cancelled: Tensor = _WithCancelledBias.apply(output, convolve.bias)  # type: ignore[no-untyped-call]
    return cancelled


class _WithCancelledBias(torch.autograd.Function):
    """Features, unchanged. The gradient of the bias, which a later layer cancels, is 0."""

    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(bias)
        return features.view_as(features)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (bias,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradients[0], torch.zeros_like(bias)


class Modulated(nn.Module):
    """Features multiplied by one attention map after another.

    Each map is computed from the product with the maps before it.
    """

    def __init__(self, *attention_maps: nn.Module) -> None:
        super().__init__()
        self.attention_maps = nn.ModuleList(attention_maps)

    def forward(self, features: Features) -> Features:
        """The features, multiplied by every map."""
        for attention_map in self.attention_maps:
            features = features * attention_map(features)
        return features


def sigmoid_in_float32(logits: Tensor) -> Tensor:
    """The sigmoid, computed in float32. In half precision it reaches 0 and 1 too early."""
    return torch.sigmoid(logits.float())
