"""Instance and group normalisation that keep channels last, the order a CPU convolves fastest in.

Of PyTorch's own (2.13) the one copies such features to another order and back, which can take
longer than the convolution before it, and the other's backward takes 30 times its forward.

On a GPU, `fuse_normalisation` lets instance normalisation and the leaky ReLU after it run in one
kernel, if triton is installed.
"""

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By the number of a tensor's axes, its memory format with the channel beside the next channel."""
FUSED_DEVICE = "cuda"
FUSED_TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Where, and in which data types, normalisation and activation can be one kernel."""


def channels_last(network: nn.Module) -> None:
    """Order a network's weights so; a layer's weights decide for what passes through it."""
    for weight in network.parameters():
        if weight.ndim in CHANNELS_LAST:
            weight.data = weight.data.contiguous(memory_format=CHANNELS_LAST[weight.ndim])


def order_for(network: nn.Module, device: torch.device) -> None:
    """Put a network's weights into the order, and its normalisations into the kernels, that are
    fastest in training on a device.

    Channels last on a CPU, and on a GPU if all normalisation is fused. Else PyTorch's own
    normalisation copies such features to the other order and back, which costs more than is won.
    """
    if device.type == "cpu" or (device.type == FUSED_DEVICE and fuse_normalisation(network)):
        channels_last(network)


def fuse_normalisation(network: nn.Module) -> bool:
    """Let each instance normalisation of a network run in one kernel with the leaky ReLU after it.

    True if all normalisation is of that kind and triton is installed. This has an effect only on a
    GPU, in float32, float16 or bfloat16, if the network is neither compiled nor exported. Elsewhere
    the network computes what it did before, bit for bit. Weights, their names and their order in
    memory stay.
    """
    others = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    normalisations = [
        module
        for module in network.modules()
        if isinstance(module, (*others, InstanceNormalisation))
    ]
    own = [each for each in normalisations if isinstance(each, InstanceNormalisation)]
    for module in own:
        module.fused = True
    return 0 < len(own) == len(normalisations) and _normalise_and_leak() is not None


@cache
def _normalise_and_leak() -> Callable[..., Tensor] | None:
    """The function of that name for GPUs, or None if triton is not installed."""
    if find_spec("triton") is None:
        return None
    from segkit.nn.fused_normalisation import normalise_and_leak

    return normalise_and_leak


def normalise_and_activate(norm: nn.Module, activation: nn.Module, features: Tensor) -> Tensor:
    """The activation of the normalised features; in one kernel if the normalisation is fused."""
    if isinstance(norm, InstanceNormalisation) and isinstance(activation, nn.LeakyReLU):
        output = norm.normalised_and_leaked(features, activation.negative_slope)
        if output is not None:
            return output
    output = activation(norm(features))
    return output


class _Normalise(torch.autograd.Function):
    """Group normalisation of features with channels last.

    Forward is PyTorch's. Backward is its closed form: with n features in a group, of mean m and
    inverse deviation r, the gradient at x is r·w·g + k·x - (r/n)·Σ w·g - k·m, where
    k = -(r²/n)·Σ w·g·r·(x - m), and both sums are over the group. It has no gradient itself.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, features: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        batch, channels, *space = features.shape
        # Of an axis of one cell the stride says nothing, and PyTorch asks for the usual one.
        rows = features.movedim(1, -1).reshape(-1).view(batch, *space, channels)
        features = rows.movedim(-1, 1)
        output: Tensor
        output, mean, inverse = torch.native_group_norm(
            features, weight, bias, batch, channels, math.prod(space), groups, eps
        )
        ctx.save_for_backward(features, weight, mean, inverse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, mean, inverse = ctx.saved_tensors  # type: ignore[attr-defined]
        batch, channels, *space = features.shape
        kind = torch.promote_types(features.dtype, torch.float32)
        width = space[-1] * channels

        def in_rows(cells: Tensor) -> Tensor:
            """Along the last axis, whose cells lie side by side: long rows are done at once."""
            return cells.movedim(1, -1).reshape(batch, -1, width)

        def at_rows(values: Tensor) -> Tensor:
            return values.to(features.dtype).repeat(1, space[-1]).unsqueeze(1)

        def summed(rows: Tensor) -> Tensor:
            """From rows to (batch, channel)."""
            return rows.sum(1).view(batch, -1, channels).sum(1, dtype=kind)

        def of_channels(values: Tensor) -> Tensor:
            """From (batch, group) to (batch, channel)."""
            return values.to(kind).repeat_interleave(channels // values.shape[1], dim=1)

        def of_groups(values: Tensor) -> Tensor:
            """The sum over a group, at each of its channels."""
            return of_channels(values.unflatten(1, (groups, -1)).sum(2))

        groups = mean.numel() // batch
        count = features[0].numel() // groups
        gradient, cells = in_rows(gradients[0]), in_rows(features)
        mean, inverse = (of_channels(values.view(batch, groups)) for values in (mean, inverse))
        for_bias = summed(gradient)
        for_weight = inverse * (summed(gradient * cells) - mean * for_bias)
        slope = -(inverse**2) / count * of_groups(weight * for_weight)
        constant = -inverse / count * of_groups(weight * for_bias) - slope * mean
        rows = torch.addcmul(at_rows(constant), gradient, at_rows(inverse * weight))
        rows = torch.addcmul(rows, cells, at_rows(slope))
        for_features = rows.view(batch, *space, channels).movedim(-1, 1)
        for_weight, for_bias = (values.sum(0).to(weight.dtype) for values in (for_weight, for_bias))
        return for_features, for_weight, for_bias, None, None


def _is_plain_call(features: Tensor) -> bool:
    """Whether features that have a deviation are computed now, not traced for later."""
    return (
        math.prod(features.shape[2:]) > 1
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch.onnx.is_in_onnx_export()
    )


def _has_channels_last(features: Tensor) -> bool:
    """Whether it is such features, on a CPU, and more than a network being traced."""
    return (
        features.device.type == "cpu"
        and _is_plain_call(features)
        and features.is_contiguous(memory_format=CHANNELS_LAST[features.ndim])
    )


class GroupNormalisation(nn.GroupNorm):
    """Group normalisation (Wu and He 2018, arXiv:1803.08494) with scale and offset."""

    def forward(
        self, features: Float[Tensor, "batch channel *space"]
    ) -> Float[Tensor, "batch channel *space"]:
        """Each group of channels of each image with mean 0 and deviation 1, scaled and moved."""
        if not _has_channels_last(features):
            return self.in_any_order(features)
        output: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
            features, self.weight, self.bias, self.num_groups, self.eps
        )
        return output

    def in_any_order(self, features: Tensor) -> Tensor:
        """The same by PyTorch alone."""
        return super().forward(features)


class InstanceNormalisation(GroupNormalisation):
    """Instance normalisation (Ulyanov et al. 2016, arXiv:1607.08022): each channel is a group."""

    fused = False
    """Whether a GPU normalises and activates at once: see `fuse_normalisation`."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(
        self, features: Float[Tensor, "batch channel *space"]
    ) -> Float[Tensor, "batch channel *space"]:
        """Each channel of each image with mean 0 and deviation 1, scaled and moved."""
        output = self.normalised_and_leaked(features, 1.0)
        return super().forward(features) if output is None else output

    def normalised_and_leaked(self, features: Tensor, slope: float) -> Tensor | None:
        """Normalisation and leaky ReLU of that slope in one, or None if this cannot be done."""
        if (
            not self.fused
            or features.device.type != FUSED_DEVICE
            or features.dtype not in FUSED_TYPES
            or features.numel() == 0
            or not _is_plain_call(features)
        ):
            return None
        function = _normalise_and_leak()
        if function is None:
            return None
        return function(features, self.weight, self.bias, eps=self.eps, slope=slope)

    def in_any_order(self, features: Tensor) -> Tensor:
        """By the layer of that name, which exported models and runtimes know."""
        return F.instance_norm(features, weight=self.weight, bias=self.bias, eps=self.eps)
