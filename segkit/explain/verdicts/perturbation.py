"""Does the segmentation rest on the image where a map is high? Deletion and insertion curves.

    deletion     the image under the map's highest cells is replaced, more and more of it
    insertion    nothing but replacement at first, and the image comes back, the highest cells first

Samek et al. (2017, arXiv:1509.06321) and Petsiuk et al. (2018, arXiv:1806.07421). A map that points
at what matters makes the first curve fall and the second rise sooner than random orders of the same
blocks do. Compared with those alone: how fast a network breaks on images it never saw says more
about the network than about any map.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from numpy import ndarray
from scipy.integrate import trapezoid
from scipy.ndimage import gaussian_filter
from torch import Tensor

from segkit.explain.measures.ranks import settled
from segkit.explain.verdicts.first_model import slabs_of_first
from segkit.geometry.grid import Grid
from segkit.geometry.resample import nearest
from segkit.inference.attention_maps import AttentionMap
from segkit.inference.engines.torch_eager import LOGITS
from segkit.inference.predictor import Predictor
from segkit.inference.windows import Slab
from segkit.io.volume import Volume
from segkit.system.progress import Track, untracked

FRACTIONS = tuple(tenth / 10 for tenth in range(11))
"""Of the cells that are replaced. They are alike seen from either end."""
RANDOM_ORDERS = 5

Score = Callable[[Float[Tensor, "channel x y z"]], float]


@dataclass(frozen=True)
class PerturbationCurve:
    """How a prediction holds while the image is deleted, or inserted, in the order of a map."""

    case: str
    map: str
    mode: Literal["deletion", "insertion"]
    label: str | None
    """The class that is scored; None for the mean over those that were predicted."""
    fractions: tuple[float, ...]
    """Of the cells that are deleted, or inserted."""
    scores: tuple[float, ...]
    """Soft Dice with the unperturbed prediction at each fraction."""
    random_scores: tuple[float, ...]
    """… in random orders, their mean."""
    auc: float
    """Area under the scores, by trapezoids."""
    random_auc: float
    random_spread: float
    """Standard deviation of the areas of random orders."""
    difference: float
    """auc - random_auc."""

    @property
    def gain(self) -> float:
        """The difference, turned so that above 0 is better than random in both modes."""
        return self.difference if self.mode == "insertion" else -self.difference


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which voxels of an image lie under each cell of a map: those it is the nearest cell of."""

    shape: tuple[int, int, int]
    """Of the map."""
    cells: tuple[ndarray, ndarray, ndarray]
    """Along each axis, the cell of each voxel."""

    @classmethod
    def of(cls, cells: Grid, image: Grid) -> Self:
        """The blocks of a map's grid in an image's."""
        x, y, z = (
            nearest(positions).clip(0, size - 1).astype(int)
            for positions, size in zip(cells.positions_of(image), cells.shape, strict=True)
        )
        return cls(cells.shape, (x, y, z))

    def first(self, order: Integer[ndarray, " cells"], count: int) -> Bool[Tensor, "x y z"]:
        """The voxels under the first `count` cells of an order."""
        chosen = np.zeros(len(order), bool)
        chosen[order[:count]] = True
        return torch.from_numpy(chosen.reshape(self.shape)[np.ix_(*self.cells)])


def cell_order(values: Float[ndarray, "x y z"], *, seed: int = 0) -> Integer[ndarray, " cells"]:
    """Flat numbers of a map's cells, the highest first; those of one value in a random order.

    So a constant map has a random order, and not that of memory, which would sweep the image.
    Values that differ in their last digits alone are the same.
    """
    draws = np.random.default_rng(seed).random(values.size)
    return np.lexsort((draws, -settled(values).ravel()))


def deletion_scores(
    image: Float[Tensor, "channel x y z"],
    replacement: Float[Tensor, "channel x y z"],
    blocks: Blocks,
    order: Integer[ndarray, " cells"],
    score: Score,
    *,
    fractions: Sequence[float] = FRACTIONS,
) -> list[float]:
    """The score of an image of which the first cells are replaced, fraction by fraction."""
    counts = [round(fraction * len(order)) for fraction in fractions]
    return [score(torch.where(blocks.first(order, count), replacement, image)) for count in counts]


def insertion_scores(
    image: Float[Tensor, "channel x y z"],
    replacement: Float[Tensor, "channel x y z"],
    blocks: Blocks,
    order: Integer[ndarray, " cells"],
    score: Score,
    *,
    fractions: Sequence[float] = FRACTIONS,
) -> list[float]:
    """The score of an image of which but the first cells are replaced, fraction by fraction.

    Inserting some first is deleting the others first, seen from the other end.
    """
    left = [1 - fraction for fraction in reversed(fractions)]
    return deletion_scores(image, replacement, blocks, order[::-1], score, fractions=left)[::-1]


