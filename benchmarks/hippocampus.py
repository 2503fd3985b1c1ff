"""Seconds of training and Dice on held-out hippocampi (Medical Segmentation Decathlon, Task04).

    python benchmarks/hippocampus.py DATASET [KEY=VALUE …]

Trains configs/attention_unet_3d.yaml with a fifth of the cases held out, and prints one table.
"""

import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from segkit.config_file import load_config
from segkit.progress import Tracker, TrainingProgress
from segkit.training import train

CONFIG = Path(__file__).parents[1] / "configs" / "attention_unet_3d.yaml"


def main() -> None:
    """Train and print."""
    dataset, *overrides = sys.argv[1:]
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            CONFIG, [f"data.folder={dataset}", f"data.cache={folder}/cache", *overrides]
        )
        run = train(
            config,
            runs=Path(folder) / "runs",
            callbacks=[TrainingProgress(console)],
            track=Tracker(console),
        )
    summary = run.summary
    scores = summary["validation"]
    table = Table(title=f"attention U-Net, {scores['cases']} held-out cases of {dataset}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("steps", str(summary["steps"]))
    table.add_row("seconds of training, validations included", f"{summary['seconds_of_training']}")
    table.add_row("parameters", f"{summary['parameters']:,}")
    for name, dice in scores["dice"].items():
        table.add_row(f"Dice {name}", f"{dice:.4f}")
    table.add_row("mean Dice", f"{scores['mean_dice']:.4f}")
    console.print(table)


if __name__ == "__main__":
    main()
