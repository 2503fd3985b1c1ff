"""Statistics of each labelled structure: number of voxels, volume in ml, and intensities."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray

from segkit.config.labels import Labelling
from segkit.data.label_numbers import volume_within
from segkit.io.volume import Volume


def label_statistics(
    labels: Volume, image: Volume, labelling: Labelling, channels: Sequence[str]
) -> dict[str, Any]:
    """Size of each class or region, and mean and standard deviation of its intensities.

    The size is in voxels and ml. A 2D picture has an area instead of a volume: in mm², or in pixels
    if its pixel size is unknown. Memory use is that of one slice.

    Args:
        labels: labels on the grid of the image.
        image: (x, y, z) or (x, y, z, channel).
        labelling: names and numbers of classes and regions. Regions may share voxels.
        channels: name of each channel.

    Returns:
        The size of a voxel, and for each structure its size, mean and standard deviation (divided
        by the number of voxels). If a structure is absent, mean and deviation are NaN.
    """
    assert labels.grid.agrees_with(image.grid), "labels lie on their image's grid"
    labels = volume_within(labels, labelling)
    values = image.data.reshape(*image.grid.shape, -1)
    highest = max(len(labelling.value_names) - 1, int(labels.data.max()))
    size, voxel = ("ml", labels.grid.voxel_ml)
    if labels.is_flat:
        size = "pixels" if labels.unit == "pixel" else "mm2"
        voxel = prod(labels.grid.spacing[:2])
    structures: dict[str, dict[str, Any]] = {}
    counts = _sums(labels.data, np.ones_like(labels.data, np.uint8), highest)
    for name, numbers in labelling.members.items():
        voxels = int(counts[list(numbers)].sum())
        structures[name] = {"voxels": voxels, size: voxels * voxel, "mean": {}, "sd": {}}
    for number, channel in enumerate(channels):
        means, squares = _spread(labels.data, values[..., number], counts)
        for name, numbers in labelling.members.items():
            mean, deviation = _pooled(*(each[list(numbers)] for each in (counts, means, squares)))
            structures[name]["mean"][channel] = mean
            structures[name]["sd"][channel] = deviation
    return {f"voxel_{size}": voxel, "structures": structures}


def _spread(
    labels: Shaped[ndarray, "x y z"], values: Shaped[ndarray, "x y z"], counts: ndarray
) -> tuple[ndarray, ndarray]:
    """Mean of each label's values, and sum of squared distances from the mean, in two passes."""
    means = _sums(labels, values, len(counts) - 1) / np.maximum(counts, 1)
    squares = np.zeros(len(counts))
    for z in range(labels.shape[2]):
        here = labels[:, :, z]
        apart = values[:, :, z] - means[here]
        squares += _sums(here[..., None], (apart**2)[..., None], len(counts) - 1)
    return means, squares


def _sums(
    labels: Shaped[ndarray, "x y z"], values: Shaped[ndarray, "x y z"], highest: int
) -> Float[ndarray, " labels"]:
    """Sum of the values at each of the labels 0, 1, …, highest."""
    sums = np.zeros(highest + 1)
    for z in range(labels.shape[2]):
        flat = labels[:, :, z].ravel()
        sums += np.bincount(flat, values[:, :, z].ravel(), minlength=highest + 1)
    return sums


def _pooled(counts: ndarray, means: ndarray, squares: ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the values of several labels together (Chan et al. 1983).

    Args:
        counts: number of voxels of each label.
        means: mean of each label.
        squares: sum of squared distances from the mean, of each label.
    """
    total = counts.sum()
    if not total:
        return float("nan"), float("nan")
    mean = float((counts * means).sum() / total)
    spread = float((squares + counts * (means - mean) ** 2).sum() / total)
    return mean, spread**0.5
