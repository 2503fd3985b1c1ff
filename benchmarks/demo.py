"""Training time and Dice of `segkit demo` on the real scan, for several seeds and contrasts.

python benchmarks/demo.py [--seeds 3] [--contrasts t1 random]
"""

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from segkit.demo.demo import demo_config, load_template, write_dataset
from segkit.training.fit import train


def main() -> None:
    """Train with each contrast and seed, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contrasts", nargs="+", default=["t1"], choices=["t1", "random"])
    options = parser.parse_args()
    table = Table(title="segkit demo: trained on synthetic scans, scored on the real T1 scan")
    for heading in ("contrast", "seed", "steps", "seconds", "grey", "white", "mean Dice"):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "dataset"
        write_dataset(dataset, *load_template())
        for contrast in options.contrasts:
            for seed in range(options.seeds):
                config = demo_config(dataset, contrast=contrast, seed=seed)
                summary = train(config, runs=Path(folder) / "runs").summary
                dice = summary["validation"]["dice"]
                grey, white = dice["grey matter"], dice["white matter"]
                table.add_row(
                    contrast,
                    str(seed),
                    str(summary["steps"]),
                    f"{summary['seconds_of_training']:.0f}",
                    f"{grey:.3f}",
                    f"{white:.3f}",
                    f"{(grey + white) / 2:.3f}",
                )
    Console().print(table)


if __name__ == "__main__":
    main()
