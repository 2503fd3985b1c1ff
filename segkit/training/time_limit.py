"""A warning if not all steps fit into `trainer.max_time`.

The learning rate schedule counts steps, not seconds; otherwise a resumed run would not end with the
same weights as a run without a stop. So a training that `trainer.max_time` ends early ends at a
high learning rate. The warning comes early and says how many steps fit.
"""

import logging
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Timer

from segkit.errors import counted

logger = logging.getLogger(__name__)

UNCOUNTED = 5
"""Number of steps at the start that are not measured, because they take longer than others."""
MEASURED = 20


class TimeLimitWarning(Callback):
    """A callback that warns once, after about twenty steps, if not all steps fit into the time."""

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
        """Measure some steps, then warn if not all steps fit."""
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
    """A warning that only `fitting` of all steps fit, with advice."""
    return (
        f"at {per_step:.2g} s a step, without validations, only {fitting} of "
        f"{counted(steps, 'step')} fit "
        f"into trainer.max_time, and training would end at a high learning rate; "
        f"set train.steps={fitting}"
    )


def wait_for_device(device: torch.device) -> None:
    """Wait until a GPU has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
