"""All uses of Lightning's private attributes (Lightning 2.6).

Lightning's counts of steps are wrong in three places, and no public interface can correct them. If
another version of Lightning lacks an attribute, the tests of this module name it.
"""

from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import WandbLogger
from torch import nn
from torch.optim import Optimizer

_STEPS = "epoch_loop.batch_progress"
_VALIDATION = "epoch_loop.val_loop.batch_progress"
_COUNTS = ("ready", "started", "processed", "completed")


def is_first_process() -> bool:
    """Whether this is the process that writes files. It works before there is a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0


def log_by_true_step(trainer: L.Trainer) -> None:
    """Log by the true step: in a resumed run, Lightning's own count is wrong."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def logs_this_step(trainer: L.Trainer) -> bool:
    """Whether the logger gets the values of the running step."""
    return bool(trainer._logger_connector.should_update_logs)


def can_record(trainer: L.Trainer) -> bool:
    """Whether gradients may be set without Lightning: one process and no scaling of the loss."""
    plugin = trainer.precision_plugin
    scaled = getattr(plugin, "scaler", None) is not None
    return trainer.world_size == 1 and trainer.accumulate_grad_batches == 1 and not scaled


def is_fused(optimiser: Optimizer) -> bool:
    """Whether an optimiser updates all weights in one kernel; Lightning clips no norm for it."""
    return bool(getattr(optimiser, "_step_supports_amp_scaling", False))


def unscale(trainer: L.Trainer, optimiser: Optimizer) -> None:
    """Divide the gradients by the loss scale of half precision, if there is one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        scaler.unscale_(optimiser)


def reset_validation(trainer: L.Trainer) -> None:
    """Reset Lightning's counts of an interrupted validation."""
    trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()


def set_last_step(trainer: L.Trainer, steps: int) -> None:
    """Make a running training end after this number of steps."""
    trainer.fit_loop.epoch_loop.max_steps = steps


def skip_validation(trainer: L.Trainer) -> None:
    """Leave out the validation that follows the running step, the last of an epoch."""
    trainer.fit_loop.epoch_loop._skip_next_val = True


def forget_data(trainer: L.Trainer) -> None:
    """Let go of the batches' source after a training; cases may be in a GPU's memory."""
    trainer.fit_loop._combined_loader = None
    trainer.fit_loop.epoch_loop.val_loop._combined_loader = None


def validation_is_interrupted(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint was written in the middle of a validation."""
    counts = checkpoint["loops"]["fit_loop"][_VALIDATION]["current"]
    return bool(counts["processed"] < counts["started"])


def correct_counts(checkpoint: dict[str, Any], *, validating: bool) -> None:
    """Correct the counts of a checkpoint that was written between two steps.

    A batch counts only if its step is done. A validation that had started counts as being at its
    first case, so that Lightning starts it again.
    """
    loop = checkpoint["loops"]["fit_loop"]
    for counts in (loop[_STEPS]["total"], loop[_STEPS]["current"]):
        counts.update(dict.fromkeys(_COUNTS, counts["completed"]))
    for counts in (loop[_VALIDATION]["total"], loop[_VALIDATION]["current"]):
        if validating:
            counts.update(ready=1, started=1, processed=0, completed=0)


def begin_epoch_at(checkpoint: dict[str, Any], every: int, batches_per_step: int = 1) -> None:
    """Set the counts of a checkpoint to its step within epochs of `every` steps.

    Nothing changes if epochs have the same length as before. Lightning counts batches.
    """
    every *= batches_per_step
    batches = checkpoint["loops"]["fit_loop"][_STEPS]
    inside = int(checkpoint["global_step"]) * batches_per_step % every
    there = batches["current"]["completed"] in (inside, inside or every)
    if there and batches["is_last_batch"] == (inside == 0):
        return
    batches["current"].update(dict.fromkeys(_COUNTS, inside or every))
    batches["is_last_batch"] = inside == 0


class MovableAverage(WeightAveraging):
    """Lightning's average of weights, with public names for its private attributes."""

    def keep_on(self, device: torch.device) -> None:
        """Keep the average on a device; call it before `setup`."""
        self._device = device

    def swap(self, pl_module: L.LightningModule) -> None:
        """Exchange the average and the weights."""
        self._swap_models(pl_module)

    def copy_into(self, pl_module: L.LightningModule) -> None:
        """Copy the average, if there is one, into the module."""
        if self._average_model is not None:
            self._copy_average_to_current(pl_module)

    @property
    def average(self) -> nn.Module:
        """The averaged copy of the module."""
        assert self._average_model is not None, "the average is made by `setup`"
        averaged: nn.Module = self._average_model.module
        return averaged

    @property
    def updates(self) -> int:
        """The step of the last update."""
        return self._latest_update_step

    @updates.setter
    def updates(self, steps: int) -> None:
        self._latest_update_step = steps

    def store_updates(self) -> None:
        """Copy the number of updates into PyTorch's average, which checkpoints contain."""
        if self._average_model is not None:
            self._average_model.n_averaged.fill_(self.updates)


def end_record(tracker: WandbLogger, status: str) -> None:
    """End the record of a tracker, if it has started one."""
    if tracker._experiment is not None:
        tracker._experiment.finish(exit_code=0 if status == "success" else 1)
