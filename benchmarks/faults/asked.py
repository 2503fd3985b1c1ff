"""Ctrl-C and SIGTERM: a job ends within seconds, says so in one sentence, and loses no step."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.faults.jobs import Bench, Job, runs_in
from benchmarks.faults.killed import finish
from benchmarks.faults.trial import Trial, broken, lost, visible

SECONDS = 60.0
"""Within which a training of tiny steps must end, on however busy a machine."""


def ask_and_finish(bench: Bench, job: Job, count: int, *, seed: int) -> Iterator[Trial]:
    """So many trials of a training, each asked to stop at a random time after it has begun."""
    whole = bench.fresh(f"{job.name}-unasked")
    ended = bench.zygote.run(job.words, whole)
    assert ended.code == 0, f"{job.name} fails where nothing strikes: {ended.err}"
    expected = job.results(whole)
    random = np.random.default_rng(seed)
    for number in range(count):
        signum = (signal.SIGINT, signal.SIGTERM)[number % 2]
        folder = bench.fresh(f"{job.name}-asked-{number}")
        child = bench.zygote.start(job.words, folder)
        wait_for(folder, "runs/*/metrics.csv")
        time.sleep(float(random.uniform(0, ended.seconds / 3)))
        asked = time.monotonic()
        over = not _asked(child.pid, signum)
        struck = child.wait()
        seconds = time.monotonic() - asked
        step = saved_step(folder)
        problems = []
        over = over or struck.code == 0 or job.again(folder) is None
        if not over:
            if struck.code != 128 + signum or not struck.told or struck.err.count("\n") != 1:
                problems.append(f"exit code {struck.code}: {struck.err.strip()[-300:]}")
            if seconds > SECONDS:
                problems.append(f"{seconds:.0f} s until the end")
            if not step:
                problems.append("no step was saved")
        if struck.survivors:
            problems.append(f"{len(struck.survivors)} processes left behind")
        halves = sum(path.stat().st_size for path in broken(visible(folder)))
        failure = finish(bench, job, folder)
        problems += [failure] if failure else []
        missing = lost(expected, job.results(folder))
        yield Trial(
            job.name,
            f"{signal.Signals(signum).name} in step {step}" + " (over before)" * over,
            not problems and not halves and not missing,
            halves + missing,
            "; ".join(problems) or f"ended within {seconds:.1f} s",
        )


def wait_for(folder: Path, pattern: str, seconds: float = 120.0) -> None:
    """Wait until a file of that name is there."""
    end = time.monotonic() + seconds
    while not any(folder.glob(pattern)):
        assert time.monotonic() < end, f"no {pattern} after {seconds} s"
        time.sleep(0.02)


def saved_step(folder: Path) -> int:
    """The step that the last checkpoint of a run was written at; 0 without any."""
    for run in runs_in(folder):
        if (run / "last.ckpt").is_file():
            return int(torch.load(run / "last.ckpt", weights_only=True)["global_step"])
    return 0


def _asked(pid: int, signum: int) -> bool:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return False
    return True
