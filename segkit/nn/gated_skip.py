"""A gate in a skip of a network that segkit did not build, and hooks that send the skip through it.

A gate becomes a part of the module in which a skip joins the decoder, with the name `segkit_gate`.
A hook of that module sends the skip through the gate. So the network keeps its code, its weights
and their names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.errors import ModelError
from segkit.nn.blocks import CONV_FUNCTION
from segkit.nn.concatenations import Half
from segkit.nn.gates import AdditiveGridGate
from segkit.nn.map_tap import MapTap

GATE = "segkit_gate"
SIGNAL = "segkit_signal"
AVERAGE_POOLING = {2: nn.functional.avg_pool2d, 3: nn.functional.avg_pool3d}
SHUT = 1 / 16
"""A gate is sigmoid(logit + log 16) / sigmoid(log 16), which is 1 if the logit is 0."""


class OpenCoefficients(nn.Module):
    """A map that is exactly 1 at first: sigmoid(q + log 16) / sigmoid(log 16) with q = 0.

    It lies between 0 and 1 + 1 / 16. Its weights start at 0, so that their gradient, but not that
    of the layers before them, differs from 0 at the first step.
    """

    def __init__(self, spatial_dims: int, in_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, in_channels, *[1] * spatial_dims))
        self.bias = nn.Parameter(torch.zeros(1))
        self.convolve = CONV_FUNCTION[spatial_dims]

    def forward(
        self, features: Float[Tensor, "batch channel *cells"]
    ) -> Float[Tensor, "batch 1 *cells"]:
        """The map, float32."""
        with torch.autocast(features.device.type, enabled=False):
            logits = self.convolve(features.float(), self.weight.float(), self.bias.float())
            # The quotient of sigmoids, in a form that is exactly 1 for a logit of 0. (The
            # exponential of less than -60 would overflow in the gradient.)
            return (1 + SHUT) / (1 + SHUT * torch.exp(-logits.clamp(min=-60)))


class OpenGate(AdditiveGridGate):
    """An additive gate (Oktay et al. 2018) that lets everything through until it is trained."""

    def __init__(
        self,
        spatial_dims: int,
        *,
        skip_channels: int,
        signal_channels: int,
        stride: Sequence[int],
    ) -> None:
        super().__init__(
            spatial_dims,
            skip_channels=skip_channels,
            signal_channels=signal_channels,
            stride=stride,
            deepest=False,
        )
        self.stride = tuple(stride)
        self.coefficients: nn.Module = OpenCoefficients(spatial_dims, skip_channels)  # type: ignore[assignment]
        self.tap = MapTap("gate", stride=self.stride, highest=1 + SHUT)

    def let_through(self, skip: Tensor, signal: Tensor) -> Tensor:
        """The skip times the map.

        Raises:
            ValueError: if the skip's size is not that of the signal times the stride.
        """
        wanted = [size * step for size, step in zip(signal.shape[2:], self.stride, strict=True)]
        if list(skip.shape[2:]) != wanted:
            raise ValueError(
                f"a gate of stride {self.stride} expected a skip of {wanted} cells, found "
                f"{list(skip.shape[2:])}; give the network an image whose size is a multiple of "
                f"its strides"
            )
        return super().let_through(skip, signal).to(skip.dtype)


class LatestSignal(nn.Module):
    """Holds the coarse features from their transposed convolution to the gate of their level."""

    value: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        """The features unchanged: an `nn.Sequential` calls each of its parts."""
        return features

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and saved: all but the features, which may be held after an error."""
        return {**self.__dict__, "value": None}


@dataclass(frozen=True)
class GatedArgument:
    """A hook before a call, which gates the skip. `skip` and `signal` are position and name of
    arguments."""

    skip: tuple[int, str]
    signal: tuple[int, str]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        skip, signal = self.values(args, named)
        return self.replaced(args, named, getattr(module, GATE).let_through(skip, signal))

    def values(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The skip and the signal among the arguments of a call."""
        skip, signal = (
            named[name] if name in named else args[place]
            for place, name in (self.skip, self.signal)
        )
        return skip, signal

    def replaced(
        self, args: tuple[Any, ...], named: dict[str, Any], skip: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with another skip."""
        place, name = self.skip
        if name in named:
            return args, {**named, name: skip}
        return (*args[:place], skip, *args[place + 1 :]), named


@dataclass(frozen=True)
class GatedConnection:
    """A hook after a call of a `SkipConnection`, which gates the skip in its output."""

    half: Half

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        skip, below = self.half.parted(output)
        return self.half.joined(getattr(module, GATE).let_through(skip, below), below)


class KeptSignal:
    """A hook before a transposed convolution, which stores its input as the gate's signal."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        getattr(module, SIGNAL).value = args[0]


class ForgottenSignals:
    """A hook after a network, which forgets its signals. Several gates may read one signal."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for part in module.modules():
            if isinstance(part, LatestSignal):
                part.value = None


@dataclass(frozen=True)
class GatedConcatenation:
    """A hook before convolutions of upsampled features and a skip, which gates the skip."""

    half: Half

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        skip, upsampled = self.half.parted(args[0])
        gate_of_skip = getattr(module, GATE)
        holder = getattr(module, SIGNAL, None)
        signal = _averaged(upsampled, gate_of_skip.stride) if holder is None else holder.value
        if signal is None:
            raise ModelError(
                "a gate expected the coarse features of this run, found none, as if the "
                "concatenation alone were computed again; checkpoint it together with the "
                "upsampling, or not at all"
            )
        gated = gate_of_skip.let_through(skip, signal)
        return (self.half.joined(gated, upsampled), *args[1:])


def _averaged(upsampled: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Means over the coarse cells. If the nearest was taken, these are the coarse features."""
    return AVERAGE_POOLING[len(stride)](upsampled, stride)
