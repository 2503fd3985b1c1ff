"""Training as Lightning sees it: a network, a loss, a schedule, and Dice on held-out cases."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Generator, Tensor
from torch.optim import Optimizer

from segkit.data.augment_spatial import Vary
from segkit.errors import ConfigError
from segkit.nn.gates import anneal
from segkit.nn.losses import presence_cross_entropy
from segkit.nn.network import SegmentationNetwork
from segkit.nn.partly_labelled import PartlyLabelled
from segkit.system.graphed_step import GraphedStep, record_step
from segkit.training.freezing import Freezing
from segkit.training.lightning_private import can_record, is_fused, log_by_true_step, unscale
from segkit.training.loss_watch import LossWatch
from segkit.training.optimisers import MakeOptimiser, MakeSchedule
from segkit.training.time_budget import TimeBudget
from segkit.training.validation import Validation

Loss = Callable[[Sequence[Tensor], Tensor], Tensor]
"""From logits (batch, class, cells …) of each supervised level, finest first, and the label
(batch, voxels …) to a scalar."""
PresenceLoss = Callable[[Tensor, Tensor], Tensor]
"""From logits (batch, class) of each class's presence and the label (batch, voxels …) to a scalar.
"""


class SegmentationModule(L.LightningModule):
    """Trains a network on varied patches and scores it on whole held-out cases.

    Args:
        network: gives `supervised` logits of a batch.
        loss: of the logits of each supervised level, finest first, and the label.
        optimiser: makes the optimiser of the network's parameters.
        schedule: makes the optimiser's schedule, which advances at each step.
        vary: from a batch as it was cut to the batch that is trained on; random by its generator.
        validation: how a held-out case is segmented and scored.
        class_names: of what is told apart, the background first.
        num_steps: steps after which hard gates are as hard as they get.
        seed: of the variations; step and process decide the rest.
        presence_loss: of the presence head's logits and the label, if the network has such a head.
        presence_weight: of that loss, beside 1 for the other.
        recorded: whether a CUDA device may replay one recorded step (see `graphed_step`): network
            and loss run the same operations at every step, and keep no count of their own.
        partly: what is known of partly labelled cases, if there are any.
        budget: of time, which the schedule follows; it follows the steps if there is none.
        freezing: of weights that are not trained, or not from the first step on.
        notes: lines that are shown when training begins.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        *,
        loss: Loss,
        optimiser: MakeOptimiser,
        schedule: MakeSchedule,
        vary: Vary,
        validation: Validation,
        class_names: Sequence[str],
        num_steps: int,
        seed: int,
        presence_loss: PresenceLoss = presence_cross_entropy,
        presence_weight: float = 0.0,
        recorded: bool = False,
        partly: PartlyLabelled | None = None,
        budget: TimeBudget | None = None,
        freezing: Freezing | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.optimiser = optimiser
        self.schedule = schedule
        self.vary = vary
        self.validation = validation
        self.class_names = tuple(class_names)
        self.num_steps = num_steps
        self.seed = seed
        self.presence_loss = presence_loss
        self.presence_weight = presence_weight
        self.scores_of_cases: list[Tensor] = []
        self.recorded = recorded
        self.steps_begun = False
        self.partly = partly
        self.budget = budget
        self.freezing = freezing
        self.notes = tuple(notes)
        self.graphed: GraphedStep | None = None
        self.losses = LossWatch()
        self.losses_of_step: list[Tensor] = []

    def training_step(self, batch: Mapping[str, Any], batch_index: int) -> Float[Tensor, ""]:
        """The loss of one batch, varied anew."""
        place = batch_index % self.trainer.accumulate_grad_batches
        image, label = self._varied(batch, place)
        loss, *others = self._graphed(image, label) or self._losses(image, label)
        if others:
            self.log("train/presence_loss", others[0], batch_size=len(label))
        self.losses.add(self.global_step, loss, list(batch.get("name", ())))
        # Of a step of several batches, the mean of those so far.
        self.losses_of_step = [*self.losses_of_step[:place], loss.detach()]
        self.log(
            "train/loss",
            torch.stack(self.losses_of_step).mean() if place else loss,
            prog_bar=True,
            batch_size=len(label),
            sync_dist=self.trainer.world_size > 1,
        )
        return loss

    def _varied(self, batch: Mapping[str, Any], place: int) -> tuple[Tensor, Tensor]:
        """A batch as it is trained on.

        The seed, the step, the process and the batch's place in the step decide how it varies.
        """
        drawn_by = [self.seed, self.global_step, self.global_rank, *([place] if place else [])]
        entropy = np.random.SeedSequence(drawn_by)
        seeds = [int(word >> 1) for word in entropy.generate_state(2, np.uint64)]
        generator = Generator().manual_seed(seeds[0])
        torch.manual_seed(seeds[1])  # of what the network itself draws: the noise of hard gates
        anneal(self.network, self.share_done)
        # In half precision the places that voxels are read at would be off by part of a voxel.
        with torch.autocast(self.device.type, enabled=False):
            return self.vary(batch["image"].float(), batch["label"], generator)

    def _losses(self, image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """The loss, and that of the presence head, which is part of it, if there is one."""
        levels, presence = self.network.supervised(image)
        if self.partly is not None:
            levels, presence, label = self.partly.known(levels, presence, label)
        loss = self.loss(levels, label)
        if presence is None:
            return (loss,)
        presence_loss = self.presence_loss(presence, label)
        return loss + self.presence_weight * presence_loss, presence_loss

    def _graphed(self, image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """The same from a recorded step, which has set the gradients already; else nothing."""
        if self.device.type != "cuda" or not self.recorded:
            return ()
        if self.graphed is None:
            self.recorded = can_record(self.trainer)
            if not self.recorded:
                return ()
            self.graphed = record_step(self.network, self._losses, image, label)
            self.recorded = self.graphed is not None
        if self.graphed is None:
            return ()
        if not self.graphed.fits(image, label):
            self.graphed.zero_gradients()
            return ()
        return self.graphed(image, label)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Set the gradients, unless a recorded step has done so."""
        if loss.requires_grad:
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Forget the last gradients; a recorded step writes over its own, where they must stay."""
        if self.graphed is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient's norm, which Lightning refuses to do for a fused optimiser."""
        if gradient_clip_val is not None and is_fused(optimizer):
            unscale(self.trainer, optimizer)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(
                optimizer,
                gradient_clip_val=gradient_clip_val,
                gradient_clip_algorithm=gradient_clip_algorithm,
            )

    def on_fit_start(self) -> None:
        """Refuse to unfreeze weights if several processes train: these would not share gradients.

        Raises ConfigError.
        """
        if self.freezing is not None and self.freezing.unfreezes and self.trainer.world_size > 1:
            raise ConfigError(
                f"train.freeze unfreezes weights at a step, and {self.trainer.world_size} "
                f"processes train; freeze them to the end (null), or set trainer.devices to 1"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Log by the true step; the first has been trained by the second."""
        if self.freezing is not None:
            # By the schedule's own step, which follows the time if that is limited.
            if self.freezing.set_step(self.budget.advanced if self.budget else self.global_step):
                self.graphed = None  # it would go on to leave out what was frozen
            self.freezing.set_modes()
        self.steps_begun |= batch_idx > 0
        log_by_true_step(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Raise TrainingError if a loss that has arrived on the host is no number."""
        self.losses.check()

    def on_validation_start(self) -> None:
        """See to the last losses before a checkpoint is kept."""
        self.losses.check(wait=True)

    def on_train_epoch_end(self) -> None:
        """See to the last losses, if nothing is validated."""
        self.losses.check(wait=True)

    def validation_step(
        self, case: Mapping[str, Tensor], batch_index: int
    ) -> Integer[Tensor, "x y z"]:
        """The labels of one held-out case on the network's own grid; keeps its scores."""
        image = case["image"].float()
        prediction: Integer[Tensor, "x y z"] = self.validation.segment(self.network, image)
        self.scores_of_cases.append(self.validation.score(prediction, case["label"]).cpu())
        return prediction

    def on_validation_epoch_end(self) -> None:
        """Log the mean over cases of each class's score, and the mean of those.

        Dice of a class that is in no reference and no prediction is undefined. If that is so of
        all, there was nothing to find and nothing was found: 1, by which checkpoints can be told
        apart.
        """
        # A process of several may have had no case.
        none = torch.empty(0, len(self.class_names) - 1)
        scores = torch.stack(self.scores_of_cases) if self.scores_of_cases else none
        self.scores_of_cases = []
        count = scores.isfinite().sum(0).to(self.device)
        total = scores.nan_to_num().sum(0).to(self.device, torch.float32)
        counts: Tensor = self.trainer.strategy.reduce(count, reduce_op="sum")
        totals: Tensor = self.trainer.strategy.reduce(total, reduce_op="sum")
        means = totals / counts
        defined = counts > 0
        measure = self.validation.measure
        for name, mean, told in zip(self.class_names[1:], means, defined, strict=True):
            if told:
                self.log(f"validation/{measure}_{name}", mean, batch_size=1)
        mean = means[defined].mean() if defined.any() else means.new_ones(())
        self.log(f"validation/{measure}", mean, prog_bar=True, batch_size=1)

    @property
    def share_done(self) -> float:
        """The share of the training that lies behind: of its time if that is limited, or steps."""
        return self.budget.share if self.budget else self.global_step / self.num_steps

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advance the schedule by a step, or by as many as the time that has gone is worth."""
        if self.budget is None:
            return super().lr_scheduler_step(scheduler, metric)
        for _ in range(self.budget.end_step()):
            scheduler.step()

    def configure_optimizers(self) -> Any:
        """The optimiser and its schedule, which advances each step."""
        optimiser = self.optimiser(self.network.parameters())
        return [optimiser], [{"scheduler": self.schedule(optimiser), "interval": "step"}]
