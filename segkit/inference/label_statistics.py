"""How large each labelled structure is, and how bright: voxels, ml, and intensities."""

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
    """Of each class or region its voxels, its ml, and each channel's mean and standard deviation.

    A flat picture has an area in mm² instead, or in pixels if its scale is not known.

    Both lie on one grid. A region is all numbers that belong to it, so that regions may share
    voxels. The deviation is over the number of voxels; of what is not there, it and the mean are
    NaN. Memory follows a slice.
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
    """Of each label the mean, and the sum of squared distances to it, in two passes."""
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
    """The sum of the values at each label 0, 1, …, up to the highest."""
    sums = np.zeros(highest + 1)
    for z in range(labels.shape[2]):
        flat = labels[:, :, z].ravel()
        sums += np.bincount(flat, values[:, :, z].ravel(), minlength=highest + 1)
    return sums


def _pooled(counts: ndarray, means: ndarray, squares: ndarray) -> tuple[float, float]:
    """Mean and standard deviation of several labels' values together (Chan et al. 1983)."""
    total = counts.sum()
    if not total:
        return float("nan"), float("nan")
    mean = float((counts * means).sum() / total)
    spread = float((squares + counts * (means - mean) ** 2).sum() / total)
    return mean, spread**0.5
