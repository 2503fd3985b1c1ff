"""Dice on held-out cases after so many minutes of a CPU, by `segkit plan` and `segkit train`.

    python benchmarks/accuracy.py DATASET [--minutes 60] [--fold 0] [KEY=VALUE …]

The clock runs from the first look at the dataset to the last held-out case's score: measuring,
planning, preparing, training, validations. One split, one run.
"""

import argparse
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from segkit.config_file import changed
from segkit.planning import plan_dataset
from segkit.progress import Tracker
from segkit.training import train
from segkit.training_progress import TrainingProgress


def main() -> None:
    """Plan, train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--fold", type=int, default=0)
    options = parser.parse_args()
    console = Console()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        planned = plan_dataset(
            options.dataset,
            cache=Path(folder, "cache"),
            device="cpu",
            minutes=options.minutes,
            track=Tracker(console),
        )
        config = changed(
            planned.config,
            [f"data.fold={options.fold}", f"data.cache={folder}/cache", *options.settings],
        )
        console.print(planned.text, highlight=False, markup=False)
        run = train(
            config,
            runs=Path(folder, "runs"),
            callbacks=[TrainingProgress(console)],
            track=Tracker(console),
        )
    minutes = (time.perf_counter() - started) / 60
    summary = run.summary
    scores = summary["validation"]
    table = Table(title=f"fold {options.fold} of {options.dataset.name}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("cases: training, held out", f"{summary['training_cases']}, {scores['cases']}")
    table.add_row("minutes asked for", f"{options.minutes:g}")
    table.add_row("minutes in all", f"{minutes:.1f}")
    table.add_row("of these training", f"{summary['seconds_of_training'] / 60:.1f}")
    table.add_row("steps", str(summary["steps"]))
    table.add_row("parameters", f"{summary['parameters']:,}")
    for name, dice in scores["dice"].items():
        table.add_row(f"Dice {name}", f"{dice:.4f}")
    table.add_row("mean Dice", f"{scores['mean_dice']:.4f}")
    console.print(table)


if __name__ == "__main__":
    main()
