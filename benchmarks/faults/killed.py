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

from benchmarks.faults.jobs import Bench, Job, Words
from benchmarks.faults.trial import Trial, broken, lost, visible
from benchmarks.faults.zygote import Ended, Fault

KILL = "kill -9"
MOST_RUNS = 4
"""A job that was killed is over after so many runs at the latest; more would be a fault of ours."""


def kill_and_finish(bench: Bench, job: Job, count: int, *, seed: int) -> Iterator[Trial]:
    """So many trials of a job, each killed, and every third one once more when it goes on."""
    whole = bench.whole(job)
    random = np.random.default_rng(seed)
    struck = number = 0
    while struck < count:
        folder = bench.fresh(f"{job.name}-{number}")
        words: Words | None = job.words
        places, halves, problems = [], 0, []
        for kind in [number % 3] if number % 3 else [0, int(random.integers(3))]:
            assert words is not None
            where, killed = _kill(bench, job, words, folder, kind, random)
            if killed.code < 0:
                places.append(where)
            halves += sum(path.stat().st_size for path in broken(visible(folder)))
            if killed.survivors:
                problems.append(f"{len(killed.survivors)} processes left behind")
            words = job.again(folder)
            if words is None:
                break
        number += 1
        assert number < 10 * count + 10, f"{job.name} is over before it can be killed"
        if not places:
            continue
        struck += 1
        failure = finish(bench, job, folder)
        problems += [failure] if failure else []
        missing = lost(whole.results, job.results(folder))
        yield Trial(job.name, KILL, ", then ".join(places), halves + missing, tuple(problems))


def _kill(
    bench: Bench,
    job: Job,
    words: Words,
    folder: Path,
    kind: int,
    random: np.random.Generator,
) -> tuple[str, Ended]:
    """Where a command was killed at random, by one of three kinds, and what became of it."""
    whole = bench.whole(job)
    if kind == 0:
        changes = whole.ended.changes
        change = int(random.integers(1, changes + 1))
        fault = Fault(kill_at=change, within=job.within)
        return f"before change {change} of {changes}", bench.zygote.run(words, folder, fault)
    if kind == 1:
        size = int(random.integers(1, whole.largest))
        fault = Fault(kill_after=size)
        return f"{size} bytes into a file", bench.zygote.run(words, folder, fault)
    seconds = float(random.uniform(0, whole.ended.seconds))
    child = bench.zygote.start(words, folder)
    time.sleep(seconds)
    send(child.pid, signal.SIGKILL)
    return f"after {seconds:.2f} s", child.wait()


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


def send(pid: int, signum: int) -> bool:
    """Send a signal to a process; whether it is there."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return False
    return True
