"""What ranks alone can tell: do two maps agree, do cases agree, and are many tests too many?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

MOST_EXACT = 50
"""Cases up to which all signs are counted; beyond, the normal approximation serves."""
LAST_DIGITS = 2.0**-18
"""Of a map's largest value: what sums over windows may be off by, and no cell is higher for it."""


def settled(values: Float[ndarray, "*cells"]) -> Float[ndarray, "*cells"]:
    """A map rounded to 2^-18 of its largest size, before its cells are ranked.

    Windows are blended in float32, so that a map of one value comes out with last digits that
    depend on where a cell lies in its window; they would rank the middle of the image first. For
    the same reason a map whose largest value is too small for float32 is 0.
    """
    largest = float(np.abs(values).max(initial=0))
    if largest < np.finfo(np.float32).tiny:
        return np.zeros_like(values)
    step = largest * LAST_DIGITS
    return np.round(values / step) * step


@dataclass(frozen=True, eq=False)
class Ranked:
    """A map's values with their ranks, found once for everything that goes by rank."""

    values: Float[ndarray, "*cells"]
    ranks: Float[ndarray, " cells"]
    """From 1 on, in the order of memory. Equal values share their mean rank; so do values that
    differ by less than blending windows in float32 may be off by (`settled`)."""

    @classmethod
    def of(cls, values: Float[ndarray, "*cells"]) -> Self:
        """The values with their ranks."""
        return cls(values, stats.rankdata(settled(values), axis=None))


def spearman(first: Ranked, second: Ranked) -> float:
    """Spearman's rank correlation of two maps on one grid, from -1 to 1.

    NaN if either map is constant, as it has no ranks.
    """
    if np.ptp(first.ranks) == 0 or np.ptp(second.ranks) == 0:
        return float("nan")
    one, other = first.ranks - first.ranks.mean(), second.ranks - second.ranks.mean()
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def rise_p(changes: Sequence[float]) -> float:
    """One-sided p of Wilcoxon's signed-rank test (1945, doi:10.2307/3001968) that changes lie above
    0.

    Changes of 0 are left out; 1 where all are 0. Of n others it is no less than 2^-n. All signs are
    counted up to 50 changes, ties included; beyond, the normal approximation serves.
    """
    counted = np.asarray([change for change in changes if change != 0], float)
    if not counted.size:
        return 1.0
    _, places, counts = np.unique(np.abs(counted), return_inverse=True, return_counts=True)
    doubled = (2 * counts.cumsum() - counts + 1)[places]  # twice the rank; ties share theirs
    above = int(doubled[counted > 0].sum())
    if len(counted) > MOST_EXACT:
        mean, deviation = doubled.sum() / 2, np.sqrt((doubled.astype(float) ** 2).sum()) / 2
        return float(stats.norm.sf((above - 1 - mean) / deviation))
    return float(_tail(tuple(sorted(doubled.tolist())))[above])


@lru_cache(maxsize=1024)
def _tail(doubled: tuple[int, ...]) -> Float[ndarray, " sums"]:
    """By each sum, the chance that as much or more comes from ranks of random signs."""
    chances = np.zeros(sum(doubled) + 1)
    chances[0] = 1.0
    for rank in doubled:
        chances[rank:] += chances[:-rank].copy()
    tail: ndarray = chances[::-1].cumsum()[::-1] / 2.0 ** len(doubled)
    return tail


def simes(p_values: Sequence[float]) -> float:
    """The p value of all hypotheses holding together (Simes 1986, doi:10.1093/biomet/73.3.751).

    The least of m p / k over the k-th smallest p of m. It holds for tests that go together.
    """
    count = len(p_values)
    return min(count * p / place for place, p in enumerate(sorted(p_values), start=1))
