"""The Lightning module, the data and the time budget of a training, from its parts."""

import copy

from lightning.pytorch.callbacks import Callback

from segkit.config.training import Config
from segkit.data.datamodule import SegmentationData
from segkit.data.patches import PatchDataset
from segkit.errors import ModelError
from segkit.model.build import weight_shapes, wrap_network
from segkit.nn.network import SegmentationNetwork, weights_of
from segkit.training.freezing import Freezing
from segkit.training.module import SegmentationModule
from segkit.training.parts import TrainingParts, check_module
from segkit.training.time_budget import Deadline, TimeBudget
from segkit.training.trainer import cases_per_validation, steps_between

RECORDED = {"network", "loss", "presence_loss"}
"""Parts that a recorded CUDA step contains."""


def _network_of(parts: TrainingParts, config: Config) -> SegmentationNetwork:
    """The network to train. Raises ModelError if a replaced one does not fit the description."""
    network, description = parts.network, parts.description
    if "network" not in parts.replaced:
        assert isinstance(network, SegmentationNetwork)
        # A copy, so that the same parts can be trained again from the same weights.
        return network if description.network.given else copy.deepcopy(network)
    if not isinstance(network, SegmentationNetwork):
        network = wrap_network(description, network).cpu()
    weights = weights_of(network)
    if description.network.given is not None:
        check_module(network, config, description)
    elif {name: tuple(value.shape) for name, value in weights.state_dict().items()} != (
        weight_shapes(description)
    ):
        raise ModelError(
            f"{description.run}: the weights of parts.network do not fit the network of the "
            f"config; change the config, or set network.given to train any module"
        )
    return network


def make_budget(parts: TrainingParts, config: Config, spent: float = 0.0) -> TimeBudget | None:
    """The run's time budget, of which preparing has used a part; None if the time has no limit."""
    if config.train.minutes is None:
        return None
    return TimeBudget(
        60 * config.train.minutes,
        before=parts.seconds + spent,
        planned_steps=config.train.steps,
        held_out=len(parts.split.held_out),
        validated=cases_per_validation(parts, config),
        validate_every=steps_between(config),
    )


def deadline_callbacks(parts: TrainingParts, budget: TimeBudget | None) -> list[Callback]:
    """The callback that ends the training in time; none without a budget."""
    if budget is None:
        return []
    return [Deadline(budget, parts.validation.cases, parts.description)]


def make_module(
    parts: TrainingParts, config: Config, budget: TimeBudget | None = None
) -> SegmentationModule:
    """The module that Lightning trains, with the parts' network, loss and optimiser."""
    settings = config.network
    head = None if settings.given else settings.attention.head
    network, patterns = _network_of(parts, config), config.train.freeze
    freezing = Freezing(weights_of(network), patterns) if patterns else None
    notes = [each.told for each in (parts.taken_over, freezing) if each is not None]
    return SegmentationModule(
        network,
        loss=parts.loss,
        optimiser=parts.optimiser,
        schedule=parts.schedule,
        vary=parts.augmentation.vary,
        validation=parts.validation,
        class_names=list(parts.description.labels),
        num_steps=config.train.steps,
        seed=config.train.seed,
        presence_loss=parts.presence_loss,
        partly=parts.partly,
        presence_weight=head.weight if head else 0.0,
        # Code from outside segkit may do things that a recording would not repeat.
        recorded=config.network.given is None and not RECORDED & set(parts.replaced),
        budget=budget,
        freezing=freezing,
        notes=notes,
        compiled=config.trainer.compile,
    )


def make_data(parts: TrainingParts, config: Config) -> SegmentationData:
    """Patches for the training, and held-out cases for validations."""
    return SegmentationData(
        PatchDataset(
            parts.cases,
            patch_size=parts.description.volume_patch,
            margin=parts.augmentation.margin,
            sampler=parts.sampler,
            seed=config.train.seed,
        ),
        parts.validation.cases,
        batch_size=config.data.batch_size,
        steps_per_epoch=steps_between(config),
        workers=config.data.workers,
        batches_per_step=config.trainer.accumulate_grad_batches,
    )
