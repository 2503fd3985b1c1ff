"""The rule that gives each gate channel and structure a word, from the evidence of scans.

docs/verdicts.md states the rule and its error rates. In short, with p values over scans:

- informative: the network needs the channel, it shows more than every comparator, and it was
  learned;
- redundant: it shows more, and there is evidence that the network does without it;
- uninformative: there is evidence that it shows no more than something it is compared with;
- cannot tell: all else.

A channel may show a structure by its high values ("lets it through") or by its low ones ("shuts it
out"). Holm's method corrects for having looked at all channels, structures and directions of a map.
Without references there is no word.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
from scipy import stats

from segkit.evaluation.compare import holm
from segkit.explain.measures.ranks import Ranked, rise_p, simes
from segkit.explain.measures.statistics import auroc
from segkit.explain.verdicts.comparators import mean_map
from segkit.explain.verdicts.evidence import (
    EARLIER,
    HIGH_FIRST,
    LOW_FIRST,
    UNTRAINED,
    CaseEvidence,
    ChannelEvidence,
    GateChannel,
)

VerdictWord = Literal["informative", "redundant", "uninformative", "cannot tell"]
Direction = Literal["lets through", "shuts out"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
SIGNIFICANT = 0.05
DICE_MARGIN = 0.01
"""A fall of Dice that matters: in a scan, and on average over scans."""
MATTERING_SHARE = 1 / 3
"""A network does without a gate if that matters in less than this share of scans."""
AUROC_MARGIN = 0.02
ERROR_MARGIN = 0.25
"""By how much a map's AUROC must exceed a comparator's: by 0.02, or, if that is less, by a quarter
of what the comparator lacks to 1."""
LEAST_MARGIN = 1e-4
"""… and the least by which a map must exceed it not to count as showing no more."""
AREA_MARGIN = 0.02
"""By how much less area must be left under deletion."""
ROUTE_SHARES = {"localisation": 0.8, "deletion": 0.2}
"""Shares of the permitted error that go to each way of looking."""
SAME_MAP = 0.9
"""|ρ| with an untrained network's map from which a map counts as the same."""
MEAN_MAP = "mean map of the other scans"
POWER = 0.8
"""The chance of a word that the number of further scans is reckoned for."""
MOST_FURTHER = 200
"""More scans than these are not reckoned with."""
Values = Sequence[float]
Pairs = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class GateVerdict:
    """What one channel of a gate is worth for one structure.

    Example:
        for verdict in segkit.judge_gates(predictor, cases):
            print(verdict.map, verdict.structure, verdict.word, verdict.reason)
    """

    map: str
    """The gate's key, such as 'skip.1/gate'."""
    channel: int
    structure: str
    word: VerdictWord | None
    """None if the scans have no references."""
    direction: Direction
    """Whether its high values or its low ones show the structure better."""
    reason: str
    """One sentence with the figures that decide."""
    figures: Mapping[str, float | str | None] = field(default_factory=dict)
    """The figures behind it, means over scans; NaN for what was not measured."""

    @property
    def claim(self) -> str:
        """Such as 'lets the liver through'."""
        verb, particle = self.direction.split()
        return f"{verb} {self.structure} {particle}"


def judge_evidence(cases: Sequence[CaseEvidence]) -> list[GateVerdict]:
    """A verdict for each channel and structure, by map; of each map the best word comes first."""
    labelled = [one for one in cases if one.against == "reference"]
    measured = labelled or list(cases)
    keys = dict.fromkeys(key for one in measured for key, _ in one.channels)
    verdicts = []
    for key in keys:
        units = sorted({unit for one in measured for unit in one.channels if unit[0] == key})
        found = []
        for unit in units:
            evidence = [one.channels[unit] for one in measured if unit in one.channels]
            for structure in _structures(evidence):
                pairs = _auroc_pairs(evidence, structure)
                found += [
                    _Hypothesis(unit, structure, direction, evidence, pairs)
                    for direction in DIRECTIONS
                ]
        verdicts += _judge_map(found, has_references=bool(labelled))
    return verdicts


