"""From a volume to labels, probabilities and attention maps on the volume's own grid, in one walk.

    volume ─▶ prepared ─▶ windows ─▶ engine ─▶ blended slab ─▶ the volume's rows ─▶ labels
                                        └────▶ maps, each on one coarse grid of its own

A slab of logits is resampled to the volume's grid, a block of classes at a time, reduced to labels
and let go. Post-processing, where a model has it, comes last: a component may span every slab, so
it needs the labels of the whole volume in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from segkit import components
from segkit.build import build_normalisers, interpolation_order, volume_patch
from segkit.data.first_stage import majority, with_labels
from segkit.data.preprocess import Prepared, prepare
from segkit.errors import ModelError, VolumeError
from segkit.geometry import Grid, Orientation
from segkit.inference.engines import LOGITS, PRESENCE, Engine, TorchEngine, choose_device
from segkit.inference.regions import written_regions
from segkit.inference.windows import Slab, slide, stream, window_starts
from segkit.model import Model, load_model
from segkit.nn.planes import SegmentationNetwork
from segkit.nn.taps import MapInfo
from segkit.resample import resample, sample_axis
from segkit.volume import Volume

CLASS_BLOCK = 8
PLANES_PER_WINDOW = 8
WALK_AXIS = 2
"""Slabs advance from foot to head, along which most volumes are stored slowest."""

Track = Callable[[Iterable[Slab], int], Iterable[Slab]]


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """A map of the whole volume: of voxels on `volume`'s own grid, or of channels as a vector."""

    info: MapInfo
    volume: Volume | None
    """Raw values, float32, where the map has a place."""
    seen: Grid
    """The part of the volume, turned to RAS+, that the network saw."""
    channel_mean: Float[ndarray, " channel"] | None = None
    """Where it has none: each channel's mean over windows …"""
    channel_std: Float[ndarray, " channel"] | None = None
    """… and standard deviation."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model makes of a volume."""

    labels: Volume
    """The smallest unsigned type that holds them, after the model's post-processing."""
    probabilities: Volume | None
    """Float16, the classes or regions last; post-processing leaves them as they are."""
    maps: dict[str, AttentionMap]
    presence: dict[str, float] | None = None
    """Of networks with a head for it, the probability that the volume holds any of each class: the
    highest of its windows'."""


