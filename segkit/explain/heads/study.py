"""Test on cases with references whether several attention heads are better than one.

Heads are masked through their map taps (`segkit.nn.map_tap`). Nothing is trained again.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.config.labels import Labelling
from segkit.data.label_numbers import volume_within
from segkit.data.preprocess import prepare_label
from segkit.errors import ModelError, VolumeError, counted
from segkit.evaluation.overlap import Overlap, confusion_matrix
from segkit.inference.predictor import Predictor
from segkit.inference.windows import stream
from segkit.io.inputs import Input, read_input
from segkit.io.volume import Volume, read_labels
from segkit.nn.cross_attention import CrossAttention, UTransformerGate
from segkit.nn.losses import dice_binary_cross_entropy, dice_cross_entropy
from segkit.nn.map_tap import Edit, editing
from segkit.nn.partly_labelled import PartlyLabelled
from segkit.nn.self_attention import SelfAttention
from segkit.system.progress import Track, untracked

MultiHeaded = SelfAttention | CrossAttention | UTransformerGate


@dataclass(frozen=True, eq=False)
class ScoredVolume:
    """A volume and its reference, in memory."""

    name: str
    volume: Volume
    reference: Volume
    unlabelled: tuple[str, ...] = ()
    """Classes or regions that nobody labelled in the reference; they do not count."""


@dataclass(frozen=True)
class CaseOnDisk:
    """A volume and its reference, read from disk at each access."""

    source: Input
    path: Path
    """The file of the reference."""
    unlabelled: tuple[str, ...] = ()
    """Classes or regions that nobody labelled in the reference; they do not count."""

    @property
    def name(self) -> str:
        """The name of the volume."""
        return self.source.name

    @property
    def volume(self) -> Volume:
        """The volume."""
        return read_input(self.source)

    @property
    def reference(self) -> Volume:
        """The reference labels."""
        return read_labels(self.path, rules=self.source.rules)


LabelledCase = ScoredVolume | CaseOnDisk


@dataclass(frozen=True)
class HeadFigures:
    """Importance of one head, and Dice with and without it."""

    head: int
    importance: float
    """Mean over windows of |dLoss / dSwitch| (Michel et al. 2019), normalised so that the squares
    of all heads of a position sum to 1. It is 0 for all heads if none has an effect."""
    dice_without: list[float]
    """Mean Dice over classes of each case, with only this head masked."""
    dice_alone: list[float]
    """Mean Dice over classes of each case, with all other heads masked."""


@dataclass(frozen=True)
class PositionFigures:
    """Importance of the heads at one position of the network, and Dice with some masked."""

    position: str
    heads: list[HeadFigures]
    dice: list[float]
    """Mean Dice over classes of each case, with no head masked."""
    dice_without_any: list[float]
    """Mean Dice over classes of each case, with all heads of this position masked."""
    least_first: list[float]
    """Mean Dice over cases with 0, 1, 2, … heads masked, the least important first."""
    most_first: list[float]
    """Mean Dice over cases with 0, 1, 2, … heads masked, the most important first."""

    @property
    def best_alone(self) -> HeadFigures:
        """The head with the highest Dice when all others are masked."""
        return max(self.heads, key=lambda head: _mean(head.dice_alone))

    @property
    def gain(self) -> list[float]:
        """Dice with all heads minus Dice with only the best one, for each case."""
        return [a - b for a, b in zip(self.dice, self.best_alone.dice_alone, strict=True)]

    @property
    def won_and_lost(self) -> tuple[int, int]:
        """Numbers of cases in which all heads are better, and worse, than only the best one."""
        return sum(gain > 0 for gain in self.gain), sum(gain < 0 for gain in self.gain)

    @property
    def p_value(self) -> float:
        """P value of a two-sided sign test of the gain."""
        won, lost = self.won_and_lost
        tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
        return min(1.0, 2 * tail / 2 ** (won + lost))

    def answer(self) -> str:
        """One sentence that says whether the heads are better than one.

        The answer is yes or no if a sign test over cases has p < 0.05; otherwise the cases cannot
        tell. The best head is chosen on the same cases, which favours a single head.
        """
        num, best = len(self.heads), self.best_alone
        if num == 1:
            gain = _mean(self.dice) - _mean(self.dice_without_any)
            return (
                f"{self.position}: one head; Dice {_mean(self.dice):.4f} with it and "
                f"{_mean(self.dice_without_any):.4f} without ({gain:+.4f})"
            )
        won, lost = self.won_and_lost
        if self.p_value >= 0.05:
            verdict = f"{counted(len(self.gain), 'case')} cannot tell"
        else:
            verdict = "better than one" if won > lost else "no better than one"
        return (
            f"{self.position}: {counted(num, 'head')}, {verdict}: Dice {_mean(self.dice):.4f} "
            f"with all, "
            f"{_mean(best.dice_alone):.4f} with only head {best.head}, "
            f"{_mean(self.dice_without_any):.4f} with none; all are better than head {best.head} "
            f"in {won} of {counted(len(self.gain), 'case')} and worse in {lost} (p = "
            f"{self.p_value:.3g})"
        )


def multi_headed(network: nn.Module) -> dict[str, MultiHeaded]:
    """The network's modules with attention heads, by position such as 'skip.1'."""
    return {
        module.matrix.info.key.split("/")[0]: module
        for module in network.modules()
        if isinstance(module, MultiHeaded) and module.matrix.info is not None
    }


