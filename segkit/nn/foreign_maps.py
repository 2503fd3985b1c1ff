"""Attention maps of a network that segkit did not build: named modules get a tap.

`nn.Sigmoid` and `nn.Softmax` over features give their output as a map. A softmax over the keys of
attention, and `nn.MultiheadAttention`, give the attention that each key receives. A hook of the
module sends the map through a tap, which is a part of the module without parameters.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.errors import ModelError
from segkit.geometry.grid import Placement
from segkit.nn.follow import Follower, followed_calls
from segkit.nn.map_tap import MapInfo, MapTap
from segkit.nn.placement_rules import Followed
from segkit.nn.running import in_prediction

TAP = "segkit_tap"
Readable = nn.Sigmoid | nn.Softmax | nn.MultiheadAttention


@dataclass(frozen=True)
class TappedOutput:
    """A hook after a call. The output is a map, which the tap records or replaces."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        tapped: Tensor = getattr(module, TAP)(output)
        return tapped


@dataclass(frozen=True)
class TappedCells:
    """A hook after a call. The output is a map whose cells lie along any axes."""

    axes: tuple[int, ...]
    """The axes of the cells; a single one if they are tokens."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        tap, last = getattr(module, TAP), tuple(range(-len(self.axes), 0))
        moved = output.movedim(self.axes, last)
        cells = tap.cells_of(moved.shape[-1]) if len(last) == 1 else moved.shape[-len(last) :]
        tapped: Tensor = tap(moved.reshape(len(output), -1, *cells))
        return tapped.reshape(moved.shape).movedim(last, self.axes)


@dataclass(frozen=True)
class TappedVector:
    """A hook after a call. The output is a map with a value for each channel."""

    spatial_dims: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        shape = (*output.shape[:2], *[1] * self.spatial_dims)
        tapped: Tensor = getattr(module, TAP)(output.reshape(shape))
        return tapped.reshape(output.shape)


@dataclass(frozen=True)
class TappedKeys:
    """A hook after a call of a softmax over keys. The tap records how much each key receives."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        tap = getattr(module, TAP)
        if tap.sink is not None:
            heads = output.reshape(len(output), -1, *output.shape[-2:])  # one, if it has no axis
            tap.record(_received(heads, tap.cells_of(output.shape[-1])))


@dataclass(frozen=True)
class TappedHeads:
    """A hook after a call of `nn.MultiheadAttention`. It computes the weights again for the tap.

    The output of the call does not change.
    """

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: object
    ) -> None:
        tap = getattr(module, TAP)
        if tap.sink is not None:
            weights = head_weights(module, args, named)
            tap.record(_received(weights, tap.cells_of(weights.shape[-1])))


class ForeignTap(MapTap):
    """A tap that knows the grid of tokens, such as the keys of attention."""

    def __init__(self, kind: Any, *, shares: tuple[int, ...] = (), highest: float = 1.0) -> None:
        super().__init__(kind, highest=highest)
        self.shares = shares
        """The cells of the tokens' grid along each axis, in the run that placed the tap."""

    def cells_of(self, num_tokens: int) -> tuple[int, ...]:
        """The grid of the tokens, which must be `num_tokens` in number. Raises ModelError."""
        placed = math.prod(self.shares)
        if num_tokens != placed:
            assert self.info is not None
            tokens = "keys" if self.info.kind == "received" else "tokens"
            raise ModelError(
                f"{self.info.key}: has positions for {placed} {tokens}, found {num_tokens} "
                f"{tokens}; record it with an image of the size of the network's windows"
            )
        return self.shares


@dataclass(frozen=True)
class Seen:
    """One run of a module: the shape of its map, and the positions of its cells."""

    shape: tuple[int, ...]
    followed: Followed | None
    """Positions of the cells of the output; None for multi-head attention."""
    keys: Followed | None
    """Positions of the keys of attention."""


