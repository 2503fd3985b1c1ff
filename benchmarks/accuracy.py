"""Dice on held-out cases after a number of minutes on a CPU, with `segkit plan` and `segkit train`.

    python benchmarks/accuracy.py DATASET [--minutes 60] [--folds 0 1 2 3 4] [KEY=VALUE …]

The time of a fold includes everything: measuring, planning, preparing, training and scoring the
held-out cases. There is one plan, and one run for each fold. Then, outside this time, the held-out
cases are scored once more with `--tta`, as nnU-Net predicts by default.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from segkit.config.load import changed
from segkit.data.dataset import read_dataset
from segkit.data.split import split_of
from segkit.model.folder import load_model
from segkit.planning.make_plan import plan_dataset
from segkit.system.progress import Tracker, untracked
from segkit.training.final_scores import score
from segkit.training.fit import train
from segkit.training.progress_bar import TrainingProgress


def main() -> None:
    """Plan, train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--folds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        planned = plan_dataset(
            options.dataset,
            cache=Path(folder, "cache"),
            device="cpu",
            minutes=options.minutes,
            track=Tracker(console),
        )
        planning = time.perf_counter() - started
        console.print(planned.text, highlight=False, markup=False)
        console.print(f"measuring and planning took {planning:.1f} s, counted in each fold")
        table: Table | None = None
        dataset = read_dataset(options.dataset)
        means, mirrored = [], []
        for fold in options.folds:
            started = time.perf_counter() - planning
            config = changed(
                planned.config,
                [f"data.fold={fold}", f"data.cache={folder}/cache", *options.settings],
            )
            run = train(
                config,
                runs=Path(folder, "runs"),
                callbacks=[TrainingProgress(console)],
                track=Tracker(console),
            )
            minutes = (time.perf_counter() - started) / 60
            summary = run.summary
            scores = summary["validation"]
            if table is None:
                table = Table(
                    title=f"{options.dataset.name}, planned for {options.minutes:g} minutes, "
                    f"{summary['parameters']:,} parameters, {summary['steps']:,} steps"
                )
                columns = ("minutes", "in training", "cases", *scores["dice"], "mean Dice", "--tta")
                for name in ("fold", *columns):
                    table.add_column(name, justify="right")
            means.append(scores["mean_dice"])
            held_out = split_of(dataset, config).held_out
            again = score(load_model(run.folder / "model"), dataset, held_out, untracked, tta=True)
            mirrored.append(again["mean_dice"])
            table.add_row(
                str(fold),
                f"{minutes:.1f}",
                f"{summary['seconds_of_training'] / 60:.1f}",
                f"{summary['training_cases']} + {scores['cases']}",
                *(f"{dice:.4f}" for dice in scores["dice"].values()),
                f"{scores['mean_dice']:.4f}",
                f"{again['mean_dice']:.4f}",
            )
            console.print(table)
        console.print(
            f"mean over {len(means)} folds: {statistics.fmean(means):.4f}, with --tta "
            f"{statistics.fmean(mirrored):.4f}"
        )


if __name__ == "__main__":
    main()
