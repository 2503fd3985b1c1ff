"""Training as Lightning sees it: a network, a loss, a schedule, and Dice on held-out cases."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Generator, Tensor

from segkit.data.augment_spatial import Vary
from segkit.errors import TrainingError
from segkit.evaluation.overlap import Overlap, confusion_matrix
from segkit.nn.gates import anneal
from segkit.nn.losses import (
    deep_dice_binary_cross_entropy,
    deep_dice_cross_entropy,
    presence_cross_entropy,
)
from segkit.nn.network import SegmentationNetwork

SegmentPrepared = Callable[[SegmentationNetwork, Tensor], Tensor]


class PendingLoss:
    """A step's loss on its way to the host, which need not wait for the step that follows."""

    def __init__(self, step: int, loss: Tensor, names: Sequence[str]) -> None:
        self.step, self.names = step, names
        self.value, self.arrived = loss.detach(), None
        if loss.device.type == "cuda":
            self.value = torch.empty((), dtype=loss.dtype, pin_memory=True)
            self.value.copy_(loss.detach(), non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def check(self) -> None:
        """Raise TrainingError where the loss is no number."""
        if self.arrived is not None:
            self.arrived.synchronize()
        if not bool(self.value.isfinite()):
            raise TrainingError(
                f"the loss of step {self.step} is {float(self.value)}, its patches are of "
                f"{', '.join(self.names) or 'unnamed cases'}; look at these images, or lower "
                f"train.learning_rate, or set trainer.precision to 32-true"
            )


class SegmentationModule(L.LightningModule):
    """Trains a network on varied patches and scores it on whole held-out cases.

    Args:
        network: gives `supervised` logits of a batch.
        vary: from a batch as it was cut to the batch that is trained on; random by its generator.
        segment: labels of a whole prepared image, by sliding windows.
        class_names: of what is told apart, the background first.
        optimiser: AdamW on a one-cycle schedule (Smith and Topin 2019, arXiv:1708.07120), or SGD
            with Nesterov momentum 0.99 on a polynomial schedule of power 0.9 (nnU-Net).
        learning_rate: the schedule's highest.
        num_steps: the schedule's length.
        batch_dice: whether the Dice loss pools the batch.
        seed: of the variations; step and process decide the rest.
        presence_weight: of the presence head's loss, where the network has one.
        regions: where outputs are regions, the labels in each; else they are the labels 0, 1, ….
        ignore: the label, if any, that counts neither in the loss nor in Dice.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        *,
        vary: Vary,
        segment: SegmentPrepared,
        class_names: Sequence[str],
        optimiser: Literal["adamw", "sgd"],
        learning_rate: float,
        weight_decay: float,
        num_steps: int,
        batch_dice: bool,
        seed: int,
        presence_weight: float = 0.0,
        regions: Sequence[Sequence[int]] = (),
        ignore: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.vary = vary
        self.segment = segment
        self.class_names = tuple(class_names)
        self.optimiser = optimiser
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.num_steps = num_steps
        self.batch_dice = batch_dice
        self.seed = seed
        self.presence_weight = presence_weight
        self.regions = tuple(regions)
        self.ignore = ignore
        self.dice_of_cases: list[Tensor] = []
        self.previous: PendingLoss | None = None

    def training_step(self, batch: Mapping[str, Any], batch_index: int) -> Float[Tensor, ""]:
        """The loss of one batch, varied anew."""
        entropy = np.random.SeedSequence([self.seed, self.global_step, self.global_rank])
        seeds = [int(word >> 1) for word in entropy.generate_state(2, np.uint64)]
        generator = Generator().manual_seed(seeds[0])
        torch.manual_seed(seeds[1])  # of what the network itself draws: the noise of hard gates
        anneal(self.network, self.global_step / self.num_steps)
        # In half precision the places that voxels are read at would be off by part of a voxel.
        with torch.autocast(self.device.type, enabled=False):
            image, label = self.vary(batch["image"], batch["label"], generator)
        levels, presence = self.network.supervised(image)
        loss = self._loss(levels, label)
        if presence is not None:
            presence_loss = presence_cross_entropy(
                presence, label, regions=self.regions, ignore=self.ignore
            )
            self.log("train/presence_loss", presence_loss, batch_size=len(label))
            loss = loss + self.presence_weight * presence_loss
        self._check_previous()
        self.previous = PendingLoss(self.global_step, loss, list(batch.get("name", ())))
        self.log(
            "train/loss",
            loss,
            prog_bar=True,
            batch_size=len(label),
            sync_dist=self.trainer.world_size > 1,
        )
        return loss

    def _loss(self, levels: Sequence[Tensor], label: Tensor) -> Tensor:
        if not self.regions:
            return deep_dice_cross_entropy(
                levels, label, pool_batch=self.batch_dice, ignore=self.ignore
            )
        return deep_dice_binary_cross_entropy(
            levels, label, regions=self.regions, pool_batch=self.batch_dice, ignore=self.ignore
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Log by the true step, of which Lightning's own count (2.6) is off in a resumed run."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """On a CPU, see to the loss at once: there is nothing to wait for."""
        if self.device.type == "cpu":
            self._check_previous()

    def on_validation_start(self) -> None:
        """See to the last loss before a checkpoint is kept."""
        self._check_previous()

    def on_train_epoch_end(self) -> None:
        """See to the last loss, where nothing is validated."""
        self._check_previous()

    def _check_previous(self) -> None:
        """Raise TrainingError where a loss is no number; on a GPU, one step late."""
        if self.previous is not None:
            self.previous.check()
            self.previous = None

    def validation_step(
        self, case: Mapping[str, Tensor], batch_index: int
    ) -> Integer[Tensor, "x y z"]:
        """The labels of one held-out case on the network's own grid; keeps Dice of each class."""
        prediction: Integer[Tensor, "x y z"] = self.segment(self.network, case["image"])
        groups = self.regions or [(number,) for number in range(1, len(self.class_names))]
        highest = max(self.ignore or 0, *(number for group in groups for number in group))
        matrix = confusion_matrix(prediction, case["label"].to(prediction.device), highest + 1)
        overlap = Overlap.of_groups(matrix, groups, ignore=self.ignore)
        self.dice_of_cases.append(overlap.dice.cpu())
        return prediction

    def on_validation_epoch_end(self) -> None:
        """Log the mean over cases of each class's Dice, and the mean of those.

        A class that is in no reference and no prediction has none. Where that is so of all, there
        was nothing to find and nothing was found: 1, by which checkpoints can be told apart.
        """
        # A process of several may have had no case.
        none = torch.empty(0, len(self.class_names) - 1)
        dice = torch.stack(self.dice_of_cases) if self.dice_of_cases else none
        self.dice_of_cases = []
        count = dice.isfinite().sum(0).to(self.device)
        total = dice.nan_to_num().sum(0).to(self.device, torch.float32)
        counts: Tensor = self.trainer.strategy.reduce(count, reduce_op="sum")
        totals: Tensor = self.trainer.strategy.reduce(total, reduce_op="sum")
        means = totals / counts
        defined = counts > 0
        for name, mean, told in zip(self.class_names[1:], means, defined, strict=True):
            if told:
                self.log(f"validation/dice_{name}", mean, batch_size=1)
        mean = means[defined].mean() if defined.any() else means.new_ones(())
        self.log("validation/dice", mean, prog_bar=True, batch_size=1)

    def configure_optimizers(self) -> Any:
        """The optimiser and its schedule, which advances each step."""
        parameters = self.network.parameters()
        optimiser: torch.optim.Optimizer
        schedule: torch.optim.lr_scheduler.LRScheduler
        if self.optimiser == "adamw":
            optimiser = torch.optim.AdamW(
                parameters, lr=self.learning_rate, weight_decay=self.weight_decay
            )
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimiser, max_lr=self.learning_rate, total_steps=self.num_steps + 1
            )
        else:
            optimiser = torch.optim.SGD(
                parameters,
                lr=self.learning_rate,
                weight_decay=self.weight_decay,
                momentum=0.99,
                nesterov=True,
            )
            schedule = torch.optim.lr_scheduler.PolynomialLR(
                optimiser, total_iters=self.num_steps, power=0.9
            )
        return [optimiser], [{"scheduler": schedule, "interval": "step"}]
