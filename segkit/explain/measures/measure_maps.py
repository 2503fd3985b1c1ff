"""Compare every map of a scan with labels, and compare intensity and gradient as baselines."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from segkit.config.labels import Labelling
from segkit.data.label_numbers import volume_within
from segkit.explain.measures.cells import Cells, pictures, seen_part
from segkit.explain.measures.fuse import scalar
from segkit.explain.measures.ranks import Ranked, spearman
from segkit.explain.measures.statistics import Figure, distribution, localisation, near_structure
from segkit.inference.attention_maps import AttentionMap
from segkit.io.volume import Volume

TOLERANCE_MM = 5.0
"""Largest distance from a structure at which the highest value still counts as pointing at it."""
HALF = 0.5 - 1e-6
"""A cell lies inside a structure if at least this share of it does: half, minus rounding error."""
MAGNITUDE = "magnitude"
"""Name of the absolute values of an attribution."""
FOREGROUND = "foreground"
"""Name of all structures together, if there are several and none has this name."""


@dataclass(frozen=True)
class Measure:
    """One measure of a map or of a baseline on the same cells."""

    map: str
    """The map's key."""
    of: str
    """'map', 'magnitude' for the absolute values of an attribution, or the name of a baseline:
    'intensity' or 'gradient'."""
    structure: str
    """Empty for measures without a structure, such as entropy."""
    name: str
    """Name of the measure, such as 'auroc'."""
    value: float
    chance: float | None
    """The value expected by chance, if there is one."""


def measure_maps(
    maps: Mapping[str, AttentionMap],
    scan: Volume,
    labels: Volume,
    labelling: Labelling,
    *,
    channels: Sequence[str],
    tolerance_mm: float = TOLERANCE_MM,
    unlabelled: Collection[str] = (),
) -> list[Measure]:
    """Measures of each map that has a spatial grid, on the cells of this grid.

    A cell lies in a structure if at least half of it does. Cells with unlabelled voxels and cells
    that were not computed are left out. Intensity and gradient are averaged over each cell and
    measured in the same way, so that a reader sees if a map shows more than these baselines. Their
    lowest value is subtracted first, because energy needs values of 0 or more.

    An attribution may be negative. Its ranks are those of its values; energy and entropy use its
    positive part. Its absolute values are measured beside it, as 'magnitude'.

    Args:
        maps: the scan's maps, by key.
        scan: the scan.
        labels: a reference or predicted labels.
        labelling: the classes or regions of the labels.
        channels: names of the scan's channels.
        tolerance_mm: largest distance (mm) from a structure that still counts as pointing at it.
        unlabelled: classes or regions that nobody labelled in this case; they are not measured.

    Raises:
        VolumeError: if the labels lie on another grid than the scan.
    """
    labels = labels.onto(scan.grid, what="the reference", whose="the scan")
    labels = volume_within(labels, labelling)
    placed = {key: one for key, one in maps.items() if one.volume is not None}
    if not placed:
        return []
    seen = next(iter(placed.values())).seen
    baselines = pictures(scan, seen, list(channels))
    numbers_seen = seen_part(labels.data, scan.grid, seen)
    inside = {
        name: np.isin(numbers_seen, numbers)
        for name, numbers in measured_structures(labelling, unlabelled).items()
    }
    ignored = None if labelling.ignore is None else numbers_seen == labelling.ignore
    measured = []
    for key, one in placed.items():
        measured += _measure(key, one, baselines, inside, ignored, tolerance_mm)
    return measured


def name_of_all(labelling: Labelling) -> str:
    """The name of all structures together: FOREGROUND, or another one if a structure has it."""
    others = (f"all structures {number}" for number in itertools.count(2))
    names = itertools.chain((FOREGROUND, "all structures"), others)
    return next(name for name in names if name not in labelling.members)


def measured_structures(
    labelling: Labelling, unlabelled: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """The label numbers of each structure. If there are several, all together come last.

    Args:
        labelling: the classes or regions.
        unlabelled: those that nobody labelled in a case. They are left out, and so are all
            structures together, because any background voxel may belong to one of them.
    """
    members = labelling.members
    found = {name: numbers for name, numbers in members.items() if name not in unlabelled}
    if len(members) > 1 and len(found) == len(members):
        found[name_of_all(labelling)] = tuple(
            sorted({number for some in found.values() for number in some})
        )
    return found


def _measure(
    key: str,
    one: AttentionMap,
    baselines: Mapping[str, ndarray],
    structures: Mapping[str, ndarray],
    ignored: ndarray | None,
    tolerance_mm: float,
) -> list[Measure]:
    """Measures of one map and of the baselines, on the map's cells.

    Args:
        key: the map's key.
        one: the map.
        baselines: intensity and gradient on the voxels that the network processed, by name.
        structures: mask of each structure on the same voxels, by name.
        ignored: mask of voxels that do not count, if there are any.
        tolerance_mm: largest distance (mm) from a structure that still counts as pointing at it.
    """
    assert one.volume is not None
    grid = one.volume.grid
    cells = Cells(grid, one.seen)
    own_values = scalar(one.volume).data
    counted = cells.counted & np.isfinite(own_values)
    if ignored is not None:
        counted = counted & (cells.mean(ignored.astype(np.float32)) == 0)
    if not counted.any():
        return []
    values = Ranked.of(own_values[counted].astype(np.float64))
    others: dict[str, Ranked] = {}
    magnitude: dict[str, Ranked] = {}
    if one.info.kind == "attribution":
        channels = np.abs(one.volume.data[counted].astype(np.float64))
        magnitude[MAGNITUDE] = Ranked.of(channels.reshape(len(channels), -1).mean(axis=1))
        values = Ranked(np.maximum(values.values, 0), values.ranks)
    for name, image in baselines.items():
        covered = cells.mean(image)[counted].astype(np.float64)
        others[name] = Ranked.of(covered - covered.min())
    measured: list[Measure] = []

    def add(of: str, structure: str, figures: Sequence[Figure]) -> None:
        measured.extend(
            Measure(key, of, structure, figure.name, figure.value, figure.chance)
            for figure in figures
        )

    own = distribution(values.values, one.info.lowest, one.info.highest)
    own += [
        Figure(f"spearman_{name}", spearman(values, image), 0.0) for name, image in others.items()
    ]
    if one.disagreement is not None:
        apart = one.disagreement.data[counted]
        apart = apart[np.isfinite(apart)].astype(np.float64)
        mean, high = (apart.mean(), np.percentile(apart, 95)) if apart.size else (np.nan, np.nan)
        own += [Figure("disagreement", float(mean)), Figure("disagreement_p95", float(high))]
    add("map", "", own)
    for name, mask in structures.items():
        within = cells.mean(mask.astype(np.float32)) >= HALF
        within &= counted
        near = near_structure(within, grid.spacing, tolerance_mm, grid.directions)[counted]
        inside = within[counted]
        add("map", name, localisation(values, inside, near))
        for baseline, ranked in {**magnitude, **others}.items():
            add(baseline, name, localisation(ranked, inside, near))
    return measured
