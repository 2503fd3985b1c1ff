"""Time of a training step of `segkit train`, compared with a bare training loop.

    python benchmarks/training.py DATASET [KEY=VALUE …]

The bare loop uses the same network, loss, gradient clipping, optimiser and precision, but always
the same batch. It runs before and after `segkit train`. The additional time of `segkit train` is
reading, patches, augmentation, weight averaging, logging and Lightning. Times are medians over
steps.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from segkit.config.load import load_config
from segkit.config.training import Config
from segkit.nn.adamw import fused_adamw
from segkit.nn.losses import deep_dice_cross_entropy
from segkit.nn.unet import UNet
from segkit.training.fit import train
from segkit.training.resolve import precision

CONFIG = Path(__file__).parents[1] / "configs" / "attention_unet_3d.yaml"
STEPS = 40
WARM_UP = 8


class StepClock(Callback):
    """Records when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.network: Any = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *details: Any
    ) -> None:
        self.ends.append(time.perf_counter())
        self.network = pl_module.network

    def median(self) -> float:
        ends = self.ends[WARM_UP:]
        return statistics.median(b - a for a, b in itertools.pairwise(ends))


def bare_loop(config: Config, network: UNet) -> float:
    """Median seconds per step of the bare loop."""
    size = (config.data.batch_size, 1, *config.data.patch_size)
    image = torch.randn(size)
    label = torch.randint(0, network.heads[0].out_channels, (size[0], *size[2:]))
    optimiser = fused_adamw(network.parameters(), lr=1e-4)
    half = precision(config) == "bf16-mixed"
    seconds = []
    for _ in range(STEPS // 2):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            levels, _ = network.train().supervised(image)
        deep_dice_cross_entropy(levels, label, pool_batch=False).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.train.gradient_clip)
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP // 2 :])


def main() -> None:
    """Measure and print."""
    dataset, *overrides = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            CONFIG,
            [
                f"data.folder={dataset}",
                f"data.cache={folder}/cache",
                "data.validation=0",
                "trainer.accelerator=cpu",
                *overrides,
                f"train.steps={STEPS}",
                f"train.validate_every={STEPS}",
            ],
        )
        clock = StepClock()
        warm = train(config.model_copy(), runs=Path(folder) / "runs", callbacks=[clock])
        network = warm.model.network
        before = bare_loop(config, network)
        clock = StepClock()
        train(config, runs=Path(folder) / "runs", callbacks=[clock])
        after = bare_loop(config, network)
    bare, whole = (before + after) / 2, clock.median()
    table = Table(title=f"{CONFIG.stem}, {torch.get_num_threads()} threads, medians of steps")
    for column in ("loop", "seconds per step", "images per second"):
        table.add_column(column, justify="left" if column == "loop" else "right")
    for name, seconds in (("bare", bare), ("segkit train", whole)):
        table.add_row(name, f"{seconds:.3f}", f"{config.data.batch_size / seconds:.2f}")
    console = Console()
    console.print(table)
    console.print(f"outside the network: {1 - bare / whole:.1%} of a step", highlight=False)
    console.print(f"bare loop before and after: {before:.3f} and {after:.3f} s", highlight=False)


if __name__ == "__main__":
    main()
