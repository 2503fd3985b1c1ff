"""Laws of what a map's values say of a structure: closed forms, chance, and trusted libraries."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays
from numpy import ndarray
from numpy.testing import assert_array_equal
from scipy.stats import mannwhitneyu

from segkit.explain.measures.ranks import Ranked
from segkit.explain.measures.statistics import (
    Figure,
    auroc,
    distribution,
    energy_inside,
    iou_at_prevalence,
    localisation,
    near_structure,
    normalised_entropy,
    pointing,
    saturation,
)
from segkit.geometry.grid import Grid

INSIDE = np.arange(20) % 5 == 0
"""4 cells of 20: p = 0.2."""
LEVELS = arrays(np.float64, 20, elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))


def told(values: ndarray, inside: ndarray = INSIDE) -> dict[str, Figure]:
    return {figure.name: figure for figure in localisation(Ranked.of(values), inside, inside)}


def test_a_constant_map_measures_as_chance() -> None:
    for constant in (0.0, 0.3, 1.0):
        figures = told(np.full(20, constant))
        for name in ("energy", "enrichment", "pointing", "auroc", "iou"):
            assert figures[name].value == pytest.approx(figures[name].chance), name


def test_the_structure_itself_is_a_perfect_map() -> None:
    figures = {name: figure.value for name, figure in told(INSIDE.astype(float)).items()}
    assert figures == {"energy": 1, "enrichment": 5, "pointing": 1, "auroc": 1, "iou": 1}


def test_all_but_the_structure_is_the_worst_map() -> None:
    figures = {name: figure.value for name, figure in told(1.0 - INSIDE).items()}
    assert figures == {"energy": 0, "enrichment": 0, "pointing": 0, "auroc": 0, "iou": 0}


def test_each_figure_has_its_value_by_chance() -> None:
    chances = {name: figure.chance for name, figure in told(INSIDE.astype(float)).items()}
    assert chances == {
        "energy": pytest.approx(0.2),
        "enrichment": 1,
        "pointing": pytest.approx(0.2),
        "auroc": 0.5,
        "iou": pytest.approx(0.2 / 1.8),
    }


def test_random_maps_measure_as_chance_on_average() -> None:
    random = np.random.default_rng(0)
    inside = np.arange(2000) < 300
    found = [told(random.random(2000), inside) for _ in range(200)]
    for name, tolerance in (("energy", 0.01), ("enrichment", 0.02), ("auroc", 0.01), ("iou", 0.01)):
        mean = np.mean([figures[name].value for figures in found])
        assert mean == pytest.approx(found[0][name].chance, abs=tolerance), name


@pytest.mark.parametrize("inside", [np.zeros(4, bool)])
def test_measures_of_a_structure_without_cells_are_nan(inside: ndarray) -> None:
    figures = told(np.arange(4.0), inside)
    assert all(np.isnan(figure.value) for figure in figures.values())
    assert np.isnan(auroc(Ranked.of(np.arange(4.0)), ~inside))


def test_the_share_of_energy_equals_a_value_worked_out_by_hand() -> None:
    values, inside = np.array([1.0, 2.0, 3.0, 4.0]), np.array([False, True, False, True])
    assert energy_inside(values, inside) == 0.6
    assert told(values, inside)["enrichment"].value == 1.2


def test_cells_that_tie_for_the_highest_value_share_the_point() -> None:
    near = np.array([True, False, False, True, False])
    for values, share in (
        ([1.0, 0, 0, 0, 0], 1),
        ([1.0, 1, 0, 0, 0], 0.5),
        ([1.0, 1, 1, 1, 0], 0.5),
        ([0.0, 1, 1, 0, 1], 0),
    ):
        assert pointing(Ranked.of(np.array(values)), near) == share


def test_a_tolerance_is_in_millimetres_along_every_axis() -> None:
    inside = np.zeros((5, 5, 5), bool)
    inside[2, 2, 2] = True
    near = near_structure(inside, (1.0, 2.0, 4.0), 2.0)
    assert {tuple(cell) for cell in np.argwhere(near).tolist()} == {
        *((x, 2, 2) for x in range(5)),
        (2, 1, 2),
        (2, 3, 2),
    }
    assert_array_equal(near_structure(inside, (1.0, 2.0, 4.0), 0.0), inside)
    # The same in pixels of less than a nanometre.
    assert_array_equal(near_structure(inside, (1e-7, 2e-7, 4e-7), 2e-7), near)
    assert near_structure(inside, (1.0, 2.0, 4.0), 4.0)[2, 2].tolist() == [
        False,
        *[True] * 3,
        False,
    ]
    assert not near_structure(inside & False, (1.0, 1.0, 1.0), 9.0).any()


def test_a_tolerance_on_leaning_axes_is_that_of_the_world() -> None:
    """Slices 3 mm apart lean 4 mm aside, with pixels of 2 mm: (i, j, k) lies at (2i + 4k, 2j, 3k).

    So the next slice's nearest cell is (-2, 0, 1), 3 mm away, and (0, 0, 1) is 5 mm away.
    """
    grid = Grid((5, 3, 3), np.array([[2.0, 0, 4, 0], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]]))
    inside = np.zeros(grid.shape, bool)
    inside[2, 1, 1] = True
    near = near_structure(inside, grid.spacing, 3.0, grid.directions)
    assert {tuple(cell) for cell in (np.argwhere(near) - [2, 1, 1]).tolist()} == {
        (0, 0, 0), (1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (1, 1, 0), (1, -1, 0),
        (-1, 1, 0), (-1, -1, 0), (-2, 0, 1), (2, 0, -1),
    }  # fmt: skip
    apart = np.linalg.norm(grid.centres() - grid.centres()[2, 1, 1], axis=-1)
    for tolerance in (2.0, 3.7, 5.0, 6.5):
        near = near_structure(inside, grid.spacing, tolerance, grid.directions)
        assert_array_equal(near, apart <= tolerance + 1e-6)
    straight = Grid(grid.shape, np.diag([2.0, 2, 5, 1]))
    assert_array_equal(
        near_structure(inside, straight.spacing, 4.0, straight.directions),
        near_structure(inside, straight.spacing, 4.0),
    )


def test_iou_takes_as_many_of_the_highest_cells_as_lie_inside_and_a_share_of_ties() -> None:
    inside = np.array([True, False, True, False])
    assert iou_at_prevalence(Ranked.of(np.array([4.0, 3.0, 2.0, 1.0])), inside) == 1 / 3
    assert iou_at_prevalence(Ranked.of(np.array([4.0, 1.0, 2.0, 1.0])), inside) == 1
    # Of three that share the second place, one of which lies inside, a third is expected.
    both = 1 + 1 / 3
    assert iou_at_prevalence(Ranked.of(np.array([4.0, 1.0, 1.0, 1.0])), inside) == pytest.approx(
        both / (4 - both)
    )
    assert iou_at_prevalence(Ranked.of(np.ones(4)), inside) == pytest.approx(0.5 / (2 - 0.5))


@given(LEVELS, st.integers(1, 19), st.permutations(range(20)))
def test_the_order_of_cells_in_an_array_changes_nothing(
    values: ndarray, count: int, order: list[int]
) -> None:
    inside = np.arange(20) < count
    first = localisation(Ranked.of(values), inside, inside)
    second = localisation(Ranked.of(values[order]), inside[order], inside[order])
    for one, other in zip(first, second, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-12), one.name


@given(st.floats(1e-3, 1e3), st.integers(1, 19), st.integers(0, 99))
def test_rounding_errors_of_blending_point_at_nothing(value: float, count: int, seed: int) -> None:
    """A gate of one value as it comes out of windows: off by up to four units in the last place."""
    inside = np.arange(20) < count
    off = np.random.default_rng(seed).integers(-4, 5, 20) * 2.0**-24
    figures = told(value * (1 + off), inside)
    for name in ("pointing", "auroc", "iou"):
        assert figures[name].value == pytest.approx(figures[name].chance), name


def test_entropy_is_one_if_all_values_are_equal_and_zero_for_a_single_cell() -> None:
    assert normalised_entropy(np.full(7, 0.2)) == pytest.approx(1)
    assert normalised_entropy(np.eye(7)[3]) == 0
    assert normalised_entropy(np.zeros(7)) == 1
    assert normalised_entropy(np.array([1.0, 1, 0, 0])) == pytest.approx(0.5)
    assert np.isnan(normalised_entropy(np.ones(1)))


def test_saturation_counts_both_ends_of_the_range() -> None:
    values = np.array([0.0, 0.01, 0.5, 0.99])
    assert saturation(values, 0.0, 1.0) == (0.5, 0.25)
    low, high = saturation(values, 0.0, np.inf)
    assert low == 0.5 and np.isnan(high)
    names = [figure.name for figure in distribution(values, 0.0, 1.0)]
    assert names == ["entropy", "saturated_low", "saturated_high"]


@given(LEVELS, st.integers(1, 19))
def test_a_monotonic_change_of_values_keeps_auroc_and_iou(values: ndarray, count: int) -> None:
    inside = np.arange(20) < count
    scaled = np.exp(3 * values) - 5
    assert auroc(Ranked.of(scaled), inside) == auroc(Ranked.of(values), inside)
    assert iou_at_prevalence(Ranked.of(scaled), inside) == iou_at_prevalence(
        Ranked.of(values), inside
    )
    assert auroc(Ranked.of(-values), inside) == pytest.approx(1 - auroc(Ranked.of(values), inside))


@pytest.mark.parity
@given(LEVELS, st.integers(1, 19))
def test_auroc_is_the_statistic_of_mann_and_whitney(values: ndarray, count: int) -> None:
    inside = np.arange(20) < count
    counted = mannwhitneyu(values[inside], values[~inside], method="asymptotic").statistic
    assert auroc(Ranked.of(values), inside) == pytest.approx(counted / (count * (20 - count)))
