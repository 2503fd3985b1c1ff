"""Comparators: maps on a gate's cells that need no training. A gate must show more than these.

- the intensity of each channel: unchanged, smoothed with Gaussians of half a cell to eight cells,
  and averaged over boxes;
- the gradient magnitude of the intensity, unchanged and smoothed;
- other fixed functions of the intensity (`OTHER`): its ranks, its deviation, its highest and lowest
  value, the difference of two smoothings, its distance from the structure's own median, its texture
  in each direction, and its entropy;
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from numpy import ndarray
from scipy import stats
from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter, uniform_filter
from scipy.special import xlogy

from segkit.explain.measures.cells import Cells, gradient_length
from segkit.explain.measures.ranks import without_rounding_noise
from segkit.geometry.grid import Grid
from segkit.geometry.resample import resample_known

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
)
"""How the names of further functions of the intensity begin. Each stands for a kind of map that
needs no training: a monotone change of the intensity, its local spread, a pooled maximum or
minimum, a Laplacian, a band of intensities, a texture of one direction, a local histogram."""
NUM_QUANTILES = 256
ENTROPY_BINS = 8
"""Bins of the histograms whose entropy is a comparator, with equally many voxels each."""
DELETED_WIDTHS = (1.0, 4.0)
"""Standard deviations, in cells, of the smoothed intensities for deletion. They are few, because
each needs several passes over the volume."""
MOST_CELLS = 2**17
"""Largest number of cells inside, and outside, for an AUROC. If there are more, a random sample of
this size is used."""
RANKED_AT_ONCE = 2**20
"""About so many cells of comparators are held in memory and ranked in one step."""
SAME_PITCH = 0.01
"""Cells count as equally long along all axes if their lengths differ by at most this share."""
BOX_CELLS = 32
"""Largest number of cells kept along each axis of a map, to compare it with other scans."""
BEYOND_WEIGHT = 1e-6
"""Weight of a map's outermost cell beyond its end. It counts only if no other map has the cell."""
ALIGNMENTS: dict[str, Callable[[ndarray, int, int], ndarray]] = {
    "": lambda cells, own, other: (cells + 0.5) * other / own - 0.5,
    "from the low corner": lambda cells, own, other: cells,
    "from the high corner": lambda cells, own, other: cells + other - own,
    "from the centre": lambda cells, own, other: cells + (other - own) / 2,
}
"""For each alignment of two maps: the positions of cells of one map, whose axis has `own` cells, on
the axis of another map with `other` cells. The first one aligns both ends of the axis."""

AXES = "xyz"

CellValues3d = Float[ndarray, "x y z"]


class ThinnedMap(NamedTuple):
    """A channel of a map, thinned by `boxed`."""

    values: CellValues3d
    shape: tuple[int, ...]
    """Shape of the map before it was thinned."""


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
    """Ranks, extremes, deviation and entropy of one channel's intensity, on a map's cells.

    Args:
        of: the end of a name, which names the channel of a scan with several ones.
        image: the intensity on the voxels that the network processed.
        cells: the map's cells.
        smoothing: the Gaussians on the map's grid.
        across: the axis across the slices that a 2D network sees; None for a 3D network.
    """
    size = _window(3, image.shape, across)
    centred = image - np.float32(image.mean())
    mean, square = (cells.mean(one).astype(np.float64) for one in (centred, centred**2))
    ranked = _ranked(image)
    bins = [cells.mean(one).astype(np.float64) for one in _binned(ranked)]
    functions = {
        f"rank{of}": cells.mean(ranked),
        f"maximum{of}": -cells.lowest(-image),
        f"minimum{of}": cells.lowest(image),
        f"maximum{of} over 3 voxels": cells.mean(maximum_filter(image, size)),
        f"minimum{of} over 3 voxels": cells.mean(minimum_filter(image, size)),
        f"deviation{of} over 3 voxels": cells.mean(_deviation(centred, size)),
    }
    for gaussian in smoothing.over(OTHER_WIDTHS):
        variance = gaussian(square) - gaussian(mean) ** 2
        yield f"deviation{of}{gaussian.name}", np.sqrt(np.maximum(variance, 0))
        yield f"entropy{of}{gaussian.name}", _entropy([gaussian(share) for share in bins])
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


