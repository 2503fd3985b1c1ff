"""Measures and verdicts for the attention maps of a trained run, on its held-out cases.

    python benchmarks/explain.py RUN DATASET [--cases 12] [--device cpu]

The Markdown table has a row for each map and structure. It contains the measures of docs/explain.md
as means over cases, their values by chance, the same measures of the scan's intensity and gradient,
and the verdict of docs/verdicts.md with its figures. Below is the time for one case: maps,
measures, ablation, deletion, untrained networks, and writing files and page. The cases are the
first, by name, that RUN's config holds out of DATASET.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from segkit.config.load import load_config
from segkit.data.dataset import read_case, read_dataset
from segkit.data.split import split_of
from segkit.explain.explain_scan import explain_volume
from segkit.explain.measures.measure_maps import Measure
from segkit.explain.verdicts.evidence import CaseEvidence
from segkit.explain.verdicts.rule import GateVerdict, judge_evidence
from segkit.inference.predictor import Predictor
from segkit.model.file_names import CONFIG
from segkit.system.progress import Tracker

COLUMNS = (
    *(
        "map",
        "structure",
        "AUROC",
        "of intensity, gradient",
        "enrichment",
        "of intensity, gradient",
    ),
    *("pointing (chance)", "IoU (chance)", "entropy", "at the high end", "windows disagree by"),
    *("Dice lost without it", "AUROC: gain over comparators", "deletion: gain over comparators"),
    *("|ρ|", "verdict"),
)


def main() -> None:
    """Explain each case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    console = Console()
    dataset = read_dataset(options.dataset)
    _, held_out = split_of(dataset, load_config(options.run / CONFIG))
    cases = sorted(held_out, key=lambda case: case.name)[: options.cases]
    predictor = Predictor.load(options.run, device=options.device)
    track = Tracker(console)
    measures: list[Measure] = []
    evidence: list[CaseEvidence] = []
    dice: dict[str, list[float]] = {}
    seconds = []
    for case in track(cases, "explaining", len(cases)):
        volume, reference = read_case(case, dataset)
        started = time.perf_counter()
        explanation = explain_volume(
            predictor,
            volume,
            reference,
            name=case.name,
            verdicts=True,
            earlier=evidence,
            track=track,
        )
        with tempfile.TemporaryDirectory() as folder:
            explanation.write(folder)
        seconds.append(time.perf_counter() - started)
        measures += explanation.measures
        evidence += [explanation.worth.evidence] if explanation.worth else []
        for structure, value in explanation.dice.items():
            dice.setdefault(structure, []).append(value)
    verdicts = judge_evidence(evidence)
    means = ", ".join(f"{name} {np.nanmean(values):.3f}" for name, values in dice.items())
    lines = [
        f"{len(cases)} held-out cases of {options.dataset.name}, {options.run.name}: Dice {means}.",
        "",
        *table(measures, verdicts),
        "",
        f"Seconds for one case in full: median {statistics.median(seconds):.1f}, from "
        f"{min(seconds):.1f} to {max(seconds):.1f}; {options.device}, "
        f"{torch.get_num_threads()} threads.",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def table(measures: Sequence[Measure], verdicts: Sequence[GateVerdict]) -> list[str]:
    """The lines of the table. The first row has the values by chance."""
    rows = [["chance", "", "0.5", "", "1", *[""] * 3, "1", *[""] * 7]]
    structures = list(dict.fromkeys(one.structure for one in measures if one.structure))
    for key in dict.fromkeys(one.map for one in measures):
        of_map = [one for one in measures if one.map == key]
        for structure in structures:
            here = [one for one in of_map if one.structure == structure]
            row = [key, structure]
            for name in ("auroc", "enrichment"):
                row.append(mean(one.value for one in here if (one.name, one.of) == (name, "map")))
                row.append(baselines(here, name))
            for name in ("pointing", "iou"):
                found = [one for one in here if (one.name, one.of) == (name, "map")]
                row.append(
                    f"{mean(one.value for one in found)} ({mean(one.chance for one in found)})"
                )
            # Entropy, saturation and disagreement are for the whole map; they are in its first row.
            whole = [
                mean(one.value for one in of_map if one.name == name)
                for name in ("entropy", "saturated_high", "disagreement")
            ]
            row += whole if structure == structures[0] else [""] * 3
            judged = [one for one in verdicts if (one.map, one.structure) == (key, structure)]
            rows.append([*row, *(worth(judged[0]) if judged else ["–"] * 5)])
    lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    return lines


def baselines(measures: Sequence[Measure], name: str) -> str:
    """A measure of each baseline: intensity and gradient of each channel."""
    others = dict.fromkeys(one.of for one in measures if one.of != "map")
    return ", ".join(
        mean(one.value for one in measures if (one.name, one.of) == (name, other))
        for other in others
    )


def worth(verdict: GateVerdict) -> list[str]:
    """A verdict with its figures."""
    names = (
        "Dice lost without it",
        "AUROC: more than the best comparator",
        "deletion: more than the best comparator",
        "|ρ| with untrained networks",
    )
    found = [verdict.figures[name] for name in names]
    cells = [f"{one:+.4f}" if isinstance(one, float) and np.isfinite(one) else "–" for one in found]
    return [*cells, f"{verdict.word}: {verdict.claim}"]


def mean(values: Iterable[float | None]) -> str:
    """The mean of the finite values, as text."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    return f"{statistics.mean(known):.3f}" if known else "–"


if __name__ == "__main__":
    main()
