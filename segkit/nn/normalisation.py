"""Instance and group normalisation that keep features in channels-last order.

CPUs convolve fastest in this order. PyTorch's own normalisations (2.13) are slow with it. Instance
normalisation copies the features to another order and back, which can take longer than the
convolution before it. The backward pass of group normalisation takes 30 times its forward pass.

On a GPU, `fuse_normalisation` lets instance normalisation and the leaky ReLU after it run in one
kernel, if triton is installed.
"""

import logging
import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

logger = logging.getLogger(__name__)

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Memory format that stores the channels of a voxel side by side, by a tensor's number of axes."""
FUSED_DEVICE = "cuda"
FUSED_TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Device and data types for which one kernel can do normalisation and activation."""


def channels_last(network: nn.Module) -> None:
    """Store a network's weights channels last. Features take the order of a layer's weights."""
    for weight in network.parameters():
        if weight.ndim in CHANNELS_LAST:
            weight.data = weight.data.contiguous(memory_format=CHANNELS_LAST[weight.ndim])


def order_for(network: nn.Module, device: torch.device) -> None:
    """Choose the order of weights and the kernels of normalisation that train fastest on a device.

    Weights are stored channels last on a CPU, and on a GPU if all normalisation can be fused.
    Otherwise PyTorch's own normalisation would copy the features to the other order and back, which
    costs more time than channels last saves.
    """
    on_gpu = device.type == FUSED_DEVICE
    if device.type == "cpu" or (on_gpu and fuse_normalisation(network, device)):
        channels_last(network)


def fuse_normalisation(network: nn.Module, device: torch.device | None = None) -> bool:
    """Let each instance normalisation of a network run in one kernel with the leaky ReLU after it.

    This has an effect only on a GPU, in float32, float16 or bfloat16, if the network is neither
    compiled nor exported. Otherwise the outputs of the network stay the same, bit for bit. Weights,
    their names and their order in memory do not change.

    Args:
        network: the network.
        device: the GPU on which it will run; None if this is not known yet.

    Returns:
        True if the network has instance normalisation and no other, and triton is installed and can
        compile for the GPU.
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
    device = device or torch.device("cpu")
    return 0 < len(own) == len(normalisations) and _normalise_and_leak(device) is not None


@cache
def _normalise_and_leak(device: torch.device) -> Callable[..., Tensor] | None:
    """`normalise_and_leak`, or None if triton is not installed or cannot compile for a device."""
    if find_spec("triton") is None:
        return None
    from segkit.nn.fused_normalisation import normalise_and_leak

    return normalise_and_leak if _compiles(normalise_and_leak, device) else None


def _compiles(function: Callable[..., Tensor], device: torch.device) -> bool:
    """Whether triton can compile `normalise_and_leak` for a GPU, for which it needs a C compiler.

    For a CPU nothing is compiled, and the answer is True.
    """
    if device.type == "cpu":
        return True
    features = torch.ones(1, 16, 8, device=device)
    try:
        with torch.cuda.device(device):
            function(features, features[0, :, 0], features[0, :, 0], eps=1e-5, slope=0.01)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # triton's errors have no class in common
        reason = (str(error) or type(error).__name__).splitlines()[0]
        logger.warning(
            "normalisation runs in PyTorch's own kernels, which are slower, because triton cannot "
            "compile (%s); install a C compiler, such as gcc, and the headers of Python",
            reason,
        )
        return False
    return True


@cache
def _has_bfloat16(device: torch.device) -> bool:
    """Whether triton compiles bfloat16 for a GPU; NVIDIA's have it since Ampere (8.0)."""
    others = device.type != "cuda" or torch.version.hip is not None
    return others or torch.cuda.get_device_capability(device) >= (8, 0)


def normalise_and_activate(norm: nn.Module, activation: nn.Module, features: Tensor) -> Tensor:
    """The activation of the normalised features, in one kernel if the normalisation is fused."""
    if isinstance(norm, InstanceNormalisation) and isinstance(activation, nn.LeakyReLU):
        output = norm.normalised_and_leaked(features, activation.negative_slope)
        if output is not None:
            return output
    output = activation(norm(features))
    return output


