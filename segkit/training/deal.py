"""Groups of cases dealt out to parts, each with its share of every stratum."""

from collections.abc import Mapping, Sequence

import numpy as np


def deal(
    groups: Mapping[str, Sequence[int]],
    strata: np.ndarray,
    shares: Sequence[float],
    random: np.random.RandomState,
) -> list[list[int]]:
    """The cases of each part, so that no group is torn and each stratum is shared out.

    The groups go in order, those with the largest share of a stratum first, each to the part whose
    strata then lie closest to their shares: the part for which the sum over strata of the squared
    distance, over the part's share, grows least. (Greedy, as scikit-learn's StratifiedGroupKFold,
    which takes groups by the spread of their counts.)

    Args:
        groups: numbers of cases by what keeps them together.
        strata: (case, stratum), how much of a stratum a case holds.
        shares: of each part; together 1.
        random: shuffles groups that are alike.

    Returns:
        Numbers of the cases of each part, in order.
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
        if len(empty) >= len(order) - place:  # each part gets one
            growth[[number for number in range(len(parts)) if number not in empty]] = np.inf
        chosen = int(growth.argmin())
        filled[chosen] += held[group]
        parts[chosen] += members[group]
    return [sorted(part) for part in parts]