class SoftDiceToFirst:
    """Soft Dice of what a network makes of an image with what it made of the first one.

    2 Σ p q / (Σ p² + Σ q²) over the voxels of the network's grid, of a class's probabilities p and,
    unperturbed, q (Milletari et al. 2016, arXiv:1606.04797, Eq. 3): 1 for the image itself. Mean
    over the classes or regions, of `labels`, that are predicted somewhere. It is the first model's,
    and without mirror images.
    """

    def __init__(
        self, predictor: Predictor, image: Float[Tensor, "channel x y z"], labels: Sequence[str]
    ) -> None:
        self.predictor = predictor
        labelling = predictor.members[0].model.description.labelling
        self.regions = labelling.written is not None
        outputs = [labelling.outputs.index(label) for label in labels]
        self.expected: list[Tensor] = []
        found = torch.zeros(len(outputs), dtype=torch.bool)
        for slab in self._walk(image):
            shares = self._probabilities(slab)
            if self.regions:
                held = [bool((shares[output] > 0.5).any()) for output in outputs]
            else:
                winners = shares.argmax(dim=0)
                held = [bool((winners == output).any()) for output in outputs]
            found |= torch.tensor(held)
            # Half precision holds a probability to a thousandth, in half the memory.
            self.expected.append(shares[outputs].half().cpu())
        self.labels = [label for label, there in zip(labels, found, strict=True) if there]
        self.outputs = [output for output, there in zip(outputs, found, strict=True) if there]
        self.expected = [shares[found] for shares in self.expected]

    def __call__(self, image: Float[Tensor, "channel x y z"]) -> float:
        """The mean over classes of an image's agreement with the first one's."""
        both = torch.zeros(len(self.outputs), dtype=torch.float64)
        size = torch.zeros(len(self.outputs), dtype=torch.float64)
        for slab, held in zip(self._walk(image), self.expected, strict=True):
            shares = self._probabilities(slab)[self.outputs]
            expected = held.to(shares)
            both += (shares * expected).flatten(1).sum(dim=1).double().cpu()
            size += (shares**2 + expected**2).flatten(1).sum(dim=1).double().cpu()
        return float((2 * both / size).mean())

    def _probabilities(self, slab: Slab) -> Tensor:
        logits = slab.rows[LOGITS]
        return logits.sigmoid() if self.regions else logits.softmax(dim=0)

    def _walk(self, image: Tensor) -> Iterable[Slab]:
        engine = self.predictor.members[0].engine
        return slabs_of_first(self.predictor, image, lambda windows: engine(windows, ()))


def perturb(
    predictor: Predictor,
    volume: Volume,
    maps: Mapping[str, AttentionMap],
    *,
    case: str,
    label: str | None = None,
    blur_mm: float | None = None,
    seed: int = 0,
    track: Track = untracked,
) -> list[PerturbationCurve]:
    """Deletion and insertion curves of every map that has a place, saliency among them.

    Cells of several maps in one, as of several gates, count by their mean. What is replaced becomes
    its channel's mean, or, with `blur_mm`, the image blurred by a Gaussian of that sigma. Labels of
    a first stage stay. There are no curves where the class, or any class, is predicted nowhere.

    Takes 22 passes over the volume per map, and 45 per grid on which maps lie, for random orders.
    """
    prepared = predictor.prepare(volume)
    image, labelling = prepared.image, predictor.model.description.labelling
    foreground = list(labelling.members) if label is None else [label]
    agreement = SoftDiceToFirst(predictor, image, foreground)
    if not agreement.labels:
        return []
    num_channels = len(predictor.model.description.channels)
    replacement = image.clone()
    sigma = None if blur_mm is None else [blur_mm / mm for mm in prepared.grid.spacing]
    for channel in replacement[:num_channels]:
        if sigma is None:
            channel.fill_(channel.mean())
        else:
            channel.copy_(torch.from_numpy(gaussian_filter(channel.numpy(), sigma)))
    random_scores: dict[bytes, ndarray] = {}
    curves = []
    placed = {key: found.volume for key, found in maps.items() if found.volume is not None}
    for key, values in track(list(placed.items()), "deleting and inserting", len(placed)):
        blocks = Blocks.of(values.grid, prepared.grid)
        same = b"".join(axis.tobytes() for axis in blocks.cells)
        if same not in random_scores:
            random = np.random.default_rng((seed, 1))
            orders = [random.permutation(int(np.prod(blocks.shape))) for _ in range(RANDOM_ORDERS)]
            # But for both ends, which are the same for any order.
            inner = FRACTIONS[1:-1]
            random_scores[same] = np.array(
                [
                    deletion_scores(image, replacement, blocks, order, agreement, fractions=inner)
                    for order in orders
                ]
            )
        cells = values.data.reshape(*blocks.shape, -1).mean(axis=3)
        order = cell_order(cells, seed=seed)
        deleted = deletion_scores(image, replacement, blocks, order, agreement)
        inserted = insertion_scores(image, replacement, blocks, order, agreement)
        ends = np.array([[deleted[0]], [deleted[-1]]]).repeat(RANDOM_ORDERS, axis=1)
        by_chance = np.column_stack([ends[0], random_scores[same], ends[1]])
        curves.append(_curve(case, key, "deletion", label, deleted, by_chance))
        # Each random order, from its end, is one of insertion.
        curves.append(_curve(case, key, "insertion", label, inserted, by_chance[:, ::-1]))
    return curves


def _curve(
    case: str,
    key: str,
    mode: Literal["deletion", "insertion"],
    label: str | None,
    scores: Sequence[float],
    random: Float[ndarray, "orders fractions"],
) -> PerturbationCurve:
    auc = float(trapezoid(scores, FRACTIONS))
    areas = trapezoid(random, FRACTIONS, axis=1)
    return PerturbationCurve(
        case,
        key,
        mode,
        label,
        FRACTIONS,
        tuple(scores),
        tuple(random.mean(axis=0).tolist()),
        auc,
        float(areas.mean()),
        float(areas.std(ddof=1)),
        auc - float(areas.mean()),
    )
