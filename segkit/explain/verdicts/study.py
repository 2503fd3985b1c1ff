"""Do the gates of a scan matter? Everything a verdict needs, measured, judged, and told.

Each gate is taken out in four ways, the image is deleted and inserted in its order, and its weights
are drawn anew; with the AUROC of the measures the module `rule` makes a verdict of it. Over
several scans the same figures are pooled.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from segkit.config.labels import Labelling
from segkit.data.label_numbers import within
from segkit.errors import ModelError
from segkit.explain.display import Curve, Line, Table, Verdict, rounded
from segkit.explain.measures.measure_maps import Measure, members
from segkit.explain.verdicts.ablation import (
    Ablation,
    AblationEffect,
    ablate,
    ablated_maps,
    ablation_effects,
)
from segkit.explain.verdicts.perturbation import PerturbationCurve, perturb
from segkit.explain.verdicts.randomisation import Randomisation, randomise
from segkit.explain.verdicts.rule import NAMES, MapFigures, gather_figures, judge
from segkit.inference.attention_maps import AttentionMap
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.nn.network import SegmentationNetwork
from segkit.system.progress import Track, untracked

ABLATIONS = "ablation.csv"
SHOWN = (
    "mean_change",
    "permuted_change",
    "auroc",
    "baseline",
    "baseline_auroc",
    "deletion_gain",
    "deletion_spread",
    "randomised",
)
"""The figures of a map in the table that verdicts rest on."""


@dataclass(frozen=True)
class Evidence:
    """What was measured of the gates of one scan."""

    maps: tuple[str, ...]
    """Their keys."""
    ablations: Sequence[Ablation]
    curves: Sequence[PerturbationCurve]
    randomisations: Sequence[Randomisation]
    aurocs: Mapping[str, Mapping[str, float]]
    """Of each map over the foreground: its own, as 'map', and those of the scan on its cells."""


@dataclass(frozen=True)
class Worth:
    """What the gates of a scan are worth, with the evidence, to be pooled over scans."""

    evidence: Evidence
    verdicts: tuple[Verdict, ...] = ()
    """On each gate of which enough was measured."""
    tables: tuple[Table, ...] = ()
    curves: tuple[Curve, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Verdicts and evidence as plain lists, dicts and numbers, as `measures.json` has them."""


def study_gates(
    predictor: Predictor,
    volume: Volume,
    reference: Volume | None,
    maps: Mapping[str, AttentionMap],
    measures: Sequence[Measure],
    *,
    case: str,
    seed: int = 0,
    fresh: SegmentationNetwork | None = None,
    track: Track = untracked,
) -> Worth:
    """What the gates of a scan are worth.

    Dice is the mean over the classes that the reference holds; without a reference, or if it is
    background only, the gates are measured as far as they can be. Takes a prediction per gate and
    operation, 22 passes per gate and 45 per grid for deletion, and one per gate and stage.

    Args:
        predictor: the model's; `maps` and `measures` are what it says of the scan.
        volume: the scan.
        reference: its labels, or None.
        maps: the scan's, by key.
        measures: of these maps.
        case: what to call the scan.
        seed: of random orders and weights.
        fresh: an untrained network of the model's form; built of its description if None.
        track: may show the progress.

    Raises:
        ModelError: if the model has no gates.
    """
    keys = check_gates(predictor)
    labelling = predictor.model.description.labelling
    ablations = []
    if reference is None or _holds_foreground(reference, labelling):
        ablations = ablate(predictor, volume, reference, case=case, seed=seed, track=track)
    gates = {key: maps[key] for key in keys}
    curves = perturb(predictor, volume, gates, case=case, seed=seed, track=track)
    redrawn = randomise(
        predictor, volume, case=case, keys=keys, seed=seed, fresh=fresh, track=track
    )
    aurocs = _aurocs(keys, measures, list(members(labelling))[-1])
    return worth_of(Evidence(keys, ablations, curves, redrawn, aurocs))


def check_gates(predictor: Predictor) -> tuple[str, ...]:
    """The keys of the maps that can be taken out. Raises ModelError where there is none."""
    keys = tuple(ablated_maps(predictor))
    if not keys:
        raise ModelError(
            "verdicts are of gates and spatial maps, and the model has none; train one with "
            "network.attention.skip=additive_grid"
        )
    return keys


