"""Evidence: the measurements on one scan that the verdict rule uses.

The evidence of a scan is measured once; the rule then judges any number of scans together. For each
channel of each gate and for each structure, it contains:

- drops: how far Dice falls if the channel is replaced by its mean over the scan, with all other
  channels unchanged and, if there are others, with all others replaced too (two gates may
  substitute for each other);
- aurocs: AUROC of the channel and of each comparator on the same cells;
- areas: area under the deletion curve, for the channel in both orders and for comparators;
- correlations: |ρ| with the same channel of untrained networks, without cells of constant
  background.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
from numpy import ndarray

from segkit.config.labels import Labelling
from segkit.data.label_numbers import volume_within
from segkit.explain.heads.study import ScoredVolume, check_case, on_one_grid
from segkit.explain.measures.cells import Cells, constant_background, pictures, seen_part
from segkit.explain.measures.fixed_functions import CellValues3d
from segkit.explain.measures.measure_maps import (
    FOREGROUND,
    HALF,
    measured_structures,
    name_of_all,
)
from segkit.explain.measures.ranks import Ranked, spearman
from segkit.explain.verdicts.ablation import ablated_maps, class_dice, observing_means
from segkit.explain.verdicts.comparators import (
    closeness_comparators,
    deleted_comparators,
    image_comparators,
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
from segkit.explain.verdicts.mean_maps import ThinnedMap, boxed, mean_maps
from segkit.explain.verdicts.sides import Sides, in_batches
from segkit.explain.verdicts.untrained import MakeUntrained, untrained_maps
from segkit.inference.attention_maps import AttentionMap
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.nn.map_tap import Edit, editing
from segkit.system.progress import Track, untracked

GateChannel = tuple[str, int]
"""A map's key and one of its channels. Each has its own verdict."""
HIGH_FIRST = "highest first"
LOW_FIRST = "lowest first"
"""The two deletion orders of a channel's own cells."""
EARLIER = "mean map of earlier scans"
BEST_IMAGE = "best function of the image"
"""The comparator from the scan's intensity that localises the predicted structures best, in this
scan. Deletion has it as one of its few comparators."""
UNTRAINED = "untrained network"
"""Prefix of the names of comparators from untrained networks."""
DELETED_DRAWS = 2
"""Number of untrained networks that are comparators for deletion."""


@dataclass(frozen=True)
class ChannelEvidence:
    """Evidence of one scan on one channel of a gate. Structures without measurement are missing."""

    drops: Mapping[str, tuple[float, ...]]
    """For each structure, the fall of Dice if the channel is replaced by its mean over the scan;
    then, if there are other channels, the same with all others replaced too."""
    aurocs: Mapping[str, Mapping[str, float]]
    """For each structure, the AUROC of the channel ('map') and of each comparator."""
    curves: Mapping[str, Sequence[DeletionCurve]]
    """For each order, the deletion curve of each structure. The order of a comparator begins with
    its high or low values, whichever localise the predicted structures better."""
    correlations: tuple[float, ...]
    """|ρ| with the channel of each untrained network, without cells of constant background. NaN if
    the trained network's map is constant, and 0 if only the untrained network's is."""
    box: ThinnedMap
    """The channel, thinned by `boxed`; NaN for cells that do not count."""
    inside: Mapping[str, ndarray]
    """For each structure, whether each cell of `box` lies in it."""

    def areas(self, structure: str) -> dict[str, float]:
        """The area under the deletion curve of a structure, by order."""
        return {
            order: curve.area
            for order, curves in self.curves.items()
            for curve in curves
            if curve.structure == structure
        }


