"""How many steps fit into `trainer.max_time`, told while there is time to change it.

The schedule of the learning rate counts steps and not seconds: by the clock, a run that goes on
after a stop would not end where it would have ended. So a training that its time cuts short ends at
a high learning rate, and what it is told here is how many steps to ask for.
"""

import logging
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Timer

logger = logging.getLogger(__name__)

UNCOUNTED = 5
"""Steps at the start, which take longer than others."""
MEASURED = 20


class Pace(Callback):
    """Warns once, after twenty steps or so, where not all steps fit into the time."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.seen = -1
        self.started = 0.0

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure; then say how many steps fit."""
        timers = [each for each in trainer.callbacks if isinstance(each, Timer)]  # type: ignore[attr-defined]
        remaining = timers[0].time_remaining() if timers else None
        if remaining is None or not trainer.is_global_zero:
            return
        step = trainer.global_step
        if step == self.seen:  # a step may be made of several batches
            return
        self.seen = step
        if self.first is None:
            self.first = step
        if step == self.first + UNCOUNTED:
            wait_for_device(pl_module.device)
            self.started = time.perf_counter()
        if step == self.first + UNCOUNTED + MEASURED:
            wait_for_device(pl_module.device)
            per_step = (time.perf_counter() - self.started) / MEASURED
            fitting = step + int(remaining / per_step)
            if fitting < trainer.max_steps:
                logger.warning("%s", too_slow(per_step, fitting, trainer.max_steps))


def too_slow(per_step: float, fitting: int, steps: int) -> str:
    """That so many steps alone fit, and what to do about it."""
    return (
        f"at {per_step:.2g} s a step, validations aside, {fitting} of {steps} steps fit into "
        f"trainer.max_time, and the learning rate would not have come down; "
        f"set train.steps={fitting}"
    )


def wait_for_device(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
