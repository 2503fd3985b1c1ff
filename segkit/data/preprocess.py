"""One form for every volume: RAS+ axes, the network's spacing, normalised intensities.

Training and prediction both come through `prepare`; whatever it does to the grid, its result's own
grid says exactly, so that nothing has to be undone by memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from segkit.geometry import Grid, Orientation
from segkit.resample import resample, resample_labels
from segkit.volume import Volume

Normaliser = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image as the network sees it, (channel, x, y, z) in RAS+ order, and where it lies."""

    image: Float[Tensor, "channel x y z"]
    grid: Grid
    source: Grid
    """The grid of the volume it was made from, turned to RAS+ but at its own spacing."""
    orientation: Orientation
    """How the volume's own axes run."""


def prepare(
    volume: Volume, *, spacing: Sequence[float], normalisers: Sequence[Normaliser]
) -> Prepared:
    """Turn to RAS+, normalise each channel, and resample linearly to `spacing` (mm)."""
    orientation = Orientation.of(volume.grid.affine)
    source = orientation.turn_grid(volume.grid)
    turned = orientation.turn(volume.data.reshape(*volume.grid.shape, -1))
    # A copy, as channels are normalised in place and torch takes no reversed view.
    image = torch.from_numpy(np.array(np.moveaxis(turned, 3, 0), np.float32, order="C"))
    assert len(normalisers) == len(image), "one normaliser per channel"
    for channel, normalise in zip(image, normalisers, strict=True):
        channel.copy_(normalise(channel))
    grid = source.with_spacing(spacing)
    return Prepared(resample(image, source.positions_of(grid)), grid, source, orientation)


def prepare_label(label: Volume, *, spacing: Sequence[float]) -> Integer[Tensor, "x y z"]:
    """A label turned and resampled as `prepare` does the image on the same grid."""
    orientation = Orientation.of(label.grid.affine)
    source = orientation.turn_grid(label.grid)
    turned = torch.from_numpy(np.array(orientation.turn(label.data), order="C"))
    return resample_labels(turned, source.positions_of(source.with_spacing(spacing)))


def zscore(image: Float[Tensor, "*space"], *, nonzero: bool) -> Float[Tensor, "*space"]:
    """The image minus its mean over its standard deviation; a constant image becomes 0.

    With `nonzero`, the statistics are those of the voxels other than 0; all voxels are shifted
    alike, so that a background of 0 stays the darkest. (nnU-Net sets it to 0, which is the value of
    the average tissue.)
    """
    counted = image != 0 if nonzero else torch.ones_like(image, dtype=torch.bool)
    values = image[counted].double()
    if values.numel() == 0:
        return image
    mean, std = float(values.mean()), float(values.std(correction=0))
    varies = std > 1e-8 * abs(mean)
    return (image - mean) / (std if varies else 1.0)


def ct_window(
    image: Float[Tensor, "*space"], *, lower: float, upper: float, mean: float, std: float
) -> Float[Tensor, "*space"]:
    """Intensities in HU clipped to [lower, upper], minus a mean, over a standard deviation."""
    return (image.clamp(lower, upper) - mean) / std


def median_spacing(grids: Sequence[Grid]) -> tuple[float, float, float]:
    """The median voxel size (mm) of grids along right-left, back-front and foot-head."""
    turned = [Orientation.of(grid.affine).turn_grid(grid).spacing for grid in grids]
    x, y, z = np.median(np.array(turned), axis=0)
    return round(float(x), 6), round(float(y), 6), round(float(z), 6)


def foreground_statistics(
    values: Float[np.ndarray, " voxels"],
) -> tuple[float, float, float, float]:
    """Percentiles 0.5 and 99.5, mean and standard deviation of foreground intensities (nnU-Net)."""
    lower, upper = np.percentile(values, [0.5, 99.5])
    return float(lower), float(upper), float(values.mean()), float(max(values.std(), 1e-8))
