"""Rank statistics: correlation of maps, signed-rank tests over cases, and Simes' test."""

import math
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
    return rise_ps([changes])[0]


def rise_ps(tests: Sequence[Sequence[float]]) -> list[float]:
    """`rise_p` of several tests. The changes of all are ranked at once, which is faster.

    Args:
        tests: the changes of each test, not all over equally many cases.
    """
    most = max(map(len, tests), default=0)
    changes = np.zeros((len(tests), most))
    for row, test in zip(changes, tests, strict=True):
        row[: len(test)] = test
    # Twice the mid-rank of each size among those that are not 0.
    doubled = (2 * stats.rankdata(np.abs(changes), axis=1)).astype(int)
    doubled -= 2 * (changes == 0).sum(axis=1, keepdims=True)
    doubled[changes == 0] = 0
    above = np.where(changes > 0, doubled, 0).sum(axis=1).tolist()
    ordered = np.sort(doubled, axis=1).tolist()
    return [
        _rise_p(tuple(filter(None, one)), sum_above)
        for one, sum_above in zip(ordered, above, strict=True)
    ]


def _rise_p(doubled: tuple[int, ...], above: int) -> float:
    """The p value of a test.

    Args:
        doubled: twice the mid-ranks of all changes, sorted.
        above: the sum of those of the changes above 0.
    """
    if not doubled:
        return 1.0
    if len(doubled) > MOST_EXACT:
        mean = sum(doubled) / 2
        deviation = math.sqrt(sum(rank**2 for rank in doubled)) / 2
        return float(stats.norm.sf((above - 1 - mean) / deviation))
    return float(_tail(doubled)[above])


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
