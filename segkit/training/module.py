"""The Lightning module: a network with its loss, optimiser, schedule and validation."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from segkit.data.augment_spatial import Vary
from segkit.errors import ConfigError
from segkit.nn.cpu_convolutions import right_convolutions
from segkit.nn.gates import HardGate, anneal
from segkit.nn.losses import presence_cross_entropy
from segkit.nn.network import SegmentationNetwork
from segkit.nn.partly_labelled import PartlyLabelled
from segkit.system.graphed_step import GraphedStep, record_step
from segkit.system.random_seeds import seed_generators
from segkit.training.compiled_step import CompiledStep
from segkit.training.freezing import Freezing
from segkit.training.lightning_private import (
    can_record,
    is_fused,
    log_by_true_step,
    logs_this_step,
    unscale,
)
from segkit.training.loss_watch import LossWatch
from segkit.training.optimisers import MakeOptimiser, MakeSchedule
from segkit.training.time_budget import TimeBudget
from segkit.training.validation import Validation

logger = logging.getLogger(__name__)

Loss = Callable[[Sequence[Tensor], Tensor], Tensor]
"""A scalar from the logits (batch, class, *space) of each supervised level, finest first, and the
label (batch, *space)."""
PresenceLoss = Callable[[Tensor, Tensor], Tensor]
"""A scalar from the logits (batch, class) of the presence head and the label (batch, *space)."""
RECORDED_DEVICE = "cuda"
"""Kind of device that can record a step."""


class SegmentationModule(L.LightningModule):
    """Trains a network on augmented patches and scores it on whole held-out cases.

    Args:
        network: the network; its `supervised` gives the logits of a batch.
        loss: the loss of the logits of each supervised level, finest first, and the label.
        optimiser: makes the optimiser from the network's parameters.
        schedule: makes the schedule of the optimiser, which advances at each step.
        vary: augments a batch as it was cut, with randomness only from its generator.
        validation: how held-out cases are segmented and scored.
        class_names: names of the classes or regions, the background first.
        num_steps: number of steps after which hard gates have their final hardness.
        seed: seed of augmentation and noise, together with the step and the process.
        presence_loss: the loss of the presence head; used only if the network has such a head.
        presence_weight: weight of the presence loss; the segmentation loss has weight 1.
        recorded: whether a CUDA device may record one step and replay it (see `graphed_step`).
            Network and loss must run the same operations at every step and keep no state.
        partly: the labelled classes of partly labelled cases, if there are any.
        budget: a time budget that the schedule follows; without it, the schedule follows the steps.
        freezing: weights that are not trained, or not from the first step.
        notes: lines to show when training begins.
        compiled: whether network and loss are compiled; `auto` decides by measuring. A compiled
            step is not recorded.
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
        compiled: bool | Literal["auto"] = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.hard_gates: list[nn.Module] = []
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
        self.clipped = False
        self.compiled = CompiledStep(self._losses, compiled)
        self.losses = LossWatch()
        self.losses_of_step: list[Tensor] = []

    def training_step(self, batch: Mapping[str, Any], batch_index: int) -> Float[Tensor, ""]:
        """The loss of one batch after augmentation."""
        place = batch_index % self.trainer.accumulate_grad_batches
        image, label = self._varied(batch, place)
        self.compiled.begin(self._seconds_left, self.device)
        replayed = self._graphed(image, label)
        self.clipped = bool(replayed)
        with right_convolutions(self.device):
            loss, *others = replayed or self.compiled(image, label)
        self.losses.add(self.global_step, loss, list(batch.get("name", ())))
        # If a step has several batches, this is the mean of the batches so far.
        self.losses_of_step = [*self.losses_of_step[:place], loss.detach()]
        if self.device.type == "cuda" and not logs_this_step(self.trainer):
            return loss  # steps on a GPU are so short that logging each would slow them down
        if others:
            self.log("train/presence_loss", others[0], batch_size=len(label))
        self.log(
            "train/loss",
            torch.stack(self.losses_of_step).mean() if place else loss,
            prog_bar=False,  # otherwise Lightning would wait for the loss of each step
            batch_size=len(label),
            sync_dist=self.trainer.world_size > 1,
        )
        return loss

    def _varied(self, batch: Mapping[str, Any], place: int) -> tuple[Tensor, Tensor]:
        """A batch after augmentation.

        It depends on the seed, the step, the process and the batch's place in the step.
        """
        drawn_by = [self.seed, self.global_step, self.global_rank, *([place] if place else [])]
        entropy = np.random.SeedSequence(drawn_by)
        seeds = [int(word >> 1) for word in entropy.generate_state(2, np.uint64)]
        generator = Generator().manual_seed(seeds[0])
        seed_generators(seeds[1], self.device)  # for the noise of hard gates
        anneal(self.hard_gates, self.share_done)
        # In half precision, sampling positions would be wrong by a fraction of a voxel.
        with torch.autocast(self.device.type, enabled=False):
            return self.vary(batch["image"].float(), batch["label"], generator)

    def _losses(self, image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """The loss; with a presence head, also the presence loss, which the first includes."""
        levels, presence = self.network.supervised(image)
        if self.partly is not None:
            levels, presence, label = self.partly.known(levels, presence, label)
        loss = self.loss(levels, label)
        if presence is None:
            return (loss,)
        presence_loss = self.presence_loss(presence, label)
        return loss + self.presence_weight * presence_loss, presence_loss

    def _graphed(self, image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """The losses from a recorded step, which also sets the gradients; empty if not recorded."""
        if self.compiled.active:
            self.graphed = None
        if self.device.type != RECORDED_DEVICE or not self.recorded or self.compiled.active:
            return ()
        if self.graphed is None:
            self.recorded = can_record(self.trainer)
            if not self.recorded:
                return ()
            clip = self.trainer.gradient_clip_val
            self.graphed = record_step(self.network, self._losses, image, label, clip)
            self.recorded = self.graphed is not None
            if self.recorded:
                logger.info("a step is recorded as a CUDA graph, and then replayed")
        if self.graphed is None:
            return ()
        if not self.graphed.fits(image, label):
            self.graphed.zero_gradients()
            return ()
        return self.graphed(image, label)

    def _seconds_left(self, per_batch: float) -> float:
        """Seconds of training that are left, if a batch takes so many seconds."""
        if self.budget is not None:
            return self.budget.left
        batches = (self.num_steps - self.global_step) * self.trainer.accumulate_grad_batches
        return batches * per_batch

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients, unless a recorded step has done so."""
        if loss.requires_grad:
            with right_convolutions(self.device):  # a network may compute features again here
                super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Reset the gradients. A recorded step overwrites them itself, in the same memory."""
        if self.graphed is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the gradient, unless a recorded step has done so.

        Lightning refuses this for a fused optimiser.
        """
        if self.clipped:
            return
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
        """Find the hard gates. Refuse to unfreeze weights if several processes train, because these
        would not share gradients.

        Raises ConfigError.
        """
        modules = self.network.modules()
        self.hard_gates = [module for module in modules if isinstance(module, HardGate)]
        if self.freezing is not None and self.freezing.unfreezes and self.trainer.world_size > 1:
            raise ConfigError(
                f"train.freeze cannot unfreeze weights at a step while {self.trainer.world_size} "
                "processes train; freeze them to the end (null), or set trainer.devices to 1"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make Lightning log by the true step, and note that the first step is done."""
        if self.freezing is not None:
            # The step of the schedule, which follows the time if time is limited.
            if self.freezing.set_step(self.budget.advanced if self.budget else self.global_step):
                self.graphed = None  # the recorded step leaves out weights that were frozen then
            self.freezing.set_modes()
        self.steps_begun |= batch_idx > 0
        log_by_true_step(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Raise TrainingError if a loss that has arrived on the host is NaN or infinite."""
        self.losses.check()

    def on_validation_start(self) -> None:
        """Check the last losses before a checkpoint is written."""
        self.losses.check(wait=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the last losses, so that no checkpoint has weights that are NaN."""
        self.losses.check(wait=True)

    def on_train_epoch_end(self) -> None:
        """Check the last losses, in case there is no validation."""
        self.losses.check(wait=True)

    def validation_step(
        self, case: Mapping[str, Tensor], batch_index: int
    ) -> Integer[Tensor, "x y z"]:
        """The predicted labels of one held-out case on the network's grid; its scores are kept."""
        image = case["image"].float()
        prediction: Integer[Tensor, "x y z"] = self.validation.segment(self.network, image)
        self.scores_of_cases.append(self.validation.score(prediction, case["label"]).cpu())
        return prediction

    def on_validation_epoch_end(self) -> None:
        """Log the mean score of each class over cases, and the mean over classes.

        The Dice of a class is undefined if it is in no reference and no prediction. If all classes
        are undefined, the mean is 1, because nothing was to be found and nothing was found; so
        checkpoints can still be compared.
        """
        # If there are several processes, this one may have had no case.
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
        for name, mean, is_defined in zip(self.class_names[1:], means, defined, strict=True):
            if is_defined:
                self.log(f"validation/{measure}_{name}", mean, batch_size=1)
        mean = means[defined].mean() if defined.any() else means.new_ones(())
        self.log(f"validation/{measure}", mean, batch_size=1)

    @property
    def share_done(self) -> float:
        """The share of the training that is done: of its time if that is limited, else of steps."""
        return self.budget.share if self.budget else self.global_step / self.num_steps

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advance the schedule by one step; with a time budget, by the time that has passed."""
        budget = self.budget
        if budget is None:
            return super().lr_scheduler_step(scheduler, metric)
        before = budget.advanced
        budget.end_step()
        if self.trainer.world_size > 1:
            # Each process has a clock of its own, but all need the same learning rate.
            place = self.trainer.strategy.broadcast((budget.share, budget.advanced))
            budget.share, budget.advanced = place
        for _ in range(budget.advanced - before):
            scheduler.step()

    def configure_optimizers(self) -> Any:
        """The optimiser and its schedule, which advances at each step."""
        optimiser = self.optimiser(self.network.parameters())
        return [optimiser], [{"scheduler": self.schedule(optimiser), "interval": "step"}]
