"""A training that ends when `train.minutes` are over, at the end of its learning rate schedule.

The minutes are wall time of preparing, training, validating and scoring. The time of preparing is
known when training begins. Time for validation and scoring is measured and reserved. The rest is
for steps, and the schedule follows the share of this rest that has passed:

    steps of the schedule   0 ─────────────────────────── train.steps
    time for steps          0 ── share ────────────────── all of it

So the learning rate has reached its end when the time is over, however fast the machine is. If the
machine is as fast as planned, each step advances the schedule by one.

A timed run depends on the clock and cannot be repeated bit for bit. With `train.minutes=null` a run
has a fixed number of steps and can be repeated.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn

from segkit.config.model import ModelDescription
from segkit.config.training import LEAST_STEPS
from segkit.data.prepared_cache import StoredCase
from segkit.errors import counted
from segkit.inference.window_seconds import num_windows, seconds_of_case, seconds_to_score
from segkit.system.core_share import FREE, CoreShare
from segkit.training.lightning_private import set_last_step, skip_validation
from segkit.training.resolve import computed_in
from segkit.training.time_limit import wait_for_device

logger = logging.getLogger(__name__)

LONG_SCORING = 60.0
"""If a timed run's final scores would take so many seconds in PyTorch, another engine is faster."""
SECONDS_TO_CONVERT = 5.0
"""Approximate time that the fastest engine needs before it can score the first case."""
SECONDS_TO_SAVE = 1.0
"""Approximate time between the last step and the first case that PyTorch scores."""
UNLIMITED = 2**31 - 1
SLOWER, FASTER = 0.8, 1.5
"""A run differs from its plan if it will do less than the first, or more than the second, of these
shares of the planned steps."""
KNOWN_AFTER, FEWEST_KNOWN = 0.05, 5
"""The speed is known after this share of the time for steps, and this number of steps."""


