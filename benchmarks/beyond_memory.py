"""Steps of a training whose prepared cases memory does not hold, against one that it does hold.

    python benchmarks/beyond_memory.py DATASET [--dims 3] [--minutes 4] [--steps 160]

DATASET is planned for these minutes and trained for these steps, as `segkit train` does it. The
steps alternate in blocks of ten. In every second block, all prepared files are dropped from the
kernel's page cache before each batch is drawn (posix_fadvise, DONTNEED), so that every patch is
read from the disk: a data set of which memory holds nothing. In the other blocks, all files are in
the page cache. The time of dropping and of filling the cache does not count. Before the training,
batches are drawn alone: if drawing one from the disk takes longer than a step, a thread cannot hide
it, and part of it would fall into the time that does not count. Linux only.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

import segkit
from segkit.config.load import changed
from segkit.data.patches import PatchDataset
from segkit.training.make_module import make_data

BLOCK = 10


class Evictions(Callback):
    """Empties the page cache of these files before each batch of every second block of steps."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.steps = 0
        self.started: float | None = None
        self.seconds: dict[bool, list[float]] = {True: [], False: []}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Note the time of the step, and prepare the cache for the next batch."""
        if self.started is not None:
            # The step drew the batch after it, because one batch is drawn ahead.
            self.seconds[self._evicted].append(time.perf_counter() - self.started)
        self.steps += 1
        for file in self.files:
            if self._evicted:
                evict(file)
            elif self.steps % BLOCK == 0:
                file.read_bytes()
        self.started = time.perf_counter() if self.steps >= BLOCK else None

    @property
    def _evicted(self) -> bool:
        return self.steps // BLOCK % 2 == 1


def evict(file: Path) -> None:
    """Drop a file from the page cache; it must have been written to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def seconds_of_batch(patches: PatchDataset, size: int, files: list[Path], cold: bool) -> float:
    """Median seconds to draw one of ten batches, from an empty or from a full page cache."""
    seconds = []
    for number in range(10):
        for file in files:
            if cold:
                evict(file)
            else:
                file.read_bytes()
        started = time.perf_counter()
        for index in range(size * number, size * (number + 1)):
            patches[index]
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    """Train and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--dims", type=int, choices=(2, 3))
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=160)
    options = parser.parse_args()
    # Not in /tmp, which may be in memory.
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as temporary:
        folder = Path(temporary)
        planned = segkit.plan_dataset(
            options.dataset, minutes=options.minutes, spatial_dims=options.dims, runs=folder
        )
        config = changed(
            planned.config,
            [
                f"data.cache={folder / 'cache'}",
                f"train.steps={options.steps}",
                f"train.validate_every={options.steps}",
                "train.minutes=null",
                "data.validation=0",
                "train.pictures=0",
                "trainer.accelerator=cpu",
            ],
        )
        parts = segkit.prepare(config, runs=folder)
        files = [file for case in parts.cases for file in case.folder.iterdir()]
        patches, batch = make_data(parts, config).patches, config.data.batch_size
        drawing = {
            name: round(seconds_of_batch(patches, batch, files, cold), 4)
            for name, cold in (("held", False), ("evicted", True))
        }
        evictions = Evictions(files)
        segkit.fit(parts, runs=folder, callbacks=[evictions])
        size = sum(file.stat().st_size for file in files)
    held, evicted = (statistics.median(evictions.seconds[each]) for each in (False, True))
    figures = {
        "dataset": options.dataset.name,
        "prepared_GB": round(size / 1e9, 2),
        "patch": config.data.patch_size,
        "batch": config.data.batch_size,
        "seconds_of_drawing": drawing,
        "seconds_of_step": {"held": round(held, 4), "evicted": round(evicted, 4)},
        "steps": {
            name: len(evictions.seconds[each])
            for name, each in (("held", False), ("evicted", True))
        },
        "ratio": round(evicted / held, 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
