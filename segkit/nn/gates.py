"""Attention gates at the skips: f(skip, signal) is how much of each skip voxel to let through.

A gate returns its map. The network multiplies, `skip * gate(skip, signal)`, and then applies the
gate's `output_transform`, which is the identity by default. "Open" means a map of 1, "shut" a map
of 0.
"""

import math
from collections.abc import Iterable, Sequence
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
from segkit.nn.map_tap import MapTap

CoefficientKind = Literal["sigmoid", "softmax", "mean_flow", "hard"]
"""How a gate's logits become its map: see `Coefficients`."""
HIGHEST_TEMPERATURE = 1.0
LOWEST_TEMPERATURE = 0.5
LARGEST_GRID_SHARE = 1000.0
"""Largest value of a map whose mean is 1; larger values would overflow in half precision."""


class Gate(nn.Module):
    """Base class of gates: the signal that steers the map, and the layer after the product."""

    signal: Literal["coarse", "upsampled"]
    output_transform: nn.Module

    def let_through(self, skip: Tensor, signal: Tensor) -> Tensor:
        """The skip times the map. Several maps give several gated copies, one after another."""
        attention_map = self(skip, signal)
        if attention_map.shape[1] == 1:
            gated = skip * attention_map
        else:
            gated = (skip[:, None] * attention_map[:, :, None]).flatten(1, 2)
        output: Tensor = self.output_transform(gated)
        return output


class HardGate(nn.Module):
    """Values 1 (open) or 0 (shut). In training, 1 is drawn with probability sigmoid(logit).

    The binary Concrete distribution of Maddison et al. (2017, arXiv:1611.00712, Appendix B) and
    Jang et al. (2017, arXiv:1611.01144, Sec. 2.2) with a straight-through gradient. With logistic
    noise L, the value is 1 if logit + L > 0, and the gradient is that of
    sigmoid((logit + L) / temperature). In evaluation there is no noise: the value is 1 if
    logit > 0. `anneal` lowers the temperature.
    """

    temperature: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.tensor(HIGHEST_TEMPERATURE))

    def forward(
        self, logits: Float[Tensor, "batch channel *cells"]
    ) -> Float[Tensor, "batch channel *cells"]:
        """The gate. Each value is 0 or 1."""
        if not self.training:
            return (logits > 0).to(logits.dtype)
        # The logits of 0 and 1 are infinite.
        uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        relaxed = torch.sigmoid((logits + torch.logit(uniform)) / self.temperature)
        return (relaxed > 0.5).to(logits.dtype) + (relaxed - relaxed.detach())


def anneal(modules: Iterable[nn.Module], progress: float) -> None:
    """Lower the temperature of every hard gate among modules, linearly from 1 to 0.5.

    Args:
        modules: modules such as `network.modules()`; only a `HardGate` changes.
        progress: share of the training that is done, in [0, 1].
    """
    temperature = HIGHEST_TEMPERATURE + progress * (LOWEST_TEMPERATURE - HIGHEST_TEMPERATURE)
    for module in modules:
        if isinstance(module, HardGate):
            module.temperature.fill_(temperature)


