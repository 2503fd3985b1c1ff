"""Comparators: maps on a gate's cells that need no training. A gate must show more than these.

- the intensity of each channel: unchanged, smoothed with Gaussians of half a cell to eight cells,
  and averaged over boxes;
- the gradient magnitude of the intensity, unchanged and smoothed;
- other fixed functions of the intensity (`OTHER`): its ranks, its deviation, its highest and lowest
  value, the difference of two smoothings, its distance from the structure's own median, its texture
  in each direction, and its entropy;
- the same gate of several untrained networks (`untrained`);
- the mean map of other scans, cell by cell of the processed part of each scan (`mean_map`).

Each comparator is used in both directions, with high values first and with low values first,
because inverting a map needs no training either.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
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
BOX_CELLS = 32
"""Largest number of cells kept along each axis of a map, to compare it with other scans."""

AXES = "xyz"

CellValues3d = Float[ndarray, "x y z"]


class _Smooth:
    """A Gaussian on a map's grid, whose width counts cells along the finest axis."""

    def __init__(self, grid: Grid) -> None:
        pitches = [pitch for pitch, size in zip(grid.spacing, grid.shape, strict=True) if size > 1]
        finest = min(pitches or grid.spacing)
        self.scales = [
            finest / pitch if size > 1 else 0.0
            for pitch, size in zip(grid.spacing, grid.shape, strict=True)
        ]

    def __call__(self, values: CellValues3d, width: float) -> CellValues3d:
        """The values smoothed over `width` cells; unchanged if it is 0."""
        if not width:
            return values
        sigma = [width * scale for scale in self.scales]
        smooth: ndarray = gaussian_filter(values, sigma, mode="nearest")
        return smooth


def image_comparators(
    pictures: Mapping[str, CellValues3d], cells: Cells, grid: Grid
) -> Iterator[tuple[str, CellValues3d]]:
    """The comparators that come from the scan's intensity, on a map's cells, each with its name.

    They are made one after the other, because all of them together may not fit into memory.

    Args:
        pictures: intensity and gradient on the voxels that the network processed, from
            `segkit.explain.measures.cells.pictures`.
        cells: the map's cells.
        grid: the map's grid.
    """
    smoothed = _Smooth(grid)
    for name, image in pictures.items():
        covered = cells.mean(image).astype(np.float64)
        yield name, covered
        if not name.startswith("intensity"):
            continue
        for width in SMOOTHING_WIDTHS:
            yield name + _over(width), smoothed(covered, width)
        for count in BOX_WIDTHS:
            sizes = [min(count, size) for size in grid.shape]
            yield f"{name} averaged over {count} cells", uniform_filter(covered, sizes)
        for width in EDGE_WIDTHS:
            edges = gradient_length(smoothed(covered, width), grid.spacing, grid.directions)
            yield name.replace("intensity", "gradient") + _over(width), edges
        of = name.removeprefix("intensity")
        yield from _other_functions(of, image, cells, smoothed)
        yield from _textures(of, image, cells, smoothed)
        for fine, coarse in itertools.combinations(CONTRAST_WIDTHS, 2):
            difference = smoothed(covered, fine) - smoothed(covered, coarse)
            yield f"contrast{of} of {fine:g} and {coarse:g} cells", difference


def _over(width: float) -> str:
    """The end of the name of a comparator that is smoothed over a number of cells."""
    return f" smoothed over {width:g} cells" if width else ""


def _other_functions(
    of: str, image: CellValues3d, cells: Cells, smoothed: _Smooth
) -> Iterator[tuple[str, CellValues3d]]:
    """Ranks, extremes, deviation and entropy of one channel's intensity, on a map's cells.

    Args:
        of: the end of a name, which names the channel of a scan with several ones.
        image: the intensity on the voxels that the network processed.
        cells: the map's cells.
        smoothed: smooths values on the map's grid.
    """
    size = [min(3, count) for count in image.shape]
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
    for width in OTHER_WIDTHS:
        variance = smoothed(square, width) - smoothed(mean, width) ** 2
        yield f"deviation{of}{_over(width)}", np.sqrt(np.maximum(variance, 0))
        yield f"entropy{of}{_over(width)}", _entropy([smoothed(share, width) for share in bins])
        for name, values in functions.items():
            yield name + _over(width), smoothed(values.astype(np.float64), width)


def _textures(
    of: str, image: CellValues3d, cells: Cells, smoothed: _Smooth
) -> Iterator[tuple[str, CellValues3d]]:
    """The texture of one channel in each direction, and its share of all directions."""
    textures = {
        along: cells.mean(squares).astype(np.float64)
        for along, squares in squared_differences(image).items()
    }
    for width in TEXTURE_WIDTHS:
        local = {along: smoothed(values, width) for along, values in textures.items()}
        total = np.maximum(sum(local.values()), np.finfo(np.float64).tiny)
        for along, values in local.items():
            yield f"texture{of} along {along}{_over(width)}", values
            yield f"texture{of} along {along}, of all directions{_over(width)}", values / total


def closeness_comparators(
    pictures: Mapping[str, CellValues3d],
    inside: Bool[ndarray, "x y z"],
    cells: Cells,
    grid: Grid,
) -> dict[str, CellValues3d]:
    """How close the intensity is to a structure's median, on a map's cells, by name.

    A gate may show a band of intensities; a viewer's window does so without training. The distance
    is taken both before and after smoothing.

    Args:
        pictures: as for `image_comparators`.
        inside: the voxels of the structure.
        cells: the map's cells.
        grid: the map's grid.
    """
    found: dict[str, CellValues3d] = {}
    if not inside.any():
        return found
    smoothed = _Smooth(grid)
    for name, image in pictures.items():
        if not name.startswith("intensity"):
            continue
        median = np.median(image[inside])
        away = cells.mean(np.abs(image - median)).astype(np.float64)
        covered = cells.mean(image).astype(np.float64)
        for width in OTHER_WIDTHS:
            named = f"{name.replace('intensity', 'closeness')} to the median{_over(width)}"
            found[named] = -smoothed(away, width)
            found[f"{named} before"] = -np.abs(smoothed(covered, width) - median)
    return found


def _deviation(image: Float[ndarray, "x y z"], size: Sequence[int]) -> Float[ndarray, "x y z"]:
    """The standard deviation of the intensity in a window around each voxel."""
    variance = uniform_filter(image**2, size) - uniform_filter(image, size) ** 2
    deviation: ndarray = np.sqrt(np.maximum(variance, 0))
    return deviation


def squared_differences(image: Float[ndarray, "x y z"]) -> dict[str, Float[ndarray, "x y z"]]:
    """For each direction, the mean squared difference between each voxel and its two neighbours.

    It is a variogram at one voxel of distance (Matheron 1963, doi:10.2113/gsecongeo.58.8.1246). The
    directions are the axes, named x, y and z, and the diagonals of two axes, such as "x and -y".
    Axes with one voxel are left out.
    """
    axes = [axis for axis, size in enumerate(image.shape) if size > 1]
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
        shape: shape of the result.
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
