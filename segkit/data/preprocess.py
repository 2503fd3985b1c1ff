"""One form for every volume: the body's box, RAS+ axes, the network's spacing, normalised values.

Training and prediction both call `prepare_image`. The grid of its result says exactly where the
result lies, so that predictions find their way back to the scan.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Integer, Shaped
from numpy import ndarray
from torch import Tensor

from segkit.data.normalise import Normaliser
from segkit.errors import VolumeError
from segkit.geometry.grid import Grid, Orientation, rounded_spacing, separate_axis
from segkit.geometry.resample import Order, nearest, resample, resample_labels
from segkit.io.volume import Volume
from segkit.system.memory import free_memory

Box = tuple[slice, slice, slice]
NEAREST: Literal[0] = 0
BYTES_PER_VALUE = 4


class TooLargeError(VolumeError):
    """A volume takes more memory at a network's spacing than there is."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image as the network sees it, (channel, x, y, z) in RAS+ order, and where it lies."""

    image: Float[Tensor, "channel x y z"]
    grid: Grid
    source: Grid
    """The box of the volume that it was made from, turned to RAS+ but at its own spacing."""
    box: Box
    """The box, in voxels of the turned volume."""
    orientation: Orientation
    """The directions of the volume's own axes."""
    orders: tuple[Order, Order, Order]
    """The order of resampling along each axis; 0 along the axis of separate slices."""

    def positions_of_source(self) -> tuple[ndarray, ndarray, ndarray]:
        """The source's cell centres on the grid, as fractional indices along each axis.

        Along an axis that was resampled by the nearest slice they are the whole indices of slices.
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
    device: torch.device | None = None,
) -> Prepared:
    """Turn to RAS+, cut the body's box, normalise each channel, and resample to `spacing`, mm.

    The box holds every voxel that is not 0 (nnU-Net): a background of zeros would only mislead
    normalisation, that of the image and those inside a network.

    Resampling is linear or, with order 3, cubic. A cubic spline that overshoots an edge is clipped
    to the channel's own range, as in skimage's `resize`, which nnU-Net calls. Along an axis of
    slices far apart (`separate_axis`) each voxel comes from the nearest slice: nothing is invented
    between slices.

    Normalised and resampled on a `device`, where the image then lies; by default on the CPU.

    Raises VolumeError before anything is allocated, if the image would not fit into free memory.
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
    image = torch.empty(len(normalisers), *grid.shape, device=device)
    # One channel after the other, so that one at a time is held at the volume's own spacing.
    for channel, normalise in enumerate(normalisers):
        # A copy, as torch takes no reversed view.
        values = torch.from_numpy(np.array(turned[..., channel], np.float32, order="C"))
        values = normalise(values.to(image.device))
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
        raise TooLargeError(
            f"expected a volume that fits into memory at the network's spacing of "
            f"{' x '.join(f'{mm:g}' for mm in spacing)} mm, found {size} voxels there, which take "
            f"{needed / 1e9:.3g} GB where {free / 1e9:.3g} GB are free; check both spacings"
        )


def orders_between(source: Grid, grid: Grid, order: Literal[1, 3]) -> tuple[Order, Order, Order]:
    """The order along each axis: 0 along the axis of separate slices, if there is one."""
    apart = separate_axis(source.spacing, grid.spacing)
    x, y, z = (NEAREST if axis == apart else order for axis in range(3))
    return x, y, z


def prepare_label(label: Volume, prepared: Prepared) -> Integer[Tensor, "x y z"]:
    """A label turned, cut and resampled as its image was, but linearly instead of cubically."""
    turned = prepared.orientation.turn(label.data)[prepared.box]
    return resample_labels(
        torch.from_numpy(np.array(turned, order="C")),
        prepared.source.positions_of(prepared.grid),
        [1 if order else 0 for order in prepared.orders],
    )


def body_box(values: Shaped[ndarray, "x y z channel"]) -> Box:
    """The smallest box that holds every voxel with a channel that is not 0, or else everything."""
    sizes = values.shape[:3]
    held = [np.zeros(size, bool) for size in sizes]
    for number, plane in enumerate(np.moveaxis(values, 2, 0)):
        found = (plane != 0).any(axis=2)
        held[0] |= found.any(axis=1)
        held[1] |= found.any(axis=0)
        held[2][number] = found.any()
    if not held[2].any():
        x, y, z = (slice(0, size) for size in sizes)
        return x, y, z
    inside = [np.flatnonzero(along) for along in held]
    x, y, z = (slice(int(indices[0]), int(indices[-1]) + 1) for indices in inside)
    return x, y, z


def cropped(grid: Grid, box: Box) -> Grid:
    """The part of a grid inside a box of its voxels."""
    first = [float(span.start) for span in box]
    return grid.placed([span.stop - span.start for span in box], (1.0, 1.0, 1.0), first)


def median_spacing(grids: Sequence[Grid]) -> tuple[float, float, float]:
    """The median voxel size (mm) of grids along right-left, back-front and foot-head."""
    turned = [Orientation.of(grid.affine).turn_grid(grid).spacing for grid in grids]
    x, y, z = np.median(np.array(turned), axis=0)
    return rounded_spacing((x, y, z))
