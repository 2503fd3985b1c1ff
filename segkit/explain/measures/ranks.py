"""Rank statistics: correlation of maps, signed-rank tests over cases, and Simes' test."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

MOST_EXACT = 50
"""The largest number of cases for which the test is exact. Above it, it is approximated."""
LAST_DIGITS = 2.0**-18
"""Rounding error of blended windows, relative to the largest value of a map."""


def without_rounding_noise(values: Float[ndarray, "*cells"]) -> Float[ndarray, "*cells"]:
    """A map rounded to multiples of 2^-18 of its largest absolute value, for ranking.

    Windows are blended in float32. In a constant map, the last digits therefore depend on the
    position of a cell in its window, and ranks would put the middle of the image first. For the
    same reason, a map whose largest absolute value is too small for float32 becomes 0.
    """
    largest = float(np.abs(values).max(initial=0))
    if largest < np.finfo(np.float32).tiny:
        return np.zeros_like(values)
    step = largest * LAST_DIGITS
    return np.round(values / step) * step


@dataclass(frozen=True, eq=False)
class Ranked:
    """A map's values and their ranks, which several measures share."""

    values: Float[ndarray, "*cells"]
    ranks: Float[ndarray, " cells"]
    """Ranks from 1, in memory order. Equal values share their mean rank. Values that differ only
    by rounding noise count as equal (`without_rounding_noise`)."""

    @classmethod
    def of(cls, values: Float[ndarray, "*cells"]) -> Self:
        """The values with their ranks."""
        return cls(values, stats.rankdata(without_rounding_noise(values), axis=None))


def spearman(first: Ranked, second: Ranked) -> float:
    """Spearman's rank correlation of two maps on one grid, from -1 to 1.

    NaN if either map is constant, or if there are no cells.
    """
    if not first.ranks.size or np.ptp(first.ranks) == 0 or np.ptp(second.ranks) == 0:
        return float("nan")
    one, other = first.ranks - first.ranks.mean(), second.ranks - second.ranks.mean()
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def rise_p(changes: Sequence[float]) -> float:
    """One-sided p value of Wilcoxon's signed-rank test (1945, doi:10.2307/3001968).

    The alternative is that changes are greater than 0. Changes of 0 are left out; p is 1 if all are
    0. For n other changes, p is at least 2^-n. The test is exact for up to 50 changes, also with
    ties; for more, it uses the normal approximation.
    """
    counted = np.asarray([change for change in changes if change != 0], float)
    if not counted.size:
        return 1.0
    sizes = np.abs(counted)
    ordered = np.sort(sizes)
    # Twice the mid-rank of each value.
    doubled = ordered.searchsorted(sizes) + ordered.searchsorted(sizes, "right") + 1
    above = int(doubled[counted > 0].sum())
    if len(counted) > MOST_EXACT:
        mean, deviation = doubled.sum() / 2, np.sqrt((doubled.astype(float) ** 2).sum()) / 2
        return float(stats.norm.sf((above - 1 - mean) / deviation))
    return float(_tail(tuple(sorted(doubled.tolist())))[above])


@lru_cache(maxsize=1024)
def _tail(doubled: tuple[int, ...]) -> Float[ndarray, " sums"]:
    """For each rank sum, the probability of this sum or more if the signs are random."""
    chances = np.zeros(sum(doubled) + 1)
    chances[0] = 1.0
    for rank in doubled:
        chances[rank:] += chances[:-rank].copy()
    tail: ndarray = chances[::-1].cumsum()[::-1] / 2.0 ** len(doubled)
    return tail


def simes(p_values: Sequence[float]) -> float:
    """The p value of the hypothesis that all null hypotheses hold.

    Simes (1986, doi:10.1093/biomet/73.3.751): the minimum of m p(k) / k; p(k) is the k-th
    smallest of m p values. It is valid for positively dependent tests.
    """
    count = len(p_values)
    return min(count * p / place for place, p in enumerate(sorted(p_values), start=1))
