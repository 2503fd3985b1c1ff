"""The AUROC of many maps on one grid: the chance that a cell inside has more than one outside."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import Bool
from numpy import ndarray
from scipy import stats

from segkit.explain.measures.fixed_functions import CellValues3d
from segkit.explain.measures.ranks import without_rounding_noise

MOST_CELLS = 2**17
"""Largest number of cells inside, and outside, for an AUROC. If there are more, a random sample of
this size is used."""
RANKED_AT_ONCE = 2**20
"""About so many cells of comparators are held in memory and ranked in one step."""


class Sides:
    """The cells inside and outside a structure, for the AUROC of maps on one grid.

    Args:
        inside: the cells in the structure.
        counted: the cells that count.
        seed: seed of the random sample, if a side has more than `MOST_CELLS` cells.
    """

    def __init__(
        self, inside: Bool[ndarray, "x y z"], counted: Bool[ndarray, "x y z"], *, seed: int = 0
    ) -> None:
        random = np.random.default_rng(seed)
        sides = [np.flatnonzero(inside & counted), np.flatnonzero(~inside & counted)]
        self.within, self.beyond = (
            random.choice(side, MOST_CELLS, replace=False) if side.size > MOST_CELLS else side
            for side in sides
        )
        self.cells = np.concatenate([self.within, self.beyond])
        self.labels = np.arange(self.cells.size) < self.within.size

    @property
    def both(self) -> bool:
        """Whether there are cells both inside and outside."""
        return self.within.size > 0 and self.beyond.size > 0

    def auroc(self, values: CellValues3d) -> float:
        """The AUROC of a map; NaN if there is no cell inside or none outside."""
        return self.aurocs({"map": values})["map"]

    def aurocs(self, maps: Mapping[str, CellValues3d]) -> dict[str, float]:
        """The AUROC of each map, by name. All maps are ranked at once, which is faster."""
        if not self.both or not maps:
            return dict.fromkeys(maps, float("nan"))
        values = [one.ravel()[self.cells].astype(np.float64) for one in maps.values()]
        ranks = stats.rankdata([without_rounding_noise(row) for row in values], axis=1)
        within, beyond = self.within.size, self.beyond.size
        above = ranks[:, self.labels].sum(axis=1) - within * (within + 1) / 2
        return dict(zip(maps, (above / (within * beyond)).tolist(), strict=True))


def in_batches(
    maps: Iterable[tuple[str, CellValues3d]],
) -> Iterator[dict[str, CellValues3d]]:
    """Maps with their names, in batches of about `RANKED_AT_ONCE` cells."""
    batch: dict[str, CellValues3d] = {}
    for name, values in maps:
        batch[name] = values
        if len(batch) * values.size >= RANKED_AT_ONCE:
            yield batch
            batch = {}
    if batch:
        yield batch
