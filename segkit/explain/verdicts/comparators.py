"""Comparators: maps on a gate's cells that need no training. A gate must show more than these.

- the intensity of each channel: unchanged, smoothed with Gaussians of half a cell to eight cells,
  and averaged over boxes;
- the gradient magnitude of the intensity, unchanged and smoothed;
- other fixed functions of the intensity (`OTHER`): its ranks, its deviation, its highest, lowest
  and median value, its openings and closings, the difference of two smoothings, its difference from
  the local mean in local deviations, its distance from the structure's own median, its texture in
  each direction, and its entropy;
- the same gate of several untrained networks (`untrained`);
- the mean map of other scans, cell by cell of the processed part of each scan (`mean_maps`).

Each comparator is used in both directions, with high values first and with low values first,
because inverting a map needs no training either.

A 2D network sees one slice at a time. Its maps are compared with functions of single slices:
nothing is smoothed or compared across them. A convolution counts voxels, not mm. So if cells are
longer along one axis, each Gaussian is used twice: as wide in mm along each axis, and as wide in
cells.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from numpy import ndarray
from scipy.ndimage import gaussian_filter, uniform_filter

from segkit.explain.measures.cells import Cells, gradient_length
from segkit.explain.measures.fixed_functions import (
    CellValues3d,
    binned,
    entropy,
    ranked,
    squared_differences,
    standardised,
    window_functions,
)
from segkit.geometry.grid import Grid

SMOOTHING_WIDTHS = tuple(round(2.0 ** (step / 4), 2) for step in range(-4, 13))
"""Standard deviations of Gaussians, 0.5 to 8 cells along the map's finest axis. The steps are so
small that no width between two of them localises a structure much better than both."""
BOX_WIDTHS = (2, 3, 5, 7)
"""Sizes, in cells along each axis, of the boxes that the intensity is averaged over."""
EDGE_WIDTHS = (1.0, 2.0, 4.0)
"""Standard deviations, in cells, of the Gaussians before the gradient."""
OTHER_WIDTHS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Standard deviations, in cells, of the Gaussians after the functions of intensity in `OTHER`."""
CONTRAST_WIDTHS = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Standard deviations, in cells, of the Gaussians whose differences are comparators."""
TEXTURE_WIDTHS = (0.0, 1.0, 2.0, 4.0)
"""Standard deviations, in cells, of the Gaussians after the textures of one direction."""
OTHER = (
    "rank",
    "deviation",
    "maximum",
    "minimum",
    "contrast",
    "closeness",
    "texture",
    "entropy",
    "median",
    "opening",
    "closing",
    "standardised",
)
"""How the names of further functions of the intensity begin. Each stands for a kind of map that
needs no training: a monotone change of the intensity, its local spread, a pooled maximum or
minimum, a Laplacian, a band of intensities, a texture of one direction, a local histogram, a filter
that removes single voxels or thin parts, a local contrast."""
DELETED_WIDTHS = (1.0, 4.0)
"""Standard deviations, in cells, of the smoothed intensities for deletion. They are few, because
each needs several passes over the volume."""
SAME_PITCH = 0.01
"""Cells count as equally long along all axes if their lengths differ by at most this share."""


@dataclass(frozen=True)
class _Gaussian:
    """A Gaussian filter on a map's grid."""

    name: str
    """The end of the name of a comparator that it smoothed."""
    sigma: tuple[float, ...]
    """Standard deviations in cells along each axis; all 0 if nothing is smoothed."""

    def __call__(self, values: CellValues3d) -> CellValues3d:
        """The smoothed values."""
        if not any(self.sigma):
            return values
        smooth: ndarray = gaussian_filter(values, self.sigma, mode="nearest")
        return smooth


