"""Optimisers and learning rate schedules, made from the settings of training."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, PolynomialLR

from segkit.config.training import TrainConfig

MakeOptimiser = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Makes the optimiser from the network's parameters."""
MakeSchedule = Callable[[Optimizer], LRScheduler]
"""Makes the learning rate schedule of an optimiser; it advances at each step."""


def make_optimiser(config: TrainConfig) -> MakeOptimiser:
    """A function that makes the optimiser of a resolved config from the network's parameters."""
    rate, decay = config.learning_rate, config.weight_decay
    assert rate is not None and decay is not None
    if config.optimiser == "sgd":
        sgd = config.sgd
        return partial(
            SGD, lr=rate, weight_decay=decay, momentum=sgd.momentum, nesterov=sgd.nesterov
        )
    adamw = config.adamw
    betas = (adamw.highest_momentum, adamw.square_decay)
    return partial(_adamw, lr=rate, weight_decay=decay, betas=betas, eps=adamw.epsilon)


def _adamw(parameters: Iterable[nn.Parameter], **settings: Any) -> AdamW:
    """AdamW; on a GPU it updates all weights in one kernel."""
    held = list(parameters)
    return AdamW(held, **settings, fused=all(each.is_cuda for each in held) or None)


def make_schedule(config: TrainConfig) -> MakeSchedule:
    """A function that makes the schedule of a resolved config from the optimiser."""
    if config.optimiser == "sgd":
        return partial(PolynomialLR, total_iters=config.steps, power=config.sgd.power)
    assert config.learning_rate is not None
    return partial(
        OneCycleLR,
        max_lr=config.learning_rate,
        total_steps=config.steps + 1,
        pct_start=config.adamw.rise,
        div_factor=config.adamw.rise_factor,
        final_div_factor=config.adamw.fall_factor,
        base_momentum=config.adamw.lowest_momentum,
        max_momentum=config.adamw.highest_momentum,
    )
