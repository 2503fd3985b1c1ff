"""Time to draw batches from prepared cases that memory does not hold, against cases that it holds.

A data set larger than memory is stood in for by eviction: before each batch, the kernel is told to
drop all prepared files from its page cache (posix_fadvise, DONTNEED), so every patch is read from
the disk. Compared are the seconds per batch, and per batch and step if a step of training takes
STEP seconds while one process draws the next batch.

python benchmarks/beyond_memory.py [NUM_CASES] [SIZE] [PATCH] [FOLDER]
"""

import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from segkit.data.patches import ForegroundSampler, PatchDataset
from segkit.data.prepared_cache import StoredCase, write_arrays

BATCH, BATCHES = 2, 40
STEP = 0.3
"""Seconds of a training step of a small network on two CPU cores."""


def main() -> None:
    """Write the cases, draw the same batches from memory and from the disk, and print the ratio."""
    given = [int(word) for word in sys.argv[1:4]]
    count, size, patch = [*given, *(24, 192, 64)[len(given) :]]
    folder = Path(sys.argv[4] if len(sys.argv) > 4 else "beyond_memory")
    cases = [stored(folder / f"case_{number:03d}", size, number) for number in range(count)]
    files = [file for case in cases for file in case.folder.iterdir()]
    total = sum(file.stat().st_size for file in files)
    patches = PatchDataset(
        cases,
        patch_size=(patch,) * 3,
        sampler=ForegroundSampler((patch,) * 3, 0.33),
        seed=0,
    )
    for file in files:  # into the page cache
        file.read_bytes()
    held = [seconds_of_batch(patches, number) for number in range(BATCHES)]
    evicted = []
    for number in range(BATCHES):
        for file in files:
            evict(file)
        evicted.append(seconds_of_batch(patches, number))
    warm, cold = statistics.median(held), statistics.median(evicted)
    print(f"{count} cases of {size}³, {total / 1e9:.2f} GB; patches of {patch}³, {BATCH} a batch")
    print(f"in memory: {1000 * warm:.1f} ms a batch; evicted: {1000 * cold:.1f} ms; medians")
    print(f"drawing alone takes {cold / warm:.2f} times as long")
    behind = max(STEP, cold) / max(STEP, warm)
    print(f"training that draws beside steps of {STEP} s takes {behind:.2f} times as long")
    print(f"training that draws between steps takes {(STEP + cold) / (STEP + warm):.2f} times")


def stored(folder: Path, size: int, seed: int) -> StoredCase:
    """A prepared case of noise, with a ball as the only structure."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(seed)
        image = random.standard_normal((1, size, size, size), dtype=np.float32)
        axis = np.arange(size) - size / 2
        x, y, z = np.meshgrid(axis, axis, axis, indexing="ij", sparse=True)
        write_arrays(folder, image, ((x**2 + y**2 + z**2) < (size / 8) ** 2).astype(np.uint8))
    return StoredCase(folder.name, folder)


def evict(file: Path) -> None:
    """Drop a file from the page cache; it must have been written to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def seconds_of_batch(patches: PatchDataset, number: int) -> float:
    """Seconds to draw one batch."""
    started = time.perf_counter()
    for index in range(BATCH * number, BATCH * (number + 1)):
        patches[index]
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
