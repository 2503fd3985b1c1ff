"""The time that a run is given is the time it takes, and its learning rate is down by then."""

import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from torch import nn

from segkit.config.network import NetworkConfig
from segkit.config.training import LEAST_STEPS, TrainConfig
from segkit.errors import ConfigError, Stopped
from segkit.inference.window_seconds import num_windows
from segkit.inference.windows import WindowLayout, slide
from segkit.training.final_scores import scored_model
from segkit.training.fit import train
from segkit.training.optimisers import make_optimiser, make_schedule
from segkit.training.resume import resume
from segkit.training.run_folder import LAST
from segkit.training.time_budget import (
    Deadline,
    TimeBudget,
    faster_than_planned,
    slower_than_planned,
)
from tests.models import random_model
from tests.small import small_config, small_dataset


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def simulated(
    seconds: float,
    per_step: float,
    per_case: float,
    *,
    before: float = 0.0,
    cases: int = 4,
    expected: float | None = None,
) -> tuple[TimeBudget, float, list[int]]:
    """A run that validates every 50 steps: its budget, the end of its scoring, its advances.

    Before the first validation, it expects a case to take `expected` seconds.
    """
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
    budget.per_case = per_case if expected is None else expected
    advances = []
    while not budget.finished:
        clock.now += per_step
        advances.append(budget.end_step())
        if budget.skips_validation:
            budget.validated_at = budget.steps
        elif budget.is_due:
            clock.now += cases * per_case
            budget.per_case, budget.validated_at = per_case, budget.steps
            budget.resume_clock()
    clock.now += cases * per_case + (5 if budget.scores_are_long else 1)
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


@given(st.floats(0.05, 0.5), st.floats(0.0, 0.3))
@settings(max_examples=50, deadline=None)
def test_a_run_of_half_a_minute_ends_on_time(per_step: float, per_case: float) -> None:
    assert simulated(30.0, per_step, per_case, before=3.0)[1] == pytest.approx(30.0, rel=0.1)


@given(st.floats(0.05, 2.0), st.floats(1.0, 50.0))
@settings(max_examples=50, deadline=None)
def test_a_run_whose_validations_are_slower_than_expected_ends_on_time(
    per_step: float, per_case: float
) -> None:
    _, elapsed, advances = simulated(600.0, per_step, per_case, cases=1, expected=per_case / 10)
    assert elapsed == pytest.approx(600.0, rel=0.1)
    assert sum(advances) >= 0.97 * 400 - 400 / len(advances)


