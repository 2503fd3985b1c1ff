"""The loss function, made from its settings."""

from functools import partial

import torch
from torch import Tensor

from segkit.config.loss import LossConfig, TermName
from segkit.config.model import ModelDescription
from segkit.errors import ConfigError, counted
from segkit.nn import loss_terms
from segkit.nn.losses import (
    SummedLoss,
    Term,
    deep_dice_binary_cross_entropy,
    deep_dice_cross_entropy,
)
from segkit.nn.network import SegmentationNetwork
from segkit.training.module import Loss

WITHOUT_BACKGROUND: tuple[TermName, ...] = (
    "dice",
    "tversky",
    "focal_tversky",
    "boundary",
    "centre_line",
)
"""Terms that compute the mean over all outputs but the background."""


def make_loss(config: LossConfig, description: ModelDescription, *, pool_batch: bool) -> Loss:
    """The loss over all supervised levels, for classes, or for regions if the model has any.

    Args:
        config: the terms and their weights.
        description: the model's description, with its classes or regions and its spacing.
        pool_batch: whether overlap terms take their sums over the whole batch.

    Returns:
        A function of the logits of each supervised level, finest first, and the label. It returns a
        scalar.

    Raises:
        ConfigError: a weight is given to a class that the model does not have, or to a class that
            no term weights.
    """
    regions = tuple(tuple(group) for group in description.regions.values())
    ignore = description.ignore
    if config.is_plain:
        if regions:
            return partial(
                deep_dice_binary_cross_entropy,
                regions=regions,
                pool_batch=pool_batch,
                ignore=ignore,
            )
        return partial(deep_dice_cross_entropy, pool_batch=pool_batch, ignore=ignore)
    total = sum(config.level_weights or ())
    return SummedLoss(
        terms=tuple((weight, _term(name, config)) for name, weight in config.terms.items()),
        weights=_class_weights(config, description),
        regions=regions,
        spacing=description.spacing,
        levels=tuple(weight / total for weight in config.level_weights or ()) or None,
        pool_batch=pool_batch,
        ignore=ignore,
    )


def check_levels(config: LossConfig, network: SegmentationNetwork, image: Tensor) -> None:
    """Check that `level_weights`, if given, has a weight for each supervised level.

    Args:
        config: settings of the loss.
        network: the network to train.
        image: any input of the network: (batch, channel, x, y, z).

    Raises:
        ConfigError: the numbers differ.
    """
    weights = config.level_weights
    if weights is None:
        return
    with torch.no_grad():
        supervised = len(network.supervised(image).levels)
    if len(weights) != supervised:
        raise ConfigError(
            f"train.loss.level_weights has {counted(len(weights), 'number')}, but the network "
            f"supervises {counted(supervised, 'level')} (see network.deep_supervision); give "
            f"{supervised}, finest first"
        )


def _term(name: TermName, config: LossConfig) -> Term:
    alarms, missed = config.false_positives, config.false_negatives
    terms: dict[TermName, Term] = {
        "dice": loss_terms.dice,
        "cross_entropy": loss_terms.cross_entropy,
        "focal": partial(loss_terms.focal, gamma=config.focal_gamma),
        "top_k": partial(loss_terms.top_k, share=config.top_share),
        "tversky": partial(loss_terms.tversky, false_positives=alarms, false_negatives=missed),
        "focal_tversky": partial(
            loss_terms.focal_tversky,
            false_positives=alarms,
            false_negatives=missed,
            gamma=config.focal_tversky_gamma,
        ),
        "generalised_dice": loss_terms.generalised_dice,
        "boundary": partial(loss_terms.boundary, reach=config.boundary_reach),
        "centre_line": partial(loss_terms.centre_line, iterations=config.centre_line_iterations),
    }
    return terms[name]


def _class_weights(config: LossConfig, description: ModelDescription) -> tuple[float, ...]:
    outputs = description.labelling.outputs
    weighted = _weighted_outputs(config, description)
    for name, weight in config.class_weights.items():
        if name not in outputs:
            raise ConfigError(
                f"train.loss.class_weights has {name!r}, which is not one of "
                f"{', '.join(outputs)}; correct the name"
            )
        if weight != 1 and name not in weighted:
            raise ConfigError(
                f"train.loss.class_weights has {weight:g} for {name!r}, which has no effect: "
                f"{', '.join(config.terms)} average over classes, and {name!r} is the only one or "
                f"not among them; remove it"
            )
    return tuple(config.class_weights.get(name, 1.0) for name in outputs)


def _weighted_outputs(config: LossConfig, description: ModelDescription) -> set[str]:
    """The classes or regions whose weights change the loss.

    Most terms divide by the sum of the weights, so a single weight has no effect.
    """
    outputs = description.labelling.outputs
    structures = outputs if description.regions else outputs[1:]
    found: set[str] = set()
    for term in config.terms:
        scope = structures if term in WITHOUT_BACKGROUND else outputs
        if len(scope) > 1 or term == "top_k":
            found |= {*scope}
    return found
