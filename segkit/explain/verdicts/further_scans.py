"""How many further scans would probably lead to a verdict, if they are like those measured."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

from segkit.explain.verdicts.comparators import OTHER
from segkit.explain.verdicts.falls import (
    DICE_MARGIN,
    MATTERING_SHARE,
    SIGNIFICANT,
    Values,
    mean_of,
    num_mattering,
)
from segkit.explain.verdicts.gains import Compared
from segkit.explain.verdicts.hypothesis import ROUTE_SHARES, SIMES_SHARES, Hypothesis

POWER = 0.8
"""Probability of a verdict for which the number of further scans is estimated."""
MOST_FURTHER = 200
"""Largest number of further scans that is reported."""


class Further(NamedTuple):
    """What would probably lead to a verdict."""

    scans: int | None
    """Number of further scans; None if more than `MOST_FURTHER`."""
    more_networks: bool
    """Whether further scans are enough for all but the comparison with untrained networks."""


def further_scans(of: Hypothesis, both: Sequence[Hypothesis], num_tested: int) -> Further:
    """Estimated number of further scans for a verdict if they are like these.

    Each test of a verdict must reach p = 0.05 with probability 0.8. The estimate uses the normal
    approximation of the signed-rank test, with the mean and deviation of these scans. If only a
    share of scans has the measure of a test, more scans are needed in proportion. The p value of
    the comparison with untrained networks rests on the number of these networks and of tests, and
    not on that of scans.

    Args:
        of: the hypothesis of the verdict.
        both: the hypotheses of both directions. Only a channel that shows no more in either of them
            is uninformative.
        num_tested: number of tests for which the p values are corrected.
    """
    cases, permitted = of.cases, SIGNIFICANT / num_tested
    shown = min((_shown(of, way, permitted) for way in of.routes), default=math.inf)
    informative = max(shown, _needed(of, permitted), _learned(of, permitted))
    redundant = max(shown, _not_needed(of, permitted))
    no_more = [_no_more(route, one.cases) for one in both for route in one.routes.values()]
    same = _all_of(of.same_tests(), cases, SIGNIFICANT / 2)
    others = min(redundant, max(no_more, default=math.inf), same)
    too_few_networks = of.outlier_p() > permitted
    scans = _reported(others if too_few_networks else min(informative, others))
    needs_networks = too_few_networks and scans is None and _reported(informative) is not None
    return Further(scans, needs_networks)


def _reported(further: float) -> int | None:
    return None if further > MOST_FURTHER else max(math.ceil(further), 1)


def _shown(of: Hypothesis, way: str, permitted: float) -> float:
    """Further scans until a kind of evidence shows more than every comparator.

    Args:
        of: the hypothesis.
        way: the kind of evidence, which has a share of the permitted error.
        permitted: the permitted error.
    """
    beyond = [one.beyond for one in of.routes[way]]
    return _all_of(beyond, of.cases, permitted * ROUTE_SHARES[way])


def _needed(of: Hypothesis, permitted: float) -> float:
    """Further scans until the channel is needed in one of the contexts, which share the error."""
    contexts = of.least_contexts
    found = [
        _all_of([falls], of.cases, permitted / len(contexts))
        for falls in contexts
        if mean_of(falls) >= DICE_MARGIN
    ]
    return min(found, default=math.inf)


def _learned(of: Hypothesis, permitted: float) -> float:
    """Further scans until |ρ| with untrained networks is small enough."""
    return _all_of([of.unlike()], of.cases, permitted) if of.learned_p() < 1 else math.inf


def _not_needed(of: Hypothesis, permitted: float) -> float:
    """Further scans until the channel is not needed in any context."""
    sides = [
        [DICE_MARGIN + sign * fall for fall in falls] for falls in of.contexts for sign in (-1, 1)
    ]
    seldom = [_seldom(falls, of.cases, permitted) for falls in of.contexts]
    return max(_all_of(sides, of.cases, permitted), *seldom) if seldom else math.inf


def _seldom(falls: Values, cases: int, permitted: float) -> float:
    """Further scans until the fall matters in significantly less than a third of them."""
    counts = np.arange(len(falls), len(falls) + MOST_FURTHER + 1)
    mattering = stats.binom.ppf(POWER, counts, num_mattering(falls) / len(falls))
    enough = np.flatnonzero(stats.binom.cdf(mattering, counts, MATTERING_SHARE) <= permitted)
    return float(enough[0]) * cases / len(falls) if enough.size else math.inf


def _no_more(route: Sequence[Compared], cases: int) -> float:
    """Further scans until Simes' test finds that a map shows no more than some comparator.

    For k of m comparators, each p must be at most k / m of the permitted error. Only powers of two
    and m are tried for k.
    """
    found = []
    for other, share in SIMES_SHARES.items():
        alike = _Tests([one.short for one in route if one.name.startswith(OTHER) == other])
        most = len(alike.counts)
        places = (2**power for power in range(most.bit_length() + bool(most)))
        for place in {min(place, most) for place in places}:
            further = alike.further(cases, share * SIGNIFICANT / 2 * place / most)
            found.append(float(np.partition(further, place - 1)[place - 1]))
    return min(found, default=math.inf)


def _all_of(tests: Sequence[Values], cases: int, permitted: float) -> float:
    """Further scans until all tests are significant; infinite if there is none."""
    further = _Tests(tests).further(cases, permitted)
    return float(further.max()) if further.size else math.inf


class _Tests:
    """Signed-rank tests over scans, of whether values are above 0.

    Args:
        tests: the values of each test. A scan without the measure of a test has no value.
    """

    def __init__(self, tests: Sequence[Values]) -> None:
        self.counts = np.array([len(values) for values in tests])
        self.spreads = np.full(len(tests), math.inf)
        """(deviation / mean)²; infinite without values or if the mean is 0 or less."""
        for count in set(self.counts.tolist()) - {0}:
            alike = self.counts == count
            values = np.array([one for one in tests if len(one) == count])
            means = values.mean(axis=1)
            deviations = values.std(axis=1, ddof=1) if count > 1 else np.zeros_like(means)
            ratios = np.full_like(means, math.inf)
            np.divide(deviations, means, out=ratios, where=means > 0)
            self.spreads[alike] = ratios**2

    def further(self, cases: int, permitted: float) -> Float[ndarray, " tests"]:
        """For each test, the number of further scans until its p is probably small enough.

        Args:
            cases: number of scans. Only the share of scans that has the measure of a test counts.
            permitted: the largest p value.
        """
        least = math.ceil(-math.log2(permitted))
        # The efficiency of the signed-rank test is 3 / π of that of the t-test.
        needed = np.ceil(_quantiles(permitted) ** 2 * self.spreads * math.pi / 3)
        more: ndarray = np.maximum(np.maximum(least, needed) - self.counts, 0)
        return np.where(self.counts > 0, more * cases / np.maximum(self.counts, 1), math.inf)


@lru_cache
def _quantiles(permitted: float) -> float:
    """The mean, in standard errors, of a test that probably has at most this p value."""
    return float(stats.norm.isf(permitted) + stats.norm.ppf(POWER))
