"""The rule that derives a verdict on each gate channel and structure from the evidence of scans.

docs/verdicts.md states the rule and its error rates. In short, with p values over scans:

- informative: the network needs the channel, the channel shows the structure better than every
  comparator, and this was learned in training;
- redundant: the channel shows more than every comparator, and there is evidence that the network
  does not need it;
- uninformative: there is evidence that the channel shows no more than some comparator;
- cannot tell: all other cases.

A channel may show a structure by high values ("lets it through") or by low values ("shuts it out").
Holm's method corrects for the number of tested channels, structures and directions of a map.
Without references there is no verdict.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
from scipy import stats

from segkit.errors import counted
from segkit.evaluation.compare import holm
from segkit.explain.measures.measure_maps import FOREGROUND
from segkit.explain.measures.ranks import Ranked, rise_p, simes
from segkit.explain.measures.statistics import auroc
from segkit.explain.verdicts.comparators import OTHER, mean_map
from segkit.explain.verdicts.evidence import (
    EARLIER,
    HIGH_FIRST,
    LOW_FIRST,
    UNTRAINED,
    CaseEvidence,
    ChannelEvidence,
    GateChannel,
)
from segkit.explain.verdicts.falls import (
    DICE_MARGIN,
    MATTERING_SHARE,
    SIGNIFICANT,
    Values,
    mean_interval,
    mean_of,
    needed_p,
    not_needed_ps,
    num_mattering,
)

VerdictWord = Literal["informative", "redundant", "uninformative", "cannot tell"]
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
ROUTE_SHARES = {"localisation": 0.8, "deletion": 0.2}
"""Shares of the permitted error for the two kinds of evidence."""
SIMES_SHARES = {False: 0.9, True: 0.1}
"""Shares of the permitted error for comparators in the test for showing no more: those of `OTHER`
have the small one, so that their number takes little from the rest."""
SAME_MAP = 0.9
"""A map counts as equal to an untrained network's if |ρ| is at least this."""
MEAN_MAP = "mean map of the other scans"
POWER = 0.8
"""Probability of a verdict for which the number of further scans is estimated."""
MOST_FURTHER = 200
"""Largest number of further scans that is reported."""
Pairs = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class GateVerdict:
    """A verdict: does one channel of a gate matter for one structure?

    Example:
        for verdict in segkit.judge_gates(predictor, cases):
            print(verdict.map, verdict.structure, verdict.word, verdict.reason)
    """

    map: str
    """The gate's key, such as 'skip.1/gate'."""
    channel: int
    structure: str
    word: VerdictWord | None
    """The verdict; None if the scans have no references."""
    direction: Direction
    """Whether the structure is shown better by high values ('lets through') or by low values."""
    reason: str
    """One sentence with the deciding figures."""
    figures: Mapping[str, float | str | None] = field(default_factory=dict)
    """The figures behind the verdict, as means over scans; NaN if not measured."""

    @property
    def claim(self) -> str:
        """The effect of the channel on the structure, such as 'lets liver through'."""
        verb, particle = self.direction.split()
        return f"{verb} {self.structure} {particle}"


def judge_evidence(cases: Sequence[CaseEvidence]) -> list[GateVerdict]:
    """A verdict on each channel and structure, map by map. The best on each map comes first.

    Args:
        cases: evidence of scans. Scans without a reference are used only if none has one.
    """
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
    """The best verdict on each map: the first one in the order of `judge_evidence`."""
    first: dict[str, GateVerdict] = {}
    for verdict in verdicts:
        first.setdefault(verdict.map, verdict)
    return list(first.values())


@dataclass(frozen=True)
class _Compared:
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


