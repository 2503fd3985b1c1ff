"""Verdicts on the gates of one scan, with evidence, ablations, tables and plots.

The evidence of several scans can be judged together (`cohort_figures`).
"""

import math
from collections.abc import Collection, Mapping, Sequence
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
    """Verdicts on the gates of a scan, and the evidence that can be judged with other scans."""

    evidence: CaseEvidence
    verdicts: tuple[GateVerdict, ...] = ()
    """A verdict on each gate, channel and structure from this scan only, best first for each
    gate."""
    ablations: Sequence[Ablation] = ()
    tables: tuple[Table, ...] = ()
    curves: tuple[Curve, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Verdicts and evidence as plain lists, dicts and numbers, for `measures.json`."""


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
    unlabelled: Collection[str] = (),
    track: Track = untracked,
) -> Worth:
    """Evidence, ablations and verdicts for the gates of a scan.

    Args:
        predictor: runs the model.
        volume: the scan.
        reference: its labels, or None.
        maps: the maps that the predictor returned for the scan, by key.
        labels: the labels that the predictor returned.
        case: name of the scan.
        earlier: evidence of other scans. Their mean map is a comparator for deletion.
        seed: seed of random orders and weights.
        untrained: makes an untrained network from a seed. If None, networks are built from the
            model's description.
        unlabelled: classes or regions that nobody labelled in the reference; they do not count.
        track: reports the progress.

    Raises:
        ModelError: if the model has no gates, or if an untrained network does not have its
            architecture.
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
        unlabelled=unlabelled,
        track=track,
    )
    ablations: list[Ablation] = []
    labelling = predictor.model.description.labelling
    if reference is None or holds_foreground(volume_within(reference, labelling), labelling):
        ablations = ablate(
            predictor,
            volume,
            reference,
            case=case,
            seed=seed,
            unlabelled=unlabelled,
            track=track,
        )
    return worth_of(evidence, ablations)


def worth_of(evidence: CaseEvidence, ablations: Sequence[Ablation] = ()) -> Worth:
    """The verdicts that follow from the evidence of one scan, with tables, plots and plain data."""
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
    """The best verdict on each map, for a page or a terminal."""
    return [
        Verdict(
            one.map,
            one.word or "no verdict",
            f"Channel {one.channel}: {one.reason}" if _several(verdicts, one) else one.reason,
            {"structure": one.structure, **{name: _cell(it) for name, it in one.figures.items()}},
        )
        for one in best_of_maps(verdicts)
    ]


def cohort_figures(scans: Sequence[CaseEvidence]) -> tuple[list[GateVerdict], dict[str, Any]]:
    """The verdicts over several scans; and verdicts and evidence as plain data for JSON."""
    verdicts = judge_evidence(scans)
    return verdicts, {
        "verdicts": [vars(one) for one in verdicts],
        "evidence": [evidence_as_json(one) for one in scans],
    }


def evidence_as_json(evidence: CaseEvidence) -> dict[str, Any]:
    """The evidence of a scan as plain data for JSON, without the maps themselves."""
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
            ["map", "channel", "structure", "verdict", "direction", *_FIGURES],
            [
                [
                    one.map,
                    one.channel,
                    one.structure,
                    one.word or "no verdict",
                    one.direction,
                    *(rounded(one.figures[name]) for name in _FIGURES),
                ]
                for one in verdicts
            ],
            note="From this scan only. One scan is too few for a verdict other than 'cannot tell'. "
            "Comparators are fixed functions of the image, such as its smoothed intensity or "
            "gradient, and untrained networks.",
        ),
        Table(
            "Dice without each map",
            ["map", "replaced by", "Dice before", "Dice after", "change"],
            [
                [row.map, row.operation, *map(rounded, (row.dice_before, row.dice, row.change))]
                for row in means
            ],
            note=f"Dice with the {evidence.against}, mean over the classes that it contains. "
            "'mean', over the whole scan, is the fair replacement: the map keeps its scale, and "
            "only the location of its high values is lost.",
        ),
        Table(
            "Each map compared with untrained networks",
            ["map", "channel", "untrained network", "|ρ| with the trained map"],
            [
                [key, channel, draw, rounded(value)]
                for (key, channel), one in evidence.channels.items()
                for draw, value in enumerate(one.correlations)
            ],
            note="Absolute value of Spearman's correlation over cells. A value near 1 means that "
            "the map comes from the image and the architecture, not from training. A constant map "
            "has no correlation; if only that of the untrained network is constant, the value is "
            "0.",
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
    """Deletion curves of each channel in both orders, of intensity and an untrained network."""
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
                note="Agreement is soft Dice with the prediction for the whole image. The area "
                f"under a line is small if the prediction changes early: {areas}.",
            )
        )
    return found


def _line(name: str, curve: DeletionCurve) -> Line:
    return Line(name, curve.fractions, curve.scores)


def _num_channels(evidence: CaseEvidence, key: str) -> int:
    return sum(one == key for one, _ in evidence.channels)