@dataclass(frozen=True)
class CaseEvidence:
    """Evidence of one scan on all gates."""

    case: str
    against: Literal["reference", "prediction"]
    """The labels that the maps are compared with. Without a reference there is no verdict."""
    channels: Mapping[GateChannel, ChannelEvidence] = field(default_factory=dict)
    """The evidence on each channel, in the order of the network's maps."""
    name_of_all: str = FOREGROUND
    """The name of all structures together."""


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
    unlabelled: Collection[str] = (),
    track: Track = untracked,
) -> CaseEvidence:
    """The evidence of one scan.

    The scan is segmented once, and once for each channel (about twice if there are several), the
    network processes it once for each untrained network and four times for each deletion order. A
    gate has about eleven deletion orders.

    Args:
        predictor: runs the model. In an ensemble, only the first model is edited and tested.
        volume: the scan.
        reference: labels on the scan's grid; if None, the predicted labels are used.
        maps: the maps that the predictor returned for the scan, by key.
        labels: the labels that the predictor returned.
        case: name of the scan.
        earlier: evidence of other scans. Their mean map is a comparator for deletion.
        seed: seed of the untrained networks and the random order of equal values.
        untrained: makes an untrained network from a seed. If None, networks are built from the
            model's description.
        unlabelled: classes or regions that nobody labelled in the reference. They have no drops, no
            AUROC and no deletion curves, and neither have all structures together.
        track: reports the progress.

    Raises:
        VolumeError: if the reference lies on another grid, or has labels that the model does not
            know.
        ModelError: if an untrained network does not have the model's architecture.
    """
    labelling = predictor.model.description.labelling
    if reference is not None:
        given = ScoredVolume(case, volume, reference)
        reference = on_one_grid(given, labelling).reference
        if holds_foreground(reference, labelling):
            check_case(given, labelling)
    labels = volume_within(labels, labelling)
    keys = [key for key in ablated_maps(predictor) if maps[key].volume is not None]
    if reference is None:
        unlabelled = ()
    structures = measured_structures(labelling, unlabelled)
    truth = labels if reference is None else reference
    shared = _Shared(predictor, volume, truth, labels, structures, seed)
    drops = dice_drops(
        predictor, volume, truth, labels, maps, keys, unlabelled=unlabelled, track=track
    )
    shapes = {key: (len(channels := channels_of(maps[key])), *channels[0].shape) for key in keys}
    draws = list(untrained_maps(predictor, shared.image, shapes, seed=seed, make=untrained))
    found: dict[GateChannel, ChannelEvidence] = {}
    for key in track(keys, "comparing maps", len(keys)):
        grid = _MapGrid(maps[key], shared)
        for channel, values in enumerate(channels_of(maps[key])):
            unit = (key, channel)
            others = [draw[key][channel] for draw in draws]
            before = [one.channels[unit].box for one in earlier if unit in one.channels]
            found[unit] = grid.evidence(values, others, before, drops[unit])
    against: Literal["reference", "prediction"] = "prediction" if reference is None else "reference"
    return CaseEvidence(case, against, found, name_of_all(labelling))


def channels_of(attention_map: AttentionMap) -> list[CellValues3d]:
    """The channels of a map with a spatial grid, each (x, y, z)."""
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
    unlabelled: Collection[str] = (),
    track: Track = untracked,
) -> dict[GateChannel, dict[str, tuple[float, ...]]]:
    """The fall of each structure's Dice without each channel; see `ChannelEvidence.drops`.

    Args:
        predictor: runs the model.
        volume: the scan.
        truth: the labels with which Dice is computed: the reference, or the prediction without one.
        labels: the labels that the predictor returned for the scan.
        maps: the maps that the predictor returned, by key.
        keys: keys of the maps to ablate.
        unlabelled: classes or regions that nobody labelled in the reference.
        track: reports the progress.
    """
    labelling = predictor.model.description.labelling
    counts = {key: len(channels_of(maps[key])) for key in keys}
    units = [(key, channel) for key in keys for channel in range(counts[key])]

    def dice(found: Volume) -> dict[str, float]:
        scores = class_dice(found, truth, labelling, unlabelled)
        return scores if unlabelled else with_foreground(scores, labelling)

    def without(removed: Collection[GateChannel]) -> dict[str, float]:
        edits: dict[str, Edit] = {}
        for key in keys:
            channels = [channel for one, channel in removed if one == key]
            if channels:
                # A single recorded channel may be the mean of many channels in the network.
                mean = means[key]
                edits[key] = mean.replace_channels(channels) if counts[key] > 1 else mean.replace
        with editing(predictor.model.network, edits):
            return dice(predictor.numbers_of(volume))

    whole = dice(labels) if holds_foreground(truth, labelling) else {}
    if not whole:
        return {unit: {} for unit in units}
    with observing_means(predictor.model.network, keys) as means:
        predictor.numbers_of(volume)
    trials: list[tuple[GateChannel, ...]] = [(unit,) for unit in units]
    if len(units) > 2:
        trials += [tuple(other for other in units if other != unit) for unit in units]
    if len(units) > 1:
        trials.append(tuple(units))
    scores = {
        frozenset(removed): without(removed)
        for removed in track(trials, "ablating maps", len(trials))
    }
    found: dict[GateChannel, dict[str, tuple[float, ...]]] = {}
    for unit in units:
        without_it = scores[frozenset([unit])]
        found[unit] = {name: (whole[name] - without_it[name],) for name in whole}
        if len(units) > 1:
            kept, none = scores[frozenset(units) - {unit}], scores[frozenset(units)]
            for name in whole:
                found[unit][name] = (*found[unit][name], kept[name] - none[name])
    return found


