"""Shapley values of a function of coalitions, by KernelSHAP.

Lundberg & Lee (2017, arXiv:1705.07874, theorem 2): the Shapley values are the coefficients of a
linear model that is fitted to the values of all coalitions. A coalition of s among M players has
the weight (M - 1) / (C(M, s) s (M - s)). The model is exact for no player and for all players.

If there are too many coalitions, all coalitions of the sizes with the largest weights are used. The
others are sampled in pairs of a coalition and its complement (Covert & Lee 2021, arXiv:2012.01536).
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray


@dataclass(frozen=True, eq=False)
class Coalitions:
    """Coalitions of players, and their weights in the fit."""

    members: Bool[ndarray, "coalition player"]
    weights: Float[ndarray, " coalition"]
    complete: bool
    """Whether these are all coalitions but the empty one and the one of all players. The Shapley
    values are then exact."""


def coalitions(players: int, count: int, *, seed: int = 0) -> Coalitions:
    """At most `count` coalitions of some of the players.

    Args:
        players: the number of players, at least 1.
        count: the largest number of coalitions; at least twice the number of players, so that
            there is a coalition of each single player, and one of all players but this one.
        seed: seed of the coalitions that are sampled.
    """
    assert count >= min(2 * players, 2**players - 2), "too few coalitions to fit all players"
    weights: dict[bytes, float] = {}
    left, mass = count, {size: _mass(players, size) for size in range(1, players)}
    sizes = list(range(1, players // 2 + 1))
    while sizes:
        pair = {sizes[0], players - sizes[0]}
        if sum(math.comb(players, size) for size in pair) > left:
            break
        for size in pair:
            weight = mass.pop(size) / math.comb(players, size)
            for members in itertools.combinations(range(players), size):
                weights[_key(players, members)] = weight
                left -= 1
        sizes.pop(0)
    sampled: dict[bytes, int] = {}
    if sizes and left > 1:
        random = np.random.default_rng(seed)
        chances = np.array([mass[size] for size in sizes])
        # A size and its complement are drawn together, so the middle size counts for two.
        chances[[2 * size == players for size in sizes]] /= 2
        for _ in range(4 * left):
            if len(sampled) + 2 > left:
                break
            size = int(random.choice(sizes, p=chances / chances.sum()))
            drawn = random.choice(players, size, replace=False).tolist()
            for key in (_key(players, drawn), _key(players, drawn, without=True)):
                sampled[key] = sampled.get(key, 0) + 1
    total = sum(sampled.values())
    for key, times in sampled.items():
        weights[key] = sum(mass.values()) * times / total
    found = np.frombuffer(b"".join(weights), np.uint8).reshape(-1, players).astype(bool)
    return Coalitions(found, np.array(list(weights.values())), complete=not sizes)


def fit_shapley(
    chosen: Coalitions,
    values: Float[ndarray, "coalition output"],
    nobody: Float[ndarray, " output"],
    everybody: Float[ndarray, " output"],
) -> Float[ndarray, "player output"]:
    """The Shapley value of each player, for each output. They sum to `everybody - nobody`.

    Args:
        chosen: the coalitions.
        values: their values.
        nobody: the value without any player.
        everybody: the value with all players.
    """
    members = chosen.members.astype(float)
    if members.shape[1] == 1:
        return (everybody - nobody)[None]
    # The last player takes what the others leave, so that the sum is exact.
    last = members[:, -1:]
    design = members[:, :-1] - last
    gained = values - nobody - last * (everybody - nobody)
    scale = np.sqrt(chosen.weights)[:, None]
    found, *_ = np.linalg.lstsq(design * scale, gained * scale, rcond=None)
    return np.concatenate([found, (everybody - nobody - found.sum(axis=0))[None]])


def _mass(players: int, size: int) -> float:
    """The weight of all coalitions of one size together."""
    return (players - 1) / (size * (players - size))


def _key(players: int, members: Iterable[int], *, without: bool = False) -> bytes:
    row = np.full(players, without, np.uint8)
    row[list(members)] = not without
    return row.tobytes()