class _Hypothesis:
    """The hypothesis that a channel shows a structure in one direction, with its evidence."""

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
        """Number of scans that have the structure."""
        return max(len(self.drops), *(len(one.gains) for one in self.places), 0)

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
        if self.structure != FOREGROUND:
            return self.contexts
        falls = [
            [falls for name, falls in one.drops.items() if name != FOREGROUND] or list(all_falls)
            for one in self.evidence
            if (all_falls := [one.drops[FOREGROUND]] if FOREGROUND in one.drops else [])
        ]
        least = [[min(context) for context in zip(*scan, strict=True)] for scan in falls]
        return [list(column) for column in zip(*least, strict=True)]

    @property
    def strength(self) -> float:
        """Mean AUROC of the channel; 1 - AUROC if it shuts the structure out."""
        found = _aurocs(self.evidence, self.structure, "map")
        return float(np.mean([_turned(one, self.direction) for one in found])) if found else np.nan

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
        """P value of the null hypothesis that the channel shows more than every comparator, either
        by localisation or by deletion."""
        return max((_no_more_p(route) for route in self.routes), default=1.0)

    def learned_p(self) -> float:
        """P value of the null hypothesis that the map is like that of an untrained network.

        It is the larger one of two tests: of |ρ|, and of how well the structure is shown.
        """
        draws = self._draws()
        if draws.size < 2 or _mean_limit(draws, upper=True) >= SAME_MAP:
            return 1.0
        over_cases = _row_means(self.correlations)
        return max(rise_p([SAME_MAP - one for one in over_cases]), self._outlier_p())

    def same_p(self) -> float:
        """P value of the null hypothesis that the map differs from untrained networks' maps."""
        draws = self._draws()
        if draws.size < 2 or _mean_limit(draws, upper=False) < SAME_MAP:
            return 1.0
        return rise_p([one - SAME_MAP for one in _row_means(self.correlations)])

    def _draws(self) -> np.ndarray:
        """|ρ| with each untrained network, as a mean over scans."""
        return _row_means(self.correlations.T) if self.correlations.ndim == 2 else np.array([])

    def _outlier_p(self) -> float:
        """P value of the null hypothesis that untrained networks show the structure equally well.

        Student's t test of one new value against a normal sample: |AUROC - 0.5| of the channel and
        of the untrained networks, each as a mean over scans.
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


def _no_more_p(route: Sequence[_Compared]) -> float:
    """P value of the null hypothesis that the channel shows more than every comparator."""
    found = []
    for other, share in SIMES_SHARES.items():
        ps = [rise_p(one.short) for one in route if one.name.startswith(OTHER) == other]
        if ps:
            found.append(simes(ps) / share)
    return min(1.0, *found)


def _judge_map(found: Sequence[_Hypothesis], *, has_references: bool) -> list[GateVerdict]:
    """The verdicts on one map, corrected for multiple testing, the best one first."""
    more = [one.more_p() for one in found]
    informative = holm(
        [max(p, one.need_p(), one.learned_p()) for p, one in zip(more, found, strict=True)]
    )
    redundant = holm([max(p, one.without_p()) for p, one in zip(more, found, strict=True)])
    ranked: list[tuple[tuple[float, ...], GateVerdict]] = []
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
        ranked.append(((rank, min(p_values.values()), -_or(found[chosen].strength, 0)), verdict))
    return [verdict for _, verdict in sorted(ranked, key=lambda pair: pair[0])]


def _verdict(
    of: _Hypothesis, word: VerdictWord | None, p_values: Mapping[str, float], num_tested: int
) -> GateVerdict:
    falls = of.contexts[0] if of.contexts else []
    low, high = mean_interval(falls)
    draws = of._draws()
    figures: dict[str, float | str | None] = {
        "scans": of.cases,
        "Dice lost without it": mean_of(falls),
        "from": low,
        "to": high,
        "share of scans where it matters": mean_of([float(fall > DICE_MARGIN) for fall in falls]),
        "Dice lost with the others gone": mean_of(of.contexts[1] if len(of.contexts) > 1 else []),
        "AUROC": of.strength if of.direction == DIRECTIONS[0] else 1 - of.strength,
    }
    for name, route in (("AUROC", of.places), ("deletion", of.deletions)):
        best = min(route, key=lambda one: one.mean, default=None)
        figures[f"{name}: more than the best comparator"] = best.mean if best else np.nan
        figures[f"{name}: best comparator"] = best.name if best else None
    figures |= {
        "|ρ| with untrained networks": mean_of(draws.tolist()),
        "least": float(np.min(draws)) if draws.size else np.nan,
        "most": float(np.max(draws)) if draws.size else np.nan,
        **{f"p, {name}": p for name, p in p_values.items()},
    }
    further = _further(of, num_tested) if word == "cannot tell" else None
    figures["further scans"] = further
    verdict = GateVerdict(*of.unit, of.structure, word, of.direction, "", figures)
    return replace(verdict, reason=_reason(verdict, of))


def _reason(verdict: GateVerdict, of: _Hypothesis) -> str:
    """One sentence: the verdict, the loss of Dice without the channel, and its measures."""
    figures = verdict.figures
    scans = counted(of.cases, "scan")
    clauses = []
    if of.contexts:
        fall, low, high = (
            _number(figures[name]) for name in ("Dice lost without it", "from", "to")
        )
        if _rises(fall):
            low, high = -high, -low
        span = f" (95 % interval {low:+.3f} to {high:+.3f})" if math.isfinite(low) else ""
        mattering = num_mattering(of.contexts[0])
        clauses.append(
            f"Dice {_fall(fall)}{span} if the map is replaced by its mean, by more than "
            f"{DICE_MARGIN:g} in {mattering} of {len(of.contexts[0])}"
        )
    beside = _number(figures["Dice lost with the others gone"])
    if math.isfinite(beside):
        clauses.append(f"it {_fall(beside)} if all other gates are replaced too")
    if of.places:
        gain = _number(figures["AUROC: more than the best comparator"])
        clauses.append(
            f"AUROC {_number(figures['AUROC']):.2f}, {gain:+.3f} compared with "
            f"{figures['AUROC: best comparator']}"
        )
    if of.deletions:
        gain = _number(figures["deletion: more than the best comparator"])
        clauses.append(f"deletion {gain:+.3f} compared with {figures['deletion: best comparator']}")
    if math.isfinite(rho := _number(figures["|ρ| with untrained networks"])):
        clauses.append(f"|ρ| {rho:.2f} with untrained networks")
    if not of.has_mean_map:
        clauses.append("not compared with the mean map of other scans, because there is none")
    return f"Over {scans}, {_said(verdict)}: {'; '.join(clauses) or 'nothing was measured'}."


def _fall(lost: float) -> str:
    """What happens to Dice, such as "falls by 0.020"."""
    return f"{'rises' if _rises(lost) else 'falls'} by {abs(lost):.3f}"


def _rises(lost: float) -> bool:
    """Whether Dice rises by an amount that three digits show."""
    return lost < -0.0005


def _said(verdict: GateVerdict) -> str:
    match verdict.word:
        case "informative":
            return f"the gate {verdict.claim}, the network needs it, and it was learned"
        case "redundant":
            return f"the gate {verdict.claim}, but the network does not need it"
        case "uninformative":
            return f"the gate shows {verdict.structure} no better than what it is compared with"
        case None:
            return "there is no verdict without a reference"
    further = verdict.figures["further scans"]
    if isinstance(further, int):
        more = counted(further, "more scan")
        return f"the evidence cannot tell; about {more} like these may be enough"
    return f"the evidence cannot tell, and {MOST_FURTHER} more scans like these are not enough"


def _further(of: _Hypothesis, num_tested: int) -> int | None:
    """Estimated number of further scans for a verdict if they are like these; None if too many.

    Each test of a verdict must reach p = 0.05 with probability 0.8. The estimate uses the normal
    approximation of the signed-rank test, with the mean and deviation of these scans.
    """
    # Corrected for the number of tests, and for the choice of localisation or deletion.
    strict = ROUTE_SHARES["localisation"] * SIGNIFICANT / num_tested
    shows = [
        max((_needed(c.beyond, strict) for c in route), default=math.inf) for route in of.routes
    ]
    no_more = [min(_needed(c.short, SIGNIFICANT / 8) for c in route) for route in of.routes]
    need = [
        _needed(falls, strict) if np.mean(falls) >= DICE_MARGIN else math.inf
        for falls in of.least_contexts
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
    """Number of scans after which a signed-rank test probably finds such values above 0."""
    least = math.ceil(-math.log2(significance))
    if len(values) < 2:
        return least if len(values) and values[0] > 0 else math.inf
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    if mean <= 0:
        return math.inf
    quantiles = stats.norm.isf(significance) + stats.norm.ppf(POWER)
    # The efficiency of the signed-rank test is 3 / π of that of the t-test.
    return max(least, math.ceil((quantiles * deviation / mean) ** 2 * math.pi / 3))


def _structures(evidence: Sequence[ChannelEvidence]) -> list[str]:
    """The structures that some scan has, in the order of the labelling."""
    return list(dict.fromkeys(name for one in evidence for name in [*one.aurocs, *one.drops]))


def _auroc_pairs(evidence: Sequence[ChannelEvidence], structure: str) -> Pairs:
    """AUROC of the channel and of each comparator, in each scan that has the structure."""
    pairs: Pairs = {}
    for one in evidence:
        scores = one.aurocs.get(structure, {})
        for name, score in scores.items():
            if name != "map" and not math.isnan(score):
                pairs.setdefault(name, []).append((scores["map"], score))
    pairs[MEAN_MAP] = _with_mean_maps(evidence, structure)
    return pairs


def _localised(pairs: Pairs, direction: Direction) -> list[_Compared]:
    """The gains of the channel's AUROC over each comparator in both directions."""
    compared = []
    for name, found in pairs.items():
        for turned in (False, True):
            scores = [1 - other if turned else other for _, other in found]
            gains = [
                _turned(own, direction) - one for (own, _), one in zip(found, scores, strict=True)
            ]
            margins = [min(AUROC_MARGIN, ERROR_MARGIN * (1 - one)) for one in scores]
            if found:
                shown_name = name + ", inverted" * turned
                compared.append(_Compared(shown_name, tuple(gains), tuple(margins)))
    return compared


