"""A training that ends when `train.minutes` are over, with its learning rate down.

The minutes are wall time: preparing, training, validating and scoring. What preparation took is
known when training begins; validation and scoring are measured and kept free; the rest is for
steps. The schedule follows the share of that rest that has gone by:

    steps of the schedule   0 ─────────────────────────── train.steps
    time for steps          0 ── share ────────────────── all of it

So the learning rate has come down when the time is over, however fast the machine turns out to be,
and if it is as fast as planned, each step advances the schedule by one.

A timed run depends on the clock and cannot be repeated bit for bit. `train.minutes=null` trains a
fixed number of steps, which can.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from segkit.config.training import LEAST_STEPS, MOST_FOR_SCORING
from segkit.data.prepared_cache import StoredCase
from segkit.inference.window_seconds import num_windows, seconds_of_window
from segkit.system.resources import num_cores
from segkit.training.lightning_private import set_last_step

logger = logging.getLogger(__name__)

SECONDS_TO_CONVERT = 5.0
"""What the fastest engine needs, about, before it scores the first case."""
UNLIMITED = 2**31 - 1
SLOWER = 0.8
"""A run is behind its plan if it will take under this share of the planned steps."""


@dataclass
class TimeBudget:
    """How much of a run's time has gone, and what is left for steps. All times are in seconds.

    Args:
        seconds: for everything.
        before: that had gone by when this was made.
        planned_steps: of the schedule.
        held_out: cases that are scored in the end.
        validated: cases that are looked at at each validation.
        validate_every: steps between two validations.
        clock: the time now.
    """

    seconds: float
    before: float
    planned_steps: int
    held_out: int
    validated: int
    validate_every: int
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.started = self.mark = self.clock()
        self.trained = self.share = self.per_case = 0.0
        self.steps = self.advanced = 0

    @property
    def elapsed(self) -> float:
        """Since the run began."""
        return self.before + self.clock() - self.started

    @property
    def per_step(self) -> float:
        """The mean of the steps so far; 0 before the first."""
        return self.trained / max(self.steps, 1)

    @property
    def for_scoring(self) -> float:
        """That is kept free for the final scores."""
        if not self.held_out:
            return 0.0
        wanted = self.held_out * self.per_case + SECONDS_TO_CONVERT
        return min(wanted, MOST_FOR_SCORING * self.seconds)

    @property
    def left(self) -> float:
        """For steps."""
        rest = max(self.seconds - self.elapsed - self.for_scoring, 0.0)
        cycle = self.validate_every * self.per_step
        looking = self.validated * self.per_case
        if looking and rest < cycle:  # no validation will come any more
            return rest
        return rest * cycle / (cycle + looking) if cycle else rest

    @property
    def expected_steps(self) -> int:
        """Of the whole run, at the pace so far."""
        if not self.steps:
            return self.planned_steps
        return max(self.steps + round(self.left / self.per_step), LEAST_STEPS)

    @property
    def finished(self) -> bool:
        """Whether the next step would end later than the time for steps."""
        return self.steps >= LEAST_STEPS and self.left < self.per_step / 2

    @property
    def until(self) -> float:
        """The clock's time at which the run should be over."""
        return self.started + self.seconds - self.before

    def resume_clock(self) -> None:
        """Begin a step: time from here on is that of a step."""
        self.mark = self.clock()

    def end_step(self) -> int:
        """Count a step; by how many of its planned steps the schedule advances."""
        now = self.clock()
        self.trained += now - self.mark
        self.mark = now
        self.steps += 1
        gone = self.trained / (self.trained + self.left) if self.trained else 0.0
        self.share = max(self.share, min(gone, self.steps / LEAST_STEPS))
        place = min(math.floor(self.share * self.planned_steps + 0.5), self.planned_steps)
        more, self.advanced = place - self.advanced, place
        return more

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        names = ("trained", "share", "per_case", "steps", "advanced")
        return {"elapsed": self.elapsed, **{name: getattr(self, name) for name in names}}

    def go_on(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint; the time since then does not count."""
        self.before, self.started = float(state["elapsed"]), self.clock()
        self.mark = self.started
        self.trained, self.share = float(state["trained"]), float(state["share"])
        self.per_case = float(state["per_case"])
        self.steps, self.advanced = int(state["steps"]), int(state["advanced"])


class Deadline(Callback):
    """Ends a training when its time for steps is over, and says if it is behind its plan.

    Args:
        budget: of the run.
        cases: that are held out, as they are prepared.
        patch_size: of a window.
    """

    def __init__(
        self, budget: TimeBudget, cases: Sequence[StoredCase], patch_size: tuple[int, ...]
    ) -> None:
        self.budget = budget
        self.cases = cases
        self.patch_size = patch_size
        self.looked = 0.0
        self.seen = -1
        self.told = False

    def state_dict(self) -> dict[str, Any]:
        """How much time has gone."""
        return self.budget.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.budget.go_on(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure a window, which tells what scoring will take."""
        if self.cases and not self.budget.per_case:
            assert isinstance(pl_module.network, nn.Module)
            windows = torch.zeros(2, self.cases[0].image.shape[0], *self.patch_size)
            seconds = seconds_of_window(pl_module.network, windows.to(pl_module.device))
            counts = [num_windows(case.label.shape, self.patch_size) for case in self.cases[:20]]
            self.budget.per_case = seconds * sum(counts) / len(counts)
        set_last_step(trainer, max(self.budget.expected_steps, trainer.global_step + 1))
        self.budget.resume_clock()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """End here if the time is over; every process of several obeys the first."""
        budget, step = self.budget, trainer.global_step
        if step == self.seen:  # a step may be made of several batches
            return
        self.seen = step
        rest = 0 if budget.finished else max(budget.expected_steps - budget.steps, 1)
        if trainer.world_size > 1:
            rest = trainer.strategy.broadcast(rest)
        set_last_step(trainer, step + rest)
        if not self.told and budget.share > 0.1 and trainer.is_global_zero:
            self.told = True
            if budget.expected_steps < SLOWER * budget.planned_steps:
                logger.warning("%s", behind(budget))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time what is not training."""
        self.looked = self.budget.clock()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Know what a case takes, for the next validations and the final scores."""
        seconds = self.budget.clock() - self.looked
        self.budget.per_case = seconds / max(self.budget.validated, 1)
        self.budget.resume_clock()


def behind(budget: TimeBudget) -> str:
    """That a run takes fewer steps than planned, and why."""
    cores, load = num_cores(), os.getloadavg()[0]
    why = "the machine is slower than when it was planned"
    if load > cores + 1:
        why = f"other programs use the cores (load {load:.1f} on {cores})"
    planned = budget.seconds / budget.planned_steps
    return (
        f"a step takes {budget.per_step:.2g} s, planned {planned:.2g} s with all that comes "
        f"beside it: {why}; {budget.expected_steps} of {budget.planned_steps} steps fit into the "
        f"{budget.seconds / 60:g} minutes, and the learning rate follows the time"
    )
