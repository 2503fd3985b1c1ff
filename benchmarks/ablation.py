"""Dice on held-out hippocampi for each kind of attention and without attention.

    python benchmarks/ablation.py DATASET [--steps 200] [--seeds 0 1 2] [--results FOLDER]
                                          [--arms ARM …]
    python benchmarks/ablation.py --results FOLDER --table

An arm is a U-Net with one kind of attention. Each arm is trained with each seed on the same 160
cases for the same number of steps, and scored on the same 40 cases. An arm with more than 2 % of
extra parameters is compared with a plain U-Net of the same size, other arms with the plain U-Net.
Results are stored in FOLDER, so the study can be stopped and resumed. `--table` prints the results
so far.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from segkit.config.load import validated
from segkit.config.training import Config
from segkit.data.dataset import read_dataset
from segkit.data.split import split
from segkit.io.atomic import write_json
from segkit.training.fit import train

WIDTHS = [8, 16, 32, 64]
MATCHED = [8, 16, 33, 65]
"""Like WIDTHS, with 4 % more parameters."""
PLAIN = "plain"
WIDER = "plain, widened"
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    WIDER: {},
    "skip: additive_grid": {"skip": "additive_grid"},
    "skip: additive_grid, hard": {"skip": {"kind": "additive_grid", "coefficients": "hard"}},
    "skip: additive_same_level": {"skip": "additive_same_level"},
    "skip: cross_attention": {"skip": "cross_attention"},
    "skip: u_transformer": {"skip": "u_transformer"},
    **{
        f"encoder: {kind}": {"encoder": kind}
        for kind in ("se", "eca", "cbam", "bam", "scse", "spatial", "sse", "gc")
    },
    "bottleneck: self_attention": {"bottleneck": "self_attention"},
    "bottleneck: additive_self": {"bottleneck": "additive_self"},
    "head: gated": {"head": "gated"},
}


def main() -> None:
    """Train the missing runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=Path("ablation"))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    console = Console()
    if not options.table:
        # The outer loop is over seeds, so that early results include every arm.
        runs = [(arm, seed) for seed in options.seeds for arm in options.arms]
        missing = [run for run in runs if not result_of(options.results, *run).exists()]
        for arm, seed in track(missing, "training", console=console):
            write_json(
                result_of(options.results, arm, seed),
                run_arm(arm, seed, options.dataset, options.steps, options.results),
            )
    console.print(table(options.results, options.seeds), highlight=False, soft_wrap=True)


def result_of(folder: Path, arm: str, seed: int) -> Path:
    """The result file of one run."""
    return folder / f"{arm.replace(': ', '-').replace(', ', '-')}_{seed}.json"


def run_arm(arm: str, seed: int, dataset: Path, steps: int, results: Path) -> dict[str, Any]:
    """Train one arm with one seed and score it."""
    _, held_out = split(read_dataset(dataset), 0.2, 0)
    config = validated(
        Config,
        {
            "name": "arm",
            "data": {
                "folder": str(dataset),
                "patch_size": [40, 56, 40],
                "validation": [case.name for case in held_out],
                "cache": str(results / "cache"),
            },
            "network": {
                "spatial_dims": 3,
                "channels": MATCHED if arm == WIDER else WIDTHS,
                "attention": ARMS[arm],
            },
            "train": {"steps": steps, "validate_every": steps, "seed": seed},
            "trainer": {"accelerator": "cpu"},
        },
        arm,
    )
    with tempfile.TemporaryDirectory() as runs:
        summary = train(config, runs=Path(runs)).summary
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "threads": torch.get_num_threads(),
        **{name: summary[name] for name in ("parameters", "seconds_of_training", "validation")},
    }


def table(folder: Path, seeds: list[int]) -> str:
    """A Markdown table with the mean and standard deviation of each arm over seeds."""
    scores: dict[str, list[float]] = {}
    parameters: dict[str, int] = {}
    steps = set()
    for arm in ARMS:
        for seed in seeds:
            source = result_of(folder, arm, seed)
            if source.exists():
                result = json.loads(source.read_text(encoding="utf-8"))
                scores.setdefault(arm, []).append(result["validation"]["mean_dice"])
                parameters[arm] = result["parameters"]
                steps.add(result["steps"])
    lines = [
        f"Mean Dice of 40 held-out hippocampi after {', '.join(map(str, sorted(steps)))} steps.",
        "",
        "| arm | parameters | Dice, mean ± sd | each seed | compared with | difference | better |",
        "|---|---:|---:|---|---|---:|---:|",
    ]
    for arm, dice in scores.items():
        heavier = parameters[arm] > 1.02 * parameters[PLAIN]
        beside = WIDER if heavier and arm != WIDER else PLAIN
        spread = statistics.stdev(dice) if len(dice) > 1 else float("nan")
        row = f"| {arm} | {parameters[arm]:,} | {statistics.mean(dice):.4f} ± {spread:.4f} "
        row += f"| {', '.join(f'{one:.3f}' for one in dice)} "
        if arm == PLAIN or beside not in scores:
            lines.append(row + "| | | |")
            continue
        gains = [ours - theirs for ours, theirs in zip(dice, scores[beside], strict=False)]
        won = sum(gain > 0 for gain in gains)
        lines.append(row + f"| {beside} | {statistics.mean(gains):+.4f} | {won} of {len(gains)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