@dataclass
class TimeBudget:
    """The time of a run that has passed, and the time that is left for steps, in seconds.

    Args:
        seconds: time for the whole run.
        before: time that had passed when this object was made.
        planned_steps: number of steps of the schedule.
        held_out: number of cases that are scored at the end.
        validated: number of cases that each validation uses.
        validate_every: number of steps between two validations.
        clock: a function that returns the current time.
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
        self.prepared = self.before
        self.trained = self.share = 0.0
        self.first_steps, self.seconds_of_first = 0, 0.0
        """The first step of each process that trained this run, which also prepares the device, and
        their seconds, which are part of `trained`."""
        self.is_first = True
        self.per_case = 0.0
        """Seconds of a held-out case in a validation, on average."""
        self.scoring_factor = 1.0
        """How much longer a case takes in the final scores, in single precision on a CPU."""
        self.relative_size = 1.0
        """Mean size of the cases of a validation, as a share of that of all held-out cases."""
        self.steps = self.advanced = 0
        self.validated_at = 0
        """The step of the last validation, or of the last that was skipped."""

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self.before + self.clock() - self.started

    @property
    def per_step(self) -> float:
        """Mean seconds of a step so far, without first steps; 0 before the first step."""
        later = self.steps - self.first_steps
        if later <= 0:
            return self.trained / max(self.steps, 1)
        return (self.trained - self.seconds_of_first) / later

    @property
    def for_scoring(self) -> float:
        """Seconds that are reserved for the final scores."""
        before = SECONDS_TO_CONVERT if self.scores_are_long else SECONDS_TO_SAVE
        per_score = self.scoring_factor * self.per_case
        return seconds_to_score(self.seconds, self.held_out, per_score, before)

    @property
    def scores_are_long(self) -> bool:
        """Whether the final scores take so long that the fastest engine pays."""
        return self.held_out * self.scoring_factor * self.per_case >= LONG_SCORING

    @property
    def rest(self) -> float:
        """Seconds that are left for steps and validations."""
        return max(self.seconds - self.elapsed - self.for_scoring, 0.0)

    @property
    def validation(self) -> float:
        """Seconds of a validation."""
        return self.validated * self.relative_size * self.per_case

    @property
    def left(self) -> float:
        """Seconds that are left for steps.

        Validations take place as long as they fit into the rest:

            rest      0 ── to_next ── validation ── cycle ── validation ── … ── all of it
        """
        rest, validation = self.rest, self.validation
        if not validation or not self.per_step:
            return rest
        cycle = self.validate_every * self.per_step
        done = self.steps % self.validate_every
        to_next = 0.0 if self.is_due else cycle - done * self.per_step
        after = rest - to_next - validation
        count = 0 if after < 0 else 1 + after // (cycle + validation)
        return rest - count * validation

    @property
    def is_due(self) -> bool:
        """Whether a validation follows this step, as long as it has not taken place."""
        return self.steps % self.validate_every == 0 and self.steps > self.validated_at

    @property
    def skips_validation(self) -> bool:
        """Whether a validation follows this step, but does not fit into the time."""
        return self.is_due and self.rest < self.validation

    @property
    def expected_steps(self) -> int:
        """Number of steps of the whole run, if steps stay as fast as they were so far."""
        if not self.steps:
            return self.planned_steps
        return max(self.steps + round(self.left / self.per_step), LEAST_STEPS)

    @property
    def finished(self) -> bool:
        """Whether no time is left for another step."""
        return self.steps >= LEAST_STEPS and self.left < self.per_step / 2

    @property
    def until(self) -> float:
        """Time of the clock at which the run should end."""
        return self.started + self.seconds - self.before

    def resume_clock(self) -> None:
        """Start to measure a step."""
        self.mark = self.clock()

    def count_time(self) -> float:
        """Count the time since the last step as time for steps, and return it."""
        now = self.clock()
        seconds, self.mark = now - self.mark, now
        self.trained += seconds
        return seconds

    def end_step(self) -> int:
        """Count a step, and return by how many planned steps the schedule advances."""
        seconds = self.count_time()
        if self.is_first:
            self.first_steps += 1
            self.seconds_of_first += seconds
            self.is_first = False
        self.steps += 1
        gone = self.trained / (self.trained + self.left) if self.trained else 0.0
        self.share = max(self.share, min(gone, self.steps / LEAST_STEPS))
        place = min(math.floor(self.share * self.planned_steps + 0.5), self.planned_steps)
        more, self.advanced = place - self.advanced, place
        return more

    def state(self) -> dict[str, float]:
        """The state for a checkpoint, as plain numbers."""
        names = (
            *("trained", "share", "per_case", "steps", "advanced"),
            *("first_steps", "seconds_of_first"),
        )
        return {"elapsed": self.elapsed, **{name: getattr(self, name) for name in names}}

    def go_on(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint.

        The time between the checkpoint and the start of this process does not count. The time in
        which this process prepared does.
        """
        self.before = self.prepared + float(state["elapsed"])
        self.mark = self.clock()
        self.trained, self.share = float(state["trained"]), float(state["share"])
        self.per_case = float(state["per_case"])
        self.steps, self.advanced = int(state["steps"]), int(state["advanced"])
        self.first_steps = int(state.get("first_steps", 0))
        self.seconds_of_first = float(state.get("seconds_of_first", 0.0))
        self.validated_at = self.steps