def cancels_bias(norm: nn.Module, features: Tensor) -> bool:
    """Whether a fused normalisation cancels a bias that a convolution of the features would add.

    Instance normalisation subtracts the mean of each channel, and the bias with it.
    """
    return isinstance(norm, InstanceNormalisation) and norm.runs_fused(features)


class _Normalise(torch.autograd.Function):
    """Group normalisation of features with channels last.

    The forward pass is PyTorch's. The backward pass is the closed form of its gradient: with n
    features in a group, their mean m and inverse deviation r, the gradient at x is
    r·w·g + k·x - (r/n)·Σ w·g - k·m with k = -(r²/n)·Σ w·g·r·(x - m). Both sums are over the group.
    There is no second derivative.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, features: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        batch, channels, *space = features.shape
        # The stride along an axis of one cell can be anything, but PyTorch needs the usual one.
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
            """(batch, row, width), with rows along the last axis, which are contiguous and long."""
            return cells.movedim(1, -1).reshape(batch, -1, width)

        def at_rows(values: Tensor) -> Tensor:
            return values.to(features.dtype).repeat(1, space[-1]).unsqueeze(1)

        def summed(rows: Tensor) -> Tensor:
            """Sum of rows over space, (batch, channel)."""
            return rows.sum(1).view(batch, -1, channels).sum(1, dtype=kind)

        def of_channels(values: Tensor) -> Tensor:
            """Values (batch, group), repeated for each channel: (batch, channel)."""
            return values.to(kind).repeat_interleave(channels // values.shape[1], dim=1)

        def of_groups(values: Tensor) -> Tensor:
            """Sum over each group, repeated for each of its channels."""
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
    """True if the features have more than one cell and the network is run, not traced."""
    return math.prod(features.shape[2:]) > 1 and not is_traced()


def is_traced() -> bool:
    """True if the running code is compiled, traced or exported instead of only run."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch.onnx.is_in_onnx_export()
    )


def _has_channels_last(features: Tensor) -> bool:
    """True if the features lie on a CPU, channels last, and the network is run, not traced."""
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
        """The features with mean 0 and deviation 1 in each group of channels of each image, then
        scaled and shifted."""
        if not _has_channels_last(features):
            return self.in_any_order(features)
        output: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
            features, self.weight, self.bias, self.num_groups, self.eps
        )
        return output

    def in_any_order(self, features: Tensor) -> Tensor:
        """The same by PyTorch's own function, for features in any order."""
        return super().forward(features)


class InstanceNormalisation(GroupNormalisation):
    """Instance normalisation (Ulyanov et al. 2016, arXiv:1607.08022): each channel is a group."""

    fused = False
    """True if a GPU may normalise and activate in one kernel; see `fuse_normalisation`."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(
        self, features: Float[Tensor, "batch channel *space"]
    ) -> Float[Tensor, "batch channel *space"]:
        """The features with mean 0 and deviation 1 in each channel of each image, then scaled and
        shifted."""
        output = self.normalised_and_leaked(features, 1.0)
        return super().forward(features) if output is None else output

    def normalised_and_leaked(self, features: Tensor, slope: float) -> Tensor | None:
        """Normalisation and leaky ReLU of a slope in one kernel, or None if this is impossible."""
        if not self.runs_fused(features):
            return None
        function = _normalise_and_leak(features.device)
        assert function is not None
        return function(features, self.weight, self.bias, eps=self.eps, slope=slope)

    def runs_fused(self, features: Tensor) -> bool:
        """True if features of this device, type and size are normalised in one kernel."""
        return (
            self.fused
            and features.device.type == FUSED_DEVICE
            and features.dtype in FUSED_TYPES
            and (features.dtype != torch.bfloat16 or _has_bfloat16(features.device))
            and features.numel() > 0
            and _is_plain_call(features)
            and _normalise_and_leak(features.device) is not None
        )

    def in_any_order(self, features: Tensor) -> Tensor:
        """The same by PyTorch's instance normalisation, which exporters and runtimes know."""
        return F.instance_norm(features, weight=self.weight, bias=self.bias, eps=self.eps)
