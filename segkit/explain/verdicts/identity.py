"""Does a network use its attention? Dice with each attention block replaced by the identity.

The test of Wald et al. (2025, arXiv:2503.01835, Sec. 3), over scans and with the equivalence tests
of the verdicts on gates (`falls`). Nothing is trained again. If Dice falls, this network uses the
block; that does not mean that training needs such a block.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch

from segkit.errors import ModelError, counted
from segkit.evaluation.compare import holm
from segkit.explain.display import Table, Verdict, rounded
from segkit.explain.heads.study import (
    ScoredVolume,
    check_case,
    on_one_grid,
)
from segkit.explain.measures.pairs import cases_to_judge
from segkit.explain.verdicts.ablation import Ablation, Against, ablation_rows, class_dice
from segkit.explain.verdicts.evidence import holds_foreground
from segkit.explain.verdicts.falls import (
    DICE_MARGIN,
    SIGNIFICANT,
    mean_interval,
    mean_of,
    needed_p,
    not_needed_ps,
    num_mattering,
)
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.nn.attention_blocks import (
    AttentionShare,
    as_identity,
    attention_blocks,
    attention_share,
)
from segkit.nn.running import in_prediction
from segkit.system.progress import Track, untracked

EVERY_BLOCK = "all blocks"
"""The name of all blocks together."""
IDENTITY = "identity.csv"
BlockWord = Literal["needed", "not needed", "harmful", "cannot tell"]


@dataclass(frozen=True)
class BlockVerdict:
    """Does a network need an attention block? The answer over several scans.

    Example:
        for verdict in segkit.judge_attention(predictor, cases).verdicts:
            print(verdict.block, verdict.word, verdict.reason)
    """

    block: str
    """Its position, as in `attention_blocks`, or 'all blocks'."""
    word: BlockWord | None
    """'needed', 'not needed', 'harmful' (Dice rises without it) or 'cannot tell'; None if the scans
    have no references."""
    reason: str
    """One sentence with the deciding figures."""
    scans: int
    dice: float
    """Mean Dice over scans with all blocks."""
    dice_without: float
    """Mean Dice over scans with the block replaced by the identity."""
    dice_lost: float
    """The difference, a mean over scans; NaN without scans."""
    low: float
    high: float
    """95 % interval of the loss, by Student's t; NaN for fewer than two scans."""
    scans_where_it_matters: int
    """Scans in which Dice falls by more than 0.01."""
    p_needed: float
    p_not_needed: float
    p_harmful: float
    """P values, corrected for the number of blocks (Holm 1979)."""


@dataclass(frozen=True)
class AttentionStudy:
    """The worth of a network's attention: verdicts, each scan's Dice, and shares.

    Example:
        study = segkit.judge_attention(predictor, pairs)
        [(verdict.block, verdict.word) for verdict in study.verdicts]
        study.share.parameters_share_outside
    """

    verdicts: tuple[BlockVerdict, ...]
    """One for each block, and one for all of them if there are several."""
    ablations: tuple[Ablation, ...]
    """Dice of each scan, block and class; `map` is the block."""
    share: AttentionShare
    """Parameters and multiply-adds, of the whole network and outside attention."""
    blocks: tuple[str, ...] = field(default=())
    """The blocks of the network that were replaced."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers, for JSON."""
        return {
            "blocks": list(self.blocks),
            "share": {
                **asdict(self.share),
                "parameters_share_outside": self.share.parameters_share_outside,
                "multiply_adds_share_outside": self.share.multiply_adds_share_outside,
            },
            "verdicts": [vars(one) for one in self.verdicts],
            "ablation": [vars(row) for row in self.ablations],
        }

    def said(self) -> str:
        """One sentence on the share of the network outside attention."""
        share = self.share
        return (
            f"outside attention: {share.parameters_outside:,} of {share.parameters:,} parameters "
            f"({share.parameters_share_outside:.1%}) and {share.multiply_adds_outside / 1e9:.3g} "
            f"of {share.multiply_adds / 1e9:.3g} G multiply-adds of a window "
            f"({share.multiply_adds_share_outside:.1%})"
        )