class Deadline(Callback):
    """A callback that ends a training when its time is over, and warns if it is behind its plan.

    Args:
        budget: the time budget of the run.
        cases: the prepared held-out cases.
        description: the description of the model.
    """

    def __init__(
        self, budget: TimeBudget, cases: Sequence[StoredCase], description: ModelDescription
    ) -> None:
        self.budget = budget
        self.cases = cases
        self.description = description
        self.validation_started = 0.0
        self.seen = -1
        self.pace_known = False
        self.cores = CoreShare()

    def state_dict(self) -> dict[str, Any]:
        """The state of the budget."""
        return self.budget.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the budget."""
        self.budget.go_on(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the time of a window, to estimate the time of validations and of scoring."""
        if self.cases:
            patch, stride = self.description.volume_patch, self.description.volume_stride
            sizes = [case.label.shape for case in self.cases]
            counts = [num_windows(size, patch, stride) for size in sizes]
            mean = sum(counts) / len(counts)
            if validated := counts[: self.budget.validated]:
                self.budget.relative_size = sum(validated) / len(validated) / mean
            assert isinstance(pl_module.network, nn.Module)
            validating, scoring = seconds_of_case(
                pl_module.network, self.description, sizes, computed_in(trainer.precision)
            )
            self.budget.scoring_factor = scoring / validating
            self.budget.per_case = self.budget.per_case or validating
        set_last_step(trainer, max(self.budget.expected_steps, trainer.global_step + 1))
        self.cores = CoreShare()
        self.budget.resume_clock()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """End the training if the time is over, and skip a validation that takes longer than that.

        All processes follow the first one.
        """
        budget, step = self.budget, trainer.global_step
        if step == self.seen:  # a step may be made of several batches
            return
        self.seen = step
        rest = 0 if budget.finished else max(budget.expected_steps - budget.steps, 1)
        skips = budget.skips_validation
        if trainer.world_size > 1:
            rest, skips = trainer.strategy.broadcast((rest, skips))
        set_last_step(trainer, step + rest)
        if skips:
            logger.info("no validation after step %d: it takes longer than the time left", step)
            skip_validation(trainer)
            budget.validated_at = budget.steps
        known = budget.share >= KNOWN_AFTER and budget.steps >= FEWEST_KNOWN
        if known and not self.pace_known and trainer.is_global_zero:
            self.pace_known = True
            if budget.expected_steps < SLOWER * budget.planned_steps:
                logger.warning("%s", slower_than_planned(budget, self.cores.share()))
            elif budget.expected_steps > FASTER * budget.planned_steps:
                logger.warning("%s", faster_than_planned(budget))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to measure the validation, when the steps before it have ended on the GPU."""
        wait_for_device(pl_module.device)
        self.budget.count_time()
        self.validation_started = self.budget.clock()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Update the time of a case, which estimates later validations and the final scores."""
        seconds = self.budget.clock() - self.validation_started
        cases = max(self.budget.validated, 1) * self.budget.relative_size
        self.budget.per_case = seconds / cases
        self.budget.validated_at = self.budget.steps
        self.budget.resume_clock()


def slower_than_planned(budget: TimeBudget, share: float = 1.0) -> str:
    """A warning that a run does fewer steps than planned, with a likely reason.

    Args:
        budget: the time budget of the run.
        share: the share of the cores that the run has had, as `CoreShare` measures it.
    """
    planned = budget.seconds / budget.planned_steps
    end = _steps_that_fit(budget)
    if share < FREE:
        return (
            f"a step takes {budget.per_step:.2g} s: other programs use the cores, and this run has "
            f"{share:.0%} of its time on them; {end}"
        )
    if budget.per_step < planned:
        return (
            f"a step takes {budget.per_step:.2g} s, about as planned, but all before it took "
            f"{budget.before:.0f} s, the final scores will take {budget.for_scoring:.0f} s and a "
            f"validation takes {budget.validation:.0f} s; {end}"
        )
    # The load counts the whole machine, also in a container that may use only a part of it.
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    reason = "the plan was for a faster machine, for more minutes or for another network"
    if load > cores + 1:
        reason = f"other programs may use the cores (load {load:.1f} on {cores}), or {reason}"
    return (
        f"a step takes {budget.per_step:.2g} s, but train.minutes and train.steps leave "
        f"{planned:.2g} s for a step and its share of all other work: {reason}; {end}"
    )


def faster_than_planned(budget: TimeBudget) -> str:
    """A warning that a run does many more steps than planned."""
    planned = budget.seconds / budget.planned_steps
    return (
        f"a step takes {budget.per_step:.2g} s, but train.minutes and train.steps leave "
        f"{planned:.2g} s for it: {_steps_that_fit(budget)}; segkit plan makes a larger plan for "
        f"these minutes on this machine"
    )


def _steps_that_fit(budget: TimeBudget) -> str:
    steps, planned = budget.expected_steps, budget.planned_steps
    many = (
        f"{counted(steps, 'step')}, {planned} planned,"
        if steps > planned
        else f"{steps} of {counted(planned, 'step')}"
    )
    return (
        f"{many} fit into the {counted(budget.seconds / 60, 'minute')}, and the learning rate "
        f"follows the time"
    )