def masking(position: str, kept: Iterable[int]) -> dict[str, Edit]:
    """The edit that masks all heads of a position except those in `kept`."""
    indices = sorted(kept)

    def mask(switches: Float[Tensor, "batch heads"]) -> Float[Tensor, "batch heads"]:
        masked = torch.zeros_like(switches)
        masked[:, indices] = switches[:, indices]
        return masked

    return {f"{position}/branch": mask}


def head_table(figures: Sequence[PositionFigures]) -> list[dict[str, Any]]:
    """A row for each head: importance, mean Dice with all heads, without it and with only it."""
    return [
        {
            "position": position.position,
            "head": head.head,
            "importance": head.importance,
            "dice_all": _mean(position.dice),
            "dice_without": _mean(head.dice_without),
            "dice_alone": _mean(head.dice_alone),
        }
        for position in figures
        for head in position.heads
    ]


def study_heads(
    predictor: Predictor,
    cases: Sequence[LabelledCase],
    *,
    track: Track = untracked,
) -> list[PositionFigures]:
    """Importance of every head, and Dice with heads masked.

    Dice is measured without each head, with only this head, and with heads masked one after the
    other in the order of importance.

    Args:
        predictor: runs the model.
        cases: volumes with references.
        track: reports the progress.

    Raises:
        ModelError: if the model has no attention heads.
        VolumeError: if a reference does not fit its volume or contains only background.
    """
    modules = multi_headed(predictor.model.network)
    if not modules:
        raise ModelError(
            "expected a model with attention heads, but this one has none; train one with "
            "network.attention.bottleneck=self_attention or network.attention.skip=cross_attention "
            "or u_transformer"
        )
    labelling = predictor.model.description.labelling
    for case in cases:
        check_case(case, labelling)
    importance = head_importance(predictor, cases, track=track)
    ranks = {
        position: sorted(range(len(scores)), key=scores.__getitem__)
        for position, scores in importance.items()
    }
    trials = {(position, kept) for position in ranks for kept in _subsets(ranks[position])}
    dice: dict[tuple[str, frozenset[int]], list[float]] = {}
    ordered = sorted(trials, key=lambda trial: (trial[0], sorted(trial[1])))
    for position, kept in track(ordered, "masking heads", len(ordered)):
        with editing(predictor.model.network, masking(position, kept)):
            dice[position, kept] = [case_dice(predictor, case) for case in cases]
    return [_figures(position, importance[position], ranks[position], dice) for position in ranks]


def _subsets(rank: Sequence[int]) -> set[frozenset[int]]:
    """The sets of heads to keep: all, none, all but one, one, and those of both masking orders."""
    everyone = frozenset(rank)
    return {
        *(everyone - {head} for head in rank),
        *(frozenset({head}) for head in rank),
        *(frozenset(rank[count:]) for count in range(len(rank) + 1)),
        *(frozenset(rank[:count]) for count in range(len(rank) + 1)),
    }


def _figures(
    position: str,
    importance: Sequence[float],
    rank: Sequence[int],
    dice: Mapping[tuple[str, frozenset[int]], list[float]],
) -> PositionFigures:
    """The figures of one position, from the Dice of all trials.

    Args:
        position: the position in the network.
        importance: importance of each head.
        rank: the heads, the most important first.
        dice: Dice of each case, by position and by the heads that are kept.
    """
    everyone = frozenset(rank)
    return PositionFigures(
        position,
        [
            HeadFigures(
                head,
                importance[head],
                dice[position, everyone - {head}],
                dice[position, frozenset({head})],
            )
            for head in sorted(rank)
        ],
        dice[position, everyone],
        dice[position, frozenset()],
        [_mean(dice[position, frozenset(rank[count:])]) for count in range(len(rank) + 1)],
        [
            _mean(dice[position, frozenset(rank[:count])])
            for count in reversed(range(len(rank) + 1))
        ],
    )