def holds_foreground(labels: Volume, labelling: Labelling) -> bool:
    """Whether labels contain any structure."""
    numbers = {number for some in measured_structures(labelling).values() for number in some}
    return bool(np.isin(labels.data, list(numbers)).any())


def with_foreground(scores: Mapping[str, float], labelling: Labelling) -> dict[str, float]:
    """Scores of structures; if there are several, also their mean, named as `name_of_all` says."""
    if len(labelling.members) < 2 or not scores:
        return dict(scores)
    return {**scores, name_of_all(labelling): sum(scores.values()) / len(scores)}


def _likeness(own: Ranked, untrained: Ranked) -> float:
    """|ρ| of a map and that of an untrained network; 0 if only the latter is constant.

    The hard gates of an untrained network are all open. They say nothing about the order of cells,
    so a map that has an order does not come from them.
    """
    constant = untrained.ranks.size and np.ptp(untrained.ranks) == 0
    if constant and np.ptp(own.ranks) > 0:
        return 0.0
    return abs(spearman(own, untrained))


class _Shared:
    """The data of a scan that all its maps share."""

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
        self.across = described.axis_across
        self.pictures = pictures(volume, self.seen, list(described.channels), across=self.across)
        true = seen_part(truth.data, volume.grid, self.seen)
        predicted = seen_part(labels.data, volume.grid, self.seen)
        intensities = [one for name, one in self.pictures.items() if name.startswith("intensity")]
        self.background = constant_background(intensities)
        self.structures = {name: np.isin(true, numbers) for name, numbers in structures.items()}
        # The prediction has all structures, whatever is labelled in the reference.
        self.predicted = np.isin(
            predicted,
            list(itertools.chain(*measured_structures(described.labelling).values())),
        )
        ignore = described.labelling.ignore
        self.unlabelled = None if ignore is None else true == ignore
        skip = predictor.members[0].skipped(volume, prepared)
        self.agreement = SoftDiceToFirst(
            predictor, self.image, list(described.labelling.members), skip=skip
        )
        self.replacement = mean_of_channels(self.image, len(described.channels))


