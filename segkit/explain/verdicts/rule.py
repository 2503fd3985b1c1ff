"""Does this map matter? A verdict from what was measured, by a written rule.

A map is

- informative, if the network needs it, it shows more than the image itself does, and it was
  learned;
- redundant, if it is not informative but shows where its class lies;
- uninformative, if neither.

Each of these in numbers:

- needed: evening the map out, or shuffling its cells, costs Dice. Over a cohort that is large
  enough to tell, the mean change is below -0.005 and Holm's p below 0.05; else it is below -0.01,
  without a test.
- shows more: AUROC over its class exceeds that of the best baseline (intensity, gradient) by 0.02,
  where a baseline below 0.5 counts turned over, as of a class that is dark; or deleting the image
  in the map's order is better than random orders, by 0.02 of area under the curve and twice the
  standard deviation among these.
- learned: Spearman's correlation with itself, after all that it depends on was drawn anew, is below
  0.9.
- shows its class: AUROC is 0.6 or more.

Opening and inverting a map decide nothing: opening also changes the scale of what the layers behind
see. What was not measured is not held against a map, but its verdict says so.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from segkit.explain.display import Verdict
from segkit.explain.verdicts.ablation import SIGNIFICANT, AblationEffect
from segkit.explain.verdicts.perturbation import PerturbationCurve
from segkit.explain.verdicts.randomisation import Randomisation

NAMES = {
    "cases": "scans",
    "against": "Dice with the",
    "testable": "enough for a test",
    "mean_change": "Dice, evened out",
    "mean_p": "p, evened out",
    "permuted_change": "Dice, shuffled",
    "permuted_p": "p, shuffled",
    "auroc": "AUROC",
    "baseline": "best baseline",
    "baseline_auroc": "baseline's AUROC",
    "deletion_gain": "deletion over random",
    "deletion_spread": "± of random",
    "randomised": "ρ, all drawn anew",
    "downstream_change": "change from behind",
}
"""What a reader calls the fields of `MapFigures`."""
LEAST_CHANGE = 0.005
"""Of Dice, over a cohort that can tell."""
LEAST_UNTESTED = 0.01
"""… where no test can."""
AUROC_MARGIN = 0.02
DELETION_MARGIN = 0.02
CHANCE_MARGIN = 0.1
"""By which AUROC exceeds the 0.5 of chance where a map shows its class."""
UNCHANGED = 0.9
"""Spearman's correlation from which a map is what it was before."""


@dataclass(frozen=True)
class MapFigures:
    """What was measured of a map, means over cases; None where it was not."""

    map: str
    cases: int = 1
    against: Literal["reference", "prediction"] = "reference"
    """What Dice is taken with."""
    mean_change: float | None = None
    """Of Dice, the map evened out."""
    mean_p: float | None = None
    """Holm's p of this change."""
    permuted_change: float | None = None
    """… the map's cells shuffled."""
    permuted_p: float | None = None
    testable: bool = False
    """Whether so many cases can be significant at all."""
    auroc: float | None = None
    """Of the map's values over its class."""
    baseline: str | None = None
    """The best baseline, such as 'intensity', or 'intensity turned over' of a dark class."""
    baseline_auroc: float | None = None
    """Its AUROC, never below 0.5: turned over it is 1 less what was measured."""
    deletion_gain: float | None = None
    """Area under the deletion curve of random orders less the map's: above 0 is better."""
    deletion_spread: float | None = None
    """Standard deviation of the areas of random orders."""
    randomised: float | None = None
    """Spearman's correlation with the map of an untrained path."""
    downstream_change: float | None = None
    """The most that what lies behind the map changes it; not 0 is an error of ours."""


def gather_figures(
    key: str,
    *,
    effects: Sequence[AblationEffect] = (),
    curves: Sequence[PerturbationCurve] = (),
    randomisations: Sequence[Randomisation] = (),
    aurocs: Sequence[float] = (),
    baselines: Mapping[str, Sequence[float]] | None = None,
) -> MapFigures:
    """The figures of one map out of those of many maps and cases.

    `aurocs` are the map's, of each case that has one; `baselines` those of what it is compared
    with, by name. `effects` are of one class, or of the mean over classes.
    """
    of_map = {effect.operation: effect for effect in effects if effect.map == key}
    mean, permuted = of_map.get("mean"), of_map.get("permuted")
    either = mean or permuted
    deletions = [curve for curve in curves if curve.map == key and curve.mode == "deletion"]
    redrawn = [found for found in randomisations if found.map == key]
    known = dict(_either_way(name, values) for name, values in (baselines or {}).items() if values)
    baseline = max(known, key=known.__getitem__, default=None)
    return MapFigures(
        key,
        cases=max(either.cases if either else 0, len(aurocs), len(deletions), len(redrawn), 1),
        against=either.against if either else "reference",
        mean_change=mean.mean_change if mean else None,
        mean_p=mean.p_holm if mean else None,
        permuted_change=permuted.mean_change if permuted else None,
        permuted_p=permuted.p_holm if permuted else None,
        testable=either.testable if either else False,
        auroc=_mean(aurocs),
        baseline=baseline,
        baseline_auroc=known[baseline] if baseline else None,
        deletion_gain=_mean([curve.gain for curve in deletions]),
        deletion_spread=_mean([curve.random_spread for curve in deletions]),
        randomised=_mean([found.last for found in redrawn]),
        downstream_change=max((found.downstream_change for found in redrawn), default=None),
    )