def judge_attention(
    predictor: Predictor,
    cases: Iterable[tuple[Volume, Volume | None]],
    *,
    blocks: Collection[str] | None = None,
    unlabelled: Mapping[int, Collection[str]] = MappingProxyType({}),
    track: Track = untracked,
) -> AttentionStudy:
    """Dice of scans with each attention block replaced by the identity, and verdicts from it.

    Each scan is segmented once, once for each block, and once without any. About ten scans with
    references are needed for a verdict, more if there are many blocks.

    Args:
        predictor: runs the model, which may be of your own module (`described_model`). In an
            ensemble, only the first model is changed.
        cases: pairs of a scan and its reference labels, or None without a reference. Without a
            reference, Dice is computed against the unchanged segmentation, and there is no verdict.
            Pairs without a reference are used only if no pair has one.
        blocks: names as for `as_identity`; all of `attention_blocks` if None.
        unlabelled: for the index of a pair, the classes or regions that nobody labelled in its
            reference; they do not count there.
        track: reports the progress.

    Returns:
        Verdicts, the Dice behind them, and the share of the network outside attention.

    Raises:
        ModelError: if the model has no such attention block or does not call it, if several of its
            arguments may be its features, or if no output of it would leave them as they are.
        VolumeError: if a reference does not fit its scan, or has labels that the model does not
            know, if `unlabelled` names an unknown class or pair, or if there are no pairs or
            other values than pairs.

    Example:
        predictor = segkit.Predictor.load("runs/mine")
        pairs = [(segkit.read_volume(a), segkit.read_labels(b)) for a, b in files]
        segkit.judge_attention(predictor, pairs).verdicts
    """
    chosen = check_blocks(predictor, blocks)
    labelling = predictor.model.description.labelling
    rows: list[Ablation] = []
    for name, volume, reference, lacking in cases_to_judge(cases, unlabelled, labelling):
        rows += without_blocks(
            predictor,
            volume,
            reference,
            case=name,
            blocks=chosen,
            unlabelled=lacking,
            track=track,
        )
    return study_of(predictor, chosen, rows)


def check_blocks(predictor: Predictor, blocks: Collection[str] | None = None) -> tuple[str, ...]:
    """The attention blocks of the (first) model, each of which the identity can replace.

    Args:
        predictor: runs the model.
        blocks: names of blocks; all of them if None.

    Raises:
        ModelError: if there is none, if a block is not called, if several of its arguments may be
            its features, or if no output of it would leave them as they are.
    """
    network, image = predictor.model.network, _window(predictor)
    known = attention_blocks(network, image)
    if blocks is None and not known:
        raise ModelError(
            "expected a model with attention blocks, but none was found in this one; name them in "
            "Python (judge_attention(blocks=[…])), or train one with network.attention"
        )
    chosen = tuple(dict.fromkeys(known if blocks is None else blocks))
    if not chosen:
        raise ModelError(
            "expected the names of attention blocks, found an empty list; list some, or leave out "
            "blocks"
        )
    try:
        with as_identity(network, chosen), in_prediction(network):
            network(image)
    except ValueError as error:
        raise ModelError(str(error)) from error
    return chosen


def without_blocks(
    predictor: Predictor,
    volume: Volume,
    reference: Volume | None,
    *,
    case: str,
    blocks: Sequence[str],
    unlabelled: Collection[str] = (),
    track: Track = untracked,
) -> list[Ablation]:
    """Dice of one scan before and after each block is replaced by the identity, and all of them.

    Args:
        predictor: runs the model.
        volume: the scan.
        reference: its labels, or None to compare with the unchanged segmentation.
        case: name of the scan in the rows.
        blocks: from `check_blocks`.
        unlabelled: classes or regions that nobody labelled in the reference; they do not count.
        track: reports the progress.

    Returns:
        A row for each block and class that the reference contains, and one for their mean; no rows
        if it contains only background.

    Raises:
        VolumeError: if the reference does not fit the scan.
    """
    labelling = predictor.model.description.labelling
    target: Volume | None = None
    if reference is not None:
        scored = ScoredVolume(case, volume, reference)
        target = on_one_grid(scored, labelling).reference
        known = int(target.data.max()) < len(labelling.value_names)
        if known and not holds_foreground(target, labelling):
            return []
        check_case(scored, labelling)
    whole = predictor.numbers_of(volume)
    against: Against = "prediction" if target is None else "reference"
    target = whole if target is None else target
    lacking = unlabelled if reference is not None else ()
    before = class_dice(whole, target, labelling, lacking)
    if not before:
        return []
    trials: list[tuple[str, tuple[str, ...]]] = [(block, (block,)) for block in blocks]
    if len(blocks) > 1:
        trials.append((EVERY_BLOCK, tuple(blocks)))
    rows = []
    for name, replaced in track(trials, "blocks as the identity", len(trials)):
        with as_identity(predictor.model.network, replaced):
            after = class_dice(predictor.numbers_of(volume), target, labelling, lacking)
        rows += ablation_rows(case, name, "identity", against, before, after)
    return rows


def study_of(
    predictor: Predictor, blocks: Sequence[str], rows: Sequence[Ablation]
) -> AttentionStudy:
    """The verdicts from the Dice of scans, and the shares of the network outside attention.

    Args:
        predictor: runs the model.
        blocks: the blocks that were replaced.
        rows: rows from `without_blocks`.
    """
    share = attention_share(predictor.model.network, _window(predictor), blocks)
    return AttentionStudy(tuple(judge_blocks(rows)), tuple(rows), share, tuple(blocks))