def test_the_time_of_small_cases_that_validate_does_not_stand_for_large_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first case has one window, the other two have seven: a mean of five."""
    monkeypatch.setattr("segkit.training.time_budget.set_last_step", lambda *_: None)
    clock = Clock()
    budget = TimeBudget(600.0, 0.0, 400, held_out=3, validated=1, validate_every=50, clock=clock)
    cases: Any = [
        SimpleNamespace(label=np.zeros(size)) for size in [(8, 8, 8), (32, 8, 8), (8, 32, 8)]
    ]
    model = random_model(NetworkConfig(channels=[2, 2]))
    deadline = Deadline(budget, cases, model.description)
    # With bfloat16, windows are computed one by one, and the scores are in single precision.
    trainer: Any = SimpleNamespace(global_step=0, precision="bf16-mixed")
    module: Any = SimpleNamespace(network=model.network, device=torch.device("cpu"))
    monkeypatch.setattr("segkit.inference.window_seconds.seconds_of_window", lambda *_: 2.0)
    deadline.on_train_start(trainer, module)
    assert budget.per_case == pytest.approx(2.0 * 5) and budget.validation == pytest.approx(2.0)
    deadline.on_validation_start(trainer, module)
    clock.now += 3.0
    deadline.on_validation_end(trainer, module)
    assert budget.per_case == pytest.approx(3.0 * 5) and budget.validation == pytest.approx(3.0)
    # In single precision a small window that is alone in its row is computed as two: 2, 14 and 8
    # windows instead of 1, 7 and 7.
    assert budget.scores_are_long and budget.for_scoring == pytest.approx(5 + 3 * 15.0 * 24 / 15)


def test_a_slow_first_step_does_not_make_the_others_slower_than_planned() -> None:
    """On a GPU the first step compiles kernels and records itself, also after a resumption."""
    clock = Clock()
    budget = TimeBudget(60.0, 0.0, 440, held_out=0, validated=0, validate_every=999, clock=clock)
    for seconds in [15.0, *[0.1] * 9]:
        clock.now += seconds
        budget.end_step()
    assert budget.per_step == pytest.approx(0.1)
    assert budget.expected_steps == round(10 + (60 - 15.9) / 0.1)
    assert budget.share == pytest.approx(15.9 / 60)  # the schedule follows all time that passed
    resumed = TimeBudget(60.0, 1.0, 440, held_out=0, validated=0, validate_every=999, clock=clock)
    resumed.go_on(budget.state())
    for seconds in [8.0, 0.1]:
        clock.now += seconds
        resumed.end_step()
    assert resumed.per_step == pytest.approx(0.1) and resumed.steps == 12
    before = {key: value for key, value in budget.state().items() if "first" not in key}
    resumed.go_on(before)  # a checkpoint of an earlier version
    assert resumed.per_step == pytest.approx(15.9 / 10)


def test_validations_take_place_as_long_as_they_fit() -> None:
    clock = Clock()
    budget = TimeBudget(101.0, 0.0, 100, held_out=0, validated=1, validate_every=10, clock=clock)
    budget.per_case = 5.0
    clock.now += 1.0
    budget.end_step()
    # 100 s: 6 times 10 steps and a validation, and 10 s for steps; the first of them is done.
    assert (budget.rest, budget.left) == (100.0, 70.0)
    for _ in range(9):
        clock.now += 1.0
        budget.end_step()
    assert budget.is_due and not budget.skips_validation and budget.left == 61.0
    clock.now += 87.0
    assert budget.rest == 4.0 and budget.skips_validation and budget.left == 4.0


@given(st.floats(30.0, 290.0))
@settings(max_examples=20, deadline=None)
def test_a_run_in_which_a_single_case_takes_up_to_half_of_the_time_ends_on_time(
    per_case: float,
) -> None:
    clock = Clock()
    budget = TimeBudget(600.0, 20.0, 400, 4, 0, 50, clock=clock)
    budget.per_case = per_case
    while not budget.finished:
        clock.now += 1.0
        budget.end_step()
    scored = max(int((600.0 - budget.elapsed - 5.0) / per_case), 1)
    clock.now += 5.0 + min(scored, 4) * per_case
    assert budget.elapsed <= 606.0
    assert scored == 4 or budget.elapsed + per_case >= 540.0


def test_a_machine_that_is_as_fast_as_planned_takes_the_planned_steps_one_by_one() -> None:
    budget, _, advances = simulated(400.0 + 1.0, 1.0, 0.0)
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


@pytest.mark.parametrize("schedule", ["one_cycle", "polynomial", "cosine"])
@pytest.mark.parametrize("per_step", [0.4, 3.0])
def test_the_learning_rate_comes_down_in_the_steps_that_there_was_time_for(
    schedule: str, per_step: float
) -> None:
    settings_of = TrainConfig.model_validate(
        {"steps": 400, "learning_rate": 1.0, "weight_decay": 0.0, "schedule": schedule}
    )
    optimiser = make_optimiser(settings_of)([nn.Parameter(torch.zeros(1))])
    scheduler = make_schedule(settings_of)(optimiser)
    rates = []
    for more in simulated(600.0, per_step, 0.0)[2]:
        optimiser.step()
        for _ in range(more):
            scheduler.step()
        rates.append(optimiser.param_groups[0]["lr"])
    peak = rates.index(max(rates))
    rise = {"one_cycle": 0.3, "polynomial": 0.0, "cosine": 0.1}[schedule]
    assert max(rates) > 0.98 and peak / len(rates) == pytest.approx(rise, abs=0.03)
    assert rates[-1] < 0.02
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize("times", [0.25, 4.0])
def test_a_machine_that_changes_its_speed_midway_ends_on_time_with_the_rate_down(
    times: float,
) -> None:
    """Another program starts, or ends, after half of the time."""
    clock = Clock()
    budget = TimeBudget(
        600.0,
        before=0.0,
        planned_steps=400,
        held_out=4,
        validated=4,
        validate_every=50,
        clock=clock,
    )
    budget.per_case = 1.0
    while not budget.finished:
        clock.now += 1.0 if budget.elapsed < 300 else times
        budget.end_step()
        if budget.steps % 50 == 0:
            clock.now += 4.0
            budget.resume_clock()
    clock.now += 4 * 1.0 + 5
    assert budget.elapsed == pytest.approx(600.0, rel=0.1)
    assert budget.advanced >= 390


def test_a_run_behind_its_plan_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (8.14, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    budget, _, _ = simulated(600.0, 3.6, 0.0)
    told = slower_than_planned(budget)
    assert (
        "a step takes 3.6 s, but train.minutes and train.steps leave 1.5 s for a step and" in told
    )
    assert "other programs may use the cores (load 8.1 on 2), or the plan was for" in told
    assert "of 400 steps fit into the 10 minutes" in told


def test_time_in_which_a_resumed_run_prepares_counts() -> None:
    clock = Clock()
    first = TimeBudget(600.0, 30.0, 400, 0, 0, 1000, clock=clock)
    clock.now += 100.0
    stopped = first.state()
    clock.now += 5000.0  # until somebody resumes it
    resumed = TimeBudget(600.0, 20.0, 400, 0, 0, 1000, clock=clock)
    clock.now += 3.0  # until the checkpoint is read
    resumed.go_on(stopped)
    assert resumed.elapsed == pytest.approx(130 + 23)
    clock.now += 10.0
    assert resumed.elapsed == pytest.approx(163) and resumed.until == pytest.approx(clock.now + 437)


def test_a_run_of_fewer_minutes_than_planned_does_not_blame_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0.0, 0.0))
    budget, _, _ = simulated(600.0, 3.6, 0.0)
    told = slower_than_planned(budget)
    assert "the plan was for a faster machine, for more minutes or for another network" in told
    assert "other programs" not in told


def test_a_run_that_waits_for_cores_says_for_how_long() -> None:
    budget, _, _ = simulated(600.0, 3.6, 0.0)
    told = slower_than_planned(budget, 0.42)
    assert "other programs use the cores, and this run has 42% of its time on them" in told
    # Also if a step is shorter than its share of all work, scoring included.
    budget, _, _ = simulated(600.0, 0.9, 5.0)
    assert "other programs use the cores" in slower_than_planned(budget, 0.42)


def test_a_machine_that_is_much_faster_than_planned_is_told() -> None:
    budget, _, _ = simulated(600.0, 0.5, 0.0)
    told = faster_than_planned(budget)
    assert "a step takes 0.5 s, but train.minutes and train.steps leave 1.5 s for it" in told
    assert f"{budget.expected_steps} steps, 400 planned, fit into the 10 minutes" in told


@pytest.mark.parametrize(
    ("per_step", "word"), [(3.0, "its share of all"), (0.5, "larger plan"), (1.4, "")]
)
def test_the_pace_is_told_once_after_a_twentieth_of_the_time(
    per_step: float,
    word: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("segkit.training.time_budget.set_last_step", lambda *_: None)
    clock = Clock()
    budget = TimeBudget(
        600.0,
        before=0.0,
        planned_steps=400,
        held_out=0,
        validated=0,
        validate_every=1000,
        clock=clock,
    )
    told = random_model(NetworkConfig(channels=[2, 2])).description
    deadline, module = Deadline(budget, (), told), SimpleNamespace()
    monkeypatch.setattr(deadline.cores, "share", lambda: 1.0)
    trainer = SimpleNamespace(world_size=1, is_global_zero=True, global_step=0)
    told_after = None
    for number in range(1, 101):
        clock.now += per_step
        budget.end_step()
        trainer.global_step = number
        deadline.on_train_batch_end(trainer, module, None, None, number)  # type: ignore[arg-type]
        if caplog.records and told_after is None:
            told_after = clock.now - 1000.0
    assert len(caplog.records) == (1 if word else 0)
    assert word in caplog.text
    if word:
        assert told_after == pytest.approx(0.05 * 600, abs=per_step)


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


def test_only_long_scores_of_a_timed_run_pay_for_a_conversion(tmp_path: Path) -> None:
    model = random_model(NetworkConfig(channels=[2, 2]))
    budget = TimeBudget(1000.0, 0.0, 100, held_out=10, validated=2, validate_every=50)
    folders = []
    for per_case in (5.9, 6.1):
        budget.per_case = per_case
        folders.append(scored_model(model, tmp_path, budget).folder)
    assert folders == [None, tmp_path]
    assert scored_model(model, tmp_path, None) is model


def test_windows_of_a_case_overlap_by_half() -> None:
    assert num_windows((64, 32, 10), (32, 32, 32), (8, 8, 8)) == 3
    assert num_windows((64, 32, 10), (32, 32, 1), (8, 8, 1)) == 3 * 10  # slices do not overlap
    # 3 x 3 x 3 windows: in each of three rows, the last of nine is computed as two.
    assert num_windows((64, 64, 64), (32, 32, 32), (8, 8, 8), at_once=2) == 3 * 10
    assert num_windows((64, 32, 10), (32, 32, 32), (8, 8, 8), at_once=2) == 3 * 2
    assert num_windows((64, 32, 10), (32, 32, 32), (8, 8, 8), at_once=2, axis=1) == 4


@given(
    st.tuples(*[st.integers(1, 16)] * 3),
    st.tuples(*[st.integers(2, 5)] * 3),
    st.sampled_from([1, 2]),
)
@settings(max_examples=30, deadline=None)
def test_as_many_windows_are_expected_as_a_prediction_computes(
    size: tuple[int, int, int], multiples: tuple[int, int, int], stride: int
) -> None:
    """Half a window of 5 strides is none of their multiples, so windows overlap by more."""
    patch = (multiples[0] * stride, multiples[1] * stride, multiples[2] * stride)
    strides = (stride, stride, stride)
    computed = 0

    def counted(windows: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal computed
        computed += len(windows)
        return {"same": windows}

    slide(torch.zeros(1, *size), counted, WindowLayout(patch, (0.5, 0.5, 0.5), strides))
    assert num_windows(size, patch, strides) == computed


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
    assert 0 < told["taken"] < (time.monotonic() - started) / 60 + 0.005  # it is rounded


def test_a_run_without_time_for_validations_skips_them_and_goes_on_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(TimeBudget, "rest", 0.0)
    folder = small_dataset(tmp_path / "data", num_cases=4)
    settings_of = {"steps": 20, "validate_every": 5, "minutes": 0.1}
    config = small_config(folder, train=settings_of)
    with caplog.at_level(logging.INFO), pytest.raises(Stopped):
        train(config, runs=tmp_path, callbacks=[StoppedAtTwelve()])
    told = "no validation after step {}: it takes longer than the time left"
    assert [told.format(step) in caplog.text for step in (5, 10, 15)] == [True, True, False]
    run = resume(tmp_path / config.name)
    assert run.summary["steps"] == LEAST_STEPS and run.summary["validation"]["cases"] == 1
    assert "validation/dice" not in (run.folder / "metrics.csv").read_text()


def test_a_run_without_validations_writes_checkpoints_and_goes_on(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=4)
    settings_of = {"steps": 20, "validate_every": 5, "validation_cases": 0}
    config = small_config(folder, train=settings_of, data={"validation": 0.5})
    with pytest.raises(Stopped):
        train(config, runs=tmp_path, callbacks=[StoppedAtTwelve()])
    run = resume(tmp_path / config.name)
    assert run.summary["steps"] == 20 and run.summary["validation"]["cases"] == 2
    assert run.summary["validation"]["best_mean_dice_during_training"] is None
    assert "validation/dice" not in (run.folder / "metrics.csv").read_text()
    assert (run.folder / LAST).is_file()
    with pytest.raises(ConfigError, match="patience is 3, but with validation_cases 0 there is no"):
        small_config(folder, train={**settings_of, "patience": 3})
