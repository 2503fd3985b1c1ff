"""By how much a gate's channel shows a structure better than each comparator, scan by scan.

A channel may show a structure by high values ("lets it through") or by low values ("shuts it out").
It shows it by localisation (AUROC), or by deletion: Dice falls sooner if the cells are deleted in
the order of the map.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from segkit.explain.measures.ranks import Ranked
from segkit.explain.measures.statistics import auroc
from segkit.explain.verdicts.evidence import HIGH_FIRST, LOW_FIRST, UNTRAINED, ChannelEvidence
from segkit.explain.verdicts.mean_maps import mean_maps_of_others

Direction = Literal["lets through", "shuts out"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
AUROC_MARGIN = 0.02
ERROR_MARGIN = 0.25
"""A map's AUROC must exceed that of a comparator by 0.02, or by a quarter of the comparator's
distance to 1 if that is less."""
LEAST_MARGIN = 1e-4
"""Smallest margin of AUROC in the test for showing no more."""
AREA_MARGIN = 0.02
"""The area under a map's deletion curve must be smaller than a comparator's by this much."""
MEAN_MAP = "mean map of the other scans"
CHANCE = "chance"
Pairs = dict[str, list[tuple[float, float]]]
"""For each comparator, the AUROC of the channel and of the comparator in each scan."""
BesideMeans = dict[str, dict[str, tuple[float, float]]]
"""The same of one scan, for each structure and mean map of other scans."""


@dataclass(frozen=True, eq=False)
class Compared:
    """A comparator, and a map's gain over it in each scan with the required margin."""

    name: str
    gains: Float[ndarray, " scans"]
    margins: Float[ndarray, " scans"]

    @property
    def mean(self) -> float:
        return float(np.mean(self.gains))

    @property
    def beyond(self) -> list[float]:
        """By how much each gain exceeds its margin."""
        beyond: list[float] = (self.gains - self.margins).tolist()
        return beyond

    @property
    def short(self) -> list[float]:
        """By how much each gain falls short of its margin."""
        short: list[float] = (np.maximum(self.margins, LEAST_MARGIN) - self.gains).tolist()
        return short


def scores_beside_means(evidence: Sequence[ChannelEvidence]) -> list[BesideMeans]:
    """For each scan, the AUROC of the channel and of its mean maps over the other scans.

    They count the same cells. With one scan there is no mean map.
    """
    found: list[BesideMeans] = [{} for _ in evidence]
    known_ranks: dict[tuple[int, bytes], Ranked] = {}
    for number, name, mean in mean_maps_of_others([one.box for one in evidence]):
        box, inside = evidence[number].box.values, evidence[number].inside
        known = np.isfinite(mean) & np.isfinite(box)
        memory = (number, known.tobytes())
        if memory not in known_ranks:
            known_ranks[memory] = Ranked.of(box[known])
        own, other = known_ranks[memory], Ranked.of(mean[known])
        for structure, cells in inside.items():
            scores = auroc(own, cells[known]), auroc(other, cells[known])
            found[number].setdefault(structure, {})[f"{MEAN_MAP} {name}".rstrip()] = scores
    return found


def auroc_pairs(
    evidence: Sequence[ChannelEvidence], structure: str, beside: Sequence[BesideMeans]
) -> Pairs:
    """AUROC of the channel and of each comparator, in each scan that has the structure.

    Args:
        evidence: the evidence of each scan.
        structure: name of the structure.
        beside: scores from `scores_beside_means`.
    """
    pairs: Pairs = {}
    for one in evidence:
        scores = one.aurocs.get(structure, {})
        for name, score in scores.items():
            if name != "map" and not math.isnan(score):
                pairs.setdefault(name, []).append((scores["map"], score))
    for of_scan in beside:
        for name, (own, other) in of_scan.get(structure, {}).items():
            if math.isfinite(own) and math.isfinite(other):
                pairs.setdefault(name, []).append((own, other))
    return pairs


def gains_in_auroc(pairs: Pairs, direction: Direction) -> list[Compared]:
    """The gains of the channel's AUROC over each comparator in both directions."""
    compared = []
    for name, found in pairs.items():
        own, other = np.array(found).T
        for turned in (False, True):
            scores = 1 - other if turned else other
            gains = turned_auroc(own, direction) - scores
            compared.append(Compared(name + ", inverted" * turned, gains, _margins(scores)))
    return compared


def _margins(scores: Float[ndarray, " scans"]) -> Float[ndarray, " scans"]:
    """By how much an AUROC must be higher than each of these of a comparator."""
    margins: ndarray = np.minimum(AUROC_MARGIN, ERROR_MARGIN * (1 - scores))
    return margins


def gains_in_deletion(
    evidence: Sequence[ChannelEvidence], structure: str, direction: Direction
) -> list[Compared]:
    """The gains of the channel's deletion order over each comparator's order, in area.

    Scans that do not have the structure are left out, though the network may predict it there.
    """
    own = HIGH_FIRST if direction == DIRECTIONS[0] else LOW_FIRST
    gains: dict[str, list[float]] = {}
    for one in evidence:
        areas = one.areas(structure) if structure in one.drops else {}
        for name, area in areas.items():
            gained = area - areas[own]
            # A network may give NaN for an image of which a part is deleted.
            if name not in (HIGH_FIRST, LOW_FIRST) and math.isfinite(gained):
                gains.setdefault(name, []).append(gained)
    return [
        Compared(name, np.array(found), np.full(len(found), AREA_MARGIN))
        for name, found in gains.items()
    ]


def gains_over_chance(
    evidence: Sequence[ChannelEvidence], structure: str, direction: Direction
) -> Compared:
    """The gains of the channel's AUROC over 0.5. The margin is 0."""
    scores = np.array([one.aurocs.get(structure, {}).get("map", math.nan) for one in evidence])
    gains = turned_auroc(scores[~np.isnan(scores)], direction) - 0.5
    return Compared(CHANCE, gains, np.zeros_like(gains))


def gains_over_draws(
    evidence: Sequence[ChannelEvidence], structure: str, direction: Direction
) -> Compared:
    """The gains of the channel's AUROC over that of untrained networks, as their mean.

    Each untrained network is used in the direction in which it shows the structure over all scans,
    because the sign of random weights is arbitrary.
    """
    own, drawn = [], []
    for one in evidence:
        scores = one.aurocs.get(structure, {})
        draws = [score for name, score in scores.items() if name.startswith(UNTRAINED)]
        if draws and np.isfinite([scores["map"], *draws]).all():
            own.append(scores["map"])
            drawn.append(draws)
    if not drawn:
        return Compared(UNTRAINED, np.zeros(0), np.zeros(0))
    scans = np.array(drawn)
    turned = np.where(scans.mean(axis=0) < 0.5, 1 - scans, scans).mean(axis=1)
    gains = turned_auroc(np.array(own), direction) - turned
    return Compared(UNTRAINED, gains, _margins(turned))


def turned_auroc(
    scores: Float[ndarray, " scans"], direction: Direction
) -> Float[ndarray, " scans"]:
    """The AUROC of a map, or of the inverted map if it shuts the structure out."""
    return scores if direction == DIRECTIONS[0] else 1 - scores
