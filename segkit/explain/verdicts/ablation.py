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
from segkit.errors import ModelError
from segkit.explain.heads.study import ScoredVolume, check_case, on_one_grid, overlap_with
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


def ablated_maps(predictor: Predictor) -> dict[str, MapInfo]:
    """The maps that can be ablated, by key: gates and spatial maps of the first model."""
    infos = predictor.model.network.maps()
    return {key: info for key, info in infos.items() if info.kind in ABLATED}


def check_gates(predictor: Predictor) -> tuple[str, ...]:
    """The keys of the maps that can be taken out. Raises ModelError where there is none."""
    keys = tuple(ablated_maps(predictor))
    if not keys:
        raise ModelError(
            "verdicts are of gates and spatial maps, and the model has none; train one with "
            "network.attention.skip=additive_grid"
        )
    return keys


def operation_edit(info: MapInfo, operation: AblationKind, *, seed: int = 0) -> Edit:
    """The edit that replaces a map; each has a random order of its own, drawn from `seed`.

    Where several maps share a tap, as of several gates, their cells are shuffled together.
    """
    generator = torch.Generator().manual_seed(seed)

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


def even_out(attention_map: Tensor) -> Tensor:
    """A map of which every cell holds the mean over cells, channel by channel and window."""
    cells = tuple(range(2, attention_map.ndim))
    return attention_map.mean(dim=cells, keepdim=True).expand_as(attention_map)


def even_out_channels(channels: Collection[int] | None) -> Edit:
    """The edit that evens out some channels of a map, all if None, and leaves the others."""
    if channels is None:
        return even_out

    def edit(attention_map: Tensor) -> Tensor:
        chosen = torch.zeros(attention_map.shape[1], dtype=torch.bool)
        chosen[list(channels)] = True
        kept = chosen.to(attention_map.device).view(1, -1, *[1] * (attention_map.ndim - 2))
        return torch.where(kept, even_out(attention_map), attention_map)

    return edit


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


def class_dice(found: Volume, reference: Volume, labelling: Labelling) -> dict[str, float]:
    """Dice of every class or region that the reference holds."""
    overlap = overlap_with(found, reference, labelling)
    held = (overlap.true_positive + overlap.false_negative > 0).tolist()
    scores = zip(labelling.members, overlap.dice.tolist(), held, strict=True)
    return {label: dice for label, dice, there in scores if there}


def _of(scores: dict[str, float], label: str | None) -> float:
    return sum(scores.values()) / len(scores) if label is None else scores[label]
