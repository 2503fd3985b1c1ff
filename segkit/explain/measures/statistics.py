"""Measures of a map: how well it localises a structure, and how its values are distributed.

All functions take the counted cells as one flat axis. `inside` tells for each cell whether it lies
in the structure; p is the share of cells inside. A measure is NaN if it is undefined, for example
AUROC if no cell or every cell lies inside.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy.ndimage import distance_transform_edt
from scipy.spatial import KDTree

from segkit.explain.measures.ranks import Ranked
from segkit.geometry.grid import are_sheared

NEAR_AN_END = 0.02
"""A value counts as saturated if it is this close to an end of the map's range."""
CellValues = Float[ndarray, " cells"]
Inside = Bool[ndarray, " cells"]


@dataclass(frozen=True)
class Figure:
    """Name and value of a measure, and the value expected by chance (None if there is none)."""

    name: str
    value: float
    chance: float | None = None


def localisation(ranked: Ranked, inside: Inside, near: Inside) -> list[Figure]:
    """Measures of how well the highest values localise a structure.

    energy and enrichment (EBPG, Wang et al. 2020, arXiv:1910.01279), pointing (Zhang et al. 2018,
    doi:10.1007/s11263-017-1059-x), auroc and iou.

    Args:
        ranked: the map's values with their ranks.
        inside: the cells in the structure.
        near: the cells within the tolerance of the structure, for the pointing game.
    """
    share = float(inside.mean())
    values = ranked.values
    energy = energy_inside(values, inside)
    defined = bool(inside.any())
    return [
        Figure("energy", energy, share),
        Figure("enrichment", energy / share if defined else float("nan"), 1.0),
        Figure("pointing", pointing(ranked, near) if defined else float("nan"), float(near.mean())),
        Figure("auroc", auroc(ranked, inside), 0.5),
        Figure("iou", iou_at_prevalence(ranked, inside), share / (2 - share)),
    ]


def distribution(values: CellValues, lowest: float, highest: float) -> list[Figure]:
    """Entropy of a map's values, and the shares of cells at either end of the map's range."""
    low, high = saturation(values, lowest, highest)
    return [
        Figure("entropy", normalised_entropy(values), 1.0),
        Figure("saturated_low", low),
        Figure("saturated_high", high),
    ]


def energy_inside(values: CellValues, inside: Inside) -> float:
    """Σ values inside / Σ values. All values must be 0 or more.

    It is p if the map is constant, also if all values are 0. NaN if no cell lies inside.
    """
    if not inside.any():
        return float("nan")
    total = values.sum(dtype=np.float64)
    return (
        float(values[inside].sum(dtype=np.float64) / total) if total > 0 else float(inside.mean())
    )


def pointing(ranked: Ranked, near: Inside) -> float:
    """The share of highest-valued cells that lie near the structure: 0 or 1, except for ties."""
    return float(near[ranked.ranks == ranked.ranks.max()].mean())


def near_structure(
    inside: Bool[ndarray, "x y z"],
    spacing: tuple[float, float, float],
    tolerance_mm: float,
    directions: Float[ndarray, "axis world"] | None = None,
) -> Bool[ndarray, "x y z"]:
    """The cells whose centre lies within a tolerance (mm) of the centre of a cell inside.

    Args:
        inside: the cells in the structure.
        spacing: distance between cells along each axis, in mm.
        tolerance_mm: the largest distance, in mm of the world.
        directions: unit vector along each axis; at right angles if None.
    """
    if not inside.any():
        return np.zeros_like(inside)
    if directions is not None and are_sheared(directions):
        steps = np.array(spacing)[:, None] * directions
        tree = KDTree(np.argwhere(inside) @ steps)
        cells = np.argwhere(np.ones_like(inside)) @ steps
        distance = np.asarray(tree.query(cells)[0]).reshape(inside.shape)
    else:
        distance = distance_transform_edt(~inside, sampling=spacing)
    return distance <= tolerance_mm * (1 + 1e-6)


def auroc(ranked: Ranked, inside: Inside) -> float:
    """The probability that a cell inside has a higher value than a cell outside. Ties count half.

    It follows from the Mann-Whitney U statistic with mid-ranks; 0.5 for a constant map.
    """
    within = int(inside.sum())
    beyond = len(inside) - within
    if within == 0 or beyond == 0:
        return float("nan")
    ranks = ranked.ranks[inside].sum()
    return float((ranks - within * (within + 1) / 2) / (within * beyond))


def iou_at_prevalence(ranked: Ranked, inside: Inside) -> float:
    """Intersection over union of the structure and equally many cells with the highest values.

    If several cells share the lowest selected value, a random choice among them is assumed and the
    intersection is its expected value. The result does not depend on the order of cells. It is
    p / (2 - p) for a constant map, and about that by chance.
    """
    count = int(inside.sum())
    if count == 0:
        return float("nan")
    cut = np.partition(ranked.ranks, -count)[-count]
    above, tied = ranked.ranks > cut, ranked.ranks == cut
    both = inside[above].sum() + (count - above.sum()) * inside[tied].mean()
    return float(both / (2 * count - both))


def normalised_entropy(values: CellValues) -> float:
    """Entropy of values / Σ values, divided by log N.

    It is 1 if all values are equal, and 0 if all but one are 0.
    """
    if len(values) < 2:
        return float("nan")
    total = values.sum(dtype=np.float64)
    if total <= 0:
        return 1.0
    shares = values[values > 0] / total
    return float(-(shares * np.log(shares)).sum(dtype=np.float64) / np.log(len(values)))


def saturation(values: CellValues, lowest: float, highest: float) -> tuple[float, float]:
    """The shares of cells at the lower and at the upper end of the map's range.

    NaN for an end that is infinite.

    Args:
        values: the map's values.
        lowest, highest: the ends of the map's range.
    """
    low = np.mean(values <= lowest + NEAR_AN_END) if np.isfinite(lowest) else np.nan
    high = np.mean(values >= highest - NEAR_AN_END) if np.isfinite(highest) else np.nan
    return float(low), float(high)
