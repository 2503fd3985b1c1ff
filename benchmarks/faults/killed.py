"""kill -9 at random points of a job: every file is whole or not there, and the next run finishes.

Three kinds of points take turns: before a change to a file or folder, in the midst of writing one,
and at any time.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.faults.jobs import Bench, Job
from benchmarks.faults.trial import Trial, broken, lost, visible
from benchmarks.faults.zygote import Ended, Fault

MOST_RUNS = 4
"""A job that was killed is over after so many runs at the latest; more would be a fault of ours."""


def kill_and_finish(bench: Bench, job: Job, count: int, *, seed: int) -> Iterator[Trial]:
    """So many trials of a job, each killed once, and every third one once more when it goes on."""
    whole = bench.fresh(f"{job.name}-whole")
    ended = bench.zygote.run(job.words, whole, Fault(within=job.within))
    assert ended.code == 0, f"{job.name} fails where nothing strikes: {ended.err}"
    expected = job.results(whole)
    sizes = [path.stat().st_size for path in whole.rglob("*") if path.is_file()]
    random = np.random.default_rng(seed)

    def killed(folder: Path, words: object, kind: int) -> tuple[str, Ended]:
        if kind == 0:
            number = int(random.integers(1, ended.changes + 1))
            fault = Fault(kill_at=number, within=job.within)
            return f"before change {number} of {ended.changes}", bench.zygote.run(
                words,  # type: ignore[arg-type]
                folder,
                fault,
            )
        if kind == 1:
            size = int(random.integers(1, max(sizes)))
            return f"{size} bytes into a file", bench.zygote.run(
                words,  # type: ignore[arg-type]
                folder,
                Fault(kill_after=size),
            )
        seconds = float(random.uniform(0, ended.seconds))
        child = bench.zygote.start(words, folder)  # type: ignore[arg-type]
        time.sleep(seconds)
        _send(child.pid, signal.SIGKILL)
        return f"after {seconds:.2f} s", child.wait()

    for number in range(count):
        folder = bench.fresh(f"{job.name}-{number}")
        words: object = job.words
        told, halves, survivors = [], 0, 0
        for kind in [number % 3] if number % 3 else [0, int(random.integers(0, 3))]:
            where, struck = killed(folder, words, kind)
            told.append(where if struck.code < 0 else f"{where} (over before)")
            halves += sum(path.stat().st_size for path in broken(visible(folder)))
            survivors += len(struck.survivors)
            words = job.again(folder)
            if words is None:
                break
        failure = "" if words is None else finish(bench, job, folder)
        missing = lost(expected, job.results(folder))
        survived = not failure and not halves and not missing and not survivors
        detail = failure or (f"{survivors} processes left behind" if survivors else "")
        yield Trial(job.name, f"killed {', then '.join(told)}", survived, halves + missing, detail)


def finish(bench: Bench, job: Job, folder: Path) -> str:
    """Run a job until nothing is left of it; what it says if it fails."""
    for _ in range(MOST_RUNS):
        words = job.again(folder)
        if words is None:
            return ""
        ended = bench.zygote.run(words, folder)
        if ended.code != 0:
            return f"exit code {ended.code}: {ended.err.strip()[-300:]}"
        if job.again(folder) == words:  # the same command, which has come to its end
            return ""
    return f"not over after {MOST_RUNS} runs"


def _send(pid: int, signum: int) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:  # it was over before
        return
