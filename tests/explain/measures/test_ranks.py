"""Laws of ranks, and parity with scipy."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays
from numpy import ndarray
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from segkit.evaluation.compare import holm
from segkit.explain.measures.ranks import (
    Ranked,
    rise_p,
    rise_ps,
    simes,
    spearman,
    without_rounding_noise,
)

LEVELS = arrays(np.float64, 20, elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))


def correlation(first: ndarray, second: ndarray) -> float:
    return spearman(Ranked.of(first), Ranked.of(second))


@pytest.mark.parity
def test_spearman_equals_scipy_with_ties() -> None:
    random = np.random.default_rng(0)
    first = random.integers(0, 5, (4, 3, 2)).astype(float)
    second = first + random.integers(0, 5, first.shape)
    expected = stats.spearmanr(first.ravel(), second.ravel()).statistic
    assert correlation(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parity
@given(LEVELS, LEVELS)
def test_ranks_and_their_correlation_equal_scipy(values: ndarray, others: ndarray) -> None:
    assert_array_equal(Ranked.of(values).ranks, stats.rankdata(values))
    if np.ptp(values) and np.ptp(others):
        expected = stats.spearmanr(values, others).statistic
        assert_allclose(correlation(values, others), expected, atol=1e-12)
    else:
        assert np.isnan(correlation(values, others))


def test_only_the_order_of_values_matters_and_a_constant_map_has_no_correlation() -> None:
    values = np.random.default_rng(0).random((3, 4))
    assert correlation(values, values) == 1
    assert correlation(values, np.exp(5 * values)) == pytest.approx(1)
    assert correlation(values, -values) == pytest.approx(-1)
    assert np.isnan(correlation(values, np.ones_like(values)))
    assert np.isnan(correlation(np.ones(3), np.ones(3)))


@given(st.floats(-1e3, 1e3), st.integers(0, 99))
def test_rounding_errors_do_not_change_ranks(value: float, seed: int) -> None:
    """A map of one value, off by up to four units in the last place of float32."""
    off = np.random.default_rng(seed).integers(-4, 5, 50) * 2.0**-24
    assert np.ptp(without_rounding_noise(value * (1 + off))) == 0
    values = np.random.default_rng(seed).permutation(50) / 50
    assert (np.argsort(without_rounding_noise(values)) == np.argsort(values)).all()
    assert_allclose(without_rounding_noise(values), values, atol=2.0**-18)


def test_the_signed_rank_test_of_changes_that_all_go_one_way_is_a_power_of_two() -> None:
    assert rise_p([0.3, 0.1, 0.2, 0.4, 0.5]) == 2**-5
    assert rise_p([0.3, 0.0, 0.1, 0.2, 0.4, 0.5]) == 2**-5
    assert rise_p([-0.3, -0.1, -0.2]) == 1
    assert rise_p([0.0, 0.0]) == rise_p([]) == 1
    assert rise_p([0.1, -0.1]) == 0.75  # of ranks that tie, three of four signs do as well
    assert rise_p([1.0] * 60) < 1e-9


@pytest.mark.parity
def test_no_cells_have_no_correlation() -> None:
    assert np.isnan(correlation(np.zeros(0), np.zeros(0)))


def test_several_signed_rank_tests_at_once_are_those_of_each() -> None:
    """With ties, changes of 0, and other numbers of cases."""
    random = np.random.default_rng(0)
    tests = [random.integers(-2, 4, count).tolist() for count in (0, 1, 5, 12, 12, 55)]
    assert rise_ps(tests) == [rise_p(test) for test in tests] and rise_ps([]) == []
    for p, test in zip(rise_ps(tests)[:5], tests[:5], strict=True):
        changes = np.array([change for change in test if change])
        ranks = stats.rankdata(np.abs(changes))
        signs = np.array(list(itertools.product((0, 1), repeat=len(changes))))
        assert p == pytest.approx(np.mean(signs @ ranks >= ranks[changes > 0].sum()))


@pytest.mark.parametrize("count", [3, 8, 20, 50, 80])
def test_the_signed_rank_test_equals_scipy(count: int) -> None:
    changes = np.random.default_rng(count).normal(0.2, 1, count)
    method = "exact" if count <= 50 else "asymptotic"
    expected = stats.wilcoxon(changes, alternative="greater", method=method).pvalue
    tolerance = 1e-9 if count <= 50 else 0.02
    assert rise_p(changes.tolist()) == pytest.approx(expected, rel=tolerance)


def test_the_signed_rank_test_is_exact_with_ties() -> None:
    """Ranks 1.5, 1.5, 3 of which 3 and 1.5 are above: sums of 4.5 or more in three of eight."""
    assert rise_p([0.1, -0.1, 0.2]) == 3 / 8


def test_simes_equals_a_value_worked_out_by_hand() -> None:
    """3 x 0.02, 3 x 0.03 / 2 and 3 x 0.9 / 3: the second is least."""
    assert simes([0.9, 0.02, 0.03]) == pytest.approx(0.045)
    assert simes([0.3]) == 0.3


def test_holms_correction_equals_values_worked_out_by_hand() -> None:
    """Sorted 0.01, 0.03, 0.04 become 3 x 0.01, 2 x 0.03 and, no less than that, 0.06."""
    assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for p, q in zip(p_values, corrected, strict=True):
        assert p <= q <= 1
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert sorted(corrected) == [corrected[number] for number in order]
    assert min(corrected) == min(len(p_values) * min(p_values), 1)
