"""A training that its time will cut short says so while it can still be changed."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Timer

from segkit.training import time_limit as pace
from segkit.training.fit import train
from segkit.training.time_limit import MEASURED, UNCOUNTED, TimeLimitWarning
from tests.small import small_config, small_dataset


def told(
    *, steps: int, max_time: str | None, seconds: float, first: int = 1, last: int = 100
) -> list[str]:
    """What is logged while steps `first` to `last` of so many are done, each in so many seconds."""
    clock = {"now": 0.0}
    trainer: Any = SimpleNamespace(
        callbacks=[Timer(duration=max_time)] if max_time else [],
        is_global_zero=True,
        max_steps=steps,
        global_step=0,
    )
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("segkit.training.time_limit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace.time, "perf_counter", lambda: clock["now"])
        logger.addHandler(handler)
        watching = TimeLimitWarning()
        for step in range(first, last + 1):
            # The first steps take longer, and are not counted.
            clock["now"] += seconds * (50 if step < first + UNCOUNTED else 1)
            trainer.global_step = step
            watching.on_train_batch_end(trainer, module, None, None, 0)
        logger.removeHandler(handler)
    return lines


def test_the_steps_that_fit_are_told_once() -> None:
    # 26 steps are done when it is told; the timer, which stands still here, holds 120 s more.
    (line,) = told(steps=1000, max_time="00:00:02:00", seconds=0.5)
    fitting = 1 + UNCOUNTED + MEASURED + 240
    assert line == (
        f"at 0.5 s a step, without validations, only {fitting} of 1000 steps fit into "
        f"trainer.max_time, and training would end at a high learning rate; "
        f"set train.steps={fitting}"
    )


def test_a_resumed_run_counts_the_steps_it_has_behind_it() -> None:
    (line,) = told(steps=1000, max_time="00:00:01:00", seconds=0.5, first=301, last=400)
    assert f"{301 + UNCOUNTED + MEASURED + 120} of 1000 steps" in line


@pytest.mark.parametrize(
    ("steps", "max_time"), [(200, "00:00:02:00"), (1000, None), (100_000, "01:00:00:00")]
)
def test_nothing_is_reported_if_all_steps_fit(steps: int, max_time: str | None) -> None:
    assert told(steps=steps, max_time=max_time, seconds=0.5) == []


def test_a_real_training_that_is_too_slow_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "UNCOUNTED", 1)
    monkeypatch.setattr(pace, "MEASURED", 2)
    config = small_config(
        small_dataset(tmp_path / "data"),
        data={"validation": 0.0},
        train={"steps": 1_000_000, "validate_every": 1000},
        trainer={"max_time": "00:00:00:05"},
    )
    run = train(config, runs=tmp_path)
    lines = [line for line in caplog.messages if "fit into trainer.max_time" in line]
    assert run.summary["steps"] >= 4 and len(lines) == 1 and "of 1000000 steps" in lines[0]