class _Smoothing:
    """The Gaussians on a map's grid. Their width counts cells along the finest axis.

    They are as wide in mm along each axis. If cells are longer along one axis, there are others
    that are as wide in cells.

    Args:
        grid: the map's grid.
        across: the axis across the slices of a 2D network, which is not smoothed; None in 3D.
    """

    def __init__(self, grid: Grid, across: int | None) -> None:
        used = [size > 1 and axis != across for axis, size in enumerate(grid.shape)]
        finest = min(itertools.compress(grid.spacing, used), default=1.0)
        in_mm = tuple(
            finest / pitch if smooth else 0.0
            for pitch, smooth in zip(grid.spacing, used, strict=True)
        )
        in_cells = tuple(map(float, used))
        self.scales = {"": in_mm}
        """For each kind of Gaussian, its width along each axis if its width is 1."""
        if not np.allclose(in_mm, in_cells, atol=SAME_PITCH):
            self.scales[" along each axis"] = in_cells

    def over(self, widths: Sequence[float]) -> list[_Gaussian]:
        """The Gaussians of each kind and width."""
        return [
            _Gaussian(
                f" smoothed over {width:g} cells{kind}" if width else "",
                tuple(width * one for one in scale),
            )
            for kind, scale in self.scales.items()
            for width in widths
            if width or not kind
        ]

    def pairs(self, widths: Sequence[float]) -> Iterator[tuple[str, _Gaussian, _Gaussian]]:
        """Two Gaussians of one kind and of different widths, with their names."""
        for kind, scale in self.scales.items():
            for pair in itertools.combinations(widths, 2):
                fine, coarse = (
                    _Gaussian("", tuple(width * one for one in scale)) for width in pair
                )
                yield f"of {pair[0]:g} and {pair[1]:g} cells{kind}", fine, coarse


def image_comparators(
    pictures: Mapping[str, CellValues3d], cells: Cells, grid: Grid, *, across: int | None = None
) -> Iterator[tuple[str, CellValues3d]]:
    """The comparators that come from the scan's intensity, on a map's cells, each with its name.

    They are made one after the other, because all of them together may not fit into memory.

    Args:
        pictures: intensity and gradient on the voxels that the network processed, from
            `segkit.explain.measures.cells.pictures`.
        cells: the map's cells.
        grid: the map's grid.
        across: the axis across the slices that a 2D network sees; None for a 3D network.
    """
    smoothing = _Smoothing(grid, across)
    for name, image in pictures.items():
        covered = cells.mean(image).astype(np.float64)
        yield name, covered
        if not name.startswith("intensity"):
            continue
        for gaussian in smoothing.over(SMOOTHING_WIDTHS):
            yield name + gaussian.name, gaussian(covered)
        for count in BOX_WIDTHS:
            boxes = uniform_filter(covered, _window(count, grid.shape, across))
            yield f"{name} averaged over {count} cells", boxes
        for gaussian in smoothing.over(EDGE_WIDTHS):
            edges = gradient_length(gaussian(covered), grid.spacing, grid.directions, across=across)
            yield name.replace("intensity", "gradient") + gaussian.name, edges
        of = name.removeprefix("intensity")
        yield from _other_functions(of, image, cells, smoothing, across)
        yield from _textures(of, image, cells, smoothing, across)
        for widths, fine, coarse in smoothing.pairs(CONTRAST_WIDTHS):
            yield f"contrast{of} {widths}", fine(covered) - coarse(covered)


def _window(count: int, shape: Sequence[int], across: int | None) -> list[int]:
    """The size of a window of `count` elements along each axis, but 1 across the slices."""
    return [1 if axis == across else min(count, size) for axis, size in enumerate(shape)]