def _deviation(image: Float[ndarray, "x y z"], size: Sequence[int]) -> Float[ndarray, "x y z"]:
    """The standard deviation of the intensity in a window around each voxel."""
    variance = uniform_filter(image**2, size) - uniform_filter(image, size) ** 2
    deviation: ndarray = np.sqrt(np.maximum(variance, 0))
    return deviation


def squared_differences(
    image: Float[ndarray, "x y z"], *, across: int | None = None
) -> dict[str, Float[ndarray, "x y z"]]:
    """For each direction, the mean squared difference between each voxel and its two neighbours.

    It is a variogram at one voxel of distance (Matheron 1963, doi:10.2113/gsecongeo.58.8.1246). The
    directions are the axes, named x, y and z, and the diagonals of two axes, such as "x and -y".
    Axes with one voxel are left out, and so is the axis `across` slices.
    """
    axes = [axis for axis, size in enumerate(image.shape) if size > 1 and axis != across]
    directions: dict[str, dict[int, int]] = {AXES[axis]: {axis: 1} for axis in axes}
    for first, second in itertools.combinations(axes, 2):
        directions[f"{AXES[first]} and {AXES[second]}"] = {first: 1, second: 1}
        directions[f"{AXES[first]} and -{AXES[second]}"] = {first: 1, second: -1}
    found = {}
    for name, steps in directions.items():
        ahead, behind = (
            tuple(_shifted(side * steps.get(axis, 0)) for axis in range(image.ndim))
            for side in (1, -1)
        )
        squares = (image[ahead] - image[behind]) ** 2
        total, count = np.zeros_like(image), np.zeros_like(image)
        for part in (ahead, behind):
            total[part] += squares
            count[part] += 1
        found[name] = total / np.maximum(count, 1)
    return found


def _shifted(step: int) -> slice:
    """The voxels of an axis that have a neighbour one step back (1) or one step ahead (-1)."""
    return {1: slice(1, None), -1: slice(None, -1), 0: slice(None)}[step]


def _binned(ranked: Float[ndarray, "x y z"]) -> list[Float[ndarray, "x y z"]]:
    """For each bin of ranks, whether each voxel lies in it."""
    bins = np.minimum((ranked * ENTROPY_BINS).astype(np.int64), ENTROPY_BINS - 1)
    return [(bins == number).astype(np.float32) for number in range(ENTROPY_BINS)]


def _entropy(shares: Sequence[CellValues3d]) -> CellValues3d:
    """The entropy of the shares of bins in each cell."""
    entropy: ndarray = -sum(xlogy(share, share) for share in np.maximum(shares, 0))
    return entropy