class Predictor:
    """Segments volumes with a model.

    Args:
        model: a trained model.
        device: 'auto', 'cpu', 'cuda' or any name that torch knows.
        overlap: share of a window that neighbours have in common.
        batch_size: windows per call of the network.
        precision: of the network's arithmetic; sums over windows are always float32.
    """

    def __init__(
        self,
        model: Model,
        *,
        device: str = "auto",
        overlap: float = 0.5,
        batch_size: int = 1,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.engine: Engine = TorchEngine(
            model.network, device=choose_device(device), precision=precision
        )
        self.layout = window_layout(model.network, volume_patch(model.description), overlap)
        self.batch_size = batch_size
        self.normalisers = build_normalisers(model.description.normalisation)
        self.overlap, self.device, self.precision = overlap, device, precision

    @classmethod
    def load(cls, path: Path | str, *, device: str = "auto", overlap: float = 0.5) -> "Predictor":
        """A predictor from a run or a model folder. Raises ModelError where there is none."""
        return cls(load_model(Path(path)), device=device, overlap=overlap)

    def __call__(
        self,
        volume: Volume,
        *,
        maps: bool = False,
        probabilities: bool = False,
        first_labels: Volume | None = None,
        track: Track = lambda slabs, count: slabs,
    ) -> Prediction:
        """Labels of every voxel of `volume`, and probabilities and attention maps where asked for.

        `first_labels` are those of the first stage where they are known already; a model with one
        finds them itself. `track(slabs, count)` may show progress. Raises ModelError where the
        channels do not fit, VolumeError for voxels that are not numbers.
        """
        prepared = self.prepare(volume, first_labels, track)
        infos = self.model.network.maps() if maps else {}
        vectors = ChannelMoments()
        presence: list[Tensor] = []
        keys = [*infos, *([PRESENCE] if self.model.network.presence is not None else [])]

        def run(windows: Tensor) -> dict[str, Tensor]:
            outputs = self.engine(windows, keys)
            for key, info in infos.items():
                if info.placement is None:
                    vectors.add(key, outputs.pop(key))
            if PRESENCE in outputs:
                presence.append(outputs.pop(PRESENCE).amax(dim=0))
            return outputs

        patch, overlap, multiple = self.layout
        slabs = stream(
            prepared.image,
            run,
            patch_size=patch,
            overlap=overlap,
            multiple=multiple,
            axis=WALK_AXIS,
            batch_size=self.batch_size,
        )
        size = prepared.grid.shape[WALK_AXIS]
        count = len(window_starts(size, patch[WALK_AXIS], overlap[WALK_AXIS], multiple[WALK_AXIS]))
        labelling = self.model.description.labelling
        kind = np.min_scalar_type(max(labelling.numbers.values()))
        labels = np.zeros(volume.grid.shape, kind, order="F")
        shares = (
            np.zeros((*volume.grid.shape, len(labelling.outputs)), np.float16, order="F")
            if probabilities
            else None
        )
        coarse: dict[str, list[Tensor]] = {}

        def logits_of(slabs: Iterable[Slab]) -> Iterator[Tensor]:
            for slab in slabs:
                for key, rows in slab.rows.items():
                    if key != LOGITS:
                        coarse.setdefault(key, []).append(rows.cpu())
                yield slab.rows[LOGITS]

        if shares is not None and labelling.written is None:
            shares[..., 0] = 1  # what the network never sees is background
        turned = prepared.orientation.turn(labels)[prepared.box]
        turned_shares = None if shares is None else prepared.orientation.turn(shares)[prepared.box]
        blended = logits_of(track(slabs, count))
        for first, logits in to_source_rows(blended, prepared, written=labelling.written):
            rows = slice(first, first + logits.count)
            turned[:, :, rows] = logits.labels().cpu().numpy()
            if turned_shares is not None:
                turned_shares[:, :, rows] = logits.probabilities().movedim(0, -1).cpu().numpy()
        adopted = self.model.description.postprocessing
        labels = components.apply(labels, adopted.largest_foreground, adopted.largest_of)
        return Prediction(
            volume.like(labels),
            None if shares is None else volume.like(shares),
            {
                key: vectors.result(info, prepared.source)
                if info.placement is None
                else _placed(info, torch.cat(coarse[key], dim=WALK_AXIS + 1), prepared, volume)
                for key, info in infos.items()
            },
            _present(presence, list(self.model.description.labels)[1:]) if presence else None,
        )

    def prepare(
        self,
        volume: Volume,
        first_labels: Volume | None = None,
        track: Track = lambda slabs, count: slabs,
    ) -> Prepared:
        """The volume as the network sees it. Raises ModelError and VolumeError as a call does."""
        expected = self.model.description.channels
        found = volume.data.shape[3] if volume.data.ndim == 4 else 1
        if found != len(expected):
            raise ModelError(
                f"the model expects {len(expected)} channels ({', '.join(expected)}), the volume "
                f"has {found}; give it the volumes it was trained on"
            )
        if not np.isfinite(volume.data).all():
            raise VolumeError("the volume holds voxels that are not numbers; repair it")
        two_stages = self.model.description.first_stage is not None
        if two_stages and first_labels is None:
            first_labels = majority([stage(volume, track=track).labels for stage in self.first])
        prepared = prepare(
            volume,
            spacing=self.model.description.spacing,
            normalisers=self.normalisers,
            order=interpolation_order(self.model.description),
        )
        return with_labels(prepared, first_labels) if two_stages and first_labels else prepared

    @cached_property
    def first(self) -> "tuple[Predictor, ...]":
        """Predictors of the model's first stage, made when they are first asked for."""
        return tuple(
            Predictor(
                model,
                device=self.device,
                overlap=self.overlap,
                batch_size=self.batch_size,
                precision=self.precision,
            )
            for model in self.model.first
        )


def window_layout(
    network: SegmentationNetwork, patch_size: tuple[int, int, int], overlap: float
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[int, ...]]:
    """Patch, overlap and multiple of windows, per axis of a volume.

    Planes of a 2D network need no overlap; several go into one window.
    """
    patch = tuple(PLANES_PER_WINDOW if size == 1 else size for size in patch_size)
    overlaps = tuple(0.0 if size == 1 else overlap for size in patch_size)
    return patch, overlaps, network.total_stride


def segment_prepared(
    network: SegmentationNetwork,
    image: Float[Tensor, "channel x y z"],
    *,
    patch_size: tuple[int, int, int],
    overlap: float = 0.5,
    written: Sequence[int] | None = None,
) -> Tensor:
    """Labels of a prepared image on its own grid: what validation during training looks at.

    `written` are the numbers of regions, in order; None where outputs are classes.
    """
    device = next(network.parameters()).device
    engine = TorchEngine(network, device=device)
    patch, overlaps, multiple = window_layout(network, patch_size, overlap)
    outputs = slide(
        image,
        lambda windows: engine(windows, ()),
        patch_size=patch,
        overlap=overlaps,
        multiple=multiple,
    )
    if written is not None:
        return written_regions([outputs[LOGITS]], written)
    return outputs[LOGITS].max(dim=0).indices


@dataclass(frozen=True, eq=False)
class SourceRows:
    """Logits of some rows of the volume, still on the network's grid in the plane."""

    logits: Float[Tensor, "classes x y rows"]
    positions: tuple[ndarray, ndarray]
    written: Sequence[int] | None = None
    """The numbers of regions, in order; None where outputs are classes."""

    @property
    def count(self) -> int:
        """How many rows of the volume these are."""
        return self.logits.shape[-1]

    def labels(self) -> Tensor:
        """The class with the largest logit at each voxel; the lowest where they tie.

        Of regions, the number of the last whose probability is above one half.
        """
        if self.written is not None:
            return written_regions(self._blocks(), self.written)
        best = winner = None
        for first in range(0, len(self.logits), CLASS_BLOCK):
            value, index = self._in_plane(first).max(dim=0)
            if best is None or winner is None:
                best, winner = value, index
            else:
                better = value > best
                winner = torch.where(better, index + first, winner)
                best = torch.maximum(value, best)
        assert winner is not None
        return winner

    def probabilities(self) -> Tensor:
        """The softmax of the resampled logits; of regions, the sigmoid."""
        if self.written is not None:
            return torch.cat([block.sigmoid().half() for block in self._blocks()])
        return torch.cat(list(self._blocks())).softmax(dim=0).half()

    def _blocks(self) -> Iterator[Tensor]:
        return (self._in_plane(first) for first in range(0, len(self.logits), CLASS_BLOCK))

    def _in_plane(self, first_class: int) -> Tensor:
        block = self.logits[first_class : first_class + CLASS_BLOCK]
        x, y = self.positions
        return sample_axis(sample_axis(block, x, 1), y, 2)


def to_source_rows(
    slabs: Iterable[Float[Tensor, "classes x y slab_rows"]],
    prepared: Prepared,
    *,
    written: Sequence[int] | None = None,
) -> Iterator[tuple[int, SourceRows]]:
    """The first row and the logits of the rows of the volume that each slab makes known.

    A row between two of the network's is known as soon as both are; until then one row is held.
    """
    x, y, rows = prepared.positions_of_source()
    last = prepared.grid.shape[WALK_AXIS] - 1
    clamped = np.clip(rows, 0, last)
    held: Tensor | None = None
    held_from = done = 0
    for slab in slabs:
        held = slab if held is None else torch.cat([held, slab], dim=-1)
        newest = held_from + held.shape[-1] - 1
        known = int(np.searchsorted(np.ceil(clamped), newest, side="right"))
        if known > done:
            part = sample_axis(held, clamped[done:known] - held_from, WALK_AXIS + 1)
            yield done, SourceRows(part, (x, y), written)
            done = known
        keep_from = min(int(clamped[done]) if done < len(clamped) else newest, newest)
        held = held[..., keep_from - held_from :].clone()
        held_from = keep_from
    assert done == len(clamped), f"{done} of {len(clamped)} rows were predicted"


class ChannelMoments:
    """Mean and standard deviation over windows of maps that are vectors over channels."""

    def __init__(self) -> None:
        self.windows: dict[str, list[Tensor]] = {}

    def add(self, key: str, window_maps: Float[Tensor, "batch channel *ones"]) -> None:
        """Take in the maps of a batch of windows."""
        self.windows.setdefault(key, []).append(window_maps.amax(tuple(range(2, window_maps.ndim))))

    def result(self, info: MapInfo, seen: Grid) -> AttentionMap:
        """The moments of one map."""
        vectors = torch.cat(self.windows[info.key]).double().cpu()
        mean, std = vectors.mean(dim=0), vectors.std(dim=0, correction=0)
        return AttentionMap(info, None, seen, mean.numpy(), std.numpy())


def map_on_source(attention_map: AttentionMap, source: Volume) -> Volume:
    """A placed map, resampled linearly to the grid of the volume it was made of, float32.

    Voxels that the network did not see, beyond the body's box, are 0.
    """
    native = attention_map.volume
    assert native is not None, "a vector over channels lies nowhere"
    orientation = Orientation.of(source.grid.affine)
    seen = attention_map.seen
    cells = torch.from_numpy(native.data.reshape(*native.grid.shape, -1)).movedim(-1, 0)
    values = resample(cells, native.grid.positions_of(seen)).movedim(0, -1).numpy()
    first = orientation.turn_grid(source.grid).index(seen.affine[:3, 3]).round().astype(int)
    box = tuple(slice(low, low + size) for low, size in zip(first, seen.shape, strict=True))
    onto = np.zeros(source.grid.shape + native.data.shape[3:], np.float32, order="F")
    orientation.turn(onto)[box] = values.reshape(*seen.shape, *native.data.shape[3:])
    return source.like(onto)


def _present(windows: list[Tensor], names: list[str]) -> dict[str, float]:
    highest = torch.stack(windows).amax(dim=0).float().sigmoid()
    return dict(zip(names, highest.tolist(), strict=True))


def _placed(info: MapInfo, cells: Tensor, prepared: Prepared, volume: Volume) -> AttentionMap:
    assert info.placement is not None
    shape = cells.shape[1:]
    grid = prepared.grid.placed(shape, info.placement.stride, info.placement.offset)
    # Blending is convex, but for the last digit.
    values = np.asfortranarray(cells.clamp(info.lowest, info.highest).movedim(0, -1).numpy())
    if values.shape[3] == 1:
        values = values[..., 0]
    return AttentionMap(info, volume.on(grid, values), prepared.source)
