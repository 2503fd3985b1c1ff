"""Jobs that faults strike: small ones, of which it is known what they write."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.faults.trial import Stored, stored, visible
from benchmarks.faults.zygote import Ended, Fault, Zygote
from segkit.config.load import dump_yaml
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, write_volume
from segkit.model.file_names import CONFIG
from tests.small import small_config, small_dataset

Words = Sequence[object]
RUN = "small"


@dataclass(frozen=True)
class Job:
    """A command, and how it is known that it did all it was for.

    Args:
        name: in the table.
        words: of the command, which runs in a folder of its own.
        again: from that folder, the command that finishes what a fault has left.
        results: from that folder, what is compared, byte by byte, by name.
        within: the folder below it that faults look at.
    """

    name: str
    words: Words
    again: Callable[[Path], Words | None]
    results: Callable[[Path], dict[str, Stored]]
    within: str = ""


@dataclass(frozen=True)
class Whole:
    """A job that nothing struck: what became of it, its results, and its largest file in bytes."""

    ended: Ended
    results: dict[str, Stored]
    largest: int


@dataclass(frozen=True)
class Bench:
    """What all jobs need: data, a trained model, and where to work."""

    zygote: Zygote
    folder: Path
    config: Path
    scans: Path
    model: Path
    wholes: dict[str, Whole] = field(default_factory=dict)

    def whole(self, job: Job) -> Whole:
        """The job where nothing strikes it, done once."""
        if job.name not in self.wholes:
            folder = self.fresh(f"{job.name}-whole")
            ended = self.zygote.run(job.words, folder, Fault(within=job.within))
            assert ended.code == 0, f"{job.name} fails where nothing strikes: {ended.err}"
            files = [path for path in folder.rglob("*") if path.is_file()]
            largest = max(path.stat().st_size for path in files)
            self.wholes[job.name] = Whole(ended, job.results(folder), largest)
        return self.wholes[job.name]

    def fresh(self, name: str) -> Path:
        """An empty folder to work in."""
        folder = self.folder / "work" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def bench_in(folder: Path, zygote: Zygote, *, steps: int = 9, workers: int = 0) -> Bench:
    """Data, a config and a finished run in a folder."""
    data = small_dataset(folder / "data", num_cases=4)
    config = small_config(
        data,
        data={"validation": 0.5, "workers": workers},
        train={"steps": steps, "validate_every": max(steps // 3, 1), "averaging": 0.9},
    )
    path = folder / "small.yaml"
    path.write_text(dump_yaml(config))
    random = np.random.default_rng(0)
    scans = folder / "scans"
    for name in "abcd":
        values = random.normal(size=(24, 20, 16)).astype(np.float32)
        write_volume(scans / f"{name}.nii.gz", Volume(values, Grid((24, 20, 16), np.eye(4))))
    ended = zygote.run(["train", path, "train.steps=2", "name=ready"], folder)
    assert ended.code == 0, ended.err
    return Bench(zygote, folder, path, scans, folder / "runs" / "ready" / "model")


def training(bench: Bench) -> Job:
    """Training a run, which `--resume` goes on with."""

    def again(folder: Path) -> Words | None:
        for run in runs_in(folder):
            if (run / "summary.json").is_file():
                return None
            return ["train", "--resume", run]
        return ["train", bench.config]

    def results(folder: Path) -> dict[str, Stored]:
        return {
            name: file
            for run in runs_in(folder)
            for name, file in stored(visible(run), run).items()
            # What names seconds or places differs from run to run.
            if name.startswith(("model/", "samples/")) or name == "metrics.csv"
        }

    return Job("train", ["train", bench.config], again, results)


def runs_in(folder: Path) -> list[Path]:
    """Runs that were begun."""
    return [path.parent for path in sorted(folder.glob(f"runs/{RUN}*/{CONFIG}"))]


def preprocessing(bench: Bench) -> Job:
    """The cache that a training begins with."""
    words = ["train", bench.config, "train.steps=1", "data.validation=0"]

    def again(folder: Path) -> Words:
        shutil.rmtree(folder / "runs" / RUN, ignore_errors=True)
        return words

    def results(folder: Path) -> dict[str, Stored]:
        cache = folder / "runs" / ".cache"
        return stored(visible(cache), cache)

    return Job("preprocess", words, again, results, within="runs/.cache")


def planning(bench: Bench) -> Job:
    """Measuring a dataset and writing a config for it."""
    # By memory, as by minutes the plan would depend on how fast the machine is just now.
    words = ["plan", bench.folder / "data", "--preset", "nnunet", "--device", "cpu"]

    def results(folder: Path) -> dict[str, Stored]:
        return stored(visible(folder), folder)

    return Job("plan", words, _unless(words, "data.yaml"), results)


def predicting(bench: Bench) -> Job:
    """A cohort with all that is written of one."""
    words: Words = [
        *("predict", bench.scans, "--model", bench.model, "--out", "out", "--maps", "out/maps"),
        *("--probabilities", "--uncertainty", "--engine", "torch"),
    ]

    def results(folder: Path) -> dict[str, Stored]:
        return stored(visible(folder), folder)

    return Job("predict", words, lambda folder: words, results)


def explaining(bench: Bench) -> Job:
    """Maps, measures and a page of two scans."""
    scans = [bench.scans / f"{name}.nii.gz" for name in "ab"]
    words = ["explain", *scans, "--model", bench.model, "--out", "out"]

    def results(folder: Path) -> dict[str, Stored]:
        return stored(visible(folder), folder)

    return Job("explain", words, _unless(words, "out/index.html"), results)


def _unless(words: Words, last: str) -> Callable[[Path], Words | None]:
    """The same command, unless its last file is there: it refuses to do again what is done."""
    return lambda folder: None if (folder / last).exists() else words
