"""All that segkit touches of Lightning (2.6) that Lightning does not promise to keep.

Lightning's counts of a training are off in three places, and no callback can set them otherwise.
The tests of this module say which attribute is gone if another version of Lightning lacks one.
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
    """Whether this is the process that writes, also before there is a trainer to ask."""
    return getattr(rank_zero_only, "rank", 0) == 0


def log_by_true_step(trainer: L.Trainer) -> None:
    """Log by the true step: Lightning's own count is off in a resumed run."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def can_record(trainer: L.Trainer) -> bool:
    """Whether a step's gradients may be set without Lightning: one process, and nothing scaled."""
    plugin = trainer.precision_plugin
    scaled = getattr(plugin, "scaler", None) is not None
    return trainer.world_size == 1 and trainer.accumulate_grad_batches == 1 and not scaled


def is_fused(optimiser: Optimizer) -> bool:
    """Whether an optimiser updates all weights in one kernel, which Lightning clips no norm for."""
    return bool(getattr(optimiser, "_step_supports_amp_scaling", False))


def unscale(trainer: L.Trainer, optimiser: Optimizer) -> None:
    """Take the scale of half precision off the gradients, if there is one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        scaler.unscale_(optimiser)


def forget_validation(trainer: L.Trainer) -> None:
    """Forget what a validation that was broken off has left in Lightning's counts."""
    trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()


def set_last_step(trainer: L.Trainer, steps: int) -> None:
    """Have the loop of a training that began end after so many steps."""
    trainer.fit_loop.epoch_loop.max_steps = steps


def validation_is_broken_off(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint was written while a case was looked at."""
    looked = checkpoint["loops"]["fit_loop"][_VALIDATION]["current"]
    return bool(looked["processed"] < looked["started"])


def settle(checkpoint: dict[str, Any], *, validating: bool) -> None:
    """Put right the counts of a checkpoint that was written between two steps.

    A batch counts if its step is done. A validation that was begun counts as one at its first case,
    where Lightning begins it anew.
    """
    loop = checkpoint["loops"]["fit_loop"]
    for counts in (loop[_STEPS]["total"], loop[_STEPS]["current"]):
        counts.update(dict.fromkeys(_COUNTS, counts["completed"]))
    for counts in (loop[_VALIDATION]["total"], loop[_VALIDATION]["current"]):
        if validating:
            counts.update(ready=1, started=1, processed=0, completed=0)


def begin_epoch_at(checkpoint: dict[str, Any], every: int, batches_per_step: int = 1) -> None:
    """Put the counts of a checkpoint where its step lies in epochs of so many steps.

    They lie there already if epochs are as long as they were. Lightning counts batches.
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
    """Lightning's average of weights, with names for what it keeps to itself."""

    def keep_on(self, device: torch.device) -> None:
        """Keep the average on a device; call it before `setup`."""
        self._device = device

    def swap(self, pl_module: L.LightningModule) -> None:
        """Exchange the average and the weights."""
        self._swap_models(pl_module)

    def leave_in(self, pl_module: L.LightningModule) -> None:
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

    def tell_updates(self) -> None:
        """Write their number where PyTorch's average keeps it, for a checkpoint."""
        if self._average_model is not None:
            self._average_model.n_averaged.fill_(self.updates)


def end_record(tracker: WandbLogger, status: str) -> None:
    """End the record of a tracker, if it began one."""
    if tracker._experiment is not None:
        tracker._experiment.finish(exit_code=0 if status == "success" else 1)
