"""The p values of a hypothesis: a channel shows a structure, is needed, and was learned."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from segkit.explain.measures.ranks import rise_p, rise_ps, simes
from segkit.explain.verdicts.comparators import OTHER
from segkit.explain.verdicts.evidence import EARLIER, UNTRAINED, ChannelEvidence, GateChannel
from segkit.explain.verdicts.falls import SIGNIFICANT, Values, needed_p, not_needed_ps
from segkit.explain.verdicts.gains import (
    MEAN_MAP,
    Compared,
    Direction,
    Pairs,
    gains_in_auroc,
    gains_in_deletion,
    gains_over_chance,
    gains_over_draws,
    turned_auroc,
)

ROUTE_SHARES = {"localisation": 0.8, "deletion": 0.2}
"""Shares of the permitted error for the two kinds of evidence."""
MEAN_MAPS = {"localisation": MEAN_MAP, "deletion": EARLIER}
"""The mean map of other scans among the comparators of each kind of evidence."""
SIMES_SHARES = {False: 0.9, True: 0.1}
"""Shares of the permitted error for comparators in the test for showing no more: those of `OTHER`
have the small one, so that their number takes little from the rest."""
SAME_MAP = 0.9
"""A map counts as equal to an untrained network's if |ρ| is at least this."""


