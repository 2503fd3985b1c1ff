"""Ablation: how Dice changes if a gate map is opened, averaged, permuted or inverted.

Each map is edited through its map tap (`segkit.nn.map_tap`). Nothing is trained again. `mean`,
the mean over the whole scan, is the fair ablation: the features keep their mean scale, and only the
location of high values is lost, also if a map is constant in each window or slice.
`open` also changes the scale on which later layers were trained, so that Dice may fall or rise for
this reason. `permuted` keeps all values, but at random cells. `inverted` exchanges high and low
values.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from segkit.config.labels import Labelling
from segkit.errors import ModelError
from segkit.explain.heads.study import ScoredVolume, check_case, on_one_grid, overlap_with
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.nn.map_tap import Edit, MapInfo, editing
from segkit.system.progress import Track, untracked

AblationKind = Literal["open", "mean", "permuted", "inverted"]
"""The replacement of a map, in each window:

- open: 1 everywhere.
- mean: the map's mean over the whole scan, one number for each channel.
- permuted: the map's cells in random order.
- inverted: lowest + highest - map, with the ends of the map's range. If the range is infinite, with
  the lowest and highest value in the window.
"""
Replacement = AblationKind | Literal["identity"]
Against = Literal["reference", "prediction"]
OPERATIONS: tuple[AblationKind, ...] = get_args(AblationKind)
ABLATED = ("gate", "spatial")
"""Kinds of maps that are multiplied with features, cell by cell."""


@dataclass(frozen=True)
class Ablation:
    """Dice of one class of one case, before and after one operation on one map."""

    case: str
    map: str
    operation: Replacement
    """How the map was replaced; 'identity' if `map` is an attention block instead."""
    label: str | None
    """The class or region; None for the mean over those that the reference contains."""
    against: Against
    """The labels that Dice compares with: a reference, or without one the unedited prediction."""
    dice_before: float
    """Dice of the unedited prediction; 1 if compared with itself."""
    dice: float
    """Dice with the edited map."""
    change: float
    """dice - dice_before; it is below 0 if the operation hurts."""


def ablated_maps(predictor: Predictor) -> dict[str, MapInfo]:
    """The maps that can be ablated, by key: gates and spatial maps of the (first) model."""
    infos = predictor.model.network.maps()
    return {key: info for key, info in infos.items() if info.kind in ABLATED}


def check_gates(predictor: Predictor) -> tuple[str, ...]:
    """The keys of the maps that can be ablated.

    Raises:
        ModelError: if there is none.
    """
    keys = tuple(ablated_maps(predictor))
    if not keys:
        raise ModelError(
            "verdicts need a model with gates or spatial maps, but this one has none; train one "
            "with network.attention.skip=additive_grid"
        )
    return keys


class ScanMean:
    """The mean over a scan of each channel of a map, from the windows that the network processes.

    A cell counts once for each window that contains it. Cells that are not finite do not count.
    """

    def __init__(self) -> None:
        self.total = torch.zeros(1, dtype=torch.float64)
        self.count = torch.zeros(1, dtype=torch.int64)

    def observe(self, attention_map: Tensor) -> Tensor:
        """Add the windows of a batch. Returns the map unchanged, so that it is an edit."""
        values = attention_map.detach().float().transpose(0, 1).flatten(1)
        finite = values.isfinite()
        self.total = self.total + values.where(finite, 0).sum(dim=1).double().cpu()
        self.count = self.count + finite.sum(dim=1).cpu()
        return attention_map

    def replace(self, attention_map: Tensor) -> Tensor:
        """The map with the mean of each channel in every cell; an edit."""
        mean = (self.total / self.count).to(attention_map)
        return mean.view(1, -1, *[1] * (attention_map.ndim - 2)).expand_as(attention_map)

    def replace_channels(self, channels: Collection[int]) -> Edit:
        """The edit that replaces some channels by their means."""

        def edit(attention_map: Tensor) -> Tensor:
            edited = attention_map.clone()
            edited[:, list(channels)] = self.replace(attention_map)[:, list(channels)]
            return edited

        return edit


@contextmanager
def observing_means(network: nn.Module, keys: Collection[str]) -> Iterator[dict[str, ScanMean]]:
    """Means of maps, by key, of all windows that the network processes within this context."""
    means = {key: ScanMean() for key in keys}
    with editing(network, {key: mean.observe for key, mean in means.items()}):
        yield means


def operation_edit(
    info: MapInfo, operation: AblationKind, mean: ScanMean, *, seed: int = 0
) -> Edit:
    """The edit that replaces a map.

    Random orders are drawn from `seed`, a new one for each window. If several maps share a tap, as
    those of several gates do, their cells are permuted together.

    Args:
        info: the map, with the range of its values.
        operation: 'mean', 'open', 'permuted' or 'inverted'.
        mean: the map's mean over the scan.
        seed: seed of the random orders.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffle(attention_map: Tensor) -> Tensor:
        cells = attention_map.flatten(2)
        orders = [torch.randperm(cells.shape[2], generator=generator) for _ in cells]
        shuffled = [values[:, order] for values, order in zip(cells, orders, strict=True)]
        return torch.stack(shuffled).view_as(attention_map)

    def invert(attention_map: Tensor) -> Tensor:
        if info.highest < torch.inf:
            return info.lowest + info.highest - attention_map
        cells = tuple(range(2, attention_map.ndim))
        ends = attention_map.amin(cells, keepdim=True) + attention_map.amax(cells, keepdim=True)
        return ends - attention_map

    match operation:
        case "open":
            return torch.ones_like
        case "mean":
            return mean.replace
        case "permuted":
            return shuffle
        case "inverted":
            return invert


