"""Laws of Shapley values."""

import itertools
import math

import numpy as np
import pytest
from numpy import ndarray
from numpy.testing import assert_allclose

from segkit.explain.attribution.shapley import coalitions, fit_shapley


def subsets(players: int) -> list[tuple[int, ...]]:
    sizes = range(players + 1)
    return [one for size in sizes for one in itertools.combinations(range(players), size)]


def brute_force(value: dict[tuple[int, ...], float], players: int) -> list[float]:
    """Shapley values by their definition: the mean gain over all orders of the players."""
    gains = np.zeros(players)
    orders = list(itertools.permutations(range(players)))
    for order in orders:
        for place, player in enumerate(order):
            before, after = sorted(order[:place]), sorted(order[: place + 1])
            gains[player] += value[tuple(after)] - value[tuple(before)]
    found: list[float] = (gains / len(orders)).tolist()
    return found


def fitted(value: dict[tuple[int, ...], float], players: int, count: int) -> ndarray:
    chosen = coalitions(players, count)
    values = np.array([[value[tuple(np.flatnonzero(row).tolist())]] for row in chosen.members])
    nobody, everybody = value[()], value[tuple(range(players))]
    return fit_shapley(chosen, values, np.array([nobody]), np.array([everybody]))[:, 0]


@pytest.mark.parametrize("players", [1, 2, 3, 5])
def test_all_coalitions_give_the_mean_gain_over_all_orders(players: int) -> None:
    random = np.random.default_rng(players)
    sets = [
        one for size in range(players + 1) for one in itertools.combinations(range(players), size)
    ]
    value = {one: float(random.normal()) for one in sets}
    chosen = coalitions(players, 2**players)
    assert chosen.complete and len(chosen.members) == 2**players - 2
    assert_allclose(fitted(value, players, 2**players), brute_force(value, players), atol=1e-9)


def test_the_glove_game_gives_its_known_values() -> None:
    # Two left gloves and a right one; a pair is worth 1 (Shapley 1953): 1/6, 1/6, 2/3.
    value = {one: float(2 in one and len(one) > 1) for one in subsets(3)}
    assert_allclose(fitted(value, 3, 8), [1 / 6, 1 / 6, 2 / 3], atol=1e-9)


@pytest.mark.parametrize("count", [24, 40, 100])
def test_a_sum_of_players_is_found_exactly_from_few_coalitions(count: int) -> None:
    weights = np.random.default_rng(0).normal(size=12)
    chosen = coalitions(12, count, seed=1)
    assert not chosen.complete and len(chosen.members) <= count
    values = (chosen.members @ weights)[:, None] + 3
    found = fit_shapley(chosen, values, np.array([3.0]), np.array([weights.sum() + 3]))
    assert_allclose(found[:, 0], weights, atol=1e-9)


def test_values_sum_to_the_gain_of_all_players_however_few_coalitions_there_are() -> None:
    chosen = coalitions(9, 30)
    values = np.random.default_rng(0).normal(size=(len(chosen.members), 2))
    found = fit_shapley(chosen, values, np.array([0.0, 1.0]), np.array([5.0, -2.0]))
    assert_allclose(found.sum(axis=0), [5.0, -3.0], atol=1e-9)


def test_each_size_has_the_weight_of_the_kernel() -> None:
    for count in (254, 60, 30):
        chosen = coalitions(8, count)
        sizes = chosen.members.sum(axis=1)
        total = sum(7 / (size * (8 - size)) for size in range(1, 8))
        assert chosen.weights.sum() == pytest.approx(total)
        complete = [size for size in range(1, 8) if (sizes == size).sum() == math.comb(8, size)]
        assert {1, 7} <= set(complete)
        for size in complete if count == 254 else (1, 7):
            of_size = chosen.weights[sizes == size]
            assert_allclose(of_size, 7 / (math.comb(8, size) * size * (8 - size)))


def test_coalitions_are_distinct_come_with_their_complements_and_follow_the_seed() -> None:
    first, again, other = (coalitions(10, 60, seed=seed) for seed in (1, 1, 2))
    assert (first.members == again.members).all()
    assert first.members.shape != other.members.shape or (first.members != other.members).any()
    rows = {tuple(row) for row in first.members.tolist()}
    assert len(rows) == len(first.members)
    assert {tuple(not one for one in row) for row in rows} == rows
