"""Taps: every attention map passes one, so that it can be recorded or changed there.

Each attention module sends its map through a `MapTap`, which has no parameters. If `sink` is set,
the tap records the map there; if `edit` is set, the tap replaces the map by `edit(map)`. Otherwise
it returns the map unchanged. Recording, ablation of gates and export use only taps. Forward hooks
would not work: PyTorch ignores a hook that is added after `torch.compile`.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from segkit.geometry.grid import Placement

MapKind = Literal["gate", "channel", "spatial", "received", "pool", "branch", "attribution"]
"""Kinds of values that pass a tap:

- gate: how much of each skip voxel to let through.
- spatial: the same for the voxels of a block's own features.
- channel: a weight for each channel.
- pool: the weight of each voxel in a weighted mean; they sum to 1.
- received: the attention that each voxel receives from all queries; 1 is an equal share.
- branch: a switch for each head of attention that is added to features. It is 1 unless edited, and
  is not a map.
- attribution: passes no tap. It is the part of a voxel in an output (`segkit.attribute`).
"""
Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MapInfo:
    """Kind, level, position and range of a recorded map."""

    key: str
    """Position in the network and kind, such as 'skip.2/gate'."""
    kind: MapKind
    level: int
    placement: Placement | None
    """Position of the cells, in voxels of the network's input. None for a map over channels, which
    has no position."""
    lowest: float
    highest: float
    """Infinite if the map's mean is 1."""