def ablate(
    predictor: Predictor,
    volume: Volume,
    reference: Volume | None = None,
    *,
    case: str,
    keys: Collection[str] | None = None,
    operations: Sequence[AblationKind] = OPERATIONS,
    seed: int = 0,
    unlabelled: Collection[str] = (),
    track: Track = untracked,
) -> list[Ablation]:
    """Dice before and after each operation on each map.

    Without a reference, Dice compares with the unedited prediction. It then says how much the map
    matters to the network, not whether the network is right. If this prediction contains only
    background, there are no rows. In an ensemble, only the first model is edited; the labels are
    those of the ensemble. The volume is segmented once, and once more for each map and operation.

    Args:
        predictor: runs the model.
        volume: the scan.
        reference: its labels, or None.
        case: name of the scan in the rows.
        keys: the maps; all gates and spatial maps if None.
        operations: the operations on each map.
        seed: seed of the random orders.
        unlabelled: classes or regions that nobody labelled in the reference; they do not count.
        track: reports the progress.

    Returns:
        A row for each map, operation and class that the reference contains, and one for their mean.

    Raises:
        VolumeError: if the reference does not fit the volume or contains only background.
    """
    labelling = predictor.model.description.labelling
    if reference is not None:
        scored = ScoredVolume(case, volume, reference)
        check_case(scored, labelling)
        reference = on_one_grid(scored, labelling).reference
    infos = ablated_maps(predictor)
    chosen = infos if keys is None else {key: infos[key] for key in keys}
    with observing_means(predictor.model.network, chosen) as means:
        whole = predictor.numbers_of(volume)
    target = whole if reference is None else reference
    lacking = unlabelled if reference is not None else ()
    before = class_dice(whole, target, labelling, lacking)
    if not before:
        return []
    trials = [(key, operation) for key in chosen for operation in operations]
    rows = []
    for key, operation in track(trials, "ablating maps", len(trials)):
        edit = operation_edit(infos[key], operation, means[key], seed=seed)
        with editing(predictor.model.network, {key: edit}):
            after = class_dice(predictor.numbers_of(volume), target, labelling, lacking)
        against: Against = "prediction" if reference is None else "reference"
        rows += ablation_rows(case, key, operation, against, before, after)
    return rows


def ablation_rows(
    case: str,
    key: str,
    operation: Replacement,
    against: Against,
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> list[Ablation]:
    """A row for the mean over classes, and one for each class, from Dice before and after.

    Args:
        case: name of the scan.
        key: key of the map, or name of the block.
        operation: the operation on it.
        against: the labels that Dice compares with: 'reference' or 'prediction'.
        before, after: Dice of each class without and with the operation.
    """
    rows = []
    for label in (None, *before):
        old, new = (_of(scores, label) for scores in (before, after))
        rows.append(Ablation(case, key, operation, label, against, old, new, new - old))
    return rows


def class_dice(
    found: Volume, reference: Volume, labelling: Labelling, unlabelled: Collection[str] = ()
) -> dict[str, float]:
    """Dice of every class or region that the reference contains, except those in `unlabelled`."""
    overlap = overlap_with(found, reference, labelling)
    held = (overlap.true_positive + overlap.false_negative > 0).tolist()
    scores = zip(labelling.members, overlap.dice.tolist(), held, strict=True)
    return {label: dice for label, dice, there in scores if there and label not in unlabelled}


def _of(scores: Mapping[str, float], label: str | None) -> float:
    return sum(scores.values()) / len(scores) if label is None else scores[label]
