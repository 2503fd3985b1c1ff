"""A training that is asked to stop ends at the next step, and its last checkpoint says where.

    steps        1   2   3   4   5 ─validation─ 6   7   8  …
    asked at           ╷ after 2            ╷ in it     ╷ after 7
    last.ckpt            2               5 once more     7

A checkpoint that Lightning (2.6) writes in the midst of an epoch counts the batch that was to come
as one that was begun, and of a validation that was broken off the cases that were looked at. Both
counts are put right, so that a run that goes on from there misses nothing and repeats no step; a
validation is begun anew, as nothing but its end is kept.
"""

from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from segkit.errors import Stopped
from segkit.system.signals import handling_signals
from segkit.training.lightning_private import (
    forget_validation,
    set_last_step,
    settle,
    validation_is_broken_off,
)


class Interruption(Callback):
    """Saves a training that Ctrl-C or SIGTERM asks to stop, and raises Stopped.

    A step is finished before, a validation is not. Asked twice, it ends at once and saves nothing.
    Several processes stop at the same step, as soon as one of them is asked.

    Args:
        path: of the last checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: int | None = None
        self.looking = False
        self.hopeless = False
        self.saving = False
        self.saved = -1
        self.steps: int | None = None
        self.handlers = ExitStack()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen, from here on: Lightning has set up its own handlers by now."""
        self.handlers.enter_context(handling_signals(self._ask))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps, stop if asked to; a step may be made of several batches."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what a validation that was broken off has left in Lightning's counts."""
        forget_validation(trainer)
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
        """Weights stay as they are while a case is looked at: stop at once from here on.

        One of several processes does not: the others would wait for it.
        """
        if trainer.world_size == 1:
            self._stop_if_asked(trainer)
            self.looking = True

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """From here on wait for a step's beginning again."""
        self.looking = False

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the step; put right the counts where this is not an epoch's end."""
        self.saved = trainer.global_step
        if self.saving:
            settle(checkpoint, validating=trainer.validating)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Have the validation after the last step begun anew, where all steps are done."""
        last = checkpoint["global_step"] == trainer.max_steps
        if last and validation_is_broken_off(checkpoint):
            # Lightning would see nothing to do. As soon as it looks, it may count again.
            self.steps = trainer.max_steps
            set_last_step(trainer, self.steps + 1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the last step, stop here if asked to."""
        if trainer.global_step == trainer.max_steps:
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What ended before its last step is saved already."""
        self.saved = trainer.global_step
        self._stop_if_asked(trainer)
        self.handlers.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save, where the training was asked to stop and no step is half done."""
        self.looking = False
        due = self.saved != trainer.global_step and not self.hopeless
        if isinstance(exception, Stopped) and due:
            self.saving = True
            trainer.save_checkpoint(self.path)
        self.handlers.close()

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.looking or self.asked is not None:
            self.hopeless = not self.looking
            raise Stopped(signum)
        self.asked = signum

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        asked = self.asked is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            raise Stopped(self.asked or 15)
