"""What one scan tells of each gate channel: everything that the rule asks, and no word yet.

The evidence of a scan is found once; the rule then looks at any number of scans together. Of each
channel of each gate and each structure:

- drops: how far Dice falls if the channel is evened out, with all others as they are, and, if there
  are others, with all others evened out as well (two gates may stand in for each other);
- aurocs: of the channel and of each comparator on the same cells;
- areas: under the curve of deletion in the order of the channel, either way, and of comparators;
- correlations: |ρ| with the same channel of untrained networks.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy import ndarray

from segkit.config.labels import Labelling
from segkit.data.label_numbers import volume_within
from segkit.explain.heads.study import ScoredVolume, check_case, on_one_grid
from segkit.explain.measures.cells import Cells, pictures, seen_part
from segkit.explain.measures.measure_maps import FOREGROUND, HALF, members
from segkit.explain.measures.ranks import Ranked, spearman
from segkit.explain.verdicts.ablation import ablated_maps, class_dice, even_out_channels
from segkit.explain.verdicts.comparators import (
    CellValues3d,
    Sides,
    boxed,
    deleted_comparators,
    image_comparators,
    mean_map,
)
from segkit.explain.verdicts.deletion import (
    FRACTIONS,
    Blocks,
    DeletionCurve,
    SoftDiceToFirst,
    cell_order,
    deletion_curves,
    mean_of_channels,
)
from segkit.explain.verdicts.untrained import MakeUntrained, untrained_maps
from segkit.inference.attention_maps import AttentionMap
from segkit.inference.empty_windows import empty_windows
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.nn.map_tap import Edit, editing
from segkit.system.progress import Track, untracked

GateChannel = tuple[str, int]
"""A map's key and a channel of it: what gets a word."""
HIGH_FIRST = "highest first"
LOW_FIRST = "lowest first"
"""The orders of a channel's own cells."""
EARLIER = "mean map of earlier scans"
UNTRAINED = "untrained network"
"""What the names of comparators from untrained networks begin with."""
DELETED_DRAWS = 2
"""Untrained networks in whose order the image is deleted."""


@dataclass(frozen=True)
class ChannelEvidence:
    """What a scan tells of one channel of a gate; a structure that is missing was not measured."""

    drops: Mapping[str, tuple[float, ...]]
    """By structure, the fall of Dice without the channel, and then with all others gone as well."""
    aurocs: Mapping[str, Mapping[str, float]]
    """By structure, of each comparator; that of the channel as 'map'."""
    curves: Mapping[str, Sequence[DeletionCurve]]
    """By order, the deletion curve of each structure; a comparator's order begins with the end that
    points at the predicted structures."""
    correlations: tuple[float, ...]
    """|ρ| with each untrained network's; NaN if either is constant."""
    box: CellValues3d
    """Its cells over the body's box, few of them; NaN where they do not count."""
    inside: Mapping[str, ndarray]
    """By structure, which of these lie in it."""

    def areas(self, structure: str) -> dict[str, float]:
        """By order, the area under the deletion curve of a structure."""
        return {
            order: curve.area
            for order, curves in self.curves.items()
            for curve in curves
            if curve.structure == structure
        }


@dataclass(frozen=True)
class CaseEvidence:
    """What a scan tells of all gates."""

    case: str
    against: Literal["reference", "prediction"]
    """What Dice and structures are of; of a prediction, no word follows."""
    channels: Mapping[GateChannel, ChannelEvidence] = field(default_factory=dict)
    """In the order of the network's maps."""


def gather_evidence(
    predictor: Predictor,
    volume: Volume,
    reference: Volume | None,
    maps: Mapping[str, AttentionMap],
    *,
    labels: Volume,
    case: str,
    earlier: Sequence[CaseEvidence] = (),
    seed: int = 0,
    untrained: MakeUntrained | None = None,
    track: Track = untracked,
) -> CaseEvidence:
    """The evidence of one scan.

    Takes a prediction for each channel (about two if there are several), a pass over the volume for
    each untrained network, and four for each order in which the image is deleted: about ten orders
    for a gate.

    Args:
        predictor: the first of its models is edited and asked.
        volume: the scan.
        reference: its labels on the scan's grid; the prediction stands in if None.
        maps: the predictor's, by key.
        labels: the predictor's.
        case: what to call the scan.
        earlier: evidence of other scans, whose mean map deletion is compared with.
        seed: of untrained networks and of the order of ties.
        untrained: makes an untrained network from a seed; built of the model's description if None.
        track: may show the progress.

    Raises:
        VolumeError: if the reference lies on another grid, or holds labels that the model does not
            know.
    """
    labelling = predictor.model.description.labelling
    if reference is not None:
        given = ScoredVolume(case, volume, reference)
        reference = on_one_grid(given, labelling).reference
        if holds_foreground(reference, labelling):
            check_case(given, labelling)
    labels = volume_within(labels, labelling)
    keys = [key for key in ablated_maps(predictor) if maps[key].volume is not None]
    structures = members(labelling)
    truth = labels if reference is None else reference
    shared = _Shared(predictor, volume, truth, labels, structures, seed)
    drops = dice_drops(predictor, volume, truth, labels, maps, keys, track=track)
    draws = list(untrained_maps(predictor, shared.image, keys, seed=seed, make=untrained))
    found: dict[GateChannel, ChannelEvidence] = {}
    for key in track(keys, "comparing maps", len(keys)):
        grid = _MapGrid(maps[key], shared)
        for channel, values in enumerate(channels_of(maps[key])):
            unit = (key, channel)
            others = [draw[key][channel] for draw in draws]
            before = [one.channels[unit].box for one in earlier if unit in one.channels]
            found[unit] = grid.evidence(values, others, before, drops[unit])
    return CaseEvidence(case, "prediction" if reference is None else "reference", found)


