"""One temperature for all probabilities of a model, fitted on cases that it was not trained on.

A network that is trained long is overconfident: of the voxels with a probability of 99 %, fewer
than 99 % are right. Guo et al. (2017, arXiv:1706.04599, section 4.2) divide its logits by one
number T, which is fitted by the negative log likelihood. Labels do not change. Probabilities p of
classes become p^(1/T) / sum of p^(1/T), which is the same as dividing the logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Integer
from numpy import ndarray
from scipy.optimize import minimize_scalar

from segkit.errors import counted
from segkit.evaluation.calibration import IN_QUESTION, Reliability

MOST_VOXELS, FEWEST_VOXELS = 200_000, 10_000
"""Most and fewest voxels of a case that are drawn at random."""
MOST_PROBABILITIES = 2**25
"""Probabilities that are kept, of all cases together: 128 MB."""
LOWEST, HIGHEST = 0.05, 20.0
"""The temperatures that are tried."""
NEAR_LIMIT = 0.01
"""A temperature that is nearer to a limit than this share of it lies at the limit."""
LEAST_LIKELY = {False: 1e-30, True: 1e-7}
"""Smallest probability in a logarithm, for classes (False) and regions (True). For regions, 1 - p
must also differ from 0 in single precision."""


@dataclass(frozen=True)
class Temperature:
    """A temperature, and its effect on the probabilities that it was fitted on."""

    value: float
    """Logits are divided by it. A value above 1 means that the probabilities were too extreme."""
    cases: int
    voxels: int
    log_loss: tuple[float, float]
    """The mean of -log of the probability of the true class, before and after."""
    ece: tuple[float, float]
    """The expected calibration error at voxels in question, before and after."""
    brier: tuple[float, float]
    """The Brier score at voxels in question, before and after."""

    @property
    def at_limit(self) -> bool:
        """Whether the temperature lies at the lowest or the highest value that is tried.

        The likelihood is then still rising, so the value says only in which direction probabilities
        are wrong.
        """
        return not LOWEST * (1 + NEAR_LIMIT) < self.value < HIGHEST * (1 - NEAR_LIMIT)

    @property
    def told(self) -> str:
        """The temperature and its effect in one line."""
        limit = ""
        if self.at_limit:
            end, wrong = ("lower", "unsure") if self.value < 1 else ("upper", "sure")
            limit = (
                f"; this is the {end} limit, so probabilities are far too {wrong} or the held-out "
                f"cases too few, and they should not be used as probabilities"
            )
        return (
            f"temperature {self.value:.3f}, fitted on {counted(self.cases, 'held-out case')}: "
            f"ECE of voxels in question {self.ece[0]:.4f} -> {self.ece[1]:.4f}, "
            f"log loss {self.log_loss[0]:.4f} -> {self.log_loss[1]:.4f}{limit}"
        )

    def as_json(self) -> dict[str, Any]:
        """The same for a summary."""
        pairs = {
            name: {"before": pair[0], "after": pair[1]}
            for name, pair in (
                ("log_loss", self.log_loss),
                ("ece_in_question", self.ece),
                ("brier_in_question", self.brier),
            )
        }
        return {
            "value": self.value,
            "at_limit": self.at_limit,
            "cases": self.cases,
            "voxels": self.voxels,
            **pairs,
            "told": self.told,
        }


@dataclass
class HeldOutVoxels:
    """Voxels of held-out cases, drawn at random, with their probabilities and true classes.

    Args:
        members: the numbers in references that each output stands for, in the order of the outputs;
            the background first if they are classes.
        are_regions: whether outputs are regions, each yes or no.
        num_cases: number of cases that will be added. Each gets an equal share of the voxels.
        ignore: the number of voxels that nobody labelled.
    """

    members: Mapping[str, Sequence[int]]
    are_regions: bool
    num_cases: int
    ignore: int | None = None
    probabilities: list[Float[ndarray, "voxels outputs"]] = field(default_factory=list)
    within: list[Bool[ndarray, "voxels outputs"]] = field(default_factory=list)

    def add(
        self, probabilities: Float[ndarray, "*space outputs"], reference: Integer[ndarray, "*grid"]
    ) -> None:
        """Draw voxels of a case, the same ones each time; ignored voxels are left out."""
        outputs = len(self.members)
        share = MOST_PROBABILITIES // max(self.num_cases, 1) // outputs
        most = min(max(share, FEWEST_VOXELS), MOST_VOXELS)
        truth = reference.ravel()
        places = (
            np.arange(truth.size) if self.ignore is None else np.flatnonzero(truth != self.ignore)
        )
        if len(places) > most:
            random = np.random.default_rng(len(self.probabilities))
            places = np.sort(random.choice(places, most, replace=False))
        if not len(places):
            return
        # By index along each axis, because the order in memory may differ, for example in a file.
        axes = np.unravel_index(places, reference.shape)
        found = probabilities[axes].astype(np.float32)
        self.probabilities.append(found)
        groups = self.members.values()
        self.within.append(np.stack([np.isin(truth[places], group) for group in groups], axis=1))

    def fit(self) -> Temperature | None:
        """The temperature with the lowest negative log likelihood; None if there is no voxel."""
        if not self.probabilities:
            return None
        found = np.concatenate(self.probabilities)
        within = np.concatenate(self.within)
        value = fit_temperature(found, within, are_regions=self.are_regions)
        cooled = tempered(found, value, are_regions=self.are_regions)
        asked = found.max(1) >= IN_QUESTION if self.are_regions else found[:, 0] <= 1 - IN_QUESTION
        before, after = (
            _reliability(each[asked], within[asked], self.are_regions) for each in (found, cooled)
        )
        return Temperature(
            value,
            len(self.probabilities),
            len(found),
            (
                _log_loss(found, within, self.are_regions),
                _log_loss(cooled, within, self.are_regions),
            ),
            (before.ece, after.ece),
            (before.brier, after.brier),
        )


def fit_temperature(
    probabilities: Float[ndarray, "voxels outputs"],
    within: Bool[ndarray, "voxels outputs"],
    *,
    are_regions: bool,
) -> float:
    """The temperature that makes the true classes most likely, between 0.05 and 20.

    Args:
        probabilities: probabilities of classes, which add up to 1, or of regions.
        within: whether each output holds at each voxel.
        are_regions: whether outputs are regions, each yes or no.
    """

    def loss(log_temperature: float) -> float:
        cooled = tempered(probabilities, float(np.exp(log_temperature)), are_regions=are_regions)
        return _log_loss(cooled, within, are_regions)

    # The loss is convex in 1 / T, so that there is one minimum.
    bounds = (np.log(LOWEST), np.log(HIGHEST))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def tempered(
    probabilities: Float[ndarray, "voxels outputs"], temperature: float, *, are_regions: bool
) -> Float64[ndarray, "voxels outputs"]:
    """The probabilities that follow if the logits are divided by a temperature.

    Args:
        probabilities: probabilities of classes, which add up to 1, or of regions.
        temperature: the divisor, above 0.
        are_regions: whether outputs are regions.
    """
    known = np.maximum(probabilities.astype(np.float64), LEAST_LIKELY[are_regions])
    if are_regions:
        odds = (np.log(np.maximum(1 - known, LEAST_LIKELY[True])) - np.log(known)) / temperature
        each: ndarray = 1 / (1 + np.exp(odds))
        return each
    logits = np.log(known) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: ndarray = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _log_loss(
    probabilities: Float[ndarray, "voxels outputs"],
    within: Bool[ndarray, "voxels outputs"],
    are_regions: bool,
) -> float:
    """The mean of -log of the probability of the true class; for regions, the mean over regions."""
    if are_regions:
        true = np.where(within, probabilities, 1 - probabilities)
        return float(-np.log(np.maximum(true, LEAST_LIKELY[True])).mean())
    true = np.where(within, probabilities, 0).max(axis=1)
    return float(-np.log(np.maximum(true, LEAST_LIKELY[False])).mean())


def _reliability(
    probabilities: Float[ndarray, "voxels outputs"],
    within: Bool[ndarray, "voxels outputs"],
    are_regions: bool,
) -> Reliability:
    reliability = Reliability()
    if are_regions:
        reliability.add(probabilities.ravel(), within.ravel())
        return reliability
    rows, best = np.arange(len(probabilities)), probabilities.argmax(axis=1)
    reliability.add(probabilities[rows, best], within[rows, best])
    return reliability
