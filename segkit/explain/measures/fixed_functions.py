"""Fixed functions of the intensity: what can be computed from an image without training."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.ndimage import (
    grey_closing,
    grey_opening,
    maximum_filter,
    median_filter,
    minimum_filter,
    uniform_filter,
)
from scipy.special import xlogy

CellValues3d = Float[ndarray, "x y z"]
FLAT = 1e-4
"""A deviation counts as 0 if it is below this share of the largest in the image or slice."""
NUM_QUANTILES = 256
RANKED_VOXELS = 2**17
"""About so many voxels of an image give its quantiles."""
ENTROPY_BINS = 8
"""Bins of the histograms whose entropy is a comparator, with equally many voxels each."""
AXES = "xyz"


def squared_differences(
    image: CellValues3d, *, across: int | None = None
) -> dict[str, CellValues3d]:
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


def standardised(
    values: CellValues3d,
    mean: CellValues3d,
    deviation: CellValues3d,
    *,
    across: int | None = None,
) -> CellValues3d:
    """How far values lie from their local mean, in local standard deviations; 0 in flat parts.

    Args:
        values: the values.
        mean: their local mean.
        deviation: their local standard deviation.
        across: the axis across slices, each of which is taken alone; None in 3D.
    """
    found = np.zeros_like(values)
    within = tuple(axis for axis in range(values.ndim) if axis != across)
    highest = deviation.max(axis=within, keepdims=True)
    varies = (deviation > FLAT * highest) & (deviation > 0)
    return np.divide(values - mean, deviation, out=found, where=varies)


def _shifted(step: int) -> slice:
    """The voxels of an axis that have a neighbour one step back (1) or one step ahead (-1)."""
    return {1: slice(1, None), -1: slice(None, -1), 0: slice(None)}[step]


def window_functions(image: CellValues3d, size: Sequence[int]) -> dict[str, CellValues3d]:
    """Functions of the voxels in a window around each voxel, by name.

    An opening removes bright parts that are smaller than the window, and a closing removes dark
    ones (Serra 1982, Image Analysis and Mathematical Morphology, chapter XII).

    Args:
        image: the intensity.
        size: voxels of the window along each axis.
    """
    return {
        "maximum": maximum_filter(image, size),
        "minimum": minimum_filter(image, size),
        "median": median_filter(image, size),
        "opening": grey_opening(image, size),
        "closing": grey_closing(image, size),
        "deviation": local_deviation(image, size),
    }


def local_deviation(image: CellValues3d, size: Sequence[int]) -> CellValues3d:
    """The standard deviation of the intensity in a window around each voxel."""
    image = image - np.float32(image.mean())  # squares of small numbers are more precise
    variance = uniform_filter(image**2, size) - uniform_filter(image, size) ** 2
    deviation: ndarray = np.sqrt(np.maximum(variance, 0))
    return deviation


def ranked(image: CellValues3d) -> CellValues3d:
    """Each voxel's share of voxels below it, to within 1 / `NUM_QUANTILES`, from 0 to 1."""
    thinned = image.ravel()[:: max(1, image.size // RANKED_VOXELS)]
    shares = np.linspace(0, 1, NUM_QUANTILES)
    found: ndarray = np.interp(image, np.quantile(thinned, shares), shares)
    return found.astype(np.float32)


def binned(ranks: CellValues3d) -> list[CellValues3d]:
    """For each bin of ranks, whether each voxel lies in it."""
    bins = np.minimum((ranks * ENTROPY_BINS).astype(np.int64), ENTROPY_BINS - 1)
    return [(bins == number).astype(np.float32) for number in range(ENTROPY_BINS)]


def entropy(shares: Sequence[CellValues3d]) -> CellValues3d:
    """The entropy of the shares of bins in each cell."""
    found: ndarray = -sum(xlogy(share, share) for share in np.maximum(shares, 0))
    return found