def judge_blocks(rows: Sequence[Ablation]) -> list[BlockVerdict]:
    """A verdict on each block, in the order of the rows.

    The p values over scans are corrected by Holm's method for the number of blocks, and for testing
    both a fall and a rise:

    - needed: Dice falls, by 0.01 or more on average;
    - not needed: Dice changes by less than 0.01 on average, by two one-sided tests, and falls by
      more in fewer than a third of all scans;
    - harmful: Dice rises, by 0.01 or more on average;
    - cannot tell: all other cases.

    Args:
        rows: rows from `without_blocks`. Those without a reference are used only if none has one.
    """
    means = [row for row in rows if row.label is None]
    labelled = [row for row in means if row.against == "reference"]
    used = labelled or means
    by_block: dict[str, list[Ablation]] = {}
    for row in used:
        by_block.setdefault(row.map, []).append(row)
    falls = {block: [-row.change for row in found] for block, found in by_block.items()}
    without = holm([max(not_needed_ps(values)) for values in falls.values()])
    downwards = [needed_p(values) for values in falls.values()]
    upwards = [needed_p([-fall for fall in values]) for values in falls.values()]
    changed = holm([*downwards, *upwards])
    needed, harmful = changed[: len(falls)], changed[len(falls) :]
    return [
        _verdict(block, by_block[block], p_values, has_references=bool(labelled))
        for block, *p_values in zip(by_block, needed, without, harmful, strict=True)
    ]


def _verdict(
    block: str, rows: Sequence[Ablation], p_values: Sequence[float], *, has_references: bool
) -> BlockVerdict:
    """The verdict on one block.

    Args:
        block: its position, or 'all blocks'.
        rows: mean Dice of each scan with and without the block.
        p_values: corrected p values of needed, not needed and harmful.
        has_references: whether the scans have references.
    """
    words: tuple[BlockWord, ...] = ("needed", "not needed", "harmful")
    found = [word for word, p in zip(words, p_values, strict=True) if p <= SIGNIFICANT]
    word = (found or ["cannot tell"])[0] if has_references else None
    falls = [-row.change for row in rows]
    low, high = mean_interval(falls)
    old, new = mean_of([row.dice_before for row in rows]), mean_of([row.dice for row in rows])
    span = f" (95 % interval of the fall {low:+.3f} to {high:+.3f})" if math.isfinite(low) else ""
    said = {
        "needed": "the network needs it",
        "not needed": "the network does as well without it",
        "harmful": "the network does better without it",
        "cannot tell": "the evidence cannot tell",
        None: "there is no verdict without a reference",
    }[word]
    scans = counted(len(falls), "scan")
    what = "they are" if block == EVERY_BLOCK else "it is"
    reason = (
        f"Over {scans}, {said}: Dice {old:.3f}, and {new:.3f} if {what} the identity{span}; it "
        f"falls by more than {DICE_MARGIN:g} in {num_mattering(falls)} of {len(falls)}."
    )
    return BlockVerdict(
        block,
        word,
        reason,
        len(falls),
        old,
        new,
        mean_of(falls),
        low,
        high,
        num_mattering(falls),
        *p_values,
    )


def identity_tables(study: AttentionStudy) -> list[Table]:
    """The study as tables of a page."""
    share = study.share
    tables = [
        Table(
            "Dice with attention blocks as the identity",
            ["block", "verdict", "Dice", "without", "lost", "from", "to", "scans"],
            [
                [
                    one.block,
                    one.word or "no verdict",
                    *map(rounded, (one.dice, one.dice_without, one.dice_lost, one.low, one.high)),
                    one.scans,
                ]
                for one in study.verdicts
            ],
            note="Nothing is trained again. A block that costs no Dice does nothing that the rest "
            "of the network could not. One scan is too few for a verdict.",
        ),
        Table(
            "The network outside attention",
            ["", "whole", "outside attention", "share"],
            [
                [
                    "parameters",
                    share.parameters,
                    share.parameters_outside,
                    rounded(share.parameters_share_outside),
                ],
                [
                    "multiply-adds of a window",
                    int(share.multiply_adds),
                    int(share.multiply_adds_outside),
                    rounded(share.multiply_adds_share_outside),
                ],
            ],
            note="With all of these blocks as the identity.",
        ),
    ]
    return [table for table in tables if table.rows]


def block_cards(study: AttentionStudy) -> list[Verdict]:
    """The verdicts for a page."""
    return [
        Verdict(
            f"{one.block} as the identity",
            one.word or "no verdict",
            one.reason,
            {
                "scans": one.scans,
                "Dice lost": rounded(one.dice_lost),
                "from": rounded(one.low),
                "to": rounded(one.high),
                "p, needed": rounded(one.p_needed),
                "p, not needed": rounded(one.p_not_needed),
                "p, harmful": rounded(one.p_harmful),
            },
        )
        for one in study.verdicts
    ]


def _window(predictor: Predictor) -> torch.Tensor:
    """A window of zeros for the (first) model."""
    description = predictor.model.description
    device = next(predictor.model.network.parameters()).device
    return torch.zeros(1, description.channels_in, *description.volume_patch, device=device)