def judge(figures: MapFigures) -> Verdict | None:
    """What a map is worth, by the rule above, in one sentence with the numbers that decided it.

    None where its ablation was not measured, or neither AUROC nor deletion: then nothing is known.
    """
    needed, shows_more, learned = _needed(figures), _shows_more(figures), _learned(figures)
    if needed is None or shows_more is None:
        return None
    shows_class = figures.auroc is not None and figures.auroc >= 0.5 + CHANCE_MARGIN
    verdict: Literal["informative", "redundant", "uninformative"]
    if needed and shows_more and learned is not False:
        verdict = "informative"
    else:
        verdict = "redundant" if shows_class else "uninformative"
    clauses = [_said_of_need(figures, needed), _said_of_place(figures, shows_more)]
    clauses.append(_said_of_learning(figures, learned))
    told = {**vars(figures), "testable": "yes" if figures.testable else "no"}
    numbers = {NAMES[name]: told[name] for name in NAMES if told[name] is not None}
    return Verdict(figures.map, verdict, f"{'; '.join(clauses)}.", numbers)


def _needed(figures: MapFigures) -> bool | None:
    trials = [
        (figures.mean_change, figures.mean_p),
        (figures.permuted_change, figures.permuted_p),
    ]
    known = [(change, p) for change, p in trials if change is not None]
    if not known:
        return None
    if not figures.testable:
        return any(change < -LEAST_UNTESTED for change, _ in known)
    return any(change < -LEAST_CHANGE and p is not None and p < SIGNIFICANT for change, p in known)


def _shows_more(figures: MapFigures) -> bool | None:
    """None where nothing that tells was measured."""
    answers = []
    if figures.auroc is not None and figures.baseline_auroc is not None:
        answers.append(figures.auroc > figures.baseline_auroc + AUROC_MARGIN)
    if figures.deletion_gain is not None:
        spread = 2 * (figures.deletion_spread or 0.0)
        answers.append(figures.deletion_gain > max(DELETION_MARGIN, spread))
    return any(answers) if answers else None


def _learned(figures: MapFigures) -> bool | None:
    return None if figures.randomised is None else figures.randomised < UNCHANGED


def _said_of_need(figures: MapFigures, needed: bool) -> str:
    changes = [
        f"by {change:+.4f}" + ("" if p is None else f" (p = {p:.3g})") + f" with it {operation}"
        for operation, change, p in (
            ("evened out", figures.mean_change, figures.mean_p),
            ("shuffled", figures.permuted_change, figures.permuted_p),
        )
        if change is not None
    ]
    dice = "Dice" if figures.against == "reference" else "Dice with the model's own prediction"
    untold = "" if figures.testable else ", of too few cases for a test"
    subject = "the network needs it" if needed else "the network does without it"
    return f"{subject}: {dice} changes {' and '.join(changes)}{untold}"


def _said_of_place(figures: MapFigures, shows_more: bool) -> str:
    told = []
    if figures.auroc is not None and figures.baseline_auroc is not None:
        told.append(
            f"AUROC {figures.auroc:.2f} beside {figures.baseline_auroc:.2f} of {figures.baseline}"
        )
    elif figures.auroc is not None:
        told.append(f"AUROC {figures.auroc:.2f}")
    if figures.deletion_gain is not None:
        told.append(f"deletion {figures.deletion_gain:+.3f} over random")
    subject = "it shows more than the image" if shows_more else "it shows no more than the image"
    return f"{subject}: {' and '.join(told)}"


def _said_of_learning(figures: MapFigures, learned: bool | None) -> str:
    if figures.randomised is None:
        return "whether it was learned cannot be told"
    subject = "it was learned" if learned else "it was not learned"
    return f"{subject}: {figures.randomised:.2f} with itself under random weights"


def _either_way(name: str, aurocs: Sequence[float]) -> tuple[str, float]:
    """A baseline's mean AUROC; of one below 0.5, that of its values turned over."""
    mean = sum(aurocs) / len(aurocs)
    return (name, mean) if mean >= 0.5 else (f"{name} turned over", 1 - mean)


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None
