"""Optimisers and learning rate schedules, made from the settings of training."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, PolynomialLR

from segkit.config.training import SCHEDULE_OF, TrainConfig
from segkit.nn.adamw import fused_adamw
from segkit.nn.muon import MuonForKernels

MakeOptimiser = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Makes the optimiser from the network's parameters."""
MakeSchedule = Callable[[Optimizer], LRScheduler]
"""Makes the learning rate schedule of an optimiser; it advances at each step."""


def make_optimiser(config: TrainConfig) -> MakeOptimiser:
    """A function that makes the optimiser of a resolved config from the network's parameters."""
    rate, decay = config.learning_rate, config.weight_decay
    assert rate is not None and decay is not None
    sgd, adamw, muon = config.sgd, config.adamw, config.muon
    moments: dict[str, Any] = {
        "betas": (adamw.highest_momentum, adamw.square_decay),
        "eps": adamw.epsilon,
    }
    match config.optimiser:
        case "sgd":
            settings: dict[str, Any] = {"momentum": sgd.momentum, "nesterov": sgd.nesterov}
            return partial(SGD, lr=rate, weight_decay=decay, **settings)
        case "muon":
            settings = {"momentum": muon.momentum, "nesterov": muon.nesterov}
            return partial(
                MuonForKernels,
                lr=rate,
                weight_decay=decay,
                iterations=muon.iterations,
                **settings,
                **moments,
            )
        case "adamw":
            return partial(fused_adamw, lr=rate, weight_decay=decay, **moments)


def make_schedule(config: TrainConfig) -> MakeSchedule:
    """A function that makes the schedule of a resolved config from the optimiser."""
    assert config.learning_rate is not None
    match config.schedule or SCHEDULE_OF[config.optimiser]:
        case "polynomial":
            power = config.polynomial.power
            return partial(PolynomialLR, total_iters=config.steps, power=power)
        case "cosine":
            cosine = config.cosine
            share = partial(
                cosine_share, steps=config.steps, warm_up=cosine.warm_up, lowest=cosine.lowest
            )
            return partial(LambdaLR, lr_lambda=share)
        case "one_cycle":
            one_cycle, adamw = config.one_cycle, config.adamw
            return partial(
                OneCycleLR,
                max_lr=config.learning_rate,
                total_steps=config.steps + 1,
                pct_start=one_cycle.rise,
                div_factor=one_cycle.rise_factor,
                final_div_factor=one_cycle.fall_factor,
                cycle_momentum=config.optimiser == "adamw",
                base_momentum=adamw.lowest_momentum,
                max_momentum=adamw.highest_momentum,
            )


def cosine_share(step: int, *, steps: int, warm_up: float, lowest: float) -> float:
    """The learning rate of a step divided by the highest learning rate.

    It rises linearly over w = round(warm_up * steps) steps, from 1 / (w + 1) in the first, and then
    falls as a cosine to `lowest` at the end (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5,
    without restarts).

    Args:
        step: number of the step, from 0 on.
        steps: number of all steps.
        warm_up: the share of the steps over which the learning rate rises.
        lowest: the last learning rate divided by the highest.
    """
    rising = round(warm_up * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    gone = min((step - rising) / max(steps - rising, 1), 1.0)
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * gone)) / 2
