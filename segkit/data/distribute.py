"""Distribution of groups of cases to parts, so that each part gets its share of every stratum."""

from collections.abc import Mapping, Sequence

import numpy as np

ROUNDING = 1e-9
"""Differences below this are due to the rounding of floats."""


def distribute(
    groups: Mapping[str, Sequence[int]],
    strata: np.ndarray,
    shares: Sequence[float],
    random: np.random.RandomState,
) -> list[list[int]]:
    """The cases of each part. No group is split; strata are shared evenly, but never at the cost of
    a part's share of the cases.

    Groups are assigned one after the other, large ones first. Groups of about equal size, within a
    factor of two, are ordered by their strata, rare ones first. A group goes to a part with room
    for it. Among these parts, it goes to the one whose distance to its shares of the strata grows
    least, and then to the one whose distance to its share of the cases grows least. A distance is
    the sum of the squared differences, divided by the part's share. (scikit-learn's
    StratifiedGroupKFold is also greedy, but lets strata decide the sizes.)

    A part p has room for a group of h cases if afterwards, for every other part q,
    share_q * cases_p - share_p * cases_q <= (share_p + share_q) / 2 * (largest group left).
    The part whose distance to its share of the cases grows least always has room. So two parts
    differ from their shares by at most half the largest group, and the sizes of equal parts differ
    by at most the largest group. Exception: each part gets at least one group.

    Args:
        groups: numbers of the cases of each group, by the group's name.
        strata: array (case, stratum) with the amount of each stratum in each case.
        shares: the share of each part; their sum is 1.
        random: shuffles groups of equal size and strata of equal amount.

    Returns:
        Sorted numbers of the cases of each part.
    """
    members = [list(cases) for cases in groups.values()]
    num_cases = np.array([len(cases) for cases in members])
    amounts = np.array([strata[cases].sum(axis=0) for cases in members])
    order = _order(num_cases, amounts, random)
    largest_left = np.maximum.accumulate(num_cases[order][::-1])[::-1]
    of_cases = num_cases[:, None] / len(strata)
    of_strata = amounts / np.maximum(strata.sum(axis=0), 1)
    aims = np.array(shares)
    filled = np.zeros((len(shares), 1))
    filled_strata = np.zeros((len(shares), strata.shape[1]))
    parts: list[list[int]] = [[] for _ in shares]
    for place, group in enumerate(order):
        growth = _growth(filled, of_cases[group], aims)
        growth_of_strata = _growth(filled_strata, of_strata[group], aims).round(9)
        sizes = np.array([len(part) for part in parts])
        able = _with_room(sizes, int(num_cases[group]), int(largest_left[place]), aims)
        empty = np.flatnonzero(sizes == 0).tolist()
        if len(empty) >= len(order) - place:  # each part gets at least one group
            able = empty
        chosen = min(able, key=lambda part: (growth_of_strata[part], growth[part]))
        filled[chosen] += of_cases[group]
        filled_strata[chosen] += of_strata[group]
        parts[chosen] += members[group]
    return [sorted(part) for part in parts]


def _order(num_cases: np.ndarray, amounts: np.ndarray, random: np.random.RandomState) -> list[int]:
    """Numbers of the groups: large ones first, and about equal ones by their rarest strata."""
    order: list[int] = random.permutation(len(num_cases)).tolist()
    strata = random.permutation(amounts.shape[1])
    rarest_first = strata[np.argsort(amounts.sum(axis=0)[strata], kind="stable")]
    keys = [
        (-int(cases).bit_length(), *(-amount[rarest_first]).tolist(), -int(cases))
        for cases, amount in zip(num_cases, amounts, strict=True)
    ]
    return sorted(order, key=keys.__getitem__)


def _growth(filled: np.ndarray, added: np.ndarray, aims: np.ndarray) -> np.ndarray:
    """How much the distance of each part to its aims grows if a group is added to it."""
    aims = aims[:, None]
    growths = ((filled + added - aims) ** 2 - (filled - aims) ** 2) / aims
    growth: np.ndarray = growths.sum(axis=1)
    return growth


def _with_room(sizes: np.ndarray, num_cases: int, largest: int, shares: np.ndarray) -> list[int]:
    """Numbers of the parts with room for a group, as `distribute` defines it."""
    ahead = np.outer(sizes + num_cases, shares) - np.outer(shares, sizes)
    limit = np.add.outer(shares, shares) / 2 * largest
    found: list[int] = np.flatnonzero((ahead <= limit + ROUNDING).all(axis=1)).tolist()
    return found
