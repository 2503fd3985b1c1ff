"""A training saves a checkpoint at least every ten minutes, and when it is asked to stop.

A training that is asked to stop saves a checkpoint at the next step and ends:

    steps        1   2   3   4   5 ─validation─ 6   7   8  …
    asked at           ╷ after 2            ╷ in it     ╷ after 7
    last.ckpt            2               5 once more     7

In a checkpoint in the middle of an epoch, Lightning (2.6) counts the next batch as started, and the
cases of an interrupted validation as done. Both counts are corrected, so that a resumed run skips
nothing and repeats no step. A validation starts again, because only its end has a result.
"""

import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from segkit.errors import Stopped
from segkit.system.signals import handling_signals
from segkit.training.lightning_private import (
    correct_counts,
    reset_validation,
    set_last_step,
    validation_is_interrupted,
)

MOST_SECONDS = 600.0
"""Longest time in seconds between two checkpoints, except for the length of a step."""


class StopAndSave(Callback):
    """A callback that saves the training on Ctrl-C or SIGTERM, and raises Stopped.

    It also saves between two steps if the last checkpoint is ten minutes old, because on a machine
    that is far slower than planned, hours may lie between two validations.

    A step is finished first; a validation is interrupted. After a second signal, the training ends
    at once and saves nothing. If there are several processes, all stop at the same step, as soon as
    one of them receives a signal.

    Args:
        path: file of the last checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.saved_at = time.monotonic()
        self.asked: int | None = None
        self.in_validation = False
        self.give_up = False
        self.saving = False
        self.saved = -1
        self.steps: int | None = None
        self.handlers = ExitStack()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the signal handlers. This comes after Lightning has installed its own."""
        self.saved_at = time.monotonic()
        self.handlers.enter_context(handling_signals(self._ask))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps, stop if asked to, and save if the last checkpoint is old.

        A step may have several batches.
        """
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._stop_if_asked(trainer)
            is_old = time.monotonic() - self.saved_at >= MOST_SECONDS
            if self._is_true_anywhere(trainer, is_old):
                self._save(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset Lightning's counts of an interrupted validation."""
        reset_validation(trainer)
        if self.steps is not None:
            set_last_step(trainer, self.steps)
            self.steps = None

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """From now on, stop at once if asked to: weights do not change during a validation.

        If there are several processes, they do not stop here, because the others would wait.
        """
        if trainer.world_size == 1:
            self._stop_if_asked(trainer)
            self.in_validation = True

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """From now on, stop only between two steps."""
        self.in_validation = False

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the step, and correct the counts if this is not the end of an epoch."""
        self.saved, self.saved_at = trainer.global_step, time.monotonic()
        if self.saving:
            correct_counts(checkpoint, validating=trainer.validating)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """If all steps are done, start the validation after the last step again."""
        last = checkpoint["global_step"] == trainer.max_steps
        if last and validation_is_interrupted(checkpoint):
            # Lightning would see that all steps are done and end. So it gets one step more, until
            # the validation has started.
            self.steps = trainer.max_steps
            set_last_step(trainer, self.steps + 1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop after the last step, if asked to."""
        if trainer.global_step == trainer.max_steps:
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop if asked to. There is nothing to save: the checkpoint of this step exists."""
        self.saved = trainer.global_step
        self._stop_if_asked(trainer)
        self.handlers.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save a checkpoint, if the training was asked to stop and no step is half done."""
        self.in_validation = False
        due = self.saved != trainer.global_step and not self.give_up
        with self.handlers:
            if isinstance(exception, Stopped) and due:
                self._save(trainer)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.in_validation or self.asked is not None:
            self.give_up = not self.in_validation
            raise Stopped(signum)
        self.asked = signum

    def _save(self, trainer: L.Trainer) -> None:
        self.saving = True
        trainer.save_checkpoint(self.path)
        self.saving = False

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        if self._is_true_anywhere(trainer, self.asked is not None):
            raise Stopped(self.asked or 15)

    def _is_true_anywhere(self, trainer: L.Trainer, decision: bool) -> bool:
        """Whether this decision is true in this process, or in any other that trains with it."""
        if trainer.world_size == 1:
            return decision
        return bool(trainer.strategy.reduce_boolean_decision(decision, all=False))