@dataclass
class _Images:
    """Measures of the comparators from the image. Only the maps for deletion are kept."""

    sides: Mapping[str, Sides]
    """The cells of each structure that has cells inside and outside."""
    predicted: Sides
    """The cells of the predicted structures."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """For each structure, the AUROC of each comparator."""
    deleted: dict[str, CellValues3d] = field(default_factory=dict)
    """The comparators that deletion always uses."""
    best: CellValues3d | None = None
    """The comparator that localises the prediction best."""
    best_distance: float = -1.0
    """|AUROC - 0.5| of `best`."""

    def add(self, batch: Mapping[str, CellValues3d]) -> None:
        """Measure comparators of all structures."""
        for name, sides in self.sides.items():
            self.scores.setdefault(name, {}).update(sides.aurocs(batch))
        self.deleted |= {name: batch[name] for name in deleted_comparators(list(batch))}
        self.see(batch)

    def add_closeness(self, structure: str, batch: Mapping[str, CellValues3d]) -> None:
        """Measure comparators of one structure."""
        self.scores[structure] |= self.sides[structure].aurocs(batch)

    def see(self, batch: Mapping[str, CellValues3d]) -> None:
        """Keep the comparator that localises the prediction best."""
        for name, score in self.predicted.aurocs(batch).items():
            if abs(score - 0.5) > self.best_distance:
                self.best, self.best_distance = batch[name], abs(score - 0.5)


class _MapGrid:
    """The data on a map's grid that all its channels share."""

    def __init__(self, one: AttentionMap, shared: _Shared) -> None:
        assert one.volume is not None
        grid = one.volume.grid
        cells = Cells(grid, one.seen)
        self.shared = shared
        self.counted = cells.counted
        if shared.unlabelled is not None:
            unlabelled = cells.mean(shared.unlabelled.astype(np.float32))
            self.counted = self.counted & (unlabelled == 0)
        # Cells of which every voxel is constant background.
        self.background = cells.mean((~shared.background).astype(np.float32)) == 0
        self.inside = {
            name: cells.mean(mask.astype(np.float32)) >= HALF
            for name, mask in shared.structures.items()
        }
        self.predicted = cells.mean(shared.predicted.astype(np.float32)) >= HALF
        self.make_images = partial(
            image_comparators, shared.pictures, cells, grid, across=shared.across
        )
        self.make_closeness = partial(
            closeness_comparators, shared.pictures, cells=cells, grid=grid, across=shared.across
        )
        self.images: dict[bytes, _Images] = {}
        self.blocks = Blocks.of(grid, shared.grid)
        self.known: dict[tuple[str, bytes], Sequence[DeletionCurve]] = {}

    def evidence(
        self,
        values: CellValues3d,
        untrained: Sequence[CellValues3d],
        earlier: Sequence[ThinnedMap],
        drops: Mapping[str, tuple[float, ...]],
    ) -> ChannelEvidence:
        """The evidence on a channel.

        Args:
            values: the channel.
            untrained: the same channel of untrained networks.
            earlier: the same channel in other scans.
            drops: the falls of Dice without the channel, by structure.
        """
        counted = self.counted & np.isfinite(values)
        draws = {f"{UNTRAINED} {number}": one for number, one in enumerate(untrained)}
        images = self._measured_images(counted)
        aurocs = {
            name: {"map": sides.auroc(values), **images.scores[name], **sides.aurocs(draws)}
            for name, sides in images.sides.items()
        }
        # Nearly every network separates air from the body, so air would decide the correlation.
        body = counted & ~self.background
        ranked = body if body.any() else counted
        own = Ranked.of(values[ranked].astype(np.float64))
        correlations = [
            _likeness(own, Ranked.of(one[ranked].astype(np.float64))) for one in untrained
        ]
        return ChannelEvidence(
            drops,
            aurocs,
            self._curves(values, images, draws, earlier) if counted.any() else {},
            tuple(correlations),
            ThinnedMap(boxed(np.where(counted, values, np.nan)), values.shape),
            {name: boxed(inside) for name, inside in self.inside.items()},
        )

    def _measured_images(self, counted: ndarray) -> _Images:
        """The comparators from the image, which all channels with the same cells share."""
        memory = counted.tobytes()
        if memory not in self.images:
            seed = self.shared.seed
            sides = {name: Sides(mask, counted, seed=seed) for name, mask in self.inside.items()}
            found = _Images(
                {name: one for name, one in sides.items() if one.both},
                Sides(self.predicted, counted, seed=seed),
            )
            for batch in in_batches(self.make_images()):
                found.add(batch)
            for name in found.sides:
                found.add_closeness(name, self.make_closeness(self.shared.structures[name]))
            found.see(self.make_closeness(self.shared.predicted))
            self.images[memory] = found
        return self.images[memory]

    def _curves(
        self,
        values: CellValues3d,
        images: _Images,
        draws: Mapping[str, CellValues3d],
        earlier: Sequence[ThinnedMap],
    ) -> dict[str, Sequence[DeletionCurve]]:
        """Deletion curves of each structure, by order.

        Args:
            values: the channel.
            images: comparators from the scan's intensity.
            draws: the same channel of untrained networks, by name.
            earlier: the same channel in other scans.
        """
        if not set(self.shared.agreement.structures) & set(self.shared.structures):
            return {}
        known = np.isfinite(values)
        orders = {HIGH_FIRST: values, LOW_FIRST: -values}
        others = dict(images.deleted)
        if images.best is not None:
            others[BEST_IMAGE] = images.best
        of_images = set(others)
        others |= dict(list(draws.items())[:DELETED_DRAWS])
        if earlier:
            means = mean_maps(earlier, values.shape, [np.arange(size) for size in values.shape])
            shown = images.predicted.aurocs({n: np.nan_to_num(one) for n, one in means.items()})
            others[EARLIER] = means[max(shown, key=lambda n: np.nan_to_num(abs(shown[n] - 0.5)))]
        for name, one in others.items():
            inverted = images.predicted.auroc(np.nan_to_num(one)) < 0.5
            orders[name] = -one if inverted else one
        found: dict[str, Sequence[DeletionCurve]] = {}
        for name, one in orders.items():
            # Orders from the intensity are the same for all channels with the same known cells.
            memory = (name, known.tobytes())
            curves = self.known.get(memory) if name in of_images else None
            if curves is None:
                curves = self._deleted(np.where(known, np.nan_to_num(one), np.nan))
                if name in of_images:
                    self.known[memory] = curves
            found[name] = curves
        return found

    def _deleted(self, values: CellValues3d) -> list[DeletionCurve]:
        """Deletion curves in the order of a map. Their first and last points fit every order."""
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
            if curve.structure in shared.structures
        ]
