"""One form for every volume: the body's box, RAS+ axes, the network's spacing, normalised values.

Training and prediction both come through `prepare_image`; whatever it does to the grid, its
result's own grid says exactly, so that nothing has to be undone by memory.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Integer, Shaped
from numpy import ndarray
from torch import Tensor

from segkit.errors import VolumeError
from segkit.geometry.grid import Grid, Orientation
from segkit.geometry.resample import Order, nearest, resample, resample_labels
from segkit.io.volume import Volume
from segkit.planning.nnunet_rules import separate_axis
from segkit.system.resources import free_memory

Normaliser = Callable[[Tensor], Tensor]
Box = tuple[slice, slice, slice]
NEAREST: Literal[0] = 0
BYTES_PER_VALUE = 4
_PLANES_AT_ONCE = 8
"""Of an image, of which a copy in double precision is held at a time."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image as the network sees it, (channel, x, y, z) in RAS+ order, and where it lies."""

    image: Float[Tensor, "channel x y z"]
    grid: Grid
    source: Grid
    """The box of the volume that it was made from, turned to RAS+ but at its own spacing."""
    box: Box
    """Where that box lies in the turned volume."""
    orientation: Orientation
    """How the volume's own axes run."""
    orders: tuple[Order, Order, Order]
    """By which the image was resampled along each axis; 0 along that of separate slices."""

    def positions_of_source(self) -> tuple[ndarray, ndarray, ndarray]:
        """Where the source's cell centres lie on the grid, for what is read there linearly.

        They are fractional indices, but whole ones, of the nearest slices, along the axis that was
        resampled so.
        """
        x, y, z = (
            positions if order else nearest(positions)
            for positions, order in zip(
                self.grid.positions_of(self.source), self.orders, strict=True
            )
        )
        return x, y, z


def prepare_image(
    volume: Volume,
    *,
    spacing: Sequence[float],
    normalisers: Sequence[Normaliser],
    order: Literal[1, 3] = 1,
) -> Prepared:
    """Turn to RAS+, cut the body's box, normalise each channel, and resample to `spacing`, mm.

    The box holds every voxel that is not 0 (nnU-Net): a background of zeros would only mislead
    normalisation, that of the image and those inside a network.

    Resampling is linear or, by order 3, cubic. Where a cubic spline overshoots an edge it is cut to
    the channel's own range, as skimage's `resize`, which nnU-Net calls, has it by default. Along an
    axis that the scan or the network sees in slices far apart (`separate_axis`) each voxel is that
    of the nearest slice: what lies between is not invented.

    Raises VolumeError, before anything is allocated, where the image would outgrow free memory.
    """
    orientation = Orientation.of(volume.grid.affine)
    turned = orientation.turn(volume.data.reshape(*volume.grid.shape, -1))
    box = body_box(turned)
    source = cropped(orientation.turn_grid(volume.grid), box)
    turned = turned[box]
    assert len(normalisers) == turned.shape[3], "one normaliser per channel"
    _check_memory(source, spacing, len(normalisers))
    grid = source.with_spacing(spacing)
    x, y, z = orders_between(source, grid, order)
    positions = source.positions_of(grid)
    image = torch.empty(len(normalisers), *grid.shape)
    # One channel after the other, so that one at a time is held at the volume's own spacing.
    for channel, normalise in enumerate(normalisers):
        # A copy, as torch takes no reversed view.
        values = torch.from_numpy(np.array(turned[..., channel], np.float32, order="C"))
        values = normalise(values)
        image[channel] = resample(values[None], positions, (x, y, z))[0]
        if order == 3:
            image[channel].clamp_(values.min(), values.max())
    return Prepared(image, grid, source, box, orientation, (x, y, z))


def _check_memory(source: Grid, spacing: Sequence[float], num_channels: int) -> None:
    # In floating point, as an absurd spacing makes numbers that no integer holds.
    with np.errstate(over="ignore"):
        shape = (np.array(source.shape) * (source.spacing / np.array(spacing))).tolist()
    needed, free = BYTES_PER_VALUE * num_channels * math.prod(shape), free_memory()
    if not needed <= free:
        size = " x ".join(f"{length:.3g}" for length in shape)
        raise VolumeError(
            f"expected a volume that fits into memory at the network's spacing of "
            f"{' x '.join(f'{mm:g}' for mm in spacing)} mm, found {size} voxels there, which take "
            f"{needed / 1e9:.3g} GB where {free / 1e9:.3g} GB are free; check both spacings"
        )


def orders_between(source: Grid, grid: Grid, order: Literal[1, 3]) -> tuple[Order, Order, Order]:
    """The order along each axis: 0 along that of separate slices, where there is one."""
    apart = separate_axis(source.spacing, grid.spacing)
    x, y, z = (NEAREST if axis == apart else order for axis in range(3))
    return x, y, z


def prepare_label(label: Volume, prepared: Prepared) -> Integer[Tensor, "x y z"]:
    """A label turned, cut and resampled as its image was, linearly where that was cubic."""
    turned = prepared.orientation.turn(label.data)[prepared.box]
    return resample_labels(
        torch.from_numpy(np.array(turned, order="C")),
        prepared.source.positions_of(prepared.grid),
        [1 if order else 0 for order in prepared.orders],
    )


def body_box(values: Shaped[ndarray, "x y z channel"]) -> Box:
    """The smallest box that holds every voxel with a channel that is not 0; all where none is."""
    found = (values != 0).any(axis=3)
    if not found.any():
        x, y, z = (slice(0, size) for size in found.shape)
        return x, y, z
    spans = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        inside = np.flatnonzero(found.any(axis=others))
        spans.append(slice(int(inside[0]), int(inside[-1]) + 1))
    x, y, z = spans
    return x, y, z


def cropped(grid: Grid, box: Box) -> Grid:
    """The part of a grid that lies in a box of it."""
    first = [float(span.start) for span in box]
    return grid.placed([span.stop - span.start for span in box], (1.0, 1.0, 1.0), first)


def zscore(image: Float[Tensor, "*space"], *, nonzero: bool) -> Float[Tensor, "*space"]:
    """The image minus its mean over its standard deviation; a constant image becomes 0.

    With `nonzero`, the statistics are those of the voxels other than 0; all voxels are shifted
    alike, so that a background of 0 stays the darkest. (nnU-Net sets it to 0, which is the value of
    the average tissue.)
    """
    count, mean = 0, 0.0
    for values in _counted(image, nonzero):
        count, mean = count + values.numel(), mean + float(values.sum())
    if count == 0:
        return image
    mean /= count
    squares = sum(float((values - mean).square().sum()) for values in _counted(image, nonzero))
    std = math.sqrt(squares / count)
    varies = std > 1e-8 * abs(mean)
    return (image - mean).div_(std if varies else 1.0)


def _counted(image: Tensor, nonzero: bool) -> Iterator[Tensor]:
    """The values, or those other than 0, in double precision; so many planes at a time."""
    for planes in image.split(_PLANES_AT_ONCE):
        yield (planes[planes != 0] if nonzero else planes).double()


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