def _ranked(image: Float[ndarray, "x y z"]) -> Float[ndarray, "x y z"]:
    """Each voxel's share of voxels below it, to within 1 / `NUM_QUANTILES`, from 0 to 1."""
    thinned = image.ravel()[:: max(1, image.size // MOST_CELLS)]
    shares = np.linspace(0, 1, NUM_QUANTILES)
    ranked: ndarray = np.interp(image, np.quantile(thinned, shares), shares)
    return ranked.astype(np.float32)


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


def kept_cells(size: int) -> Integer[ndarray, " cells"]:
    """The cells of an axis that `boxed` keeps: at most `BOX_CELLS`, evenly spaced."""
    count = min(size, BOX_CELLS)
    cells: ndarray = ((np.arange(count) + 0.5) * size / count).astype(int)
    return cells


def boxed(values: ndarray) -> ndarray:
    """An array on a map's grid, thinned to at most `BOX_CELLS` cells along each axis."""
    for axis, size in enumerate(values.shape):
        values = values.take(kept_cells(size), axis=axis)
    return values


def mean_maps(
    others: Sequence[ThinnedMap],
    shape: Sequence[int],
    cells: Sequence[Integer[ndarray, " cells"]],
) -> dict[str, CellValues3d]:
    """The mean of thinned maps of other scans at cells of a scan, for each alignment.

    A network has no coordinates of the body: a fixed place is so many cells from an end of the
    image, or from its middle. So if a map has another shape, there are four alignments: the ends of
    all axes (''), and the low corner, the high corner and the centre of the boxes, in cells.

    NaN cells are left out of the mean; the mean is NaN if a cell is NaN in all maps. Beyond the end
    of a map, its outermost cell counts only if no other map has the cell.

    Args:
        others: the maps. Not empty.
        shape: shape of the scan's map before it was thinned.
        cells: for each axis, the cells of the scan's map at which the mean is computed.
    """
    same = all(tuple(other.shape) == tuple(shape) for other in others)
    return {
        name: _mean(_sums(others, shape, cells, place))
        for name, place in ALIGNMENTS.items()
        if not (name and same)
    }


def mean_maps_of_others(
    maps: Sequence[ThinnedMap],
) -> Iterator[tuple[int, str, CellValues3d]]:
    """The `mean_maps` of all other maps, for each of several maps at its own cells.

    Maps of one shape share what they have in common: those of other shapes are resampled once for
    all of them, and the sum of the others is that of the maps before and of the maps after it.

    Args:
        maps: thinned maps. If there is one, there is no mean.

    Yields:
        The number of a map, the name of an alignment, and the mean.
    """
    for shape in dict.fromkeys(tuple(one.shape) for one in maps) if len(maps) > 1 else ():
        cells = [kept_cells(size) for size in shape]
        alike = [number for number, one in enumerate(maps) if tuple(one.shape) == shape]
        others = [one for one in maps if tuple(one.shape) != shape]
        for name, place in ALIGNMENTS.items():
            if name and not others:
                continue
            before = [_sums(others, shape, cells, place)]
            for number in alike[:-1]:
                before.append(before[-1] + _placed(maps[number], shape, cells, place))
            after = np.zeros_like(before[0])
            for number in reversed(alike):
                yield number, name, _mean(before.pop() + after)
                after = after + _placed(maps[number], shape, cells, place)


def _sums(
    maps: Sequence[ThinnedMap],
    shape: Sequence[int],
    cells: Sequence[Integer[ndarray, " cells"]],
    place: Callable[[ndarray, int, int], ndarray],
) -> Float[ndarray, "2 x y z"]:
    """The sums of `_placed` over maps; 0 if there are none."""
    nothing = np.zeros((2, *map(len, cells)))
    return sum((_placed(one, shape, cells, place) for one in maps), start=nothing)


def _placed(
    one: ThinnedMap,
    shape: Sequence[int],
    cells: Sequence[Integer[ndarray, " cells"]],
    place: Callable[[ndarray, int, int], ndarray],
) -> Float[ndarray, "2 x y z"]:
    """A map in one alignment, multiplied by its weight, and the weight; see `mean_maps`."""
    size = tuple(len(along) for along in cells)
    values, weight = one.values, np.ones(size)
    if (tuple(one.shape), values.shape) != (tuple(shape), size):
        positions = []
        for axis, (along, own, old) in enumerate(zip(cells, shape, one.shape, strict=True)):
            there, kept = place(along, own, old), kept_cells(old)
            positions.append(np.interp(there, kept, np.arange(len(kept))))
            beyond = (there < -0.5) | (there > old - 0.5)
            weight[(slice(None),) * axis + (beyond,)] = BEYOND_WEIGHT
        held = torch.from_numpy(np.ascontiguousarray(values, np.float64))[None]
        values = resample_known(held, positions)[0].numpy()
    known = np.isfinite(values)
    return np.stack([np.where(known, weight * values, 0), weight * known])


def _mean(sums: Float[ndarray, "2 x y z"]) -> CellValues3d:
    """The mean of maps from the sums of `_placed`."""
    total, weights = sums
    mean = np.full(total.shape, np.nan)
    np.divide(total, weights, out=mean, where=weights > 0)
    return mean