def best_of_maps(verdicts: Iterable[GateVerdict]) -> list[GateVerdict]:
    """The first verdict of each map, which `judge_evidence` gives the best word."""
    first: dict[str, GateVerdict] = {}
    for verdict in verdicts:
        first.setdefault(verdict.map, verdict)
    return list(first.values())


@dataclass(frozen=True)
class _Compared:
    """A comparator by name, and by how much more than it a map shows in each scan."""

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


class _Hypothesis:
    """That a channel shows a structure in one direction, with all that scans say of it."""

    def __init__(
        self,
        unit: GateChannel,
        structure: str,
        direction: Direction,
        evidence: Sequence[ChannelEvidence],
        pairs: Pairs,
    ) -> None:
        self.unit, self.structure, self.direction = unit, structure, direction
        self.evidence = evidence
        self.drops = [one.drops[structure] for one in self.evidence if structure in one.drops]
        self.correlations = np.array([one.correlations for one in self.evidence])
        self.places = _localised(pairs, direction)
        self.deletions = _deleted(self.evidence, structure, direction)
        self.routes = [route for route in (self.places, self.deletions) if route]

    @property
    def cases(self) -> int:
        """Scans that have the structure."""
        return max(len(self.drops), *(len(one.gains) for one in self.places), 0)

    @property
    def contexts(self) -> list[Values]:
        """Falls of Dice, with the other channels as they are, and with them gone."""
        return [list(column) for column in zip(*self.drops, strict=True)]

    @property
    def strength(self) -> float:
        """Mean AUROC, turned over if the channel shuts the structure out."""
        found = _aurocs(self.evidence, self.structure, "map")
        return float(np.mean([_turned(one, self.direction) for one in found])) if found else np.nan

    def need_p(self) -> float:
        """Of a network that does not need the channel."""
        found = [rise_p(falls) if np.mean(falls) >= DICE_MARGIN else 1.0 for falls in self.contexts]
        return min(1.0, len(found) * min(found)) if found else 1.0

    def without_p(self) -> float:
        """Of a network that does not do without it: TOST, and a share of scans."""
        found = []
        for falls in self.contexts:
            mattering = sum(fall > DICE_MARGIN for fall in falls)
            found += [
                rise_p([DICE_MARGIN - fall for fall in falls]),
                rise_p([DICE_MARGIN + fall for fall in falls]),
                float(stats.binom.cdf(mattering, len(falls), MATTERING_SHARE)),
            ]
        return max(found, default=1.0)

    def more_p(self) -> float:
        """Of a channel that shows no more than some comparator, in either way of looking."""
        found = [
            max(rise_p(one.beyond) for one in route) / ROUTE_SHARES[way]
            for way, route, mean_map_of in (
                ("localisation", self.places, MEAN_MAP),
                ("deletion", self.deletions, EARLIER),
            )
            if any(one.name == mean_map_of for one in route)
        ]
        return min(1.0, min(found, default=1.0))

    @property
    def has_mean_map(self) -> bool:
        """Whether the channel was compared with its mean over other scans."""
        return any(one.name == MEAN_MAP for one in self.places)

    def no_more_p(self) -> float:
        """Of a channel that shows more than every comparator in some way of looking."""
        found = [simes([rise_p(one.short) for one in route]) for route in self.routes]
        return max(found, default=1.0)

    def learned_p(self) -> float:
        """Of a map that is as an untrained network's: by |ρ|, and by how much it shows."""
        draws = self._draws()
        if draws.size < 2 or _mean_limit(draws, upper=True) >= SAME_MAP:
            return 1.0
        over_cases = _row_means(self.correlations)
        return max(rise_p([SAME_MAP - one for one in over_cases]), self._outlier_p())

    def same_p(self) -> float:
        """Of a map that is not the same as an untrained network's."""
        draws = self._draws()
        if draws.size < 2 or _mean_limit(draws, upper=False) < SAME_MAP:
            return 1.0
        return rise_p([one - SAME_MAP for one in _row_means(self.correlations)])

    def _draws(self) -> np.ndarray:
        """|ρ| with each untrained network, mean over scans."""
        return _row_means(self.correlations.T) if self.correlations.ndim == 2 else np.array([])

    def _outlier_p(self) -> float:
        """Of an untrained network that shows the structure as well, either way.

        By Student's t for one more of a normal sample: the channel's |AUROC - 0.5| and those of the
        untrained networks, each the mean over scans.
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


def _judge_map(found: Sequence[_Hypothesis], *, has_references: bool) -> list[GateVerdict]:
    """The verdicts on one map, corrected for all that was looked at, the best word first."""
    more = [one.more_p() for one in found]
    informative = holm(
        [max(p, one.need_p(), one.learned_p()) for p, one in zip(more, found, strict=True)]
    )
    redundant = holm([max(p, one.without_p()) for p, one in zip(more, found, strict=True)])
    told: list[tuple[tuple[float, ...], GateVerdict]] = []
    for place in range(0, len(found), len(DIRECTIONS)):
        both = range(place, place + len(DIRECTIONS))
        chosen = min(
            both,
            key=lambda one: (min(informative[one], redundant[one]), -_or(found[one].strength, 0)),
        )
        nothing = max(found[one].no_more_p() for one in both)
        nothing = min(1.0, 2 * min(nothing, found[chosen].same_p()))
        word: VerdictWord = "cannot tell"
        if informative[chosen] <= SIGNIFICANT:
            word = "informative"
        elif redundant[chosen] <= SIGNIFICANT:
            word = "redundant"
        elif nothing <= SIGNIFICANT:
            word = "uninformative"
        p_values = {
            "informative": informative[chosen],
            "redundant": redundant[chosen],
            "uninformative": nothing,
        }
        verdict = _verdict(found[chosen], word if has_references else None, p_values, len(found))
        rank = ("informative", "redundant", "cannot tell", "uninformative").index(word)
        told.append(((rank, min(p_values.values()), -_or(found[chosen].strength, 0)), verdict))
    return [verdict for _, verdict in sorted(told, key=lambda pair: pair[0])]


def _verdict(
    of: _Hypothesis, word: VerdictWord | None, p_values: Mapping[str, float], looked_at: int
) -> GateVerdict:
    falls = of.contexts[0] if of.contexts else []
    low, high = _interval(falls)
    draws = of._draws()
    figures: dict[str, float | str | None] = {
        "scans": of.cases,
        "Dice lost without it": _mean(falls),
        "from": low,
        "to": high,
        "share of scans where it matters": _mean([float(fall > DICE_MARGIN) for fall in falls]),
        "Dice lost with the others gone": _mean(of.contexts[1]) if len(of.contexts) > 1 else np.nan,
        "AUROC": of.strength if of.direction == DIRECTIONS[0] else 1 - of.strength,
    }
    for name, route in (("AUROC", of.places), ("deletion", of.deletions)):
        best = min(route, key=lambda one: one.mean, default=None)
        figures[f"{name}: more than the best comparator"] = best.mean if best else np.nan
        figures[f"{name}: best comparator"] = best.name if best else None
    figures |= {
        "|ρ| with untrained networks": _mean(draws.tolist()),
        "least": float(np.min(draws)) if draws.size else np.nan,
        "most": float(np.max(draws)) if draws.size else np.nan,
        **{f"p, {name}": p for name, p in p_values.items()},
    }
    further = _further(of, looked_at) if word == "cannot tell" else None
    figures["further scans"] = further
    verdict = GateVerdict(*of.unit, of.structure, word, of.direction, "", figures)
    return replace(verdict, reason=_reason(verdict, of))


def _reason(verdict: GateVerdict, of: _Hypothesis) -> str:
    """One sentence: the word in full, what the network loses, and what the channel shows."""
    figures = verdict.figures
    scans = f"{of.cases} scan{'s' * (of.cases != 1)}"
    clauses = []
    if of.contexts:
        fall, low, high = (
            _number(figures[name]) for name in ("Dice lost without it", "from", "to")
        )
        span = f" (95 % interval {low:+.3f} to {high:+.3f})" if math.isfinite(low) else ""
        mattering = sum(one > DICE_MARGIN for one in of.contexts[0])
        clauses.append(
            f"Dice falls by {fall:.3f}{span} with it evened out, by more than {DICE_MARGIN:g} in "
            f"{mattering} of {len(of.contexts[0])}"
        )
    beside = _number(figures["Dice lost with the others gone"])
    if math.isfinite(beside):
        clauses.append(f"by {beside:.3f} with all other gates evened out as well")
    if of.places:
        gain = _number(figures["AUROC: more than the best comparator"])
        clauses.append(
            f"AUROC {_number(figures['AUROC']):.2f}, {gain:+.3f} beside "
            f"{figures['AUROC: best comparator']}"
        )
    if of.deletions:
        gain = _number(figures["deletion: more than the best comparator"])
        clauses.append(f"deletion {gain:+.3f} beside {figures['deletion: best comparator']}")
    if math.isfinite(rho := _number(figures["|ρ| with untrained networks"])):
        clauses.append(f"|ρ| {rho:.2f} with untrained networks")
    if not of.has_mean_map:
        clauses.append("not compared with other scans' mean map, as there is none")
    return f"Over {scans}, {_said(verdict)}: {'; '.join(clauses) or 'nothing was measured'}."


def _said(verdict: GateVerdict) -> str:
    match verdict.word:
        case "informative":
            return f"it {verdict.claim}, the network needs it, and it was learned"
        case "redundant":
            return f"it {verdict.claim}, and the network does without it"
        case "uninformative":
            return f"it shows no more of {verdict.structure} than what it is compared with"
        case None:
            return "there is no word without a reference"
    further = verdict.figures["further scans"]
    if isinstance(further, int):
        return f"the evidence cannot tell; about {further} more like these may"
    return f"the evidence cannot tell, and {MOST_FURTHER} more like these would not"


def _further(of: _Hypothesis, looked_at: int) -> int | None:
    """About how many further scans would give a word, if they are as these; None if too many.

    For a word, each test that it needs must reach 0.05 with a chance of 0.8, by the normal
    approximation of the signed-rank test with the mean and deviation found here.
    """
    # For all that was looked at, and by two ways of looking.
    strict = ROUTE_SHARES["localisation"] * SIGNIFICANT / looked_at
    shows = [
        max((_needed(c.beyond, strict) for c in route), default=math.inf) for route in of.routes
    ]
    no_more = [min(_needed(c.short, SIGNIFICANT / 8) for c in route) for route in of.routes]
    need = [
        _needed(falls, strict) if np.mean(falls) >= DICE_MARGIN else math.inf
        for falls in of.contexts
    ]
    without = [
        _needed([DICE_MARGIN - abs(fall) for fall in falls], strict) for falls in of.contexts
    ]
    least = math.ceil(math.log(strict) / math.log(1 - MATTERING_SHARE))
    shown = min(shows, default=math.inf)
    words = [
        max(shown, min(need, default=math.inf)) if of.learned_p() < 1 else math.inf,
        max(shown, max(without, default=math.inf), least),
        max(no_more, default=math.inf),
    ]
    further = min(words) - of.cases
    return None if further > MOST_FURTHER else max(int(further), 1)


def _needed(values: Values, significance: float) -> float:
    """Scans after which a signed-rank test is likely to say that such values are above 0."""
    least = math.ceil(-math.log2(significance))
    if len(values) < 2:
        return least if len(values) and values[0] > 0 else math.inf
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    if mean <= 0:
        return math.inf
    quantiles = stats.norm.isf(significance) + stats.norm.ppf(POWER)
    # The signed-rank test keeps 3 / π of the t-test's power.
    return max(least, math.ceil((quantiles * deviation / mean) ** 2 * math.pi / 3))


def _structures(evidence: Sequence[ChannelEvidence]) -> list[str]:
    """Those that some scan has, in the order of the labelling."""
    return list(dict.fromkeys(name for one in evidence for name in [*one.aurocs, *one.drops]))


def _auroc_pairs(evidence: Sequence[ChannelEvidence], structure: str) -> Pairs:
    """By comparator, the channel's AUROC and its own in each scan that has the structure."""
    pairs: Pairs = {}
    for one in evidence:
        scores = one.aurocs.get(structure, {})
        for name, score in scores.items():
            if name != "map" and not math.isnan(score):
                pairs.setdefault(name, []).append((scores["map"], score))
    pairs[MEAN_MAP] = _with_mean_maps(evidence, structure)
    return pairs


