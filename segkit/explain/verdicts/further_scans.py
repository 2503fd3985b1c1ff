"""How many further scans would probably lead to a verdict, if they are like those measured."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import stats

from segkit.explain.verdicts.comparators import OTHER
from segkit.explain.verdicts.falls import DICE_MARGIN, MATTERING_SHARE, SIGNIFICANT, Values
from segkit.explain.verdicts.gains import Compared
from segkit.explain.verdicts.hypothesis import ROUTE_SHARES, SIMES_SHARES, Hypothesis

POWER = 0.8
"""Probability of a verdict for which the number of further scans is estimated."""
MOST_FURTHER = 200
"""Largest number of further scans that is reported."""


def further_scans(of: Hypothesis, both: Sequence[Hypothesis], num_tested: int) -> int | None:
    """Estimated number of further scans for a verdict if they are like these; None if too many.

    Each test of a verdict must reach p = 0.05 with probability 0.8. The estimate uses the normal
    approximation of the signed-rank test, with the mean and deviation of these scans. If only a
    share of scans has the measure of a test, more scans are needed in proportion.

    Args:
        of: the hypothesis of the verdict.
        both: the hypotheses of both directions. Only a channel that shows no more in either of them
            is uninformative.
        num_tested: number of tests for which the p values are corrected.
    """
    informative, others = _scans_for_words(of, both, num_tested)
    return _reported(min(others, math.inf if _too_few_networks(of, num_tested) else informative))


def needs_more_networks(of: Hypothesis, both: Sequence[Hypothesis], num_tested: int) -> bool:
    """Whether further scans are enough for all but the comparison with untrained networks.

    Its p value rests on the number of untrained networks and of tests, and not on that of scans.
    The arguments are those of `further_scans`.
    """
    informative, others = _scans_for_words(of, both, num_tested)
    return (
        _too_few_networks(of, num_tested)
        and _reported(others) is None
        and _reported(informative) is not None
    )


def _too_few_networks(of: Hypothesis, num_tested: int) -> bool:
    """Whether the test against untrained networks stays above p = 0.05 with any number of scans."""
    return of.outlier_p() * num_tested > SIGNIFICANT


def _reported(further: float) -> int | None:
    return None if further > MOST_FURTHER else max(math.ceil(further), 1)


def _scans_for_words(
    of: Hypothesis, both: Sequence[Hypothesis], num_tested: int
) -> tuple[float, float]:
    """Further scans for "informative", and for the first of "redundant" and "uninformative".

    Those for "informative" take no account of the test against untrained networks.
    """

    cases = of.cases

    def further(values: Values, significance: float) -> float:
        return _further(values, cases, significance)

    # Corrected for the number of tests, and for the choice of localisation or deletion.
    strict = ROUTE_SHARES["localisation"] * SIGNIFICANT / num_tested
    shows = [
        max((further(c.beyond, strict) for c in route), default=math.inf)
        for route in of.routes.values()
    ]
    need = [
        further(falls, strict) if np.mean(falls) >= DICE_MARGIN else math.inf
        for falls in of.least_contexts
    ]
    without = [
        further([DICE_MARGIN - abs(fall) for fall in falls], strict) for falls in of.contexts
    ]
    least = math.ceil(math.log(strict) / math.log(1 - MATTERING_SHARE)) - cases
    shown = min(shows, default=math.inf)
    learned = of.learned_p() < 1
    informative = max(shown, min(need, default=math.inf)) if learned else math.inf
    redundant = max(shown, max(without, default=math.inf), least)
    no_more = [_no_more(route, one.cases) for one in both for route in one.routes.values()]
    uninformative = min(max(no_more, default=math.inf), _same(of))
    return informative, min(redundant, uninformative)


def _no_more(route: Sequence[Compared], cases: int) -> float:
    """Further scans until Simes' test finds that a map shows no more than some comparator.

    For k of m comparators, each p must be at most k / m of the permitted error. Only powers of two
    and m are tried for k.
    """
    found = []
    for other, share in SIMES_SHARES.items():
        alike = [one.short for one in route if one.name.startswith(OTHER) == other]
        places = (2**power for power in range(len(alike).bit_length() + bool(alike)))
        for place in {min(place, len(alike)) for place in places}:
            permitted = share * SIGNIFICANT / 2 * place / len(alike)
            found.append(sorted(_further(one, cases, permitted) for one in alike)[place - 1])
    return min(found, default=math.inf)


def _same(of: Hypothesis) -> float:
    """Further scans until a map is found to be like those of untrained networks."""
    tests = of.same_tests()
    return max(
        (_further(one, of.cases, SIGNIFICANT / 2) for one in tests),
        default=math.inf,
    )


def _further(values: Values, cases: int, significance: float) -> float:
    """Further scans for a test. Only the share of scans that has its measure counts."""
    if not len(values):
        return math.inf
    return max(0, _needed(values, significance) - len(values)) * cases / len(values)


def _needed(values: Values, significance: float) -> float:
    """Number of scans after which a signed-rank test probably finds such values above 0."""
    least = math.ceil(-math.log2(significance))
    if len(values) < 2:
        return least if len(values) and values[0] > 0 else math.inf
    mean = sum(values) / len(values)
    if mean <= 0:
        return math.inf
    # In plain Python: NumPy takes longer for so few values, and there are thousands of lists.
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    # The efficiency of the signed-rank test is 3 / π of that of the t-test.
    return max(least, math.ceil((_quantiles(significance) * deviation / mean) ** 2 * math.pi / 3))


@lru_cache(maxsize=1024)
def _quantiles(significance: float) -> float:
    """Sum of the normal quantiles of the permitted error and of the power.

    It is the same for hundreds of comparators, and SciPy takes a millisecond for it.
    """
    return float(stats.norm.isf(significance) + stats.norm.ppf(POWER))
