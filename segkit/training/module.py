"""Training as Lightning sees it: a network, a loss, a schedule, and Dice on held-out cases."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Generator, Tensor

from segkit.data.augment_spatial import Vary
from segkit.errors import TrainingError
from segkit.nn.gates import anneal
from segkit.nn.losses import presence_cross_entropy
from segkit.nn.network import SegmentationNetwork
from segkit.training.lightning_private import log_by_true_step
from segkit.training.optimisers import MakeOptimiser, MakeSchedule
from segkit.training.validation import Validation

Loss = Callable[[Sequence[Tensor], Tensor], Tensor]
"""From logits (batch, class, cells …) of each supervised level, finest first, and the label
(batch, voxels …) to a scalar."""
PresenceLoss = Callable[[Tensor, Tensor], Tensor]
"""From logits (batch, class) of each class's presence and the label (batch, voxels …) to a scalar.
"""


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
        loss = self.loss(levels, label)
        if presence is not None:
            presence_loss = self.presence_loss(presence, label)
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

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Log by the true step."""
        log_by_true_step(self.trainer)

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
        """The labels of one held-out case on the network's own grid; keeps its scores."""
        prediction: Integer[Tensor, "x y z"] = self.validation.segment(self.network, case["image"])
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

    def configure_optimizers(self) -> Any:
        """The optimiser and its schedule, which advances each step."""
        optimiser = self.optimiser(self.network.parameters())
        return [optimiser], [{"scheduler": self.schedule(optimiser), "interval": "step"}]
