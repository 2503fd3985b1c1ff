"""The time that a run is given is the time it takes, and its learning rate is down by then."""

import logging
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from torch import nn

from segkit.config.training import LEAST_STEPS, TrainConfig
from segkit.errors import Stopped
from segkit.inference.window_seconds import num_windows
from segkit.training.fit import resume, train
from segkit.training.optimisers import make_optimiser, make_schedule
from segkit.training.run_folder import LAST
from segkit.training.time_budget import TimeBudget, slower_than_planned
from tests.small import small_config, small_dataset


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def simulated(
    seconds: float, per_step: float, per_case: float, *, before: float = 0.0, cases: int = 4
) -> tuple[TimeBudget, float, list[int]]:
    """A run that validates every 50 steps: its budget, the end of its scoring, its advances."""
    clock = Clock()
    budget = TimeBudget(
        seconds,
        before=before,
        planned_steps=400,
        held_out=cases,
        validated=cases,
        validate_every=50,
        clock=clock,
    )
    budget.per_case = per_case  # measured before the first step
    advances = []
    while not budget.finished:
        clock.now += per_step
        advances.append(budget.end_step())
        if budget.steps % 50 == 0:
            clock.now += cases * per_case
            budget.resume_clock()
    clock.now += cases * per_case + 5
    return budget, budget.elapsed, advances


@given(st.floats(0.05, 2.0), st.floats(0.0, 2.0), st.floats(0.0, 60.0))
@settings(max_examples=50, deadline=None)
def test_a_run_ends_on_time_however_fast_the_machine_is(
    per_step: float, per_case: float, before: float
) -> None:
    budget, elapsed, advances = simulated(600.0, per_step, per_case, before=before)
    assert elapsed == pytest.approx(600.0, rel=0.1)
    assert sum(advances) == budget.advanced >= 0.97 * 400 - 400 / budget.steps
    assert min(advances) >= 0 and budget.advanced <= 400


def test_a_machine_that_is_as_fast_as_planned_takes_the_planned_steps_one_by_one() -> None:
    budget, _, advances = simulated(405.0 + 5.0, 1.0, 0.0)
    assert budget.steps == pytest.approx(400, abs=6)
    assert set(advances[:-1]) <= {0, 1, 2} and advances.count(1) > 380


def test_a_run_whose_time_is_over_before_it_begins_takes_the_least_steps() -> None:
    budget, _, advances = simulated(10.0, 1.0, 0.0, before=20.0)
    assert budget.steps == LEAST_STEPS and sum(advances) == 400


def test_a_run_that_goes_on_has_the_time_that_was_left() -> None:
    clock = Clock()

    def new() -> TimeBudget:
        return TimeBudget(
            100.0,
            before=0.0,
            planned_steps=100,
            held_out=0,
            validated=0,
            validate_every=50,
            clock=clock,
        )

    first = new()
    for _ in range(40):
        clock.now += 1.0
        first.end_step()
    state = first.state()
    clock.now += 1e6  # nobody trains
    second = new()
    second.go_on(state)
    assert (second.elapsed, second.share, second.advanced) == (40.0, first.share, first.advanced)
    while not second.finished:
        clock.now += 1.0
        second.end_step()
    assert second.elapsed == pytest.approx(100, abs=1) and second.advanced >= 99


def test_the_learning_rate_comes_down_in_the_steps_that_there_was_time_for() -> None:
    settings_of = TrainConfig(steps=400, learning_rate=1.0, weight_decay=0.0)
    optimiser = make_optimiser(settings_of)([nn.Parameter(torch.zeros(1))])
    schedule = make_schedule(settings_of)(optimiser)
    rates = []
    for more in simulated(600.0, 3.0, 0.0)[2]:
        optimiser.step()
        for _ in range(more):
            schedule.step()
        rates.append(optimiser.param_groups[0]["lr"])
    peak = rates.index(max(rates))
    assert max(rates) > 0.99 and peak / len(rates) == pytest.approx(0.3, abs=0.03)
    assert rates[-1] < 1e-3
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_a_run_behind_its_plan_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (8.14, 0.0, 0.0))
    monkeypatch.setattr("segkit.training.time_budget.num_cores", lambda: 2)
    budget, _, _ = simulated(600.0, 3.6, 0.0)
    told = slower_than_planned(budget)
    assert "a step takes 3.6 s instead of the planned 1.5 s" in told
    assert "other programs use the cores (load 8.1 on 2)" in told
    assert "of 400 steps fit into the 10 minutes" in told


def test_a_run_whose_scoring_takes_the_time_does_not_blame_its_steps() -> None:
    clock = Clock()
    budget = TimeBudget(240.0, 60.0, 400, 10, 2, 1000, clock=clock)
    budget.per_case = 6.0
    for _ in range(20):
        clock.now += 0.35
        budget.end_step()
    told = slower_than_planned(budget)
    assert "a step takes 0.35 s, about as planned, but all before it took 60 s" in told
    assert "the final scores will take 60 s" in told  # the most that they may
    assert "slower" not in told and "other programs" not in told


def test_windows_of_a_case_overlap_by_half() -> None:
    assert num_windows((64, 32, 10), (32, 32, 32)) == 3


class StoppedAtTwelve(Callback):
    """Asks a training to stop at its twelfth step."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 12:
            raise Stopped(15)


def test_a_timed_run_ends_on_time_and_goes_on_after_a_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = time.monotonic()
    folder = small_dataset(tmp_path / "data", num_cases=4)
    settings_of = {"steps": 1000, "validate_every": 10, "minutes": 0.1, "validation_cases": 1}
    config = small_config(folder, train=settings_of, data={"validation": 0.5})
    with pytest.raises(Stopped):
        train(config, runs=tmp_path, callbacks=[StoppedAtTwelve()])
    assert (tmp_path / config.name / LAST).is_file()
    with caplog.at_level(logging.INFO):
        run = resume(tmp_path / config.name)
    assert run.summary["steps"] >= LEAST_STEPS
    assert run.summary["validation"]["cases"] >= 1
    told = run.summary["minutes"]
    assert told["given"] == 0.1 and told["planned_steps"] == 1000
    # How far over depends on the programs that use this machine's cores.
    assert 0 < told["taken"] < (time.monotonic() - started) / 60