def _other_functions(
    of: str, image: CellValues3d, cells: Cells, smoothing: _Smoothing, across: int | None
) -> Iterator[tuple[str, CellValues3d]]:
    """Functions of one channel's intensity in each cell and in windows of voxels, on a map's cells.

    Args:
        of: the end of a name, which names the channel of a scan with several ones.
        image: the intensity on the voxels that the network processed.
        cells: the map's cells.
        smoothing: the Gaussians on the map's grid.
        across: the axis across the slices that a 2D network sees; None for a 3D network.
    """
    centred = image - np.float32(image.mean())
    mean, square = (cells.mean(one).astype(np.float64) for one in (centred, centred**2))
    ranks = ranked(image)
    bins = [cells.mean(one).astype(np.float64) for one in binned(ranks)]
    window = _window(3, image.shape, across)
    functions = {
        f"rank{of}": cells.mean(ranks),
        f"maximum{of}": -cells.lowest(-image),
        f"minimum{of}": cells.lowest(image),
    } | {
        f"{name}{of} over 3 voxels": cells.mean(values)
        for name, values in window_functions(image, window).items()
    }
    for gaussian in smoothing.over(OTHER_WIDTHS):
        local = gaussian(mean)
        deviation = np.sqrt(np.maximum(gaussian(square) - local**2, 0))
        yield f"deviation{of}{gaussian.name}", deviation
        if any(gaussian.sigma):
            contrast = standardised(mean, local, deviation, across=across)
            yield f"standardised{of}{gaussian.name}", contrast
        yield f"entropy{of}{gaussian.name}", entropy([gaussian(share) for share in bins])
        for name, values in functions.items():
            yield name + gaussian.name, gaussian(values.astype(np.float64))


def _textures(
    of: str, image: CellValues3d, cells: Cells, smoothing: _Smoothing, across: int | None
) -> Iterator[tuple[str, CellValues3d]]:
    """The texture of one channel in each direction, and its share of all directions."""
    textures = {
        along: cells.mean(squares).astype(np.float64)
        for along, squares in squared_differences(image, across=across).items()
    }
    for gaussian in smoothing.over(TEXTURE_WIDTHS):
        local = {along: gaussian(values) for along, values in textures.items()}
        total = np.maximum(sum(local.values()), np.finfo(np.float64).tiny)
        for along, values in local.items():
            yield f"texture{of} along {along}{gaussian.name}", values
            yield f"texture{of} along {along}, of all directions{gaussian.name}", values / total


def closeness_comparators(
    pictures: Mapping[str, CellValues3d],
    inside: Bool[ndarray, "x y z"],
    cells: Cells,
    grid: Grid,
    *,
    across: int | None = None,
) -> dict[str, CellValues3d]:
    """How close the intensity is to a structure's median, on a map's cells, by name.

    A gate may show a band of intensities; a viewer's window does so without training. The distance
    is taken both before and after smoothing.

    Args:
        pictures: as for `image_comparators`.
        inside: the voxels of the structure.
        cells: the map's cells.
        grid: the map's grid.
        across: as for `image_comparators`.
    """
    found: dict[str, CellValues3d] = {}
    if not inside.any():
        return found
    gaussians = _Smoothing(grid, across).over(OTHER_WIDTHS)
    for name, image in pictures.items():
        if not name.startswith("intensity"):
            continue
        median = np.median(image[inside])
        away = cells.mean(np.abs(image - median)).astype(np.float64)
        covered = cells.mean(image).astype(np.float64)
        for gaussian in gaussians:
            named = f"{name.replace('intensity', 'closeness')} to the median{gaussian.name}"
            found[named] = -gaussian(away)
            found[f"{named} before"] = -np.abs(gaussian(covered) - median)
    return found


def deleted_comparators(names: Sequence[str]) -> list[str]:
    """The image comparators that are also used for deletion.

    Args:
        names: names of all image comparators.
    """
    smoothed = [f"smoothed over {width:g} cells" for width in DELETED_WIDTHS]
    return [
        name
        for name in names
        if (
            name.startswith(("intensity", "gradient"))
            and not ("smoothed" in name or "averaged" in name)
        )
        or (name.startswith("intensity") and any(name.endswith(end) for end in smoothed))
    ]
