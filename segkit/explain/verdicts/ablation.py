"""What becomes of the segmentation when a gate is opened, evened out, shuffled or turned over.

Each map is edited through its tap, so nothing is trained again. Evening out (`mean`) is the fair
operation: the features keep their scale on average and lose only *where* the map is high. `open`
also changes their scale, on which the layers behind were trained, so that it may hurt, or help,
whatever the map says; `permuted` keeps all values and loses their places; `inverted` looks where
the map does not.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from segkit.config.labels import Labelling
from segkit.explain.heads.study import ScoredVolume, check_case, on_one_grid, overlap_with
from segkit.explain.measures.ranks import holm, signed_rank_p
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.nn.map_tap import Edit, MapInfo, editing
from segkit.system.progress import Track, untracked

AblationKind = Literal["open", "mean", "permuted", "inverted"]
"""What a map is replaced with, in each window:

- open: 1 everywhere.
- mean: its own mean over cells.
- permuted: its own cells, shuffled.
- inverted: lowest + highest - map, of what its values may be, or where that has no end of what they
  are in the window.
"""
OPERATIONS: tuple[AblationKind, ...] = get_args(AblationKind)
ABLATED = ("gate", "spatial")
"""Kinds of maps that features are multiplied with, cell by cell."""
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Ablation:
    """What one operation on one map does to one class of one case."""

    case: str
    map: str
    operation: AblationKind
    label: str | None
    """The class or region; None for the mean over those that the reference holds."""
    against: Literal["reference", "prediction"]
    """What Dice is taken with: a reference, or where there is none the unedited prediction."""
    dice_before: float
    """Of the unedited prediction; 1 against itself."""
    dice: float
    change: float
    """dice - dice_before: below 0 where the operation hurts."""


@dataclass(frozen=True)
class AblationEffect:
    """What one operation on one map does over cases."""

    map: str
    operation: AblationKind
    label: str | None
    against: Literal["reference", "prediction"]
    cases: int
    mean_change: float
    """Of Dice."""
    hurt: int
    """Cases whose Dice falls."""
    p_value: float | None
    """Of Wilcoxon's signed-rank test over cases; None of a single one."""
    p_holm: float | None
    """… corrected for all maps and operations."""
    testable: bool
    """Whether so few cases could be significant at all: of n, p is no less than 2^(1 - n)."""


def ablated_maps(predictor: Predictor) -> dict[str, MapInfo]:
    """The maps that can be ablated, by key: gates and spatial maps of the first model."""
    infos = predictor.model.network.maps()
    return {key: info for key, info in infos.items() if info.kind in ABLATED}


def operation_edit(info: MapInfo, operation: AblationKind, *, seed: int = 0) -> Edit:
    """The edit that replaces a map; each has a random order of its own, drawn from `seed`.

    Where several maps share a tap, as of several gates, their cells are shuffled together.
    """
    generator = torch.Generator().manual_seed(seed)

    def even_out(attention_map: Tensor) -> Tensor:
        cells = tuple(range(2, attention_map.ndim))
        return attention_map.mean(dim=cells, keepdim=True).expand_as(attention_map)

    def shuffle(attention_map: Tensor) -> Tensor:
        cells = attention_map.flatten(2)
        orders = [torch.randperm(cells.shape[2], generator=generator) for _ in cells]
        shuffled = [values[:, order] for values, order in zip(cells, orders, strict=True)]
        return torch.stack(shuffled).view_as(attention_map)

    def turn_over(attention_map: Tensor) -> Tensor:
        if info.highest < torch.inf:
            return info.lowest + info.highest - attention_map
        cells = tuple(range(2, attention_map.ndim))
        ends = attention_map.amin(cells, keepdim=True) + attention_map.amax(cells, keepdim=True)
        return ends - attention_map

    match operation:
        case "open":
            return torch.ones_like
        case "mean":
            return even_out
        case "permuted":
            return shuffle
        case "inverted":
            return turn_over


def ablate(
    predictor: Predictor,
    volume: Volume,
    reference: Volume | None = None,
    *,
    case: str,
    keys: Collection[str] | None = None,
    operations: Sequence[AblationKind] = OPERATIONS,
    seed: int = 0,
    track: Track = untracked,
) -> list[Ablation]:
    """A row per map, operation and class that the reference holds, and one for their mean.

    Without a reference the unedited prediction is it: how much the map matters to the network,
    whether or not it is right. There are no rows where that holds background alone. Of several
    models the first alone is edited, and the labels are those of all. Takes a prediction per map
    and operation, and one.

    Raises VolumeError for a reference that does not fit its volume or holds nothing.
    """
    labelling = predictor.model.description.labelling
    if reference is not None:
        scored = ScoredVolume(case, volume, reference)
        check_case(scored, labelling)
        reference = on_one_grid(scored, labelling).reference
    whole = predictor.numbers_of(volume)
    target = whole if reference is None else reference
    before = class_dice(whole, target, labelling)
    if not before:
        return []
    infos = ablated_maps(predictor)
    chosen = infos if keys is None else {key: infos[key] for key in keys}
    trials = [(key, operation) for key in chosen for operation in operations]
    rows = []
    for key, operation in track(trials, "ablating maps", len(trials)):
        edit = operation_edit(infos[key], operation, seed=seed)
        with editing(predictor.model.network, {key: edit}):
            after = class_dice(predictor.numbers_of(volume), target, labelling)
        for label in (None, *before):
            old, new = (_of(scores, label) for scores in (before, after))
            against: Literal["reference", "prediction"] = (
                "prediction" if reference is None else "reference"
            )
            rows.append(Ablation(case, key, operation, label, against, old, new, new - old))
    return rows


def ablation_effects(rows: Sequence[Ablation], *, label: str | None = None) -> list[AblationEffect]:
    """Over cases, what each operation on each map does to one class, or to the mean over classes.

    The p values are corrected by Holm's method for all that is returned. Changes against
    predictions are never above 0, so that their p values speak of any difference, not of harm.
    """
    groups: dict[tuple[str, AblationKind], list[Ablation]] = {}
    for row in rows:
        if row.label == label:
            groups.setdefault((row.map, row.operation), []).append(row)
    changes = [[row.change for row in group] for group in groups.values()]
    p_values = [signed_rank_p(values) if len(values) > 1 else None for values in changes]
    corrected = iter(holm([p for p in p_values if p is not None]))
    return [
        AblationEffect(
            group[0].map,
            group[0].operation,
            label,
            group[0].against,
            len(values),
            sum(values) / len(values),
            sum(value < 0 for value in values),
            p,
            None if p is None else next(corrected),
            len(groups) * 2.0 ** (1 - len(values)) < SIGNIFICANT,
        )
        for group, values, p in zip(groups.values(), changes, p_values, strict=True)
    ]


def class_dice(found: Volume, reference: Volume, labelling: Labelling) -> dict[str, float]:
    """Dice of every class or region that the reference holds."""
    overlap = overlap_with(found, reference, labelling)
    held = (overlap.true_positive + overlap.false_negative > 0).tolist()
    scores = zip(labelling.members, overlap.dice.tolist(), held, strict=True)
    return {label: dice for label, dice, there in scores if there}


def _of(scores: dict[str, float], label: str | None) -> float:
    return sum(scores.values()) / len(scores) if label is None else scores[label]
