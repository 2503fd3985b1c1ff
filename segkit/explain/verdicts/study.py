"""Do the gates of a scan matter? The evidence of a scan, its verdicts, and how they are told.

Over several scans the evidence of all is judged together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from segkit.data.label_numbers import volume_within
from segkit.explain.display import Cell, Curve, Line, Table, Verdict, rounded
from segkit.explain.verdicts.ablation import Ablation, ablate, check_gates
from segkit.explain.verdicts.deletion import DeletionCurve
from segkit.explain.verdicts.evidence import (
    HIGH_FIRST,
    LOW_FIRST,
    UNTRAINED,
    CaseEvidence,
    gather_evidence,
    holds_foreground,
)
from segkit.explain.verdicts.rule import GateVerdict, best_of_maps, judge_evidence
from segkit.explain.verdicts.untrained import MakeUntrained
from segkit.inference.attention_maps import AttentionMap
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.system.progress import Track, untracked

ABLATIONS = "ablation.csv"


@dataclass(frozen=True)
class Worth:
    """What the gates of a scan are worth, with the evidence, to be judged with other scans'."""

    evidence: CaseEvidence
    verdicts: tuple[GateVerdict, ...] = ()
    """On each gate, channel and structure, by this scan only; of a gate the best word first."""
    ablations: Sequence[Ablation] = ()
    tables: tuple[Table, ...] = ()
    curves: tuple[Curve, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Verdicts and evidence as plain lists, dicts and numbers, as `measures.json` has them."""


def study_gates(
    predictor: Predictor,
    volume: Volume,
    reference: Volume | None,
    maps: Mapping[str, AttentionMap],
    *,
    labels: Volume,
    case: str,
    earlier: Sequence[CaseEvidence] = (),
    seed: int = 0,
    untrained: MakeUntrained | None = None,
    track: Track = untracked,
) -> Worth:
    """What the gates of a scan are worth.

    Args:
        predictor: the model's; `maps` and `labels` are what it says of the scan.
        volume: the scan.
        reference: its labels, or None.
        maps: the scan's, by key.
        labels: the predicted ones.
        case: what to call the scan.
        earlier: evidence of other scans, to compare deletion with their mean map.
        seed: of random orders and weights.
        untrained: makes an untrained network from a seed; built of the model's description if None.
        track: may show the progress.

    Raises:
        ModelError: if the model has no gates.
        VolumeError: if the reference does not fit the volume or the model.
    """
    check_gates(predictor)
    evidence = gather_evidence(
        predictor,
        volume,
        reference,
        maps,
        labels=labels,
        case=case,
        earlier=earlier,
        seed=seed,
        untrained=untrained,
        track=track,
    )
    ablations: list[Ablation] = []
    told = predictor.model.description.labelling
    if reference is None or holds_foreground(volume_within(reference, told), told):
        ablations = ablate(predictor, volume, reference, case=case, seed=seed, track=track)
    return worth_of(evidence, ablations)


def worth_of(evidence: CaseEvidence, ablations: Sequence[Ablation] = ()) -> Worth:
    """The evidence of a scan with its verdicts, as parts of a page and as plain data."""
    verdicts = judge_evidence([evidence])
    return Worth(
        evidence,
        tuple(verdicts),
        ablations,
        tuple(_tables(evidence, ablations, verdicts)),
        tuple(_curves(evidence)),
        {
            "verdicts": [vars(one) for one in verdicts],
            "ablation": [vars(row) for row in ablations],
            "evidence": evidence_as_json(evidence),
        },
    )


def shown_verdicts(verdicts: Sequence[GateVerdict]) -> list[Verdict]:
    """The best verdict of each map, as a page and a terminal show it."""
    return [
        Verdict(
            one.map,
            one.word or "no word",
            f"Channel {one.channel}: {one.reason}" if _several(verdicts, one) else one.reason,
            {"structure": one.structure, **{name: _cell(it) for name, it in one.figures.items()}},
        )
        for one in best_of_maps(verdicts)
    ]


def cohort_figures(scans: Sequence[CaseEvidence]) -> tuple[list[GateVerdict], dict[str, Any]]:
    """The verdicts over several scans, and all behind them as plain JSON."""
    verdicts = judge_evidence(scans)
    return verdicts, {
        "verdicts": [vars(one) for one in verdicts],
        "evidence": [evidence_as_json(one) for one in scans],
    }


def evidence_as_json(evidence: CaseEvidence) -> dict[str, Any]:
    """What a scan tells, as plain data, without the cells of maps."""
    return {
        "case": evidence.case,
        "against": evidence.against,
        "channels": [
            {
                "map": key,
                "channel": channel,
                "dice_lost": {name: list(falls) for name, falls in one.drops.items()},
                "auroc": {name: dict(scores) for name, scores in one.aurocs.items()},
                "deletion_area": {
                    order: {curve.structure: curve.area for curve in curves}
                    for order, curves in one.curves.items()
                },
                "correlation_with_untrained": list(one.correlations),
            }
            for (key, channel), one in evidence.channels.items()
        ],
    }


def _several(verdicts: Sequence[GateVerdict], one: GateVerdict) -> bool:
    return any(other.map == one.map and other.channel != one.channel for other in verdicts)


def _cell(value: float | str | None) -> Cell:
    return None if isinstance(value, float) and math.isnan(value) else value


def _tables(
    evidence: CaseEvidence, ablations: Sequence[Ablation], verdicts: Sequence[GateVerdict]
) -> list[Table]:
    means = [row for row in ablations if row.label is None]
    tables = [
        Table(
            "Each gate channel and structure",
            ["map", "channel", "structure", "word", "direction", *_FIGURES],
            [
                [
                    one.map,
                    one.channel,
                    one.structure,
                    one.word or "no word",
                    one.direction,
                    *(rounded(one.figures[name]) for name in _FIGURES),
                ]
                for one in verdicts
            ],
            note="By this scan only: one scan cannot give a word but 'cannot tell'. Comparators "
            "are intensity and gradient, as they are and smoothed, and untrained networks.",
        ),
        Table(
            "Dice without each map",
            ["map", "replaced by", "Dice", "without", "change"],
            [
                [row.map, row.operation, *map(rounded, (row.dice_before, row.dice, row.change))]
                for row in means
            ],
            note=f"With the {evidence.against}, mean over the classes it holds. Mean is the fair "
            "one: the map keeps its scale and loses only where it is high.",
        ),
        Table(
            "Each map beside untrained networks",
            ["map", "channel", "untrained network", "|ρ| with the trained map"],
            [
                [key, channel, draw, rounded(value)]
                for (key, channel), one in evidence.channels.items()
                for draw, value in enumerate(one.correlations)
            ],
            note="Spearman's correlation over cells, without its sign. A map near 1 shows the "
            "image and the form of the network, and nothing learned; a constant one has no ranks.",
        ),
    ]
    return [table for table in tables if table.rows]


_FIGURES = (
    "Dice lost without it",
    "AUROC",
    "AUROC: more than the best comparator",
    "AUROC: best comparator",
    "deletion: more than the best comparator",
    "|ρ| with untrained networks",
)


def _curves(evidence: CaseEvidence) -> list[Curve]:
    """Deletion of each channel, both ways, beside intensity and an untrained network."""
    found = []
    for (key, channel), one in evidence.channels.items():
        orders = [
            name
            for name in one.curves
            if name in (HIGH_FIRST, LOW_FIRST, f"{UNTRAINED} 0")
            or (name.startswith("intensity") and "smoothed" not in name)
        ]
        if not orders:
            continue
        lines = [_line(name, one.curves[name][-1]) for name in orders]
        areas = ", ".join(f"{name} {one.curves[name][-1].area:.3f}" for name in orders)
        found.append(
            Curve(
                f"Deletion: {key}" + f" channel {channel}" * (_num_channels(evidence, key) > 1),
                "share of cells deleted",
                "agreement",
                lines,
                note="Agreement is soft Dice with what is predicted of the whole image. Area under "
                f"each line, the lower the sooner the prediction falls: {areas}.",
            )
        )
    return found


def _line(name: str, curve: DeletionCurve) -> Line:
    return Line(name, curve.fractions, curve.scores)


def _num_channels(evidence: CaseEvidence, key: str) -> int:
    return sum(one == key for one, _ in evidence.channels)