def record(
    network: nn.Module,
    image: Float[Tensor, "batch channel *space"],
    modules: Sequence[str],
    *,
    placements: Mapping[str, Placement] | None = None,
) -> dict[str, MapInfo]:
    """Record attention maps of a network that segkit did not build, by the names of its modules.

    The network then has maps like segkit's own networks: `Predictor(…)(scan, maps=True)` returns
    each on its own grid with world coordinates, and `explain_volume` measures it. Weights and
    output do not change. A map of the kind `spatial` can also be edited (`judge_gates`).

    - `nn.Sigmoid` or `nn.Softmax` over features: the output is the map, with a value for each cell
      ('name/spatial') or for each channel ('name/channel'). Cells may be tokens, or come before the
      channels.
    - `nn.Softmax` of attention, (batch, heads, queries, keys), and `nn.MultiheadAttention`: the map
      is the attention that each key receives from all queries, for each head; 1 is an equal share
      ('name/received'). Attention (batch, queries, keys) has one head. `nn.MultiheadAttention`
      computes its weights a second time while maps are recorded.

    Args:
        network: any network. Call this before it is compiled.
        image: an input, (batch, channel, *space), of the size of the windows in prediction; the
            network runs once.
        modules: names of such modules, as in `network.named_modules()`.
        placements: positions of the cells of a map, in voxels of the input, by the module's name;
            only for cells that cannot be followed through the layers.

    Returns:
        Kind and position of each map, by its key.

    Raises:
        ModelError: if a module is missing, of another kind, recorded already, not called or called
            several times; if fused attention replaces it; or if its cells cannot be followed from
            the input.

    Example:
        gates = ["model.1.attention.psi.2", "model.1.submodule.1.attention.psi.2"]
        segkit.record(attention_unet, torch.zeros(1, 1, 64, 64, 64), gates)
    """
    known = dict(network.named_modules())
    if missing := [name for name in modules if name not in known]:
        raise ModelError(
            f"expected names of modules, found {', '.join(missing)}; choose from the names that "
            "print(dict(network.named_modules())) shows"
        )
    seen: dict[str, list[Seen]] = {}

    def watch(
        name: str, args: tuple[Any, ...], named: Mapping[str, Any], output: Any, follower: Follower
    ) -> None:
        module = known[name]
        if isinstance(module, nn.MultiheadAttention):
            shape = tuple(head_weights(module, args, named).shape)
            key = named.get("key", args[1] if len(args) > 1 else None)
            seen.setdefault(name, []).append(Seen(shape, None, follower.of(key)))
        elif isinstance(output, Tensor):
            found = Seen(tuple(output.shape), follower.of(output), follower.keys_of(output))
            seen.setdefault(name, []).append(found)

    with in_prediction(network):
        follower = followed_calls(network, image, {name: known[name] for name in modules}, watch)
    for name in modules:
        _check(name, known[name], seen.get(name, []), follower.fused)
    taps = []
    for name in modules:
        made = _made(name, known[name], seen[name][0], image, placements or {})
        taps.append((known[name], *made))
    for module, tap, hook in taps:
        module.add_module(TAP, tap)
        module.register_forward_hook(hook, with_kwargs=isinstance(hook, TappedHeads))
    infos = [tap.info for _, tap, _ in taps]
    return {info.key: info for info in infos if info is not None}


def _check(name: str, module: nn.Module, seen: Sequence[Seen], fused: set[str]) -> None:
    """Raise ModelError if the maps of a module cannot be recorded.

    Args:
        name: name of the module.
        module: the module.
        seen: the runs of the module.
        fused: names of the modules that computed fused attention.
    """
    kind = type(module).__name__
    if not isinstance(module, Readable):
        if name in fused:
            raise ModelError(
                f"{name}: {kind} computes fused attention (scaled_dot_product_attention), which "
                f"gives no weights; build the network without it (in MONAI "
                f"use_flash_attention=False) and name its nn.Softmax"
            )
        raise ModelError(
            f"{name}: expected an nn.Softmax, an nn.Sigmoid or an nn.MultiheadAttention, found a "
            f"{kind}; choose such a module"
        )
    if hasattr(module, TAP):
        raise ModelError(f"{name}: is recorded already; list each module only once")
    if not seen:
        parent = name.rpartition(".")[0]
        why = (
            f"{parent} computes fused attention (scaled_dot_product_attention) instead; build the "
            f"network without it (in MONAI use_flash_attention=False)"
            if parent in fused
            else "name a module that the network runs"
        )
        raise ModelError(f"{name}: this {kind} is not called when the network runs; {why}")
    if len(seen) > 1:
        raise ModelError(
            f"{name}: this {kind} is called {len(seen)} times in one run, so its maps cannot be "
            "told apart; use a separate module for each call"
        )