def _localised(pairs: Pairs, direction: Direction) -> list[_Compared]:
    """By how much the channel's AUROC exceeds each comparator's, of either direction."""
    compared = []
    for name, found in pairs.items():
        for turned in (False, True):
            scores = [1 - other if turned else other for _, other in found]
            gains = [
                _turned(own, direction) - one for (own, _), one in zip(found, scores, strict=True)
            ]
            margins = [min(AUROC_MARGIN, ERROR_MARGIN * (1 - one)) for one in scores]
            told = name + " turned over" * turned
            if found:
                compared.append(_Compared(told, tuple(gains), tuple(margins)))
    return compared


def _with_mean_maps(
    evidence: Sequence[ChannelEvidence], structure: str
) -> list[tuple[float, float]]:
    """AUROC of the channel in each scan beside that of its mean over the others."""
    found = []
    boxes = [one.box for one in evidence]
    for number, one in enumerate(evidence):
        inside = one.inside.get(structure)
        others = boxes[:number] + boxes[number + 1 :]
        if inside is None or not others:
            continue
        mean = mean_map(others, one.box.shape)
        known = np.isfinite(mean) & np.isfinite(one.box)
        scores = [auroc(Ranked.of(box[known]), inside[known]) for box in (one.box, mean)]
        if not np.isnan(scores).any():
            found.append((scores[0], scores[1]))
    return found