def _with_mean_maps(
    evidence: Sequence[ChannelEvidence], structure: str
) -> list[tuple[float, float]]:
    """AUROC of the channel in each scan, and AUROC of its mean map over the other scans."""
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
    """The gains of the channel's deletion order over each comparator's order, in area."""
    own = HIGH_FIRST if direction == DIRECTIONS[0] else LOW_FIRST
    gains: dict[str, list[float]] = {}
    for one in evidence:
        areas = one.areas(structure)
        for name, area in areas.items():
            gained = area - areas[own]
            # A network may give NaN for an image of which a part is deleted.
            if name not in (HIGH_FIRST, LOW_FIRST) and math.isfinite(gained):
                gains.setdefault(name, []).append(gained)
    return [
        _Compared(name, tuple(found), (AREA_MARGIN,) * len(found)) for name, found in gains.items()
    ]


def _aurocs(evidence: Sequence[ChannelEvidence], structure: str, name: str) -> list[float]:
    found = [one.aurocs.get(structure, {}).get(name, math.nan) for one in evidence]
    return [one for one in found if not math.isnan(one)]


def _turned(score: float, direction: Direction) -> float:
    return score if direction == DIRECTIONS[0] else 1 - score


def _row_means(values: np.ndarray) -> np.ndarray:
    """The mean of the finite numbers in each row; rows without any are left out."""
    rows = [row[np.isfinite(row)] for row in np.atleast_2d(values)]
    return np.array([row.mean() for row in rows if row.size])


def _mean_limit(values: np.ndarray, *, upper: bool) -> float:
    """The upper or lower end of the one-sided 95 % interval of a mean, by Student's t."""
    half = float(stats.t.isf(SIGNIFICANT, len(values) - 1) * stats.sem(values))
    return float(np.mean(values)) + (half if upper else -half)


def _number(value: float | str | None) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _or(value: float, other: float) -> float:
    return other if math.isnan(value) else value
