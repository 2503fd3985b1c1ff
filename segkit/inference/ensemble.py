"""What several models make of the same rows of a volume, and how far they agree.

Each model walks over the volume in slabs of its own, on a grid of its own, and none runs ahead: the
one that knows least goes on, so that each holds a slab.
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
    """What is said of some rows of the volume."""

    labels: Integer[Tensor, "x y rows"]
    probabilities: Float[Tensor, "classes x y rows"] | None = None
    """The mean of the members'."""
    entropy: Float[Tensor, "x y rows"] | None = None
    """Of the mean probabilities, from 0 to 1: 1 where all classes, or yes and no, are alike."""
    variance: Float[Tensor, "x y rows"] | None = None
    """Of each class's probability between members, and mirrors of a window, mean over classes."""


def merge(
    members: Sequence[Iterator[tuple[int, SourceRows]]],
) -> Iterator[tuple[int, list[SourceRows]]]:
    """The rows of the volume that all members know, with their first, as soon as all do.

    Each member yields consecutive rows from 0 on, and all end at the same row.
    """
    known: list[tuple[int, SourceRows] | None] = [next(member, None) for member in members]
    done = 0
    while True:
        held = [head for head in known if head is not None]
        if not held:
            return
        assert len(held) == len(members), "the members end at different rows"
        reached = min(first + rows.count for first, rows in held)
        parts = [rows.part(done - first, reached - first) for first, rows in held]
        del held
        yield done, parts
        del parts
        done = reached
        for number, member in enumerate(members):
            head = known[number]
            if head is not None and head[0] + head[1].count == done:
                # Its slab is let go before the next is made.
                known[number] = head = None
                known[number] = next(member, None)


def consult(
    members: Sequence[SourceRows],
    *,
    shares: bool,
    uncertainty: bool,
    temperature: float | None = None,
) -> MergedRows:
    """The verdict of one or several members on the rows that they all have.

    Args:
        members: the same rows of the volume.
        shares: whether probabilities are asked for.
        uncertainty: whether entropy and variance are.
        temperature: of the mean probabilities; labels and variance do not depend on it.
    """
    alone = len(members) == 1
    if alone and not shares and not uncertainty:
        return MergedRows(members[0].labels())
    moments = Moments(class_axis=0)
    for rows in members:
        moments.add(rows.probabilities())
    written = members[0].written
    if alone:  # the label is the same whatever else is asked for
        labels = members[0].labels()
    else:
        labels = labels_of(moments.mean if written is None else moments.mean - 0.5, written)
    mean = moments.mean
    if temperature is not None:
        mean = at_temperature(mean, temperature, regions=written is not None)
    probabilities = mean if shares else None
    if not uncertainty:
        return MergedRows(labels, probabilities)
    variance = moments.variance
    for rows in members:
        variance = variance + rows.spread() / len(members)
    uncertain = predictive_entropy if written is None else region_entropy
    return MergedRows(labels, probabilities, uncertain(mean), variance)


def at_temperature(
    probabilities: Float[Tensor, "classes x y rows"], temperature: float, *, regions: bool
) -> Float[Tensor, "classes x y rows"]:
    """Probabilities as if the logits had been divided by a temperature (Guo et al. 2017).

    The largest stays the largest, and of regions what is above 0.5 stays above it.
    """
    smallest = torch.finfo(probabilities.dtype).tiny
    if regions:
        return (
            probabilities.logit(eps=torch.finfo(probabilities.dtype).eps) / temperature
        ).sigmoid()
    return (probabilities.clamp(min=smallest).log() / temperature).softmax(dim=0)


class Moments:
    """The mean of probabilities, and the mean over classes of their variance.

    Welford (1962): no difference of large sums, so that what agrees has a variance of exactly 0.
    `class_axis` is that of the probabilities.
    """

    def __init__(self, class_axis: int) -> None:
        self.class_axis = class_axis
        self.count = 0
        self.mean = self.squares = torch.zeros(())

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


def predictive_entropy(probabilities: Float[Tensor, "classes *space"]) -> Float[Tensor, "*space"]:
    """The entropy over that of classes all alike."""
    total = torch.special.entr(probabilities).sum(dim=0)
    return (total / math.log(max(len(probabilities), 2))).clamp(0, 1)


def region_entropy(probabilities: Float[Tensor, "regions *space"]) -> Float[Tensor, "*space"]:
    """The entropy of yes and no, over its largest, as the mean over regions."""
    both = torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
    return (both.mean(dim=0) / math.log(2)).clamp(0, 1)
