"""Mean and variance of answers that come one after the other."""

import torch
from jaxtyping import Float
from torch import Tensor


class Moments:
    """The mean of probabilities, and the mean over classes of their variance.

    Welford (1962): no difference of large sums, so that what agrees has a variance of exactly 0.

    Args:
        class_axis: of the probabilities.
    """

    def __init__(self, class_axis: int) -> None:
        self.class_axis = class_axis
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())

    def add(self, answer: Float[Tensor, "*shape"]) -> None:
        """Take in one more answer."""
        self.count += 1
        if self.count == 1:
            self.mean = answer
            self.squares = torch.zeros_like(answer.select(self.class_axis, 0))
            return
        apart = answer - self.mean
        self.mean = self.mean + apart / self.count
        self.squares = self.squares + (apart * (answer - self.mean)).mean(self.class_axis)

    @property
    def variance(self) -> Float[Tensor, "*space"]:
        """Between the answers, each counted alike; 0 for one."""
        return self.squares / self.count
