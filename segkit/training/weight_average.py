"""A running average of the weights, which scores a little better than the last of them."""

import lightning as L
import torch
from torch import Tensor

from segkit.training.lightning_private import MovableAverage


class Averaging(MovableAverage):
    """Exponential moving average of weights (Polyak and Juditsky 1992), validated and saved.

    After n steps the average keeps min(decay, (1 + n) / (10 + n)) of itself, so that a short run
    forgets where it began. Buffers are averaged too where they are real numbers. Lightning keeps
    the average in checkpoints.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._average)
        self.decay = decay
        self.swapped = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep the average where the model will be, which is not there yet."""
        self.keep_on(trainer.strategy.root_device)
        super().setup(trainer, pl_module, stage)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the average."""
        super().on_validation_epoch_start(trainer, pl_module)
        self.swapped = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the weights themselves."""
        super().on_validation_epoch_end(trainer, pl_module)
        self.swapped = False

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Where a validation ends half-way, put each where it belongs before it is saved."""
        if self.swapped:
            self.swap(pl_module)
            self.swapped = False

    def settle(self, pl_module: L.LightningModule) -> None:
        """Leave the average in the model, also where nothing was left to train after a stop."""
        self.leave_in(pl_module)

    def _average(self, averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        # Lightning's count is a number, the given one a tensor of the device, to be waited for.
        steps = self.updates
        if averaged[0].is_floating_point():
            kept = min(self.decay, (1 + steps) / (10 + steps))
            torch._foreach_lerp_(averaged, current, 1 - kept)
        else:
            torch._foreach_copy_(averaged, current)
