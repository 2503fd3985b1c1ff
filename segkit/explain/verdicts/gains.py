"""By how much a gate's channel shows a structure better than each comparator, scan by scan.

A channel may show a structure by high values ("lets it through") or by low values ("shuts it out").
It shows it by localisation (AUROC), or by deletion: Dice falls sooner if the cells are deleted in
the order of the map.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from segkit.explain.measures.ranks import Ranked
from segkit.explain.measures.statistics import auroc
from segkit.explain.verdicts.comparators import CellValues3d, kept_cells, mean_maps
from segkit.explain.verdicts.evidence import HIGH_FIRST, LOW_FIRST, UNTRAINED, ChannelEvidence

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


@dataclass(frozen=True)
class Compared:
    """A comparator, and a map's gain over it in each scan with the required margin."""

    name: str
    gains: tuple[float, ...]
    margins: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.gains))

    @property
    def beyond(self) -> list[float]:
        """By how much each gain exceeds its margin."""
        return [gain - margin for gain, margin in zip(self.gains, self.margins, strict=True)]

    @property
    def short(self) -> list[float]:
        """By how much each gain falls short of its margin."""
        return [
            max(margin, LEAST_MARGIN) - gain
            for gain, margin in zip(self.gains, self.margins, strict=True)
        ]


def means_of_others(evidence: Sequence[ChannelEvidence]) -> list[dict[str, CellValues3d]]:
    """For each scan, the channel's mean maps over the other scans, by name; none for one scan."""
    boxes = [one.box for one in evidence]
    found = []
    for number, box in enumerate(boxes):
        others = boxes[:number] + boxes[number + 1 :]
        cells = [kept_cells(size) for size in box.shape]
        means = mean_maps(others, box.shape, cells) if others else {}
        found.append({f"{MEAN_MAP} {name}".rstrip(): mean for name, mean in means.items()})
    return found


def auroc_pairs(
    evidence: Sequence[ChannelEvidence], structure: str, means: Sequence[Mapping[str, CellValues3d]]
) -> Pairs:
    """AUROC of the channel and of each comparator, in each scan that has the structure.

    Args:
        evidence: the evidence of each scan.
        structure: name of the structure.
        means: mean maps from `means_of_others`.
    """
    pairs: Pairs = {}
    for one in evidence:
        scores = one.aurocs.get(structure, {})
        for name, score in scores.items():
            if name != "map" and not math.isnan(score):
                pairs.setdefault(name, []).append((scores["map"], score))
    for one, of_others in zip(evidence, means, strict=True):
        if (inside := one.inside.get(structure)) is None:
            continue
        for name, mean in of_others.items():
            known = np.isfinite(mean) & np.isfinite(one.box.values)
            own, other = (
                auroc(Ranked.of(values[known]), inside[known]) for values in (one.box.values, mean)
            )
            if math.isfinite(own) and math.isfinite(other):
                pairs.setdefault(name, []).append((own, other))
    return pairs


def gains_in_auroc(pairs: Pairs, direction: Direction) -> list[Compared]:
    """The gains of the channel's AUROC over each comparator in both directions."""
    compared = []
    for name, found in pairs.items():
        for turned in (False, True):
            scores = [1 - other if turned else other for _, other in found]
            gains = [
                turned_auroc(own, direction) - one
                for (own, _), one in zip(found, scores, strict=True)
            ]
            if found:
                shown_name = name + ", inverted" * turned
                compared.append(Compared(shown_name, tuple(gains), tuple(_margins(scores))))
    return compared


def _margins(scores: Iterable[float]) -> list[float]:
    """By how much an AUROC must be higher than each of these of a comparator."""
    return [min(AUROC_MARGIN, ERROR_MARGIN * (1 - one)) for one in scores]


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
        Compared(name, tuple(found), (AREA_MARGIN,) * len(found)) for name, found in gains.items()
    ]


def gains_over_chance(
    evidence: Sequence[ChannelEvidence], structure: str, direction: Direction
) -> Compared:
    """The gains of the channel's AUROC over 0.5. The margin is 0."""
    scores = [one.aurocs.get(structure, {}).get("map", math.nan) for one in evidence]
    gains = [turned_auroc(one, direction) - 0.5 for one in scores if not math.isnan(one)]
    return Compared(CHANCE, tuple(gains), (0.0,) * len(gains))


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
            own.append(turned_auroc(scores["map"], direction))
            drawn.append(draws)
    if not drawn:
        return Compared(UNTRAINED, (), ())
    scans = np.array(drawn)
    turned = np.where(scans.mean(axis=0) < 0.5, 1 - scans, scans).mean(axis=1).tolist()
    gains = [mine - other for mine, other in zip(own, turned, strict=True)]
    return Compared(UNTRAINED, tuple(gains), tuple(_margins(turned)))


def turned_auroc(score: float, direction: Direction) -> float:
    """The AUROC of a map, or of the inverted map if it shuts the structure out."""
    return score if direction == DIRECTIONS[0] else 1 - score