def worth_of(evidence: Evidence) -> Worth:
    """The evidence with its verdicts, as parts of a page and as plain data."""
    figures, _ = pooled([evidence])
    verdicts = verdicts_of(figures)
    return Worth(
        evidence,
        tuple(verdicts),
        tuple(_tables(evidence, figures)),
        tuple(_curve(curve) for curve in evidence.curves),
        {
            **_told(figures, verdicts),
            "ablation": [vars(row) for row in evidence.ablations],
            "perturbation": [vars(curve) for curve in evidence.curves],
            "randomisation": [vars(found) for found in evidence.randomisations],
        },
    )


def pooled(scans: Sequence[Evidence]) -> tuple[list[MapFigures], list[AblationEffect]]:
    """The figures of each map over scans, and what taking it out does, tested over them."""
    effects = ablation_effects([row for scan in scans for row in scan.ablations])
    figures = []
    for key in dict.fromkeys(key for scan in scans for key in scan.maps):
        of: dict[str, list[float]] = {}
        for scan in scans:
            for what, auroc in scan.aurocs.get(key, {}).items():
                of.setdefault(what, []).append(auroc)
        figures.append(
            gather_figures(
                key,
                effects=effects,
                curves=[curve for scan in scans for curve in scan.curves],
                randomisations=[found for scan in scans for found in scan.randomisations],
                aurocs=of.pop("map", []),
                baselines=of,
            )
        )
    return figures, effects


def verdicts_of(figures: Sequence[MapFigures]) -> list[Verdict]:
    """The verdict on each map of which enough was measured."""
    found = [judge(one) for one in figures]
    return [verdict for verdict in found if verdict is not None]


def cohort_figures(scans: Sequence[Evidence]) -> tuple[list[Verdict], dict[str, Any]]:
    """The verdict on each map over several scans, and all behind it as plain JSON."""
    figures, effects = pooled(scans)
    verdicts = verdicts_of(figures)
    return verdicts, {**_told(figures, verdicts), "ablation": [vars(one) for one in effects]}


def _told(figures: Sequence[MapFigures], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "verdicts": [
            {"map": one.map, "verdict": one.verdict, "reason": one.reason} for one in verdicts
        ],
        "figures": [vars(one) for one in figures],
    }


def _holds_foreground(reference: Volume, labelling: Labelling) -> bool:
    numbers = {number for some in members(labelling).values() for number in some}
    return bool(np.isin(within(reference.data, labelling), list(numbers)).any())


def _aurocs(
    keys: Sequence[str], measures: Sequence[Measure], structure: str
) -> dict[str, dict[str, float]]:
    """Of each map, the AUROC over a structure of what is measured on its cells."""
    found: dict[str, dict[str, float]] = {key: {} for key in keys}
    for one in measures:
        known = one.name == "auroc" and one.structure == structure and not math.isnan(one.value)
        if known and one.map in found:
            found[one.map][one.of] = one.value
    return found


def _tables(evidence: Evidence, figures: Sequence[MapFigures]) -> list[Table]:
    means = [row for row in evidence.ablations if row.label is None]
    against = means[0].against if means else "reference"
    tables = [
        Table(
            "Dice without each map",
            ["map", "replaced by", "Dice", "without", "change"],
            [
                [row.map, row.operation, *map(rounded, (row.dice_before, row.dice, row.change))]
                for row in means
            ],
            note=f"With the {against}, mean over the classes it holds. Mean is the fair one: the "
            "map keeps its scale and loses only where it is high.",
        ),
        Table(
            "Each map under random weights",
            ["map", "drawn anew, with all above", "ρ with the trained map"],
            [
                [found.map, stage, rounded(value)]
                for found in evidence.randomisations
                for stage, value in zip(found.stages, found.correlations, strict=True)
            ],
            note="Spearman's correlation. A map that stays as it was shows the image, and nothing "
            "learned; a constant one has no ranks.",
        ),
        Table(
            "What the verdicts rest on",
            ["map", *(NAMES[name] for name in SHOWN)],
            [[one.map, *(rounded(getattr(one, name)) for name in SHOWN)] for one in figures],
            note="One scan has no test: a change of Dice counts from 0.01 on. Of all structures "
            "together.",
        ),
    ]
    return [table for table in tables if table.rows]


def _curve(curve: PerturbationCurve) -> Curve:
    verb = "deleted" if curve.mode == "deletion" else "inserted"
    return Curve(
        f"{curve.mode.capitalize()}: {curve.map}",
        f"share of cells {verb}",
        "agreement",
        [
            Line("the highest first", curve.fractions, curve.scores),
            Line("random orders", curve.fractions, curve.random_scores),
        ],
        note="Agreement is soft Dice with what is predicted of the whole image. Area "
        f"{curve.auc:.3f}, random {curve.random_auc:.3f} ± {curve.random_spread:.3f}.",
    )
