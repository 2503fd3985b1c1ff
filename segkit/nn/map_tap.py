"""The one seam through which every attention map passes.

Each attention module sends its map through a `MapTap` that has no parameters: `sink` records the
map, `edit` replaces it, and with both unset the tap returns what it was given. Recording, gate
ablation and export use nothing else. Forward hooks would not do: one that is added after
`torch.compile` never fires.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from segkit.geometry.grid import Placement

MapKind = Literal["gate", "channel", "spatial", "received", "pool", "branch"]
"""What a tap carries:

- gate: how much of each skip voxel to let through; spatial: the same for a block's own features.
- channel: how much each channel counts.
- pool: the share that each voxel has in a weighted mean.
- received: of a matrix of attention, what each voxel receives, as a multiple of its fair share.
- branch: a switch per head of attention that is added, 1 unless edited. It is no map.
"""
Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MapInfo:
    """What a recorded map is and where its cells lie."""

    key: str
    """Position and name, such as 'skip.2/gate'."""
    kind: MapKind
    level: int
    placement: Placement | None
    """In voxels of the network's input; None for a vector over channels, which lies nowhere."""
    lowest: float
    highest: float
    """Infinite for maps whose mean is 1."""


class MapTap(nn.Module):
    """Returns the map it is given, recorded into `sink` and changed by `edit` where these are set.

    Args:
        kind: of the map.
        stride: the step between the map's cells in cells of the feature map that its module
            attends to: a gate that works on the next coarser grid has the stride to that grid.
        lowest, highest: what the map's values lie between.
        window: cells of the windows within which attention is paid, where it is not paid to all.
        shift: cells along each axis by which the windows are moved towards the far end, if at all.
        mean: whether only the mean over channels is recorded, where a map has as many channels as
            the features.
        magnitude: whether only the mean over channels of absolute values is recorded, if a map may
            be negative.
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
        """Name the map after its position, and place it given where the features lie."""
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
        """The map, which the caller multiplies with."""
        if self.edit is not None:
            attention_map = self.edit(attention_map)
        self.record(attention_map)
        return attention_map

    def record(self, attention_map: Float[Tensor, "batch channel *cells"]) -> None:
        """Put a map into the sink, if there is one."""
        if self.sink is not None:
            assert self.info is not None, "the network places its taps when it is built"
            kept = attention_map.detach().float()
            if self.magnitude:
                kept = kept.abs()
            averaged = self.mean or self.magnitude
            self.sink[self.info.key] = kept.mean(dim=1, keepdim=True) if averaged else kept


class Stage(nn.Sequential):
    """Blocks of attention one after another; each is a position of its own, 'bottleneck.0', …"""


class PassThrough(nn.Module):
    """The identity in the place of an attention block, whatever else the block is given."""

    signal = "coarse"

    def forward(self, features: Tensor, *others: object, **settings: object) -> Tensor:
        """The features themselves."""
        return features

    def let_through(self, skip: Tensor, signal: Tensor) -> Tensor:
        """The skip itself."""
        return skip


def place_taps(module: nn.Module, position: str, level: int, features: Placement) -> None:
    """Place every tap inside a module that attends to `features`."""
    if isinstance(module, Stage):
        for number, block in enumerate(module):
            place_taps(block, f"{position}.{number}", level, features)
        return
    for part in module.modules():
        if isinstance(part, MapTap):
            part.place(position, level, features)


def taps(network: nn.Module) -> dict[str, MapTap]:
    """Every placed tap of a network by its key, switches included."""
    return {
        module.info.key: module
        for module in network.modules()
        if isinstance(module, MapTap) and module.info is not None
    }


def maps_of(network: nn.Module) -> dict[str, MapInfo]:
    """What each attention map of a network is and where it lies, by key."""
    return {
        key: tap.info
        for key, tap in taps(network).items()
        if tap.info is not None and tap.kind != "branch"
    }


def edited(network: nn.Module) -> bool:
    """Whether any map or switch of a network is being edited, or a block is the identity."""
    return any(
        isinstance(module, PassThrough) or (isinstance(module, MapTap) and module.edit is not None)
        for module in network.modules()
    )


@contextmanager
def recording(
    network: nn.Module, keys: Collection[str] | None = None
) -> Iterator[dict[str, Tensor]]:
    """A dictionary that holds the maps of the latest forward pass, by key, in float32.

    Maps of these keys alone, where some are given: others cost nothing then.
    Recording changes no bit of the output. Nested recordings each get their own dictionary; the
    outer one resumes when the inner one ends.
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
    """Within it, the map of each key in `edits` is replaced by what its function makes of it.

    Raises KeyError for a key that the network does not have.
    """
    known = taps(network)
    if unknown := sorted(set(edits) - set(known)):
        raise KeyError(f"no map {unknown}; this network has {sorted(known)}")
    before = {key: known[key].edit for key in edits}
    for key, edit in edits.items():
        known[key].edit = edit
    try:
        yield
    finally:
        for key, previous in before.items():
            known[key].edit = previous
