"""Does the segmentation rest on the image where a map is high? Deletion curves.

The image under the first cells of an order is replaced, more and more of it, and the prediction is
compared with that of the whole image (Samek et al. 2017, arXiv:1509.06321; Petsiuk et al. 2018,
arXiv:1806.07421). The sooner the prediction falls, the more the order points at what matters to the
network. A curve says something only beside those of other orders of the same cells: how fast a
network breaks on images that it never saw says more about the network than about any map.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from numpy import ndarray
from scipy.integrate import trapezoid
from torch import Tensor

from segkit.explain.measures.measure_maps import FOREGROUND
from segkit.explain.measures.ranks import settled
from segkit.geometry.grid import Grid
from segkit.geometry.resample import nearest
from segkit.inference.engines.torch_eager import LOGITS
from segkit.inference.predictor import Predictor
from segkit.inference.source_rows import WALK_AXIS
from segkit.inference.windows import Slab, WindowPlace, stream

FRACTIONS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Of the cells that are replaced."""

Score = Callable[[Float[Tensor, "channel x y z"]], Mapping[str, float]]
"""From an image to how well the prediction of each structure holds."""


@dataclass(frozen=True)
class DeletionCurve:
    """How the prediction of a structure holds while the image is deleted in one order."""

    structure: str
    fractions: tuple[float, ...]
    """Of the cells that are deleted."""
    scores: tuple[float, ...]
    """Soft Dice with the unperturbed prediction at each fraction."""

    @property
    def area(self) -> float:
        """Under the scores, by trapezoids: the lower, the sooner the prediction falls."""
        return float(trapezoid(self.scores, self.fractions))


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
        chosen = np.zeros(int(np.prod(self.shape)), bool)
        chosen[order[:count]] = True
        return torch.from_numpy(chosen.reshape(self.shape)[np.ix_(*self.cells)])


def cell_order(values: Float[ndarray, "x y z"], *, seed: int = 0) -> Integer[ndarray, " cells"]:
    """Flat numbers of a map's known cells, the highest first; those of one value in random order.

    So a constant map has a random order, and not that of memory, which would sweep the image.
    Values that differ in their last digits only are the same. Cells that are NaN have no place.
    """
    flat = values.ravel()
    known = np.flatnonzero(np.isfinite(flat))
    draws = np.random.default_rng(seed).random(known.size)
    return known[np.lexsort((draws, -settled(flat[known])))]


def mean_of_channels(image: Float[Tensor, "channel x y z"], num_channels: int) -> Tensor:
    """An image of which the first channels hold their means; those of a first stage stay."""
    replacement = image.clone()
    for channel in replacement[:num_channels]:
        channel.fill_(channel.mean())
    return replacement


def deletion_curves(
    image: Float[Tensor, "channel x y z"],
    replacement: Float[Tensor, "channel x y z"],
    blocks: Blocks,
    order: Integer[ndarray, " cells"],
    score: Score,
    *,
    fractions: Sequence[float] = FRACTIONS,
) -> list[DeletionCurve]:
    """The curve of each structure that is scored, the first cells of an order replaced first."""
    found: dict[str, list[float]] = {}
    for fraction in fractions:
        deleted = blocks.first(order, round(fraction * len(order)))
        for structure, value in score(torch.where(deleted, replacement, image)).items():
            found.setdefault(structure, []).append(value)
    return [DeletionCurve(name, tuple(fractions), tuple(found[name])) for name in found]


class SoftDiceToFirst:
    """Soft Dice of what a network makes of an image with what it made of the first one.

    2 Σ p q / (Σ p² + Σ q²) over the voxels of the network's grid, of a structure's probabilities p
    and, unperturbed, q (Milletari et al. 2016, arXiv:1606.04797, Eq. 3): 1 for the image itself. Of
    the structures that are predicted somewhere, and of several their mean as FOREGROUND. It is the
    first model's, and without mirror images.

    Args:
        predictor: of the model.
        image: the first one, as the network sees it.
        structures: names of classes or regions.
        skip: windows that the network is not asked about.
    """

    def __init__(
        self,
        predictor: Predictor,
        image: Float[Tensor, "channel x y z"],
        structures: Sequence[str],
        *,
        skip: Collection[WindowPlace] = (),
    ) -> None:
        self.member = predictor.members[0]
        self.skip = skip
        labelling = self.member.model.description.labelling
        self.regions = labelling.written is not None
        outputs = [labelling.outputs.index(name) for name in structures]
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
        self.structures = [name for name, there in zip(structures, found, strict=True) if there]
        self.outputs = [output for output, there in zip(outputs, found, strict=True) if there]
        self.expected = [shares[found] for shares in self.expected]
        self.several = len(structures) > 1

    def __call__(self, image: Float[Tensor, "channel x y z"]) -> dict[str, float]:
        """How far an image's probabilities of each structure agree with the first one's."""
        both = torch.zeros(len(self.outputs), dtype=torch.float64)
        size = torch.zeros(len(self.outputs), dtype=torch.float64)
        for slab, held in zip(self._walk(image), self.expected, strict=True):
            shares = self._probabilities(slab)[self.outputs]
            expected = held.to(shares)
            both += (shares * expected).flatten(1).sum(dim=1).double().cpu()
            size += (shares**2 + expected**2).flatten(1).sum(dim=1).double().cpu()
        scores = dict(zip(self.structures, (2 * both / size).tolist(), strict=True))
        if self.several and scores:
            scores[FOREGROUND] = sum(scores.values()) / len(scores)
        return scores

    def _probabilities(self, slab: Slab) -> Tensor:
        logits = slab.rows[LOGITS]
        return logits.sigmoid() if self.regions else logits.softmax(dim=0)

    def _walk(self, image: Tensor) -> Iterator[Slab]:
        engine = self.member.engine
        return stream(
            image,
            lambda windows: engine(windows, ()),
            self.member.layout,
            axis=WALK_AXIS,
            batch_size=self.member.batch_size,
            skip=self.skip,
            unseen={LOGITS: self.member.background()},
        )