class Coefficients(nn.Module):
    """Maps of an additive gate: its last 1x1 convolution, and a function of the logits.

    Kinds:
        sigmoid: of each voxel, in (0, 1) (Oktay et al. 2018).
        softmax: over all voxels (Schlemper et al. 2019, arXiv:1808.08114, Sec. 3.2).
        mean_flow: logits minus their minimum, divided by their sum (the code of Schlemper et al.).
        hard: `HardGate`.

    In the pooled classifiers of Schlemper et al., softmax and mean_flow sum to 1. That would almost
    shut a skip, so here their mean is 1: equal logits let everything through. A constant that is
    added to all logits changes neither of them, and a factor does not change mean_flow. So only
    sigmoid and hard use `initial_bias`; a softmax starts near 1, and mean_flow can start with any
    values.

    Logits are never normalised: instance normalisation would fix the mean of their only channel,
    and batch normalisation would cancel the bias. Weights start at N(0, 0.01^2), so that a sigmoid
    starts near sigmoid(initial_bias) everywhere. Everything is computed in float32, also under
    autocast. Several gates (`num_gates`) share no weights: each uses its own part of the channels.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        initial_bias: float,
        kind: CoefficientKind = "sigmoid",
        num_gates: int = 1,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(num_gates, in_channels // num_gates, *[1] * spatial_dims)
        )
        self.bias = (
            nn.Parameter(torch.full((num_gates,), initial_bias))
            if kind in ("sigmoid", "hard")
            else None
        )
        nn.init.normal_(self.weight, std=0.01)
        self.convolve = CONV_FUNCTION[spatial_dims]
        self.kind = kind
        self.num_gates = num_gates
        self.hard = HardGate() if kind == "hard" else nn.Identity()

    def forward(
        self, features: Float[Tensor, "batch channel *cells"]
    ) -> Float[Tensor, "batch gates *cells"]:
        """The maps, float32."""
        with torch.autocast(features.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            logits = self.convolve(
                features.float(), self.weight.float(), bias, groups=self.num_gates
            )
            match self.kind:
                case "sigmoid":
                    return sigmoid_in_float32(logits)
                case "softmax":
                    cells = logits.flatten(2)
                    shares = cells.softmax(dim=2) * cells.shape[2]
                    return shares.clamp(max=LARGEST_GRID_SHARE).view(logits.shape)
                case "mean_flow":
                    cells = logits.flatten(2)
                    # If all logits are equal, the small number lets everything through.
                    risen = cells - cells.amin(dim=2, keepdim=True) + 1e-6
                    shares = risen / risen.mean(dim=2, keepdim=True)
                    return shares.clamp(max=LARGEST_GRID_SHARE).view(logits.shape)
                case "hard":
                    gates: Tensor = self.hard(logits)
                    return gates

    def tap(self, *, stride: tuple[int, ...] | None = None) -> MapTap:
        """A tap with the range of these maps."""
        highest = 1.0 if self.kind in ("sigmoid", "hard") else math.inf
        return MapTap("gate", stride=stride, highest=highest)


class AdditiveGridGate(Gate):
    """Map of how much of each skip voxel to let through, computed on the coarser signal's grid.

    Additive gate of Oktay et al. (2018, arXiv:1804.03999, Eq. 1-2), as in their published CT
    network. The signal is the decoder's output one level below. A convolution whose kernel equals
    its stride brings the skip down to the grid of the signal, and the map is interpolated linearly
    back to the skip's grid. At the deepest skip the signal is the bottleneck, which first passes a
    1x1 convolution, a normalisation and an activation.

    We differ from their code in three points. The gate starts open (`initial_bias`), as in the
    paper. The stride is that of the level, so it may be anisotropic. The 1x1 convolution and the
    normalisation after the product, which the paper does not mention, are used only if
    `output_transform` is set.

    Several gates (`num_gates`) are the multi-dimensional coefficients that the paper proposes for
    several classes (Sec. 2.2), as in the `_multi_att` networks of the code. Each gate has its own
    weights; only the layers that prepare the deepest signal are shared. A 1x1 convolution, a
    normalisation and an activation always bring the gated copies back to the skip's channels.
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
        coefficients: CoefficientKind = "sigmoid",
        num_gates: int = 1,
        norm: NormalisationKind = "instance",
    ) -> None:
        super().__init__()
        kernel = [1] * spatial_dims
        conv = CONV[spatial_dims]
        between = skip_channels * num_gates
        self.prepare_signal = (
            ConvolutionBlock(
                spatial_dims, signal_channels, widths=[signal_channels], kernel=kernel, norm=norm
            )
            if deepest
            else nn.Identity()
        )
        self.from_skip = conv(
            skip_channels, between, kernel_size=tuple(stride), stride=tuple(stride), bias=False
        )
        self.from_signal = conv(signal_channels, between, kernel_size=1)
        self.coefficients = Coefficients(
            spatial_dims, between, initial_bias=initial_bias, kind=coefficients, num_gates=num_gates
        )
        self.tap = self.coefficients.tap(stride=tuple(stride))
        if num_gates > 1:
            self.output_transform = ConvolutionBlock(
                spatial_dims, between, widths=[skip_channels], kernel=kernel, norm=norm
            )
        elif output_transform:
            self.output_transform = nn.Sequential(
                convolution(spatial_dims, skip_channels, skip_channels, kernel=kernel),
                normalisation(norm, spatial_dims, skip_channels),
            )
        else:
            self.output_transform = nn.Identity()
        # A hard gate stays hard: each voxel takes the value of its cell.
        self.mode = "nearest" if coefficients == "hard" else LINEAR_MODE[spatial_dims]

    def forward(
        self,
        skip: Float[Tensor, "batch skip_channel *space"],
        signal: Float[Tensor, "batch signal_channel *coarse"],
    ) -> Float[Tensor, "batch gates *space"]:
        """The maps on the skip's grid. The skip's size must be a multiple of the stride."""
        query = self.from_signal(self.prepare_signal(signal))
        coarse = self.tap(self.coefficients(F.relu(self.from_skip(skip) + query)))
        # Cell centres do not move, and values stay within the map's range.
        align = None if self.mode == "nearest" else False
        fine = F.interpolate(coarse, size=skip.shape[2:], mode=self.mode, align_corners=align)
        return fine.to(skip.dtype)


class AdditiveSameLevelGate(Gate):
    """Map of how much of each skip voxel to let through, computed on the skip's own grid.

    The common variant of Oktay et al. (2018): the signal is first brought up to the skip's grid,
    and a 1x1 convolution and a normalisation bring both to half the skip's channels. MONAI's
    attention block is the same, except that it normalises the map itself over the batch, which we
    do not (see `Coefficients`).
    """

    signal: Literal["coarse", "upsampled"] = "upsampled"

    def __init__(
        self,
        spatial_dims: int,
        *,
        skip_channels: int,
        signal_channels: int,
        initial_bias: float = 3.0,
        coefficients: CoefficientKind = "sigmoid",
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
        self.coefficients = Coefficients(
            spatial_dims, between, initial_bias=initial_bias, kind=coefficients
        )
        self.tap = self.coefficients.tap()
        self.output_transform = nn.Identity()

    def forward(
        self,
        skip: Float[Tensor, "batch skip_channel *space"],
        signal: Float[Tensor, "batch signal_channel *space"],
    ) -> Float[Tensor, "batch 1 *space"]:
        """The map on the skip's grid."""
        features = F.relu(self.from_skip(skip) + self.from_signal(signal))
        attention_map: Tensor = self.tap(self.coefficients(features))
        return attention_map.to(skip.dtype)
