"""Run as a program: many small volumes through one process, and what that leaves behind.

    python -m benchmarks.faults.load predict MODEL 1000
    python -m benchmarks.faults.load preprocess - 500

Prints what the process holds, now and then, as one JSON line: resident memory, open files, threads,
processes, and names in /dev/shm. Linux alone.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np

from segkit.data.dataset import CaseFiles, Dataset
from segkit.data.normalise import zscore
from segkit.data.prepared_cache import store_cases
from segkit.geometry.grid import Grid
from segkit.inference.predict_files import predict_files
from segkit.inference.predictor import Predictor
from segkit.io.inputs import find_inputs
from segkit.io.volume import Volume, write_volume

SHAPE = (24, 20, 16)
LOOKS = 50
WARM = 0.4
"""The share of volumes after which memory is looked at: what is made once is made by then."""


@dataclass(frozen=True)
class Held:
    """What a process holds after so many volumes."""

    done: int
    resident: int
    """Bytes, its processes' with it."""
    files: int
    threads: int
    processes: int
    shared: int
    """Names in /dev/shm."""


@dataclass(frozen=True)
class Load:
    """What became of many volumes."""

    name: str
    count: int
    looks: tuple[Held, ...]

    @property
    def slope(self) -> float:
        """Growth of resident memory in MB per 100 volumes: Theil and Sen's, which no jump moves."""
        warm = [look for look in self.looks[:-1] if look.done >= WARM * self.count]
        slopes = [
            (b.resident - a.resident) / (b.done - a.done)
            for number, a in enumerate(warm)
            for b in warm[number + 1 :]
        ]
        return float(np.median(slopes)) * 100 / 1e6

    def growth(self, what: str) -> int:
        """How many more files, threads, processes or names there are in the end than at first."""
        return int(getattr(self.looks[-1], what) - getattr(self.looks[0], what))


def measure(name: str, model: Path | None, count: int) -> Load:
    """So many volumes through `predict` or `preprocess`, in a fresh process."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults.load", name, str(model or "-"), str(count)],
        capture_output=True,
        text=True,
        check=True,
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
    )
    looks = tuple(Held(**look) for look in json.loads(done.stdout.splitlines()[-1]))
    return Load(name, count, looks)


def held(done: int) -> Held:
    """What this process holds now."""
    tasks = Path("/proc/self/task").iterdir()
    children = [child for task in tasks for child in (task / "children").read_text().split()]
    pages = [int(Path(f"/proc/{of}/statm").read_text().split()[1]) for of in ("self", *children)]
    return Held(
        done,
        sum(pages) * os.sysconf("SC_PAGE_SIZE"),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        len(children),
        len(os.listdir("/dev/shm")),
    )


def predict(folder: Path, model: Path, count: int, look: Callable[[int], None]) -> None:
    """Segment so many scans, one after the other; `look` takes how many are done."""
    random = np.random.default_rng(0)
    for number in range(count):
        write_volume(folder / "scans" / f"{number:05d}.nii.gz", scan_of(random))
    predictor = Predictor.load(model, device="cpu", engine="torch")
    inputs = find_inputs([folder / "scans"], 1)
    outcomes = predict_files(predictor, inputs, out=folder / "out", probabilities=True)
    for done, outcome in enumerate(outcomes, start=1):
        assert outcome.error is None, outcome.error
        look(done)


def preprocess(folder: Path, count: int, look: Callable[[int], None]) -> None:
    """Prepare so many cases in two processes; `look` takes how many are done."""
    random = np.random.default_rng(0)
    cases = []
    for number in range(count):
        image, label = (folder / kind / f"{number:05d}.nii.gz" for kind in ("images", "labels"))
        scan = scan_of(random)
        write_volume(image, scan)
        write_volume(label, scan.like((scan.data > 1).astype(np.uint8)))
        cases.append(CaseFiles(f"{number:05d}", (image,), label))

    def track(stored: Iterable[CaseFiles]) -> Iterator[CaseFiles]:
        for done, case in enumerate(stored, start=1):
            look(done)
            yield case

    store_cases(
        cases,
        Dataset(folder, tuple(cases), ("T1",), {"background": 0, "bright": 1}),
        folder=folder / "cache",
        spacing=(1.0, 1.0, 1.0),
        normalisers=[partial(zscore, nonzero=False)],
        settings=None,
        track=track,
        num_processes=2,
    )


def scan_of(random: np.random.Generator) -> Volume:
    """Noise."""
    return Volume(random.normal(size=SHAPE).astype(np.float32), Grid(SHAPE, np.eye(4)))


def main(name: str, model: str, count: int) -> None:
    """Measure and print."""
    looks: list[Held] = []
    between = max(count // LOOKS, 1)

    # Python's own keeper of shared memory begins with the first process and stays until the end.
    resource_tracker.ensure_running()
    looks.append(held(0))

    def look(done: int) -> None:
        if done % between == 0 or done == count:
            looks.append(held(done))

    with tempfile.TemporaryDirectory() as folder:
        if name == "predict":
            predict(Path(folder), Path(model), count, look)
        else:
            preprocess(Path(folder), count, look)
    looks.append(held(count))
    print(json.dumps([asdict(one) for one in looks]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
