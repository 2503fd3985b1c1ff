"""Every map of a scan measured against its labels, beside the scan's own intensity and gradient."""

from collections.abc import Mapping, Sequence
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
"""How far the highest value may lie from a structure and still point at it."""
HALF = 0.5 - 1e-6
"""The share of a cell from which on it lies inside; a half but for rounding."""
FOREGROUND = "foreground"
"""All structures together, where there are several."""


@dataclass(frozen=True)
class Measure:
    """One figure of a map."""

    map: str
    of: str
    """'map', or what is measured in its stead on the same cells: 'intensity', 'gradient'."""
    structure: str
    """Empty for what needs none."""
    name: str
    value: float
    chance: float | None


def measure_maps(
    maps: Mapping[str, AttentionMap],
    scan: Volume,
    labels: Volume,
    labelling: Labelling,
    *,
    channels: Sequence[str],
    tolerance_mm: float = TOLERANCE_MM,
) -> list[Measure]:
    """Measures of each map that has a place, on its own grid.

    A cell lies in a structure if at least half of it does. Cells that hold voxels nobody labelled
    do not count, nor do those that were not computed. Intensity and gradient are averaged over each
    cell and measured as the map is, so that a map can be seen to tell more than they do; for
    shares, their lowest value counts as 0.
    Raises VolumeError for labels on another grid than the scan's.
    """
    labels = labels.onto(scan.grid, what="the reference", whose="the scan")
    labels = volume_within(labels, labelling)
    placed = {key: one for key, one in maps.items() if one.volume is not None}
    if not placed:
        return []
    seen = next(iter(placed.values())).seen
    baselines = pictures(scan, seen, list(channels))
    told = seen_part(labels.data, scan.grid, seen)
    inside = {name: np.isin(told, numbers) for name, numbers in members(labelling).items()}
    unlabelled = None if labelling.ignore is None else told == labelling.ignore
    measured = []
    for key, one in placed.items():
        measured += _measure(key, one, baselines, inside, unlabelled, tolerance_mm)
    return measured


def members(labelling: Labelling) -> dict[str, tuple[int, ...]]:
    """The numbers in labels of each structure that is measured, all together last."""
    found = labelling.members
    if len(found) > 1:
        found[FOREGROUND] = tuple(sorted({number for some in found.values() for number in some}))
    return found


def _measure(
    key: str,
    one: AttentionMap,
    baselines: Mapping[str, ndarray],
    structures: Mapping[str, ndarray],
    unlabelled: ndarray | None,
    tolerance_mm: float,
) -> list[Measure]:
    assert one.volume is not None
    grid = one.volume.grid
    cells = Cells(grid, one.seen)
    own_values = scalar(one.volume).data
    counted = cells.counted & np.isfinite(own_values)
    if unlabelled is not None:
        counted = counted & (cells.mean(unlabelled.astype(np.float32)) == 0)
    if not counted.any():
        return []
    values = Ranked.of(own_values[counted].astype(np.float64))
    others: dict[str, Ranked] = {}
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
        inside, near = within[counted], near_structure(within, grid.spacing, tolerance_mm)[counted]
        add("map", name, localisation(values, inside, near))
        for baseline, ranked in others.items():
            add(baseline, name, localisation(ranked, inside, near))
    return measured
