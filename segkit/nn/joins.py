"""Joins: the modules in which the skips of any network join its decoder.

Three forms of such modules are known:

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from segkit.geometry.grid import Placement
from segkit.nn.concatenations import Concatenation, Concatenations, Half, half_of
from segkit.nn.follow import Follower, followed_calls
from segkit.nn.foreign_blocks import is_attention, is_inside
from segkit.nn.gated_skip import GatedArgument
from segkit.nn.running import in_prediction


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
            skip, _ = arguments.values(args, named)
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
