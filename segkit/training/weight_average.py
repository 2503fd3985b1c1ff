"""A running average of the weights, which scores a little better than the last of them."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import lightning as L
import torch
from torch import Tensor

from segkit.training.lightning_private import MovableAverage


class Averaging(MovableAverage):
    """Exponential moving average of weights (Polyak and Juditsky 1992), validated and saved.

    After n steps the average keeps min(decay, (1 + n) / (10 + n)) of itself, so that a short run
    forgets where it began. Buffers are averaged too if they are real numbers. Lightning keeps the
    average in checkpoints. The steps are counted here: Lightning's count lies on the device, and
    each step would wait for it.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.swapped = False
        self.pairs: list[tuple[list[Tensor], list[Tensor]]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep the average where the model will be, which is not there yet."""
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
        """Take the weights of a new step into the average; the first weights are the average."""
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
        """Save the average, and how many steps are in it."""
        self.tell_updates()
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

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

    def _paired(self, pl_module: L.LightningModule) -> list[tuple[list[Tensor], list[Tensor]]]:
        """The average's tensors beside the model's, those of one type together; kept for later."""
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
