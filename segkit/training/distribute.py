"""Distribution of groups of cases to parts, so that each part gets its share of every stratum."""

from collections.abc import Mapping, Sequence

import numpy as np


def distribute(
    groups: Mapping[str, Sequence[int]],
    strata: np.ndarray,
    shares: Sequence[float],
    random: np.random.RandomState,
) -> list[list[int]]:
    """The cases of each part. No group is split, and every part gets its share of each stratum.

    Groups are assigned one after the other, those with the largest share of a stratum first. Each
    group goes to the part whose distance to its shares then grows least. The distance is the sum
    over strata of the squared difference, divided by the part's share. (This is greedy, like
    scikit-learn's StratifiedGroupKFold, which orders groups by the spread of their counts.)

    Args:
        groups: numbers of the cases of each group, by the group's name.
        strata: array (case, stratum) with the amount of each stratum in each case.
        shares: the share of each part; their sum is 1.
        random: shuffles groups of equal size.

    Returns:
        Sorted numbers of the cases of each part.
    """
    whole = np.ones((len(strata), 1))
    counted = np.concatenate([whole, strata], axis=1).astype(np.float64)
    totals = np.maximum(counted.sum(axis=0), 1)
    held = [counted[list(cases)].sum(axis=0) / totals for cases in groups.values()]
    members = [list(cases) for cases in groups.values()]
    order = random.permutation(len(members)).tolist()
    order.sort(key=lambda group: -float(held[group].max()))
    aims = np.array(shares)[:, None]
    filled = np.zeros((len(shares), counted.shape[1]))
    parts: list[list[int]] = [[] for _ in shares]
    for place, group in enumerate(order):
        before = (filled - aims) ** 2
        after = (filled + held[group] - aims) ** 2
        growth = ((after - before) / aims).sum(axis=1)
        empty = [number for number, part in enumerate(parts) if not part]
        if len(empty) >= len(order) - place:  # each part gets at least one group
            growth[[number for number in range(len(parts)) if number not in empty]] = np.inf
        chosen = int(growth.argmin())
        filled[chosen] += held[group]
        parts[chosen] += members[group]
    return [sorted(part) for part in parts]