def head_importance(
    predictor: Predictor,
    cases: Sequence[LabelledCase],
    *,
    track: Track = untracked,
) -> dict[str, list[float]]:
    """Importance of every head, by position: mean over windows of |dLoss / dSwitch|.

    Michel et al. (2019, arXiv:1905.10650, Eq. 2 and Sec. 4.1): the switch multiplies the output of
    the head before W_o. The absolute value is taken for each window, and the importances of each
    position are divided by their Euclidean norm. The loss is the training loss on the finest level.
    """
    network, device = predictor.model.network, next(predictor.model.network.parameters()).device
    labelling = predictor.model.description.labelling
    loss_of = partial(dice_cross_entropy, ignore=labelling.ignore, pool_batch=False)
    if labelling.regions:
        loss_of = partial(
            dice_binary_cross_entropy,
            regions=list(labelling.regions.values()),
            ignore=labelling.ignore,
            pool_batch=False,
        )
    positions = list(multi_headed(network))
    partly: PartlyLabelled | None = None
    totals: dict[str, Tensor] = {}
    switches: dict[str, Tensor] = {}

    def exposing(position: str) -> Edit:
        def expose(ones: Tensor) -> Tensor:
            switches[position] = ones.detach().clone().requires_grad_()
            return switches[position]

        return expose

    def differentiate(windows: Tensor) -> dict[str, Tensor]:
        image, label = windows[:, :-1].to(device), windows[:, -1].round().long().to(device)
        with torch.enable_grad():
            logits = network(image)
            if partly is not None:
                (logits,), _, label = partly.known((logits,), None, label + partly.num_labels)
            loss = loss_of(logits, label)
        slopes = torch.autograd.grad(loss, [switches[position] for position in positions])
        for position, slope in zip(positions, slopes, strict=True):
            total = slope.abs().double().sum(dim=0)
            totals[position] = totals[position] + total if position in totals else total
        return {}

    edits = {f"{position}/branch": exposing(position) for position in positions}
    with editing(network, edits):
        for given in track(cases, "importance of heads", len(cases)):
            case = on_one_grid(given, labelling)
            partly = _partly_labelled(labelling, case.unlabelled)
            prepared = predictor.prepare(case.volume)
            label = prepare_label(case.reference, prepared)
            both = torch.cat([prepared.image, label[None].to(prepared.image.dtype)])
            slabs = stream(both, differentiate, predictor.members[0].layout_for(both.shape[1:]))
            for _ in slabs:
                pass
    return {
        position: (total / total.norm().clamp_min(1e-30)).tolist()
        for position, total in totals.items()
    }


def _partly_labelled(labelling: Labelling, unlabelled: Sequence[str]) -> PartlyLabelled | None:
    """The outputs that the loss of a case leaves out; None if the case is labelled completely."""
    if not unlabelled:
        return None
    outputs = labelling.outputs
    hidden = tuple(outputs.index(name) for name in unlabelled)
    regions = tuple(labelling.regions.values())
    return PartlyLabelled(len(labelling.value_names), ((), hidden), len(outputs), regions)


def case_dice(predictor: Predictor, case: LabelledCase) -> float:
    """Mean Dice of a case, over the labelled classes that its reference or prediction contains."""
    labelling = predictor.model.description.labelling
    case = on_one_grid(case, labelling)
    found = predictor.numbers_of(case.volume)
    dice = overlap_with(found, case.reference, labelling).dice
    labelled = [name not in case.unlabelled for name in labelling.members]
    return float(dice[torch.tensor(labelled)].nanmean())


def overlap_with(found: Volume, reference: Volume, labelling: Labelling) -> Overlap:
    """Overlap of every class or region of two label volumes, in the order of the labelling.

    Both volumes contain the labelling's own numbers 0, 1, 2, …, not the numbers in files.
    """
    labels = [torch.from_numpy(volume.data.astype("int64")) for volume in (found, reference)]
    matrix = confusion_matrix(labels[0], labels[1], len(labelling.value_names))
    return Overlap.of_groups(matrix, list(labelling.members.values()), ignore=labelling.ignore)


def on_one_grid(case: LabelledCase, labelling: Labelling) -> ScoredVolume:
    """The case in memory, with its reference on the volume's grid in the labelling's own numbers.

    Raises:
        VolumeError: if the reference has another grid or a label number without a name.
    """
    volume = case.volume
    name = f"{case.name}: its reference"
    reference = case.reference.measured_as(volume).onto(volume.grid, what=name, whose="the volume")
    try:
        numbers = volume_within(reference, labelling)
        return ScoredVolume(case.name, volume, numbers, case.unlabelled)
    except ValueError as error:
        raise VolumeError(f"{name} {error}") from None


def check_case(case: LabelledCase, labelling: Labelling) -> None:
    """Raise VolumeError if a reference does not fit its volume or contains only background."""
    num_labels = len(labelling.value_names)
    reference = on_one_grid(case, labelling).reference
    lowest, highest = int(reference.data.min()), int(reference.data.max())
    if lowest < 0 or highest >= num_labels:
        raise VolumeError(
            f"{case.name}: expected a reference with the model's labels 0 … {num_labels - 1}, "
            f"found {lowest} … {highest}; use labels of the same classes"
        )
    if not np.isin(reference.data, list(itertools.chain(*labelling.members.values()))).any():
        raise VolumeError(
            f"{case.name}: its reference contains only background; leave the case out"
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