class MapTap(nn.Module):
    """Returns its input, a map. `edit` changes the map and `sink` records it, if these are set.

    Args:
        kind: kind of the map.
        stride: the step between the map's cells, in cells of the features that its module attends
            to; 1 if not given. A gate that works on the next coarser grid has the stride to that
            grid.
        lowest, highest: limits of the map's values.
        window: size in cells of the windows within which attention is computed; None if it is
            computed over the whole grid.
        shift: cells by which the windows are shifted along each axis; 0 if not given.
        mean: record only the mean over channels, for a map with as many channels as the features.
        magnitude: record only the mean absolute value over channels, for a map that may be
            negative.
    """

    def __init__(
        self,
        kind: MapKind,
        *,
        stride: tuple[int, ...] | None = None,
        lowest: float = 0.0,
        highest: float = 1.0,
        window: tuple[int, ...] | None = None,
        shift: tuple[int, ...] | None = None,
        mean: bool = False,
        magnitude: bool = False,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.stride = stride
        self.lowest = lowest
        self.highest = highest
        self.window = window
        self.shift = shift
        self.mean = mean
        self.magnitude = magnitude
        self.info: MapInfo | None = None
        self.sink: dict[str, Tensor] | None = None
        self.edit: Edit | None = None

    def place(self, position: str, level: int, features: Placement) -> None:
        """Set the map's key and placement.

        Args:
            position: position of the module in the network, such as "skip.2".
            level: level of the features; 0 is the finest.
            features: placement of the features that the module attends to.
        """
        placement = None
        if self.kind not in ("channel", "branch"):
            step = self.stride or (1,) * len(features.stride)
            placement = features.through(kernel=step, stride=step, padding=(0,) * len(step))
        self.info = MapInfo(
            f"{position}/{self.kind}", self.kind, level, placement, self.lowest, self.highest
        )

    def forward(
        self, attention_map: Float[Tensor, "batch channel *cells"]
    ) -> Float[Tensor, "batch channel *cells"]:
        """The map, by which the caller multiplies."""
        if self.edit is not None:
            attention_map = self.edit(attention_map)
        self.record(attention_map)
        return attention_map

    def record(self, attention_map: Float[Tensor, "batch channel *cells"]) -> None:
        """Record a map, if there is a sink."""
        if self.sink is not None:
            assert self.info is not None, "the network places its taps when it is built"
            kept = attention_map.detach().float()
            if self.magnitude:
                kept = kept.abs()
            averaged = self.mean or self.magnitude
            self.sink[self.info.key] = kept.mean(dim=1, keepdim=True) if averaged else kept


class Stage(nn.Sequential):
    """Blocks of attention one after another; each has its own position, 'bottleneck.0', …"""


def _itself(features: Tensor) -> Tensor:
    return features


class PassThrough:
    """Replaces the `forward` of an attention block by the identity, which ignores other arguments.

    Args:
        module: the block. It stays where it is, so it is replaced in every place that calls it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.place, self.argument = features_argument(module)
        self.forward = module.forward
        self.own_let_through = getattr(module, "let_through", None)
        self.unchanged: Callable[[Tensor], Any] = _itself
        """Gives the output that leaves features unchanged: themselves, or 0 for a branch."""
        self.asleep = False
        """Whether the block computes as it did."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        """The output that leaves the features unchanged: by default the features themselves."""
        if self.asleep:
            return self.forward(*given, **named)
        features: Tensor = named[self.argument] if self.argument in named else given[self.place]
        return self.unchanged(features)

    def let_through(self, skip: Tensor, signal: Tensor) -> Tensor:
        """The skip itself."""
        if self.asleep and self.own_let_through is not None:
            own: Tensor = self.own_let_through(skip, signal)
            return own
        return skip


def replacement(module: nn.Module) -> PassThrough | None:
    """The identity that replaces a module; None if nothing does."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, PassThrough) else None


@contextmanager
def passing_through(modules: Collection[nn.Module]) -> Iterator[dict[nn.Module, PassThrough]]:
    """Inside `with`, these modules are the identity; then they are restored.

    Yields:
        The identity of each module, also of one that was replaced already.
    """
    identities = {module: replacement(module) or PassThrough(module) for module in modules}
    new = [module for module in identities if replacement(module) is None]
    before = [{name: vars(one)[name] for name in REPLACED if name in vars(one)} for one in new]
    try:
        for module in new:
            identity = identities[module]
            vars(module)["forward"] = identity
            if identity.own_let_through is not None:
                vars(module)["let_through"] = identity.let_through
        yield identities
    finally:
        for module, own in zip(new, before, strict=True):
            for name in REPLACED:
                vars(module).pop(name, None)
            vars(module).update(own)


REPLACED = ("forward", "let_through")
"""The methods of a block that its identity replaces."""


@contextmanager
def computing_again(network: nn.Module) -> Iterator[None]:
    """Inside `with`, blocks that are replaced by the identity compute as they did."""
    found = [one for one in map(replacement, network.modules()) if one is not None]
    before = [one.asleep for one in found]
    for one in found:
        one.asleep = True
    try:
        yield
    finally:
        for one, asleep in zip(found, before, strict=True):
            one.asleep = asleep


def argument_names(module: nn.Module) -> list[str]:
    """Names of the arguments of a module, also while the identity replaces it."""
    identity = replacement(module)
    forward = module.forward if identity is None else identity.forward
    return list(inspect.signature(forward).parameters)


def features_argument(module: nn.Module) -> tuple[int, str]:
    """Position and name of the argument that the identity returns, by the names of arguments.

    It is the argument called `x`, or else the first.
    """
    names = argument_names(module) or [""]
    place = names.index("x") if "x" in names else 0
    return place, names[place]


def place_taps(module: nn.Module, position: str, level: int, features: Placement) -> None:
    """Set key and placement of every tap in a module that attends to `features`.

    Args:
        module: the module of attention.
        position: its position in the network, such as "skip.2".
        level: level of the features; 0 is the finest.
        features: placement of the features that it attends to.
    """
    if isinstance(module, Stage):
        for number, block in enumerate(module):
            place_taps(block, f"{position}.{number}", level, features)
        return
    for part in module.modules():
        if isinstance(part, MapTap):
            part.place(position, level, features)


def taps(network: nn.Module) -> dict[str, MapTap]:
    """All placed taps of a network by key, those of kind `branch` included."""
    return {
        module.info.key: module
        for module in network.modules()
        if isinstance(module, MapTap) and module.info is not None
    }


def maps_of(network: nn.Module) -> dict[str, MapInfo]:
    """Kind and position of each attention map of a network, by key."""
    return {
        key: tap.info
        for key, tap in taps(network).items()
        if tap.info is not None and tap.kind != "branch"
    }


def edited(network: nn.Module) -> bool:
    """True if any tap of a network has an `edit`, or if a block is replaced by the identity."""
    return any(
        replacement(module) is not None or (isinstance(module, MapTap) and module.edit is not None)
        for module in network.modules()
    )


@contextmanager
def recording(
    network: nn.Module, keys: Collection[str] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Record the maps of each forward pass.

        with recording(network) as maps:
            network(image)
        gate = maps["skip.0/gate"]

    Recording changes no bit of the output. Nested recordings each have their own dictionary; the
    outer one continues when the inner one ends.

    Args:
        network: the network, or a module with placed taps.
        keys: the maps to record; all if not given. Maps that are not recorded cost no time.

    Yields:
        The maps of the latest forward pass by key, (batch, channel, *cells) in float32.
    """
    sink: dict[str, Tensor] = {}
    before = {
        tap: tap.sink
        for key, tap in taps(network).items()
        if tap.kind != "branch" and (keys is None or key in keys)
    }
    for tap in before:
        tap.sink = sink
    try:
        yield sink
    finally:
        for tap, previous in before.items():
            tap.sink = previous


@contextmanager
def editing(network: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Within this context, replace the map of each key in `edits` by its function of the map.

        with editing(network, {"skip.0/gate": torch.ones_like}):
            logits = network(image)

    Raises:
        KeyError: the network has no map of such a key.
    """
    known = taps(network)
    if unknown := sorted(set(edits) - set(known)):
        raise KeyError(f"expected keys of {sorted(known)}, found {unknown}; remove these edits")
    before = {key: known[key].edit for key in edits}
    for key, edit in edits.items():
        known[key].edit = edit
    try:
        yield
    finally:
        for key, previous in before.items():
            known[key].edit = previous
