"""A running average of the weights, which scores a little better than the last of them."""

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class Averaging(WeightAveraging):
    """Exponential moving average of weights (Polyak and Juditsky 1992), validated and saved.

    The decay begins at 0.1 and rises to `decay` as (1 + n) / (10 + n) after n steps, so that a
    short run forgets where it began. Lightning keeps the average in checkpoints.
    """

    def __init__(self, decay: float) -> None:
        def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
            steps = float(count)
            weight = 1 - min(decay, (1 + steps) / (10 + steps))
            if not averaged.is_floating_point():
                return current
            return torch.lerp(averaged, current, weight)

        super().__init__(avg_fn=average)
