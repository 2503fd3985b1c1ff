"""What a map's values say of a structure and of themselves: arithmetic on cells, chance beside it.

All functions take the cells that count as one flat axis, and `inside`, which of them lie in the
structure; p is the structure's share of the cells. A figure is NaN where it is undefined: of a
structure that no cell or every cell lies in, or of ranks that are all alike.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy.ndimage import distance_transform_edt

from segkit.explain.measures.ranks import Ranked

NEAR_AN_END = 0.02
"""Within how much of an end of its range a map's value counts as saturated, for a range of 1."""
CellValues = Float[ndarray, " cells"]
Inside = Bool[ndarray, " cells"]


@dataclass(frozen=True)
class Figure:
    """A measure by name, its value, and what chance would give; None where there is no chance."""

    name: str
    value: float
    chance: float | None = None


def localisation(ranked: Ranked, inside: Inside, near: Inside) -> list[Figure]:
    """How well the highest values pick out a structure; `near` are the cells close enough to it.

    energy and enrichment (EBPG, Wang et al. 2020, arXiv:1910.01279), pointing (Zhang et al. 2018,
    doi:10.1007/s11263-017-1059-x), auroc and iou.
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
    """How widely a map's values spread, and how many stand at an end of the map's range."""
    low, high = saturation(values, lowest, highest)
    return [
        Figure("entropy", normalised_entropy(values), 1.0),
        Figure("saturated_low", low),
        Figure("saturated_high", high),
    ]


def energy_inside(values: CellValues, inside: Inside) -> float:
    """Σ values inside / Σ values, which must be 0 or more; p where all are 0, as of any constant.

    NaN where no cell lies inside.
    """
    if not inside.any():
        return float("nan")
    total = values.sum(dtype=np.float64)
    return (
        float(values[inside].sum(dtype=np.float64) / total) if total > 0 else float(inside.mean())
    )


def pointing(ranked: Ranked, near: Inside) -> float:
    """The share of the cells with the highest value that lie near enough: 0 or 1 but for ties."""
    return float(near[ranked.ranks == ranked.ranks.max()].mean())


def near_structure(
    inside: Bool[ndarray, "x y z"], spacing: tuple[float, float, float], tolerance_mm: float
) -> Bool[ndarray, "x y z"]:
    """The cells whose centre is within a tolerance (mm) of the centre of a cell inside."""
    if not inside.any():
        return np.zeros_like(inside)
    distance: ndarray = distance_transform_edt(~inside, sampling=spacing)
    return distance <= tolerance_mm + 1e-6


def auroc(ranked: Ranked, inside: Inside) -> float:
    """The chance that a cell inside has a higher value than one outside, a tie counting half.

    Mann and Whitney's U by mid-ranks; 0.5 for a constant.
    """
    within = int(inside.sum())
    beyond = len(inside) - within
    if within == 0 or beyond == 0:
        return float("nan")
    ranks = ranked.ranks[inside].sum()
    return float((ranks - within * (within + 1) / 2) / (within * beyond))


def iou_at_prevalence(ranked: Ranked, inside: Inside) -> float:
    """Intersection over union of the structure and as many cells of the highest values.

    Of equal values at the cut, so many are taken at random: the intersection is its expectation,
    whatever order cells have in the array. p / (2 - p) for a constant, and by chance about that.
    """
    count = int(inside.sum())
    if count == 0:
        return float("nan")
    cut = np.partition(ranked.ranks, -count)[-count]
    above, tied = ranked.ranks > cut, ranked.ranks == cut
    both = inside[above].sum() + (count - above.sum()) * inside[tied].mean()
    return float(both / (2 * count - both))


def normalised_entropy(values: CellValues) -> float:
    """Entropy of values over their sum, over log N: 1 if all are alike, 0 if all but one are 0."""
    if len(values) < 2:
        return float("nan")
    total = values.sum(dtype=np.float64)
    if total <= 0:
        return 1.0
    shares = values[values > 0] / total
    return float(-(shares * np.log(shares)).sum(dtype=np.float64) / np.log(len(values)))


def saturation(values: CellValues, lowest: float, highest: float) -> tuple[float, float]:
    """The shares of cells at the lower and at the upper end of the map's range.

    NaN at an end that is infinite.
    """
    low = np.mean(values <= lowest + NEAR_AN_END) if np.isfinite(lowest) else np.nan
    high = np.mean(values >= highest - NEAR_AN_END) if np.isfinite(highest) else np.nan
    return float(low), float(high)
