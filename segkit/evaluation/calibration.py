"""Calibration of probabilities: of all voxels with a probability of 70 %, are 70 % right?"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import isnan, nan
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Integer
from numpy import ndarray
from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text
from scipy.stats import spearmanr

from segkit.io.atomic import without_nan

NUM_BINS = 15
IN_QUESTION = 0.01
"""A voxel is in question if it is a structure with at least this probability."""
SMALLEST = 1e-7
"""Smallest probability in a logarithm; lower ones are replaced by it."""
BEYOND_RANGE = 1e-3
"""A probability may lie so far outside 0 and 1."""
FEWEST_CASES = 3
"""Smallest number of cases for a correlation."""


@dataclass
class Reliability:
    """Histogram of predicted probabilities, with the number of correct voxels in each bin."""

    count: Float64[ndarray, " bins"] = field(default_factory=lambda: np.zeros(NUM_BINS))
    """Number of voxels in each bin."""
    probability: Float64[ndarray, " bins"] = field(default_factory=lambda: np.zeros(NUM_BINS))
    """Sum of the probabilities in each bin."""
    right: Float64[ndarray, " bins"] = field(default_factory=lambda: np.zeros(NUM_BINS))
    """Number of correct voxels in each bin."""
    squares: float = 0.0
    """The sum of squared differences between probability and outcome, 0 or 1."""

    def add(self, probability: Float[ndarray, " voxels"], right: Bool[ndarray, " voxels"]) -> None:
        """Add voxels: their probabilities, and whether each is correct."""
        bins = np.minimum((probability * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        self.count += np.bincount(bins, minlength=NUM_BINS)
        self.probability += np.bincount(bins, probability, minlength=NUM_BINS)
        self.right += np.bincount(bins, right, minlength=NUM_BINS)
        self.squares += float(np.square(probability - right, dtype=np.float64).sum())

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return int(self.count.sum())

    @property
    def ece(self) -> float:
        """The expected calibration error (Naeini et al. 2015; Guo et al. 2017, equation 3).

        |share of correct voxels - mean probability| of each bin, as a mean over voxels. NaN if
        there are no voxels.
        """
        gaps = np.abs(self.right - self.probability).sum()
        return float(gaps / self.count.sum()) if self.voxels else nan

    @property
    def brier(self) -> float:
        """The mean squared difference between probability and outcome (Brier 1950).

        NaN if there are no voxels.
        """
        return self.squares / self.voxels if self.voxels else nan

    def to_json(self) -> dict[str, Any]:
        """All figures, and the bins for a diagram. The shares of an empty bin are None."""
        filled = self.count > 0
        shares = [
            np.divide(total, self.count, out=np.full(NUM_BINS, nan), where=filled).tolist()
            for total in (self.probability, self.right)
        ]
        content: dict[str, Any] = {
            "voxels": self.voxels,
            "ece": self.ece,
            "brier": self.brier,
            "bins": {
                "count": self.count.astype(int).tolist(),
                "mean_probability": shares[0],
                "share_right": shares[1],
            },
        }
        plain: dict[str, Any] = without_nan(content)
        return plain


@dataclass
class Calibration:
    """Probabilities of a cohort compared with references. `add` adds one case."""

    members: Mapping[str, Sequence[int]]
    """The reference numbers of each output, in the order of the outputs. If the outputs are
    classes, the background comes first."""
    are_regions: bool
    """Whether the outputs are regions, which may overlap, instead of classes."""
    ignore: int | None = None
    """Reference number of voxels that are left out."""
    largest: Reliability = field(default_factory=Reliability)
    """Reliability of the class with the largest probability, at all voxels; empty for regions."""
    in_question: Reliability = field(default_factory=Reliability)
    """The same only at voxels in question: the background has at most 99 % there."""
    outputs: dict[str, Reliability] = field(default_factory=dict)
    """Reliability of each output except the background, at voxels in question."""
    log_loss: float = 0.0
    """Sum over all voxels of completely labelled cases of -log p of the true class; for regions, of
    the mean over regions of -log p of the truth, inside or outside."""
    voxels: int = 0
    """Number of voxels in this sum."""
    entropy_of_cases: dict[str, float] = field(default_factory=dict)
    """Mean entropy of each case over its voxels in question, from 0 to 1; NaN if it has none."""

    def add(
        self,
        case: str,
        probabilities: Float[ndarray, "*space outputs"],
        reference: Integer[ndarray, "*grid"],
        unlabelled: Collection[str] = (),
    ) -> None:
        """Add the voxels of a case, except those that the reference ignores.

        Args:
            case: its name.
            probabilities: probabilities of each output, with the outputs on the last axis.
            reference: the labels, of the same spatial shape.
            unlabelled: outputs that nobody labelled in this case. Then only its labelled outputs
                count: the background of the reference may be any of the others.

        Raises:
            ValueError: if there are more or fewer probabilities than outputs, or numbers that are
                no probabilities.
        """
        if probabilities.shape[-1] != len(self.members):
            raise ValueError(
                f"expected a probability for each of {', '.join(self.members)}, got "
                f"{probabilities.shape[-1]}; evaluate predictions of the same classes"
            )
        total, voxels = 0.0, 0
        for plane in range(reference.shape[-1]):
            found = probabilities[..., plane, :].reshape(-1, len(self.members)).astype(np.float64)
            truth = reference[..., plane].ravel()
            if self.ignore is not None:
                counted = truth != self.ignore
                found, truth = found[counted], truth[counted]
            if not ((found >= -BEYOND_RANGE) & (found <= 1 + BEYOND_RANGE)).all():
                wrong = found[~((found >= -BEYOND_RANGE) & (found <= 1 + BEYOND_RANGE))][0]
                raise ValueError(
                    f"expected probabilities from 0 to 1, found {wrong:g}; evaluate what segkit "
                    f"predict --probabilities wrote"
                )
            within = np.stack([np.isin(truth, group) for group in self.members.values()], axis=1)
            asked = found.max(1) >= IN_QUESTION if self.are_regions else self._asked(found)
            if not unlabelled:
                self._add_largest(found, within, asked)
            first = 0 if self.are_regions else 1
            for index, name in list(enumerate(self.members))[first:]:
                if name in unlabelled:
                    continue
                seen = self.outputs.setdefault(name, Reliability())
                seen.add(found[asked, index], within[asked, index])
            total += float(_entropy(found[asked], self.are_regions).sum())
            voxels += int(asked.sum())
        self.entropy_of_cases[case] = total / voxels if voxels else nan

    def _asked(self, found: Float64[ndarray, "voxels outputs"]) -> Bool[ndarray, " voxels"]:
        asked: ndarray = found[:, 0] <= 1 - IN_QUESTION
        return asked

    def _add_largest(
        self,
        found: Float64[ndarray, "voxels outputs"],
        within: Bool[ndarray, "voxels outputs"],
        asked: Bool[ndarray, " voxels"],
    ) -> None:
        self.voxels += len(found)
        if self.are_regions:
            true = np.where(within, found, 1 - found)
            self.log_loss -= float(np.log(np.maximum(true, SMALLEST)).mean(1).sum())
            return
        best = found.argmax(1)
        rows = np.arange(len(found))
        confidence, right = found[rows, best], within[rows, best]
        self.largest.add(confidence, right)
        self.in_question.add(confidence[asked], right[asked])
        true = np.where(within, found, 0).max(1, initial=0)
        self.log_loss -= float(np.log(np.maximum(true, SMALLEST)).sum())

    def correlation(self, dice_of_cases: Mapping[str, float]) -> float:
        """Spearman's correlation over cases between mean entropy and 1 - Dice.

        It is 1 if entropy ranks the cases exactly by their error. NaN for fewer than three cases,
        or if entropy or Dice is the same in all.
        """
        pairs = [
            (entropy, 1 - dice_of_cases[case])
            for case, entropy in self.entropy_of_cases.items()
            if case in dice_of_cases and not isnan(entropy) and not isnan(dice_of_cases[case])
        ]
        entropies, errors = np.array(pairs).reshape(-1, 2).T
        if len(pairs) < FEWEST_CASES or np.ptp(entropies) == 0 or np.ptp(errors) == 0:
            return nan
        return float(spearmanr(entropies, errors).statistic)

    @property
    def mean_log_loss(self) -> float:
        """The mean of the log loss over all voxels of completely labelled cases; NaN if none is."""
        return self.log_loss / self.voxels if self.voxels else nan

    def to_json(self, dice_of_cases: Mapping[str, float]) -> dict[str, Any]:
        """All figures as plain dicts; NaN becomes None."""
        largest = {} if self.are_regions else self.largest.to_json()
        in_question = {} if self.are_regions else {"in_question": self.in_question.to_json()}
        content: dict[str, Any] = {
            "all_voxels": {"voxels": self.voxels, **largest, "log_loss": self.mean_log_loss},
            **in_question,
            "outputs": {name: each.to_json() for name, each in self.outputs.items()},
            "entropy_of_cases": self.entropy_of_cases,
            "spearman_of_entropy_and_error": self.correlation(dice_of_cases),
        }
        plain: dict[str, Any] = without_nan(content)
        return plain


def _entropy(
    found: Float64[ndarray, "voxels outputs"], are_regions: bool
) -> Float64[ndarray, " voxels"]:
    """Entropy of each voxel, divided by its maximum; for regions, the mean over them."""
    if are_regions:
        both = np.stack([found, 1 - found], axis=2)
        each: ndarray = _entropy(both.reshape(-1, 2), False).reshape(found.shape).mean(1)
        return each
    known = np.maximum(found, SMALLEST)
    entropy: ndarray = -(found * np.log(known)).sum(1) / np.log(found.shape[1])
    return entropy


def to_calibration_table(calibration: Calibration) -> Table:
    """The figures as a table for the terminal."""
    in_question = (
        f"some region has at least {IN_QUESTION:.0%}"
        if calibration.are_regions
        else f"the background has at most {1 - IN_QUESTION:.0%}"
    )
    table = Table(
        box=HORIZONTALS,
        pad_edge=False,
        title="probabilities",
        caption=(
            "ECE: mean difference between probability and share of correct voxels. Brier: mean "
            f"squared error. In question: voxels at which {in_question}."
        ),
    )
    table.add_column("class", overflow="fold")
    for heading in ("voxels", "ECE", "Brier", "log loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    largest, log_loss = calibration.largest, calibration.mean_log_loss
    if calibration.are_regions:
        rows = [("all regions, all voxels", calibration.voxels, nan, nan, log_loss)]
    else:
        rows = [
            ("largest, all voxels", largest.voxels, largest.ece, largest.brier, log_loss),
            _row("largest, in question", calibration.in_question),
        ]
    rows += [_row(f"{name}, in question", each) for name, each in calibration.outputs.items()]
    for name, voxels, *figures in rows:
        told = ("-" if isnan(value) else f"{value:.4f}" for value in figures)
        table.add_row(Text(name), f"{voxels:,}", *told)
    return table


def _row(name: str, figures: Reliability) -> tuple[str, int, float, float, float]:
    return name, figures.voxels, figures.ece, figures.brier, nan


def reliability_diagram(calibration: Calibration) -> str:
    """An SVG diagram of the share of correct voxels against the predicted probability.

    It has a line for each output. Points on the diagonal are calibrated; below it, the
    probabilities are too high.
    """
    side, edge = 320, 44
    curves: dict[str, Reliability] = dict(calibration.outputs)
    if not calibration.are_regions:
        curves = {"largest probability": calibration.in_question, **curves}
    # Okabe and Ito (2008): colours that colour-blind readers can distinguish.
    colours = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    styles = ("none", "7 3", "2 2")
    height = side + 2 * edge + 18 * len(curves)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side + 2 * edge} {height}" '
        f'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<path d="M{edge} {edge}V{edge + side}H{edge + side}" fill="none" stroke="black"/>',
        f'<path d="M{edge} {edge + side}L{edge + side} {edge}" stroke="#999"/>',
        f'<text x="{edge + side / 2}" y="{edge + side + 34}" text-anchor="middle">'
        f"predicted probability</text>",
        f'<text transform="translate(12 {edge + side / 2}) rotate(-90)" text-anchor="middle">'
        f"share of correct voxels</text>",
    ]
    for tick in (0, 0.5, 1):
        x, y = edge + tick * side, edge + side - tick * side
        lines.append(f'<text x="{x}" y="{edge + side + 16}" text-anchor="middle">{tick:g}</text>')
        lines.append(f'<text x="{edge - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for number, (name, each) in enumerate(curves.items()):
        colour, style = colours[number % len(colours)], styles[number // len(colours) % len(styles)]
        filled = each.count > 0
        xs = edge + side * each.probability[filled] / each.count[filled]
        ys = edge + side - side * each.right[filled] / each.count[filled]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        drawn = f'fill="none" stroke="{colour}" stroke-dasharray="{style}"'
        lines.append(f'<polyline points="{points}" {drawn} stroke-width="2"/>')
        y = side + 2 * edge + 18 * number
        lines.append(f'<path d="M{edge} {y - 4}h28" {drawn} stroke-width="2"/>')
        error = "no voxels" if isnan(each.ece) else f"ECE {each.ece:.3f}"
        lines.append(f'<text x="{edge + 36}" y="{y}">{escape(name)}: {error}</text>')
    return "\n".join([*lines, "</svg>", ""])
