"""Training time until held-out hippocampi reach a Dice: segkit and nnU-Net on one machine.

    python -m venv /tmp/nnunet && /tmp/nnunet/bin/pip install torch==2.13.0 nnunetv2==2.8.1
    python benchmarks/time_to_dice.py DATASET --nnunet /tmp/nnunet/bin/python

segkit runs first, then nnU-Net. Each makes its own plan (segkit for a given number of minutes),
prepares the data, and trains on nnU-Net's fold 0 with the same held-out cases. Only training time
counts; preparation has its own row, and validation is left out. nnU-Net is stopped after a limit; a
Dice that it did not reach is reported as "over" this time.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from segkit.config.load import changed
from segkit.planning.make_plan import plan_dataset
from segkit.system.progress import Tracker
from segkit.training.fit import train

TARGETS = (0.80, 0.85)
PEER = Path(__file__).parent / "peers" / "nnunet_training.py"


class Stopwatch(Callback):
    """Records Dice of held-out cases and training time without validation."""

    def __init__(self) -> None:
        self.seconds, self.resumed = 0.0, 0.0
        self.looks: list[tuple[float, int, float]] = []
        self.began: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.began = self.resumed = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.perf_counter() - self.resumed

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        dice = float(trainer.callback_metrics["validation/dice"])
        self.looks.append((self.seconds, trainer.global_step, dice))
        self.resumed = time.perf_counter()


def segkit_looks(
    dataset: Path, minutes: float, every: int, console: Console
) -> tuple[float, list[tuple[float, int, float]]]:
    """Seconds of planning and preparation, and segkit's (seconds, steps, Dice) at validations."""
    clock = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        planned = plan_dataset(
            dataset, cache=Path(folder, "cache"), device="cpu", minutes=minutes
        ).config
        config = changed(
            planned,
            ["data.fold=0", f"data.cache={folder}/cache", f"train.validate_every={every}"],
        )
        console.print(
            f"segkit: channels {config.network.channels}, patch {config.data.patch_size}, "
            f"batch {config.data.batch_size}, {config.train.steps} steps",
            highlight=False,
        )
        train(config, runs=Path(folder), callbacks=[clock], track=Tracker(console))
    assert clock.began is not None
    return clock.began - started, clock.looks


def nnunet_looks(
    python: Path, dataset: Path, seconds: float, every: float
) -> tuple[float, list[tuple[float, int, float]]]:
    """The same for nnU-Net, run by the Python interpreter that has it."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.jsonl")
        command = [python, PEER, dataset, results, "--seconds", seconds, "--every", every]
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
        first, *rest = [json.loads(line) for line in results.read_text().splitlines()]
    looks = [(row["seconds"], row["steps"], sum(row["dice"]) / len(row["dice"])) for row in rest]
    return first["preparation"], looks


def reached(looks: list[tuple[float, int, float]], target: float) -> float | None:
    """Seconds until the first validation with at least the target Dice."""
    return next((seconds for seconds, _, dice in looks if dice >= target), None)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--nnunet", type=Path, help="an interpreter that has nnunetv2")
    parser.add_argument("--minutes", type=float, default=5, help="segkit's plan")
    parser.add_argument("--every", type=int, default=50, help="segkit's validation interval, steps")
    parser.add_argument("--limit", type=float, default=1500, help="nnU-Net's seconds of training")
    parser.add_argument("--look", type=float, default=60, help="nnU-Net's validation interval, s")
    options = parser.parse_args()
    console = Console(width=120)
    prepared, looks = segkit_looks(options.dataset, options.minutes, options.every, console)
    for seconds, steps, dice in looks:
        console.print(f"segkit: {seconds:.0f} s, {steps} steps: {dice:.4f}", highlight=False)
    peer_prepared, peer_looks = None, []
    if options.nnunet:
        peer_prepared, peer_looks = nnunet_looks(
            options.nnunet, options.dataset, options.limit, options.look
        )
        for seconds, steps, dice in peer_looks:
            console.print(f"nnU-Net: {seconds:.0f} s, {steps} steps: {dice:.4f}", highlight=False)
    table = Table(title=f"seconds, fold 0 of {options.dataset.name}")
    table.add_column("until")
    for column in ("segkit", "nnU-Net 2.8.1", "ratio"):
        table.add_column(column, justify="right")
    table.add_row(
        "planned and prepared",
        f"{prepared:.0f}",
        "" if peer_prepared is None else f"{peer_prepared:.0f}",
        "",
    )
    for target in TARGETS:
        ours, theirs = reached(looks, target), reached(peer_looks, target)
        last = peer_looks[-1][0] if peer_looks else None
        at_least = theirs or last
        table.add_row(
            f"mean Dice {target:.2f}",
            "not reached" if ours is None else f"{ours:.0f}",
            "" if last is None else f"{theirs:.0f}" if theirs else f"over {last:.0f}",
            ""
            if ours is None or at_least is None
            else f"{'' if theirs else 'over '}{at_least / ours:.1f}",
        )
    table.add_row(
        "a training step",
        f"{looks[-1][0] / looks[-1][1]:.3f}",
        f"{peer_looks[-1][0] / peer_looks[-1][1]:.3f}" if peer_looks else "",
        "",
    )
    console.print(table)


if __name__ == "__main__":
    main()
