"""A running average of the weights, which scores a little better than the last weights."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import lightning as L
import torch
from torch import Tensor

from segkit.training.lightning_private import MovableAverage


class Averaging(MovableAverage):
    """A callback that keeps an exponential moving average of the weights, validates and saves it.

    (Polyak and Juditsky 1992.) After n steps the average keeps min(decay, (1 + n) / (10 + n)) of
    itself, so that a short run forgets its first weights. Buffers of real numbers are averaged too.
    Lightning saves the average in checkpoints. This class counts the steps itself, because each
    step would have to wait for Lightning's count, which is on the device.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.swapped = False
        self.pairs: list[tuple[list[Tensor], list[Tensor]]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep the average on the device to which the model will be moved."""
        self.keep_on(trainer.strategy.root_device)
        super().setup(trainer, pl_module, stage)

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: torch.Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the weights of a new step to the average, which starts as the first weights."""
        steps = self.updates
        if trainer.global_step <= steps:
            return
        kept = min(self.decay, (1 + steps) / (10 + steps))
        for averaged, current in self.pairs or self._paired(pl_module):
            if steps == 0 or not averaged[0].is_floating_point():
                torch._foreach_copy_(averaged, current)
            else:
                torch._foreach_lerp_(averaged, current, 1 - kept)
        self.updates = trainer.global_step

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average and the number of its steps."""
        self.store_updates()
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average into the model for the validation."""
        super().on_validation_epoch_start(trainer, pl_module)
        self.swapped = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights back into the model."""
        super().on_validation_epoch_end(trainer, pl_module)
        self.swapped = False

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """After an interrupted validation, exchange average and weights before they are saved."""
        if self.swapped:
            self.swap(pl_module)
            self.swapped = False

    def keep_average(self, pl_module: L.LightningModule) -> None:
        """Copy the average into the model, also if a resumed run had nothing left to train."""
        self.copy_into(pl_module)

    def _paired(self, pl_module: L.LightningModule) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Pairs of the average's and the model's tensors, grouped by type; stored for later."""
        average = self.average
        alike: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for averaged, current in zip(
            chain(average.parameters(), average.buffers()),
            chain(pl_module.parameters(), pl_module.buffers()),
            strict=True,
        ):
            ours, theirs = alike.setdefault(averaged.dtype, ([], []))
            ours.append(averaged)
            theirs.append(current)
        self.pairs = list(alike.values())
        return self.pairs