def _deleted(
    evidence: Sequence[ChannelEvidence], structure: str, direction: Direction
) -> list[_Compared]:
    """By how much less area deletion in the channel's order leaves than in each comparator's."""
    own = HIGH_FIRST if direction == DIRECTIONS[0] else LOW_FIRST
    gains: dict[str, list[float]] = {}
    for one in evidence:
        areas = one.areas(structure)
        for name, area in areas.items():
            if name not in (HIGH_FIRST, LOW_FIRST):
                gains.setdefault(name, []).append(area - areas[own])
    return [
        _Compared(name, tuple(found), (AREA_MARGIN,) * len(found)) for name, found in gains.items()
    ]


def _aurocs(evidence: Sequence[ChannelEvidence], structure: str, name: str) -> list[float]:
    found = [one.aurocs.get(structure, {}).get(name, math.nan) for one in evidence]
    return [one for one in found if not math.isnan(one)]


def _turned(score: float, direction: Direction) -> float:
    return score if direction == DIRECTIONS[0] else 1 - score


def _row_means(values: np.ndarray) -> np.ndarray:
    """The mean of each row's numbers; rows without any are left out."""
    rows = [row[np.isfinite(row)] for row in np.atleast_2d(values)]
    return np.array([row.mean() for row in rows if row.size])


def _mean_limit(values: np.ndarray, *, upper: bool) -> float:
    """The end of the one-sided 95 % interval of a mean, by Student's t."""
    half = float(stats.t.isf(SIGNIFICANT, len(values) - 1) * stats.sem(values))
    return float(np.mean(values)) + (half if upper else -half)


def _interval(values: Values) -> tuple[float, float]:
    """The 95 % interval of a mean by Student's t; NaN of fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    half = float(stats.t.isf(0.025, len(values) - 1) * stats.sem(values))
    return _mean(values) - half, _mean(values) + half


def _mean(values: Values) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _number(value: float | str | None) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _or(value: float, other: float) -> float:
    return other if math.isnan(value) else value
