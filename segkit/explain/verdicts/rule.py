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
from typing import Literal

import numpy as np

from segkit.errors import counted
from segkit.evaluation.compare import holm
from segkit.explain.verdicts.evidence import CaseEvidence, ChannelEvidence
from segkit.explain.verdicts.falls import (
    DICE_MARGIN,
    SIGNIFICANT,
    mean_interval,
    mean_of,
    num_mattering,
)
from segkit.explain.verdicts.further_scans import MOST_FURTHER, Further, further_scans
from segkit.explain.verdicts.gains import DIRECTIONS, Direction, auroc_pairs, scores_beside_means
from segkit.explain.verdicts.hypothesis import Hypothesis

VerdictWord = Literal["informative", "redundant", "uninformative", "cannot tell"]


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
            beside = scores_beside_means(evidence)
            for structure in _structures(evidence):
                pairs = auroc_pairs(evidence, structure, beside)
                found += [
                    Hypothesis(unit, structure, direction, evidence, pairs, measured[0].name_of_all)
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


def _judge_map(found: Sequence[Hypothesis], *, has_references: bool) -> list[GateVerdict]:
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
        no_more, same = max(found[one].no_more_p() for one in both), found[chosen].same_p()
        nothing = min(1.0, 2 * min(no_more, same))
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
        verdict = _verdict(
            found[chosen],
            [found[one] for one in both],
            word if has_references else None,
            p_values,
            len(found),
            like_untrained=same < no_more,
        )
        rank = ("informative", "redundant", "cannot tell", "uninformative").index(word)
        ranked.append(((rank, min(p_values.values()), -_or(found[chosen].strength, 0)), verdict))
    return [verdict for _, verdict in sorted(ranked, key=lambda pair: pair[0])]


def _verdict(
    of: Hypothesis,
    both: Sequence[Hypothesis],
    word: VerdictWord | None,
    p_values: Mapping[str, float],
    num_tested: int,
    *,
    like_untrained: bool,
) -> GateVerdict:
    """The verdict on one hypothesis, with its figures.

    Args:
        of: the hypothesis and its evidence.
        both: the hypotheses of both directions.
        word: the verdict; None without references.
        p_values: the p values, by name.
        num_tested: number of tests for which they were corrected.
        like_untrained: whether an uninformative channel is so because it is like that of untrained
            networks.
    """
    falls = of.contexts[0] if of.contexts else []
    low, high = mean_interval(falls)
    draws = of.draws()
    figures: dict[str, float | str | None] = {
        "scans": of.cases,
        "scans with Dice": len(falls),
        "scans with AUROC": of.cases_with_auroc,
        "scans with deletion": of.cases_with_deletion,
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
    further = Further(None, more_networks=False)
    if word == "cannot tell":
        further = further_scans(of, both, num_tested)
    figures["further scans"] = further.scans
    verdict = GateVerdict(*of.unit, of.structure, word, of.direction, "", figures)
    reason = _reason(
        verdict, of, like_untrained=like_untrained, too_few_networks=further.more_networks
    )
    return replace(verdict, reason=reason)


def _reason(
    verdict: GateVerdict, of: Hypothesis, *, like_untrained: bool, too_few_networks: bool
) -> str:
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
            f"Dice {_fall(fall)}{span} if the map is replaced by its mean, and by more "
            f"than {DICE_MARGIN:g} in {mattering} of {counted(len(of.contexts[0]), 'scan')}"
        )
    beside = _number(figures["Dice lost with the others gone"])
    if math.isfinite(beside):
        clauses.append(f"it {_fall(beside)} if all other gates are replaced too")
    if of.places:
        gain = _number(figures["AUROC: more than the best comparator"])
        score = f"{_number(figures['AUROC']):.2f}{_over(of.cases_with_auroc, of)}"
        clauses.append(f"AUROC {score}, {_gain(gain)} than {figures['AUROC: best comparator']}")
    if of.deletions:
        gain = _number(figures["deletion: more than the best comparator"])
        clauses.append(
            f"in deletion{_over(of.cases_with_deletion, of)} {_gain(gain)} than "
            f"{figures['deletion: best comparator']}"
        )
    if math.isfinite(rho := _number(figures["|ρ| with untrained networks"])):
        clauses.append(f"|ρ| with untrained networks {rho:.2f}")
    if not of.places:
        clauses.append("no AUROC, because no cell that counts lies inside, or none outside")
    elif not of.has_mean_map:
        clauses.append("not compared with the mean map of other scans, because there is none")
    said = _said(verdict, like_untrained=like_untrained, too_few_networks=too_few_networks)
    return f"Over {scans}, {said}: {'; '.join(clauses) or 'nothing was measured'}."


def _over(scans: int, of: Hypothesis) -> str:
    """The number of scans that have a measure, such as " (over 4 scans)", if not all have it."""
    return f" (over {counted(scans, 'scan')})" if scans < of.cases else ""


def _fall(lost: float) -> str:
    """The change of Dice in words, such as "falls by 0.020"."""
    return f"{'rises' if _rises(lost) else 'falls'} by {abs(lost):.3f}"


def _gain(gained: float) -> str:
    """A gain over a comparator, such as "0.020 better"."""
    return f"{abs(gained):.3f} {'worse' if gained < 0 else 'better'}"


def _rises(lost: float) -> bool:
    """Whether Dice rises by an amount that three digits show."""
    return lost < -0.0005


def _said(verdict: GateVerdict, *, like_untrained: bool, too_few_networks: bool) -> str:
    match verdict.word:
        case "informative":
            return f"the gate {verdict.claim}, the network needs it, and it was learned"
        case "redundant":
            return f"the gate {verdict.claim}, but the network does not need it"
        case "uninformative" if like_untrained:
            return (
                f"the gate orders the cells as untrained networks do, and shows "
                f"{verdict.structure} hardly better than they do or no better"
            )
        case "uninformative":
            gains = [
                _number(verdict.figures[f"{name}: more than the best comparator"])
                for name in ("AUROC", "deletion")
            ]
            least = min(filter(math.isfinite, gains), default=0.0)
            better = "hardly better" if least > 0 else "no better"
            shown = f"the gate shows {verdict.structure} {better}"
            return f"{shown} than a map that it is compared with"
        case None:
            return "there is no verdict without a reference"
    further = verdict.figures["further scans"]
    if isinstance(further, int):
        more = counted(further, "more scan")
        return f"the evidence cannot tell; about {more} like these may be enough"
    if too_few_networks:
        return (
            "the evidence cannot tell; more untrained networks or fewer channels would be needed, "
            "not more scans"
        )
    return f"the evidence cannot tell, and {MOST_FURTHER} more scans like these are not enough"


def _structures(evidence: Sequence[ChannelEvidence]) -> list[str]:
    """The structures that some scan has, in the order of the labelling."""
    return list(dict.fromkeys(name for one in evidence for name in [*one.aurocs, *one.drops]))


def _number(value: float | str | None) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _or(value: float, other: float) -> float:
    return other if math.isnan(value) else value
