"""Ctrl-C and SIGTERM: a job ends within seconds, says so in one sentence, and loses no step."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.faults.jobs import Bench, Job, runs_in
from benchmarks.faults.killed import finish, send
from benchmarks.faults.trial import Trial, broken, lost, visible

ASKED = (signal.SIGINT, signal.SIGTERM)
ASKED_BY = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
SECONDS = 60.0
"""Within which a training of tiny steps must end, on however busy a machine."""


def ask_and_finish(bench: Bench, job: Job, count: int, *, seed: int) -> Iterator[Trial]:
    """So many trials of a training, each asked to stop at a random time after it has begun."""
    whole = bench.whole(job)
    random = np.random.default_rng(seed)
    struck = number = 0
    while struck < count:
        signum = ASKED[number % 2]
        folder = bench.fresh(f"{job.name}-asked-{number}")
        child = bench.zygote.start(job.words, folder)
        wait_for(folder, "runs/*/metrics.csv")
        time.sleep(float(random.uniform(0, whole.ended.seconds / 3)))
        asked = time.monotonic()
        send(child.pid, signum)
        stopped = child.wait()
        seconds = time.monotonic() - asked
        number += 1
        assert number < 10 * count + 10, f"{job.name} is over before it can be asked"
        if job.again(folder) is None:  # it was over before
            continue
        struck += 1
        step, problems = saved_step(folder), []
        if stopped.code != 128 + signum or not stopped.told or stopped.err.count("\n") != 1:
            problems.append(f"exit code {stopped.code}: {stopped.err.strip()[-300:]}")
        if seconds > SECONDS:
            problems.append(f"{seconds:.0f} s until the end")
        if not step:
            problems.append("no step was saved")
        if stopped.survivors:
            problems.append(f"{len(stopped.survivors)} processes left behind")
        halves = sum(path.stat().st_size for path in broken(visible(folder)))
        failure = finish(bench, job, folder)
        problems += [failure] if failure else []
        missing = lost(whole.results, job.results(folder))
        yield Trial(
            job.name,
            ASKED_BY[signum],
            f"in step {step}",
            halves + missing,
            tuple(problems),
            stopped.err.strip(),
            seconds,
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