def _made(
    name: str,
    module: nn.Module,
    seen: Seen,
    image: Tensor,
    placements: Mapping[str, Placement],
) -> tuple[ForeignTap, Callable[..., Any]]:
    """The tap of a module, with its position, and the hook that sends maps to it.

    Args:
        name: name of the module.
        module: the module.
        seen: its run.
        image: the input of the network.
        placements: positions that the user gives, by the name of the module.
    """
    shape, space = seen.shape, image.ndim - 2
    attention = isinstance(module, nn.MultiheadAttention) or (
        isinstance(module, nn.Softmax)
        and module.dim in (-1, len(shape) - 1)
        and (len(shape) == 4 or len(shape) == 3)
        and not (seen.followed is not None and not seen.followed.tokens)
        and not _one_map(seen)
    )
    if attention:
        if shape[0] != image.shape[0]:
            raise ModelError(
                f"{name}: expected attention of shape (batch, heads, queries, keys) or (batch, "
                f"queries, keys) with a batch of {image.shape[0]}, found {shape}; choose another "
                "module, because attention in windows, or with its heads in the batch axis, has no "
                "known position in the image"
            )
        if len(shape) == 3 and not _one_head(seen):
            raise ModelError(
                f"{name}: expected attention (batch, queries, keys) whose queries are the cells of "
                f"one grid, found {shape}, whose axis 1 has other values, such as channels; choose "
                "another module"
            )
        placement = placements.get(name, seen.keys.placement if seen.keys is not None else None)
        cells = seen.keys.cells if seen.keys is not None else _cells(placement, image)
        if placement is None or math.prod(cells) != shape[-1]:
            raise ModelError(
                f"{name}: the positions of its {shape[-1]} keys in the input cannot be found; if "
                f"each key is a cell of one grid, give placements={{{name!r}: "
                "segkit.Placement(stride, offset)} in voxels of the input, else choose another "
                "module"
            )
        tap = ForeignTap("received", shares=cells, highest=math.inf)
        tap.place(name, _level(placement), placement)
        hooks: Callable[..., Any] = (
            TappedHeads() if isinstance(module, nn.MultiheadAttention) else TappedKeys()
        )
        return tap, hooks
    grid = tuple(range(2, space + 2))
    followed = seen.followed if _has_cells(seen) else None
    axes = grid if followed is None else followed.axes
    vector = len(shape) == 2 or (len(shape) == space + 2 and math.prod(shape[2:]) == 1 < shape[1])
    if vector and 1 not in axes and shape[0] == len(image):
        tap = ForeignTap("channel")
        tap.place(name, 0, Placement.identity(space))
        return tap, TappedVector(space)
    placement = placements.get(name, followed.placement if followed is not None else None)
    if placement is None and len(shape) == space + 2:
        raise ModelError(
            f"{name}: the positions of its output's cells {shape} in the input cannot be found; if "
            f"the output is (batch, channel, *cells), give placements={{{name!r}: "
            "segkit.Placement(stride, offset)} in voxels of the input"
        )
    if placement is None or (axes == grid and len(shape) != space + 2):
        raise ModelError(
            f"{name}: expected a map of cells, a vector (batch, channel), or attention (batch, "
            f"heads, queries, keys), found an output {shape} whose axes cannot be told, such as "
            "weights of branches; choose another module"
        )
    tap = ForeignTap(
        "spatial", shares=followed.cells if followed is not None and followed.tokens else ()
    )
    tap.place(name, _level(placement), placement)
    return tap, TappedOutput() if axes == grid else TappedCells(axes)


def _has_cells(seen: Seen) -> bool:
    """Whether an output has axes of batch and cells, and at most one other, for channels."""
    followed = seen.followed
    return (
        followed is not None
        and followed.keys is None
        and 0 not in followed.axes
        and len(seen.shape) - len(followed.axes) in (1, 2)
    )


def _one_map(seen: Seen) -> bool:
    """Whether an output is one map of all tokens, (batch, 1, tokens), and not attention."""
    followed = seen.followed
    return followed is not None and followed.axes == (2,) and seen.shape[1:2] == (1,)


def _one_head(seen: Seen) -> bool:
    """Whether an output of three axes may be attention: axis 1 has the cells of the queries.

    If nothing in it could be followed, it must have as many queries as keys.
    """
    if seen.followed is None:
        return seen.shape[1] == seen.shape[2]
    return seen.followed.axes == (1,)


def _cells(placement: Placement | None, image: Tensor) -> tuple[int, ...]:
    """The cells of a grid over the whole image, along each axis; none without a placement."""
    if placement is None:
        return ()
    return tuple(
        round(size / step) for size, step in zip(image.shape[2:], placement.stride, strict=True)
    )


def _level(placement: Placement) -> int:
    return max(0, round(math.log2(max(placement.stride))))


def _received(weights: Float[Tensor, "batch heads queries keys"], cells: tuple[int, ...]) -> Tensor:
    """The attention that each key receives from all queries: (batch, heads, *cells).

    1 is an equal share.
    """
    received = weights.detach().float().mean(dim=2) * weights.shape[-1]
    return received.reshape(*received.shape[:2], *cells)


def head_weights(
    module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]
) -> Float[Tensor, "batch heads queries keys"]:
    """The weights of a call of `nn.MultiheadAttention`, for each head."""
    bound = inspect.signature(module.forward).bind(*args, **named)
    bound.arguments.update(need_weights=True, average_attn_weights=False)
    with torch.no_grad():
        _, weights = module.forward(*bound.args, **bound.kwargs)
    found: Tensor = weights
    return found
