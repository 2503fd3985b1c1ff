"""Oktay's attention gates in the skips of a network that segkit did not build.

A gate becomes a part of the module in which a skip joins the decoder, with the name `segkit_gate`.
A hook of that module sends the skip through the gate. So the network keeps its code, its weights
and their names. Three forms of such modules, called joins, are known:

- a module that is called with coarse features and a skip: MONAI's DynUNet, BasicUNet, UNETR and
  SwinUNETR, the decoder blocks of segmentation_models_pytorch;
- MONAI's `SkipConnection`, in its UNet: the skip and the features from below, on one grid;
- a module that is called with a concatenation of upsampled features and a skip, as in nnU-Net's and
  in `self.conv(torch.cat([self.up(x), skip], dim=1))`. `up` may also be a call of `interpolate`.

In the last two, the skip may be the first or the last of the channels: their values tell it.
"""

import inspect
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.errors import ModelError
from segkit.geometry.grid import Placement
from segkit.nn.blocks import CONV_FUNCTION
from segkit.nn.concatenations import Concatenation, Concatenations, Half, half_of
from segkit.nn.follow import Follower, followed_calls
from segkit.nn.foreign_blocks import is_attention, is_inside
from segkit.nn.gates import AdditiveGridGate
from segkit.nn.map_tap import MapTap
from segkit.nn.running import in_prediction

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


@dataclass(frozen=True)
class GatedArgument:
    """A hook before a call, which gates the skip. `skip` and `signal` are position and name of
    arguments."""

    skip: tuple[int, str]
    signal: tuple[int, str]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (place, name), (other, label) = self.skip, self.signal
        skip = named[name] if name in named else args[place]
        signal = named[label] if label in named else args[other]
        return self.replaced(args, named, getattr(module, GATE).let_through(skip, signal))

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
        gated = gate_of_skip.let_through(skip, signal)
        return (self.half.joined(gated, upsampled), *args[1:])


