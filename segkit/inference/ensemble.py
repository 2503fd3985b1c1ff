"""Combine the outputs of several models: mean probabilities, entropy and variance.

Each model processes the volume in its own slabs and on its own grid. The model that has the fewest
rows always continues, so that each model holds only one slab in memory.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from segkit.inference.source_rows import SourceRows, labels_of


@dataclass(frozen=True, eq=False)
class MergedRows:
    """Combined outputs for some rows of the volume."""

    labels: Integer[Tensor, "x y rows"]
    probabilities: Float[Tensor, "classes x y rows"] | None = None
    """Mean over the models."""
    entropy: Float[Tensor, "x y rows"] | None = None
    """Entropy of the mean probabilities, divided by its maximum, which equal probabilities have."""
    variance: Float[Tensor, "x y rows"] | None = None
    """Variance of the probabilities between models and between mirror images, mean over classes;
    NaN for one model without mirror images, which has no variance."""


def merge(
    members: Sequence[Iterator[tuple[int, SourceRows]]],
) -> Iterator[tuple[int, list[SourceRows]]]:
    """Rows of the volume from all models, as soon as all models have them.

    Args:
        members: for each model, an iterator over (first row, rows). Rows are consecutive, start at
            0, and end at the same row for all models.

    Yields:
        The first row, and the same rows of each model.
    """
    known: list[tuple[int, SourceRows] | None] = [next(member, None) for member in members]
    done = 0
    while True:
        held = [head for head in known if head is not None]
        if not held:
            return
        assert len(held) == len(members), "the models end at different rows"
        reached = min(first + rows.count for first, rows in held)
        parts = [rows.part(done - first, reached - first) for first, rows in held]
        del held
        yield done, parts
        del parts
        done = reached
        for number, member in enumerate(members):
            head = known[number]
            if head is not None and head[0] + head[1].count == done:
                # Its slab is freed before the next one is made.
                known[number] = head = None
                known[number] = next(member, None)


def combine(
    members: Sequence[SourceRows],
    *,
    probabilities: bool,
    uncertainty: bool,
    temperature: float | None = None,
) -> MergedRows:
    """Labels, and probabilities and uncertainty if requested, from one or several models.

    Args:
        members: the same rows of the volume from each model.
        probabilities: compute probabilities too.
        uncertainty: compute entropy and variance too.
        temperature: temperature of the mean probabilities and of their entropy; labels and variance
            do not depend on it.
    """
    single = len(members) == 1
    if single and not probabilities and not uncertainty:
        return MergedRows(members[0].labels())
    running = RunningVariance(class_axis=0)
    for rows in members:
        running.add(rows.probabilities())
    written = members[0].written
    if single:  # so that labels do not depend on the other outputs that are requested
        labels = members[0].labels()
    else:
        labels = labels_of(running.mean if written is None else running.mean - 0.5, written)
    mean = running.mean
    if temperature is not None:
        mean = at_temperature(mean, temperature, regions=written is not None)
    if not uncertainty:
        return MergedRows(labels, mean if probabilities else None)
    variance = running.variance
    if single and not members[0].with_spread:
        variance = torch.full_like(variance, torch.nan)
    for rows in members:
        variance = variance + rows.spread() / len(members)
    entropy = predictive_entropy if written is None else region_entropy
    return MergedRows(labels, mean if probabilities else None, entropy(mean), variance)


def at_temperature(
    probabilities: Float[Tensor, "classes x y rows"], temperature: float, *, regions: bool
) -> Float[Tensor, "classes x y rows"]:
    """Probabilities as if the logits had been divided by a temperature (Guo et al. 2017).

    The order of probabilities does not change, and regions above 0.5 stay above 0.5.
    """
    smallest = torch.finfo(probabilities.dtype).tiny
    if regions:
        return (
            probabilities.logit(eps=torch.finfo(probabilities.dtype).eps) / temperature
        ).sigmoid()
    return (probabilities.clamp(min=smallest).log() / temperature).softmax(dim=0)


class RunningVariance:
    """Running mean of probabilities, and their variance averaged over classes.

    Welford (1962): this subtracts no large sums, so that equal probabilities have a variance of
    exactly 0.

    Args:
        class_axis: axis of the classes in the probabilities.
    """

    def __init__(self, class_axis: int) -> None:
        self.class_axis = class_axis
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, probabilities: Float[Tensor, "*shape"]) -> None:
        """Add the probabilities of one more model or mirror image."""
        self.count += 1
        if self.count == 1:
            self.mean = probabilities
            self.squares = torch.zeros_like(probabilities.select(self.class_axis, 0))
            return
        if self.mean.device != probabilities.device:  # GPU memory has run out since
            self.mean, self.squares = (
                each.to(probabilities.device) for each in (self.mean, self.squares)
            )
        difference = probabilities - self.mean
        self.mean = self.mean + difference / self.count
        change = (difference * (probabilities - self.mean)).mean(self.class_axis)
        self.squares = self.squares + change

    @property
    def variance(self) -> Float[Tensor, "*space"]:
        """Variance of the probabilities that were added, with equal weights; 0 after one."""
        return self.squares / self.count


def predictive_entropy(probabilities: Float[Tensor, "classes *space"]) -> Float[Tensor, "*space"]:
    """Entropy over classes, divided by that of equal probabilities."""
    total = torch.special.entr(probabilities).sum(dim=0)
    return (total / math.log(max(len(probabilities), 2))).clamp(0, 1)


def region_entropy(probabilities: Float[Tensor, "regions *space"]) -> Float[Tensor, "*space"]:
    """Entropy of inside and outside, divided by its maximum and averaged over regions."""
    both = torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
    return (both.mean(dim=0) / math.log(2)).clamp(0, 1)
