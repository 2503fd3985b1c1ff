"""The progress of a training counts from the step at which a run continues."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import Timer
from rich.console import Console

from segkit.training import progress_bar
from segkit.training.progress_bar import TrainingProgress


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_bar.time, "monotonic", clock)
    return clock


def trainer_at(step: int, steps: int, *, every: int = 100, timers: Any = ()) -> Any:
    return SimpleNamespace(
        global_step=step,
        max_steps=steps,
        is_global_zero=True,
        callbacks=list(timers),
        callback_metrics={},
        datamodule=SimpleNamespace(steps_per_epoch=every),
    )


def lines(progress: TrainingProgress) -> list[str]:
    file = progress.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().splitlines()


def progress_of(trainer: Any) -> TrainingProgress:
    progress = TrainingProgress(Console(file=io.StringIO(), width=200))
    progress.on_train_start(trainer, None)  # type: ignore[arg-type]
    return progress


def validated(progress: TrainingProgress, trainer: Any) -> str:
    progress.on_validation_start(trainer, None)  # type: ignore[arg-type]
    return lines(progress)[-1]


@pytest.mark.parametrize(
    ("first", "told"),
    [
        # 200 steps in 1200 s are 6 s a step, and 800 are left.
        (0, "step 200 of 1000, 1200 s: validating 2 of 10, about 80 min left"),
        # The same 1200 s for 50 steps are 24 s a step.
        (150, "step 200 of 1000, 1200 s since step 150: validating 2 of 10, about 320 min left"),
    ],
)
def test_the_time_left_follows_from_the_steps_since_the_start(
    first: int, told: str, clock: Clock
) -> None:
    progress = progress_of(trainer_at(first, 1000))
    clock.now += 1200
    assert validated(progress, trainer_at(200, 1000)) == told


def test_before_the_first_step_no_time_left_is_told(clock: Clock) -> None:
    """A run that continues from a validation repeats it at once."""
    progress = progress_of(trainer_at(200, 1000))
    clock.now += 3
    told = "step 200 of 1000, 3 s since step 200: validating 2 of 10"
    assert validated(progress, trainer_at(200, 1000)) == told


def test_the_time_left_is_never_more_than_the_time_limit(clock: Clock) -> None:
    timer = Timer(duration="00:00:10:00")
    progress = progress_of(trainer_at(0, 1000, timers=[timer]))
    clock.now += 1200
    assert validated(progress, trainer_at(200, 1000, timers=[timer])).endswith("10 min left")


def test_the_bar_begins_at_the_step_at_which_the_run_continues(clock: Clock) -> None:
    progress = progress_of(trainer_at(600, 1000))
    (task,) = progress.display.tasks
    assert (task.completed, task.total, task.percentage) == (600, 1000, 60)


def test_a_second_fold_counts_from_its_own_start(clock: Clock) -> None:
    progress = progress_of(trainer_at(600, 1000))
    clock.now += 5000
    progress.on_train_start(trainer_at(0, 1000), None)  # type: ignore[arg-type]
    clock.now += 600
    told = "step 100 of 1000, 600 s: validating 1 of 10, about 90 min left"
    assert validated(progress, trainer_at(100, 1000)) == told