class Hypothesis:
    """The hypothesis that a channel shows a structure in one direction, with its evidence."""

    def __init__(
        self,
        unit: GateChannel,
        structure: str,
        direction: Direction,
        evidence: Sequence[ChannelEvidence],
        pairs: Pairs,
        name_of_all: str,
    ) -> None:
        self.unit, self.structure, self.direction = unit, structure, direction
        self.evidence, self.name_of_all = evidence, name_of_all
        self.drops = [one.drops[structure] for one in self.evidence if structure in one.drops]
        self.correlations = np.array([one.correlations for one in self.evidence])
        self.places = gains_in_auroc(pairs, direction)
        self.deletions = gains_in_deletion(self.evidence, structure, direction)
        # Deletion shows the use of the image, not the place of the structure. A map that is high in
        # the structure does not shut it out, however early its low values change the prediction.
        chance = gains_over_chance(evidence, structure, direction)
        found = {
            "localisation": self.places,
            "deletion": self.deletions and [*self.deletions, chance],
        }
        self.routes = {way: route for way, route in found.items() if route}
        """The comparators of each kind of evidence; all must be exceeded."""

    @property
    def cases(self) -> int:
        """Number of scans that have the structure. Each measure may have fewer."""
        return max(len(self.drops), *(len(one.gains) for one in self.places), 0)

    @property
    def cases_with_auroc(self) -> int:
        """Number of scans with an AUROC: in the others, no cell or every cell is inside."""
        return len(_aurocs(self.evidence, self.structure, "map"))

    @property
    def cases_with_deletion(self) -> int:
        """Number of scans in which the structure was predicted and the image deleted."""
        return max((len(one.gains) for one in self.deletions), default=0)

    @property
    def contexts(self) -> list[Values]:
        """Falls of Dice with the other channels unchanged, and with them replaced too."""
        return [list(column) for column in zip(*self.drops, strict=True)]

    @property
    def least_contexts(self) -> list[Values]:
        """The same with the smallest fall of all structures in each scan, for all together.

        The network may need a channel for one structure that shows another one. So it needs the
        channel for all structures together only if each one's Dice falls.
        """
        if self.structure != self.name_of_all:
            return self.contexts
        falls = [
            [falls for name, falls in one.drops.items() if name != self.name_of_all]
            or list(all_falls)
            for one in self.evidence
            if (all_falls := [one.drops[self.name_of_all]] if self.name_of_all in one.drops else [])
        ]
        least = [[min(context) for context in zip(*scan, strict=True)] for scan in falls]
        return [list(column) for column in zip(*least, strict=True)]

    @property
    def strength(self) -> float:
        """Mean AUROC of the channel; 1 - AUROC if it shuts the structure out."""
        found = np.array(_aurocs(self.evidence, self.structure, "map"))
        return float(np.mean(turned_auroc(found, self.direction))) if found.size else math.nan

    def need_p(self) -> float:
        """P value of the null hypothesis that the network does not need the channel."""
        found = [needed_p(falls) for falls in self.least_contexts]
        return min(1.0, len(found) * min(found)) if found else 1.0

    def without_p(self) -> float:
        """P value of the null hypothesis that the network needs the channel."""
        return max((p for falls in self.contexts for p in not_needed_ps(falls)), default=1.0)

    def more_p(self) -> float:
        """P value of the null hypothesis that the channel shows no more than some comparator.

        It is the smaller one of localisation and deletion, corrected for the choice.
        """
        found = [
            max(rise_ps([one.beyond for one in route])) / ROUTE_SHARES[way]
            for way, route in self.routes.items()
            if any(one.name == MEAN_MAPS[way] for one in route)
        ]
        return min(1.0, min(found, default=1.0))

    @property
    def has_mean_map(self) -> bool:
        """Whether the channel was compared with its mean over other scans."""
        return any(one.name == MEAN_MAP for one in self.places)

    def no_more_p(self) -> float:
        """P value of the null hypothesis that the channel shows more than every comparator, either
        by localisation or by deletion."""
        return max((_no_more_p(route) for route in self.routes.values()), default=1.0)

    def learned_p(self) -> float:
        """P value of the null hypothesis that the map is like that of an untrained network.

        It is the larger one of two tests: of |ρ|, and of how well the structure is shown.
        """
        draws = self.draws()
        if draws.size < 2 or _mean_limit(draws, upper=True) >= SAME_MAP:
            return 1.0
        return max(rise_p(self.unlike()), self.outlier_p())

    def unlike(self) -> Values:
        """By how much |ρ| with untrained networks lies below `SAME_MAP`, in each scan."""
        return [SAME_MAP - one for one in _row_means(self.correlations)]

    def same_p(self) -> float:
        """P value of the null hypothesis that the map differs from untrained networks' maps.

        It is the larger one of two tests: of |ρ|, and of how well the structure is shown.
        """
        return max((rise_p(values) for values in self.same_tests()), default=1.0)

    def same_tests(self) -> list[Values]:
        """The values over scans that are above 0 if the map is like untrained networks' maps; none
        if too few of these networks have such a map."""
        draws = self.draws()
        if draws.size < 2 or _mean_limit(draws, upper=False) < SAME_MAP:
            return []
        beside = gains_over_draws(self.evidence, self.structure, self.direction)
        return [[one - SAME_MAP for one in _row_means(self.correlations)], beside.short]

    def draws(self) -> np.ndarray:
        """|ρ| with each untrained network, as a mean over scans."""
        return _row_means(self.correlations.T) if self.correlations.ndim == 2 else np.array([])

    def outlier_p(self) -> float:
        """P value of the null hypothesis that untrained networks show the structure equally well.

        Student's t test of one new value against a normal sample: |AUROC - 0.5| of the channel and
        of the untrained networks, each as a mean over scans. More scans do not make it smaller.
        """
        names = sorted(
            {name for one in self.evidence for name in one.aurocs.get(self.structure, {})}
        )
        drawn = [
            abs(float(np.mean(found)) - 0.5)
            for name in names
            if name.startswith(UNTRAINED)
            and (found := _aurocs(self.evidence, self.structure, name))
        ]
        if len(drawn) < 2:
            return 1.0
        above = abs(self.strength - 0.5) - float(np.mean(drawn))
        spread = float(np.std(drawn, ddof=1)) * math.sqrt(1 + 1 / len(drawn))
        if spread == 0:
            return 0.0 if above > 0 else 1.0
        return float(stats.t.sf(above / spread, len(drawn) - 1))


def _no_more_p(route: Sequence[Compared]) -> float:
    """P value of the null hypothesis that the channel shows more than every comparator."""
    found = []
    for other, share in SIMES_SHARES.items():
        alike = [one.short for one in route if one.name.startswith(OTHER) == other]
        if alike:
            found.append(simes(rise_ps(alike)) / share)
    return min(1.0, *found)


def _aurocs(evidence: Sequence[ChannelEvidence], structure: str, name: str) -> list[float]:
    found = [one.aurocs.get(structure, {}).get(name, math.nan) for one in evidence]
    return [one for one in found if not math.isnan(one)]


def _row_means(values: np.ndarray) -> np.ndarray:
    """The mean of the finite numbers in each row; rows without any are left out."""
    rows = [row[np.isfinite(row)] for row in np.atleast_2d(values)]
    return np.array([row.mean() for row in rows if row.size])


def _mean_limit(values: np.ndarray, *, upper: bool) -> float:
    """The upper or lower end of the one-sided 95 % interval of a mean, by Student's t."""
    half = float(stats.t.isf(SIGNIFICANT, len(values) - 1) * stats.sem(values))
    return float(np.mean(values)) + (half if upper else -half)
