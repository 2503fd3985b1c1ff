"""Does a network need a part? Tests of the falls of Dice without this part, over scans.

A fall is Dice with the part minus Dice without it, in one scan.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from segkit.explain.measures.ranks import rise_p

SIGNIFICANT = 0.05
DICE_MARGIN = 0.01
"""Smallest fall of Dice that matters, in one scan and on average over scans."""
MATTERING_SHARE = 1 / 3
"""A part counts as not needed if its removal matters in less than this share of scans."""
Values = Sequence[float]


def needed_p(falls: Values) -> float:
    """P value of the null hypothesis that the network does not need the part.

    It is 1 if the mean fall is below the margin.
    """
    return rise_p(falls) if len(falls) and np.mean(falls) >= DICE_MARGIN else 1.0


def not_needed_ps(falls: Values) -> list[float]:
    """P values of tests that must all be small to say that the network does not need the part.

    Two one-sided tests (TOST) of the size of the fall, and a test of the share of scans in which
    the fall matters. Each side must be significant in Wilcoxon's test and in Student's t test of
    the mean: large falls in a few scans hardly change the first, but they move the mean.
    """
    below, above = [DICE_MARGIN - fall for fall in falls], [DICE_MARGIN + fall for fall in falls]
    return [
        *(max(rise_p(side), mean_above_zero_p(side)) for side in (below, above)),
        float(stats.binom.cdf(num_mattering(falls), len(falls), MATTERING_SHARE)),
    ]


def mean_above_zero_p(values: Values) -> float:
    """One-sided p value of Student's t test; the alternative is that the mean is above 0.

    It is 1 for fewer than two values.
    """
    if len(values) < 2:
        return 1.0
    mean, error = mean_of(values), float(stats.sem(values))
    if error == 0:
        return 0.0 if mean > 0 else 1.0
    return float(stats.t.sf(mean / error, len(values) - 1))


def num_mattering(falls: Values) -> int:
    """The number of scans in which the fall matters."""
    return sum(fall > DICE_MARGIN for fall in falls)


def mean_interval(values: Values) -> tuple[float, float]:
    """The 95 % interval of a mean, by Student's t; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan, math.nan
    half = float(stats.t.isf(0.025, len(values) - 1) * stats.sem(values))
    return mean_of(values) - half, mean_of(values) + half


def mean_of(values: Values) -> float:
    """The mean; NaN if there are no values."""
    return float(np.mean(values)) if len(values) else math.nan
