"""Comparators: maps on a gate's cells that need no training. A gate must show more than these.

- the intensity of each channel: unchanged, smoothed with Gaussians of half a cell to eight cells,
  and averaged over boxes;
- the gradient magnitude of the intensity, unchanged and smoothed;
- the same gate of several untrained networks (`untrained`);
- the mean map of other scans, cell by cell of the processed part of each scan (`mean_map`).

Each comparator is used in both directions, with high values first and with low values first,
because inverting a map needs no training either.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy.ndimage import gaussian_filter, uniform_filter

from segkit.explain.measures.cells import Cells, gradient_length
from segkit.explain.measures.ranks import Ranked
from segkit.explain.measures.statistics import auroc
from segkit.geometry.grid import Grid
from segkit.geometry.resample import resample_known

SMOOTHING_WIDTHS = tuple(round(2.0 ** (step / 4), 2) for step in range(-4, 13))
"""Standard deviations of Gaussians, 0.5 to 8 cells along the map's finest axis. The steps are so
small that no width between two of them localises a structure much better than both."""
BOX_WIDTHS = (2, 3, 5, 7)
"""Sizes, in cells along each axis, of the boxes that the intensity is averaged over."""
EDGE_WIDTHS = (1.0, 2.0, 4.0)
"""Standard deviations, in cells, of the Gaussians before the gradient."""
DELETED_WIDTHS = (1.0, 4.0)
"""Standard deviations, in cells, of the smoothed intensities for deletion. They are few, because
each needs several passes over the volume."""
MOST_CELLS = 2**17
"""Largest number of cells inside, and outside, for an AUROC. If there are more, a random sample of
this size is used."""
BOX_CELLS = 32
"""Largest number of cells kept along each axis of a map, to compare it with other scans."""

CellValues3d = Float[ndarray, "x y z"]


def image_comparators(
    pictures: Mapping[str, CellValues3d], cells: Cells, grid: Grid
) -> dict[str, CellValues3d]:
    """The comparators that come from the scan's intensity, on a map's cells, by name.

    Args:
        pictures: intensity and gradient on the voxels that the network processed, from
            `segkit.explain.measures.cells.pictures`.
        cells: the map's cells.
        grid: the map's grid.
    """
    finest = (
        min(pitch for pitch, size in zip(grid.spacing, grid.shape, strict=True) if size > 1)
        if max(grid.shape) > 1
        else min(grid.spacing)
    )
    found: dict[str, CellValues3d] = {}
    for name, image in pictures.items():
        covered = cells.mean(image).astype(np.float64)
        found[name] = covered
        if not name.startswith("intensity"):
            continue
        for width in SMOOTHING_WIDTHS:
            found[f"{name} smoothed over {width:g} cells"] = _smoothed(covered, width, finest, grid)
        for count in BOX_WIDTHS:
            sizes = [min(count, size) for size in grid.shape]
            found[f"{name} averaged over {count} cells"] = uniform_filter(covered, sizes)
        for width in EDGE_WIDTHS:
            smooth = _smoothed(covered, width, finest, grid)
            edges = gradient_length(smooth, grid.spacing)
            found[f"{name.replace('intensity', 'gradient')} smoothed over {width:g} cells"] = edges
    return found


def deleted_comparators(names: Sequence[str]) -> list[str]:
    """The image comparators that are also used for deletion.

    Args:
        names: of all image comparators.
    """
    smoothed = [f"smoothed over {width:g} cells" for width in DELETED_WIDTHS]
    return [
        name
        for name in names
        if not ("smoothed" in name or "averaged" in name)
        or (name.startswith("intensity") and any(name.endswith(end) for end in smoothed))
    ]


def _smoothed(values: CellValues3d, width: float, finest: float, grid: Grid) -> CellValues3d:
    sigma = [
        width * finest / pitch if size > 1 else 0.0
        for pitch, size in zip(grid.spacing, grid.shape, strict=True)
    ]
    smooth: ndarray = gaussian_filter(values, sigma, mode="nearest")
    return smooth


class Sides:
    """The cells inside and outside a structure, for the AUROC of maps on one grid.

    Args:
        inside: the cells in the structure.
        counted: the cells that count.
        seed: of the random sample, if a side has more than `MOST_CELLS` cells.
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
        if not self.both:
            return float("nan")
        return auroc(Ranked.of(values.ravel()[self.cells].astype(np.float64)), self.labels)


def boxed(values: ndarray) -> ndarray:
    """An array on a map's grid, thinned to at most `BOX_CELLS` cells along each axis."""
    for axis, size in enumerate(values.shape):
        count = min(size, BOX_CELLS)
        chosen = ((np.arange(count) + 0.5) * size / count).astype(int)
        values = values.take(chosen, axis=axis)
    return values


def mean_map(others: Sequence[CellValues3d], shape: tuple[int, ...]) -> CellValues3d:
    """The mean of thinned maps of other scans, resampled to a grid of the given shape.

    The maps are aligned by the ends of their axes. NaN cells are left out of the mean; the mean is
    NaN if a cell is NaN in all maps.

    Args:
        others: maps from `boxed`.
        shape: of the result.
    """
    total, count = np.zeros(shape), np.zeros(shape)
    for values in others:
        if values.shape != shape:
            positions = [
                (np.arange(size) + 0.5) * old / size - 0.5
                for size, old in zip(shape, values.shape, strict=True)
            ]
            held = torch.from_numpy(np.ascontiguousarray(values, np.float64))[None]
            values = resample_known(held, positions)[0].numpy()
        known = np.isfinite(values)
        total[known] += values[known]
        count += known
    mean = np.full(shape, np.nan)
    np.divide(total, count, out=mean, where=count > 0)
    return mean
