"""Deletion curves: does the segmentation depend on the parts of the image with high map values?

Cells are ordered by a map. The image under the first cells is replaced, more of it in each step,
and the prediction is compared with that of the whole image (Samek et al. 2017, arXiv:1509.06321;
Petsiuk et al. 2018, arXiv:1806.07421). The earlier the prediction changes, the better the order
finds the image parts that the network uses. Compare a curve only with curves of other orders of the
same cells; a single curve mostly shows how the network reacts to images unlike its training images.
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

from segkit.explain.measures.measure_maps import name_of_all
from segkit.explain.measures.ranks import without_rounding_noise
from segkit.geometry.grid import Grid
from segkit.geometry.resample import nearest
from segkit.inference.engines.torch_eager import LOGITS
from segkit.inference.predictor import Predictor
from segkit.inference.source_rows import WALK_AXIS
from segkit.inference.windows import Slab, WindowPlace, stream

FRACTIONS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Shares of cells that are replaced."""

Score = Callable[[Float[Tensor, "channel x y z"]], Mapping[str, float]]
"""A function from an image to a score of each structure's prediction."""


@dataclass(frozen=True)
class DeletionCurve:
    """Score of a structure's prediction while the image is deleted in one order."""

    structure: str
    fractions: tuple[float, ...]
    """Shares of cells that are deleted."""
    scores: tuple[float, ...]
    """Soft Dice with the prediction of the whole image, for each share."""

    @property
    def area(self) -> float:
        """Area under the curve, by trapezoids. It is low if the prediction changes early."""
        return float(trapezoid(self.scores, self.fractions))


@dataclass(frozen=True, eq=False)
class Blocks:
    """The voxels of an image under each cell of a map. A voxel belongs to its nearest cell."""

    shape: tuple[int, int, int]
    """Shape of the map."""
    cells: tuple[ndarray, ndarray, ndarray]
    """For each axis, the cell index of each voxel index."""

    @classmethod
    def of(cls, cells: Grid, image: Grid) -> Self:
        """The blocks of a map's grid `cells` in the grid `image`."""
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
    """Flat indices of a map's cells, the highest value first, without NaN cells.

    Cells of equal value are in random order. A constant map therefore has a random order; memory
    order would delete the image from one side to the other. Values that differ only by rounding
    noise count as equal.
    """
    flat = values.ravel()
    known = np.flatnonzero(np.isfinite(flat))
    draws = np.random.default_rng(seed).random(known.size)
    return known[np.lexsort((draws, -without_rounding_noise(flat[known])))]


def mean_of_channels(image: Float[Tensor, "channel x y z"], num_channels: int) -> Tensor:
    """An image whose first `num_channels` channels are replaced by their means.

    The other channels, which come from a first stage, are kept.
    """
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
    """The deletion curve of each structure.

    Args:
        image: the image as the network receives it.
        replacement: the values of deleted voxels.
        blocks: the voxels under each cell.
        order: flat indices of cells, the first to delete first.
        score: scores the prediction of an image.
        fractions: shares of cells to delete.
    """
    found: dict[str, list[float]] = {}
    for fraction in fractions:
        deleted = blocks.first(order, round(fraction * len(order)))
        for structure, value in score(torch.where(deleted, replacement, image)).items():
            found.setdefault(structure, []).append(value)
    return [DeletionCurve(name, tuple(fractions), tuple(found[name])) for name in found]


class SoftDiceToFirst:
    """Soft Dice between the prediction of an image and that of the original image.

    2 Σ p q / (Σ p² + Σ q²) over the voxels of the network's grid, with a structure's probabilities
    p for the image and q for the original (Milletari et al. 2016, arXiv:1606.04797, Eq. 3). It is 1
    for the original itself. Only structures that are predicted in the original have a score; if the
    model has several structures, their mean has the name of `name_of_all`. Only the first model of
    an ensemble is used, without mirroring.

    Args:
        predictor: runs the model.
        image: the original image, as the network receives it.
        structures: names of classes or regions.
        skip: windows that the network does not process.
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
        self.all = name_of_all(labelling)
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
            # Half precision keeps a probability to a thousandth, in half the memory.
            self.expected.append(shares[outputs].half().cpu())
        self.structures = [name for name, there in zip(structures, found, strict=True) if there]
        self.outputs = [output for output, there in zip(outputs, found, strict=True) if there]
        self.expected = [shares[found] for shares in self.expected]
        self.several = len(structures) > 1

    def __call__(self, image: Float[Tensor, "channel x y z"]) -> dict[str, float]:
        """Soft Dice of each structure between an image and the original."""
        both = torch.zeros(len(self.outputs), dtype=torch.float64)
        size = torch.zeros(len(self.outputs), dtype=torch.float64)
        for slab, held in zip(self._walk(image), self.expected, strict=True):
            shares = self._probabilities(slab)[self.outputs]
            expected = held.to(shares)
            both += (shares * expected).flatten(1).sum(dim=1).double().cpu()
            size += (shares**2 + expected**2).flatten(1).sum(dim=1).double().cpu()
        scores = dict(zip(self.structures, (2 * both / size).tolist(), strict=True))
        if self.several and scores:
            scores[self.all] = sum(scores.values()) / len(scores)
        return scores

    def _probabilities(self, slab: Slab) -> Tensor:
        logits = slab.rows[LOGITS]
        return logits.sigmoid() if self.regions else logits.softmax(dim=0)

    def _walk(self, image: Tensor) -> Iterator[Slab]:
        return stream(
            image,
            lambda windows: {LOGITS: self.member.logits(windows)},
            self.member.layout_for(image.shape[1:]),
            axis=WALK_AXIS,
            batch_size=self.member.batch_size,
            skip=self.skip,
            unseen={LOGITS: self.member.background()},
        )