def _averaged(upsampled: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Means over the coarse cells. If the nearest was taken, these are the coarse features."""
    return AVERAGE_POOLING[len(stride)](upsampled, stride)


@dataclass(frozen=True)
class FoundJoin:
    """A join: the module in which a skip joins the decoder."""

    module: str
    form: Literal["arguments", "connection", "concatenation"]
    skip_channels: int
    signal_channels: int
    cells: tuple[int, ...]
    """Number of cells of the skip along each axis."""
    coarse: tuple[int, ...]
    """Number of cells of the signal along each axis."""
    placement: Placement | None
    """Placement of the skip; None if it could not be followed."""
    arguments: GatedArgument | None = None
    half: Half | None = None
    """The channels of the skip, if the form is a connection or a concatenation."""
    before: str = ""
    """Name of the module that upsampled the coarse features, if the form is a concatenation. If it
    is empty, the gating signal is the mean of the upsampled features over the coarse cells."""
    calls: int = 1
    """Number of calls in one run."""


def gate(
    network: nn.Module,
    image: Float[Tensor, "batch channel *space"],
    *,
    skips: Collection[str] | None = None,
    placements: Mapping[str, Placement] | None = None,
) -> dict[str, str]:
    """Put attention gates (Oktay et al. 2018) into the skips of a network of another library.

    The network gets new modules, but its output does not change: gates start exactly open, with a
    map of 1. In training, values of the map stay between 0 and 1.0625. The gating signal is the
    coarser features of the decoder. The weights of the network keep their values and names. Each
    gate is a part of the module in which its skip joins the decoder, `….segkit_gate`. Its map
    passes a tap, so `Predictor`, `explain_volume` and `judge_gates` find it by its key,
    'skip.1/gate', as in segkit's own networks. Call this before the network is compiled, exported,
    trained, or loaded with the weights of a gated network.

    Args:
        network: MONAI's DynUNet, BasicUNet, UNet, UNETR or SwinUNETR, a U-Net of
            segmentation_models_pytorch, nnU-Net's PlainConvUNet or ResidualEncoderUNet, or another
            network whose skips join the decoder in one of these forms, such as
            `self.conv(torch.cat([self.up(x), skip], dim=1))`.
        image: an input, (batch, channel, *space), whose sizes are multiples of the network's
            strides. The network runs twice, on noise of this shape.
        skips: names (`named_modules`) of the modules in which skips join the decoder. If None, all
            but those of the finest level, as in the paper; all if there is no other level.
        placements: positions of the features of skips, in voxels of the input, by the name of the
            module; only for features that cannot be followed through the layers.

    Returns:
        Names of the gated modules by the position of their gate, 'skip.1', the finest first.

    Raises:
        ModelError: if no skip joins the decoder in such a form, `skips` has an unknown name, the
            size of a skip is not a multiple of the coarser size, a module joins several skips or
            is an nn.Sequential, or a skip cannot be followed from the input, so that its map would
            have no position.

    Example:
        network = monai.networks.nets.BasicUNet(spatial_dims=3, out_channels=2)
        segkit.gate(network, torch.zeros(1, 1, 32, 32, 32))  # {'skip.1': 'upcat_2', …}
        run = segkit.train(config, network=network)
    """
    joins = find_joins(network, image)
    names = [join.module for join in joins]
    if not joins:
        raise ModelError(
            f"{type(network).__name__}: found no skip connection to gate; expected a module that "
            "is called with coarse features and a skip, or with the concatenation of a skip and of "
            "upsampled features, or MONAI's SkipConnection (by concatenation)"
        )
    coarser = [join.module for join in joins if join.cells != joins[0].cells]
    wanted = (coarser or names) if skips is None else list(skips)
    if unknown := sorted(set(wanted) - set(names)):
        raise ModelError(
            f"skips: expected names of skip connections ({', '.join(names)}), found "
            f"{', '.join(unknown)}; correct the names"
        )
    gated: dict[str, str] = {}
    made = []
    for level, join in enumerate(joins):
        if join.module in wanted:
            made.append((level, join, _made(network, join, level, placements or {})))
            gated[f"skip.{level}"] = join.module
    # Only after all checks, so that a network that cannot be gated does not change.
    for _, join, gate_of_join in made:
        _put(network, join, gate_of_join)
    if any(join.before for _, join, _ in made):
        network.register_forward_hook(ForgottenSignals())
    return gated


def find_joins(network: nn.Module, image: Tensor) -> list[FoundJoin]:
    """The modules in which skips join the decoder, that of the finest skip first."""
    found: dict[str, FoundJoin] = {}
    calls: Counter[str] = Counter()
    modules = dict(network.named_modules())
    concatenations = Concatenations(modules, image.ndim)
    # Values of noise tell features apart; an image of zeros might not.
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).to(image)

    def watch(
        name: str, args: tuple[Any, ...], named: Mapping[str, Any], output: Any, follower: Follower
    ) -> None:
        if is_attention(modules[name]):  # a gate of segkit's, or the network's own
            return
        concatenations.watch(name, args, output, follower)
        if type(modules[name]).__name__ == "SkipConnection":
            join = _connected(name, args, output, follower)
        else:
            join = _called(name, modules[name], args, named, output, follower, noise.ndim)
        if join is not None:
            calls[name] += 1
            found.setdefault(name, join)

    with in_prediction(network):
        followed_calls(network, noise, modules, watch)
    # If joins are nested, only the innermost counts: it calls the layers.
    inner = [
        replace(join, calls=calls[name])
        for name, join in found.items()
        if join.form != "arguments" or not any(is_inside(other, name) for other in found)
    ]
    used = _using_skips(network, noise, inner)
    concatenated = concatenations.found(within={join.module for join in inner})
    times = Counter(one.module for one in concatenated)
    used += [
        replace(_concatenated(one), calls=times[one.module])
        for one in reversed({one.module: one for one in reversed(concatenated)}.values())
    ]
    return sorted(used, key=lambda join: -math.prod(join.cells))


def _using_skips(network: nn.Module, image: Tensor, joins: Sequence[FoundJoin]) -> list[FoundJoin]:
    """The joins whose output changes if the skip is 0; others use only the size of the argument."""
    unused = {join.module for join in joins if join.arguments is not None}
    handles = []
    for join in joins:
        if join.arguments is None:
            continue

        def compare(
            module: nn.Module,
            args: tuple[Any, ...],
            named: dict[str, Any],
            output: Tensor,
            name: str = join.module,
            arguments: GatedArgument = join.arguments,
        ) -> None:
            place, label = arguments.skip
            skip = named[label] if label in named else args[place]
            args, named = arguments.replaced(args, named, torch.zeros_like(skip))
            if not torch.equal(module.forward(*args, **named), output):
                unused.discard(name)

        module = network.get_submodule(join.module)
        handles.append(module.register_forward_hook(compare, with_kwargs=True))
    try:
        with in_prediction(network):
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    return [join for join in joins if join.module not in unused]


def _concatenated(one: Concatenation) -> FoundJoin:
    """The join of upsampled features and a skip."""
    return FoundJoin(
        one.module,
        "concatenation",
        one.half.channels,
        one.coarse.shape[1] if one.before else one.both.shape[1] - one.half.channels,
        tuple(one.both.shape[2:]),
        tuple(one.coarse.shape[2:]),
        one.followed.placement if one.followed is not None else None,
        half=one.half,
        before=one.before,
    )


def _connected(
    name: str, args: tuple[Any, ...], output: Any, follower: Follower
) -> FoundJoin | None:
    """The join of a `SkipConnection`, from its call; None if it does not concatenate."""
    skip = args[0]
    half = half_of(skip, output) if isinstance(output, Tensor) else None
    if half is None:
        return None
    followed = follower.of(skip)
    cells = tuple(skip.shape[2:])
    place = followed.placement if followed is not None else None
    below = output.shape[1] - half.channels
    return FoundJoin(name, "connection", half.channels, below, cells, cells, place, half=half)


def _called(
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    named: Mapping[str, Any],
    output: Any,
    follower: Follower,
    ndim: int,
) -> FoundJoin | None:
    """The join of a module that is called with coarse features and a skip, or None."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **named).arguments
    except (TypeError, ValueError):  # a module without a signature cannot be a join
        return None
    given = [
        (place, label, value)
        for place, (label, value) in enumerate(bound.items())
        if isinstance(value, Tensor) and value.ndim == ndim
    ]
    if len(given) != 2 or not isinstance(output, Tensor):
        return None
    coarse, skip = sorted(given, key=lambda each: math.prod(each[2].shape[2:]))
    if coarse[2].shape[2:] == skip[2].shape[2:] or output.shape[2:] != skip[2].shape[2:]:
        return None
    followed = follower.of(skip[2])
    return FoundJoin(
        name,
        "arguments",
        skip[2].shape[1],
        coarse[2].shape[1],
        tuple(skip[2].shape[2:]),
        tuple(coarse[2].shape[2:]),
        followed.placement if followed is not None and not followed.tokens else None,
        GatedArgument(skip[:2], coarse[:2]),
    )


def _made(
    network: nn.Module, join: FoundJoin, level: int, placements: Mapping[str, Placement]
) -> OpenGate:
    """The gate of a join, with its tap placed.

    Args:
        network: the network.
        join: the join.
        level: level of the skip; 0 is the finest.
        placements: positions that the user gives, by the name of the module.
    """
    if hasattr(network.get_submodule(join.module), GATE):
        raise ModelError(
            f"{join.module}: has a segkit gate already; add gates to a network only once"
        )
    if isinstance(network.get_submodule(join.module), nn.Sequential):
        raise ModelError(
            f"{join.module}: expected a module with a forward of its own, found an nn.Sequential, "
            "which would call the gate as a layer; put it into such a module"
        )
    if join.calls > 1:
        raise ModelError(
            f"{join.module}: joins {join.calls} skips in one run, so they would share a gate; use "
            "a separate module for each, or leave it out of skips"
        )
    if any(fine % coarse for fine, coarse in zip(join.cells, join.coarse, strict=True)):
        raise ModelError(
            f"{join.module}: the skip has {join.cells} cells, which is not a multiple of the "
            f"{join.coarse} cells of the level below; give an image whose size is a multiple of "
            "the network's strides"
        )
    placement = placements.get(join.module, join.placement)
    if placement is None:
        raise ModelError(
            f"{join.module}: the position of this skip's features in the input cannot be found; "
            f"leave it out of skips, or give placements={{{join.module!r}: "
            "segkit.Placement(stride, offset)} in voxels of the input"
        )
    stride = [fine // coarse for fine, coarse in zip(join.cells, join.coarse, strict=True)]
    made = OpenGate(
        len(join.cells),
        skip_channels=join.skip_channels,
        signal_channels=join.signal_channels,
        stride=stride,
    )
    made.tap.place(f"skip.{level}", level, placement)
    weight = next(network.parameters())
    return made.to(weight.device, weight.dtype).train(network.training)


def _put(network: nn.Module, join: FoundJoin, made: OpenGate) -> None:
    """Make a gate a part of its module, and send the skip through it."""
    module = network.get_submodule(join.module)
    module.add_module(GATE, made)
    match join.form:
        case "arguments":
            assert join.arguments is not None
            module.register_forward_pre_hook(join.arguments, with_kwargs=True)
        case "connection":
            assert join.half is not None
            module.register_forward_hook(GatedConnection(join.half))
        case "concatenation":
            assert join.half is not None
            if join.before:
                before = network.get_submodule(join.before)
                holder = getattr(before, SIGNAL, None)  # of another level, if they share a module
                if holder is None:
                    holder = LatestSignal()
                    before.add_module(SIGNAL, holder)
                    before.register_forward_pre_hook(KeptSignal())
                module.add_module(SIGNAL, holder)
            module.register_forward_pre_hook(GatedConcatenation(join.half))