def channels_of(attention_map: AttentionMap) -> list[CellValues3d]:
    """The channels of a map that has a place, each (x, y, z)."""
    assert attention_map.volume is not None
    data = attention_map.volume.data
    return list(np.moveaxis(data.reshape(*data.shape[:3], -1), -1, 0))


def dice_drops(
    predictor: Predictor,
    volume: Volume,
    truth: Volume,
    labels: Volume,
    maps: Mapping[str, AttentionMap],
    keys: Sequence[str],
    *,
    track: Track = untracked,
) -> dict[GateChannel, dict[str, tuple[float, ...]]]:
    """How far Dice of each structure falls without each channel; see `ChannelEvidence.drops`."""
    labelling = predictor.model.description.labelling
    counts = {key: len(channels_of(maps[key])) for key in keys}
    units = [(key, channel) for key in keys for channel in range(counts[key])]

    def dice(found: Volume) -> dict[str, float]:
        return with_foreground(class_dice(found, truth, labelling), labelling)

    def without(gone: Collection[GateChannel]) -> dict[str, float]:
        edits: dict[str, Edit] = {}
        for key in keys:
            channels = [channel for one, channel in gone if one == key]
            if channels:
                # A map of one recorded channel may stand for the mean of many.
                edits[key] = even_out_channels(channels if counts[key] > 1 else None)
        with editing(predictor.model.network, edits):
            return dice(predictor.numbers_of(volume))

    whole = dice(labels) if holds_foreground(truth, labelling) else {}
    if not whole:
        return {unit: {} for unit in units}
    trials: list[tuple[GateChannel, ...]] = [(unit,) for unit in units]
    if len(units) > 2:
        trials += [tuple(other for other in units if other != unit) for unit in units]
    if len(units) > 1:
        trials.append(tuple(units))
    scores = {
        frozenset(gone): without(gone) for gone in track(trials, "ablating maps", len(trials))
    }
    found: dict[GateChannel, dict[str, tuple[float, ...]]] = {}
    for unit in units:
        alone = scores[frozenset([unit])]
        found[unit] = {name: (whole[name] - alone[name],) for name in whole}
        if len(units) > 1:
            kept, none = scores[frozenset(units) - {unit}], scores[frozenset(units)]
            for name in whole:
                found[unit][name] = (*found[unit][name], kept[name] - none[name])
    return found


def holds_foreground(labels: Volume, labelling: Labelling) -> bool:
    """Whether labels hold any structure."""
    numbers = {number for some in members(labelling).values() for number in some}
    return bool(np.isin(labels.data, list(numbers)).any())


def with_foreground(scores: Mapping[str, float], labelling: Labelling) -> dict[str, float]:
    """Scores of structures, and of several their mean as that of all together."""
    if len(labelling.members) < 2 or not scores:
        return dict(scores)
    return {**scores, FOREGROUND: sum(scores.values()) / len(scores)}


class _Shared:
    """What all maps of a scan are measured with."""

    def __init__(
        self,
        predictor: Predictor,
        volume: Volume,
        truth: Volume,
        labels: Volume,
        structures: Mapping[str, tuple[int, ...]],
        seed: int,
    ) -> None:
        described = predictor.model.description
        volume = predictor.with_numbers(volume)
        prepared = predictor.prepare(volume)
        self.image, self.grid, self.seen = prepared.image, prepared.grid, prepared.source
        self.seed = seed
        self.pictures = pictures(volume, self.seen, list(described.channels))
        told = seen_part(truth.data, volume.grid, self.seen)
        said = seen_part(labels.data, volume.grid, self.seen)
        self.structures = {name: np.isin(told, numbers) for name, numbers in structures.items()}
        self.predicted = np.isin(said, [one for numbers in structures.values() for one in numbers])
        ignore = described.labelling.ignore
        self.unlabelled = None if ignore is None else told == ignore
        skip: Collection[tuple[int, ...]] = ()
        if predictor.members[0].skip_empty:
            skip = empty_windows(volume, prepared, predictor.members[0].layout)
        self.agreement = SoftDiceToFirst(
            predictor, self.image, list(described.labelling.members), skip=skip
        )
        self.replacement = mean_of_channels(self.image, len(described.channels))


class _MapGrid:
    """What the channels of a map are measured with."""

    def __init__(self, one: AttentionMap, shared: _Shared) -> None:
        assert one.volume is not None
        grid = one.volume.grid
        cells = Cells(grid, one.seen)
        self.shared = shared
        self.counted = cells.counted
        if shared.unlabelled is not None:
            unlabelled = cells.mean(shared.unlabelled.astype(np.float32))
            self.counted = self.counted & (unlabelled == 0)
        self.inside = {
            name: cells.mean(mask.astype(np.float32)) >= HALF
            for name, mask in shared.structures.items()
        }
        self.predicted = cells.mean(shared.predicted.astype(np.float32)) >= HALF
        self.images = image_comparators(shared.pictures, cells, grid)
        self.blocks = Blocks.of(grid, shared.grid)
        self.known: dict[tuple[str, bytes], Sequence[DeletionCurve]] = {}

    def evidence(
        self,
        values: CellValues3d,
        untrained: Sequence[CellValues3d],
        earlier: Sequence[CellValues3d],
        drops: Mapping[str, tuple[float, ...]],
    ) -> ChannelEvidence:
        """Of a channel, given the same of untrained networks and boxes of it in earlier scans."""
        counted = self.counted & np.isfinite(values)
        draws = {f"{UNTRAINED} {number}": one for number, one in enumerate(untrained)}
        aurocs = {}
        for name, inside in self.inside.items():
            sides = Sides(inside, counted, seed=self.shared.seed)
            if sides.both:
                compared = {"map": values, **self.images, **draws}
                aurocs[name] = {of: sides.auroc(one) for of, one in compared.items()}
        own = Ranked.of(values[counted].astype(np.float64))
        correlations = [
            abs(spearman(own, Ranked.of(one[counted].astype(np.float64)))) for one in untrained
        ]
        return ChannelEvidence(
            drops,
            aurocs,
            self._curves(values, draws, earlier) if counted.any() else {},
            tuple(correlations),
            boxed(np.where(counted, values, np.nan)),
            {name: boxed(inside) for name, inside in self.inside.items()},
        )

    def _curves(
        self,
        values: CellValues3d,
        draws: Mapping[str, CellValues3d],
        earlier: Sequence[CellValues3d],
    ) -> dict[str, Sequence[DeletionCurve]]:
        if not self.shared.agreement.structures:
            return {}
        known = np.isfinite(values)
        orders = {HIGH_FIRST: values, LOW_FIRST: -values}
        sides = Sides(self.predicted, self.counted & known, seed=self.shared.seed)
        others = {name: self.images[name] for name in deleted_comparators(list(self.images))}
        others |= dict(list(draws.items())[:DELETED_DRAWS])
        if earlier:
            others[EARLIER] = mean_map(earlier, values.shape)
        for name, one in others.items():
            orders[name] = one if not sides.auroc(np.nan_to_num(one)) < 0.5 else -one
        found: dict[str, Sequence[DeletionCurve]] = {}
        for name, one in orders.items():
            # The scan's own orders are the same for all channels that know the same cells.
            memory = (name, known.tobytes())
            curves = self.known.get(memory) if name in self.images else None
            if curves is None:
                curves = self._deleted(np.where(known, np.nan_to_num(one), np.nan))
                if name in self.images:
                    self.known[memory] = curves
            found[name] = curves
        return found

    def _deleted(self, values: CellValues3d) -> list[DeletionCurve]:
        """Curves in the order of a map; both ends are the same for every order."""
        shared = self.shared
        order = cell_order(values, seed=shared.seed)
        curves = deletion_curves(
            shared.image,
            shared.replacement,
            self.blocks,
            order,
            shared.agreement,
            fractions=FRACTIONS[1:-1],
        )
        memory = ("end", np.isfinite(values).tobytes())
        if memory not in self.known:
            self.known[memory] = deletion_curves(
                shared.image,
                shared.replacement,
                self.blocks,
                order,
                shared.agreement,
                fractions=FRACTIONS[-1:],
            )
        return [
            replace(curve, fractions=FRACTIONS, scores=(1.0, *curve.scores, *end.scores))
            for curve, end in zip(curves, self.known[memory], strict=True)
        ]
