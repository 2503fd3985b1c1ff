"""Preprocessing of a volume: crop to the body, RAS+ axes, normalisation, the network's spacing.

Training and prediction both call `prepare_image`. The grid of its result gives the exact position
of the result in the scan, so that predictions can be mapped back.
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
from segkit.geometry.grid import (
    Grid,
    Orientation,
    measured_spacings,
    rounded_spacing,
    separate_axis,
)
from segkit.geometry.memory_order import slowest_first
from segkit.geometry.resample import Order, nearest, resample, resample_labels
from segkit.io.volume import Volume
from segkit.system.memory import free_memory

Box = tuple[slice, slice, slice]
NEAREST: Literal[0] = 0
BYTES_PER_VALUE = 4
SHARED_TYPES = tuple(np.dtype(kind) for kind in ("i1", "u1", "i2", "i4", "f2", "f4", "?"))
"""Types of arrays, in the byte order of this machine, that PyTorch can use without a copy. Types of
8 bytes are left out: they would need more of the device's memory than float32."""


class TooLargeError(VolumeError):
    """A volume does not fit into free memory at the network's spacing."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prepared image, (channel, x, y, z) in RAS+ order, and its position in the volume."""

    image: Float[Tensor, "channel x y z"]
    grid: Grid
    """The grid of the prepared image."""
    source: Grid
    """The part of the volume that the image was made from, in RAS+ order, at its own spacing."""
    box: Box
    """This part as a box of voxels of the volume in RAS+ order."""
    orientation: Orientation
    """The directions of the volume's own axes."""
    orders: tuple[Order, Order, Order]
    """The order of resampling along each axis; 0 along the axis of separate slices."""

    def positions_of_source(self) -> tuple[ndarray, ndarray, ndarray]:
        """The centres of the source's voxels as fractional indices of the grid, along each axis.

        Along an axis that was resampled by the nearest slice, they are whole indices of slices.
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
    """Prepare a volume: RAS+ order, crop to the body, normalisation, and resampling.

    The volume is cropped to the smallest box around all voxels that are not 0, as in nnU-Net,
    because a background of zeros would disturb normalisation, of the image and inside a network.

    Cubic splines can overshoot at edges, so the result is clipped to the range of the channel, as
    in skimage's `resize`, which nnU-Net uses. Along an axis of slices that are far apart
    (`separate_axis`), each voxel comes from the nearest slice. An axis of one voxel keeps it.

    Args:
        volume: the volume.
        spacing: target spacing in mm along x, y and z.
        normalisers: one function for each channel.
        order: order of the interpolation: 1 is linear, 3 is cubic.
        device: the device that normalises and resamples, and then holds the image. Default: CPU.

    Raises:
        VolumeError: the result would not fit into free memory; nothing is allocated then.
    """
    orientation = Orientation.of(volume.grid.affine)
    turned = orientation.turn(volume.data.reshape(*volume.grid.shape, -1))
    box = body_box(turned)
    source = cropped(orientation.turn_grid(volume.grid), box)
    turned = turned[box]
    assert len(normalisers) == turned.shape[3], "one normaliser per channel"
    _check_memory(source, spacing, len(normalisers))
    grid = source.with_spacing(spacing_for(source, spacing))
    x, y, z = orders_between(source, grid, order)
    positions = source.positions_of(grid)
    image = torch.empty(len(normalisers), *grid.shape, device=device)
    # One channel after the other, so that only one is in memory at the volume's own spacing.
    for channel, normalise in enumerate(normalisers):
        values = normalise(_float32_on(image.device, turned[..., channel]))
        image[channel] = resample(values[None], positions, (x, y, z))[0]
        if order == 3:
            image[channel].clamp_(values.min(), values.max())
    return Prepared(image, grid, source, box, orientation, (x, y, z))


def _float32_on(device: torch.device, values: Shaped[ndarray, "x y z"]) -> Float[Tensor, "x y z"]:
    """The values in float32 and in C order, in new memory of a device.

    The device gets the bytes as they lie in memory, then sorts and converts them: NumPy takes
    longer for this, and a GPU a fraction of the time.
    """
    if values.dtype not in SHARED_TYPES or not values.flags.writeable:
        values = np.array(values, np.float32, order="K")
    reversed_axes = tuple(axis for axis in range(values.ndim) if values.strides[axis] < 0)
    forward = np.flip(values, reversed_axes)
    order = slowest_first(forward.strides)
    stored = torch.from_numpy(forward.transpose(order)).to(device)
    back = [order.index(axis) for axis in range(values.ndim)]
    turned = stored.permute(back)
    found = torch.empty(values.shape, device=device)
    return found.copy_(turned.flip(reversed_axes) if reversed_axes else turned)


def _check_memory(source: Grid, spacing: Sequence[float], num_channels: int) -> None:
    # In floating point, because an absurd spacing gives numbers too large for integers.
    with np.errstate(over="ignore"):
        ratios = source.spacing / np.array(spacing_for(source, spacing))
        shape = (np.array(source.shape) * ratios).tolist()
    needed, free = BYTES_PER_VALUE * num_channels * math.prod(shape), free_memory()
    if not needed <= free:
        size = " x ".join(f"{length:.3g}" for length in shape)
        raise TooLargeError(
            "expected a volume that fits into memory at the network's spacing of "
            f"{' x '.join(f'{mm:g}' for mm in spacing)} mm, found {size} voxels, which need "
            f"{needed / 1e9:.3g} GB while only {free / 1e9:.3g} GB are free; check the spacing of "
            "the volume and of the network"
        )


def spacing_for(source: Grid, spacing: Sequence[float]) -> tuple[float, float, float]:
    """The target spacing of a grid in mm: along an axis of one voxel, the grid's own.

    The header's spacing along such an axis means nothing, as of a picture or of a single slice.

    Args:
        source: the grid before it is resampled.
        spacing: target spacing of the network, in mm.
    """
    x, y, z = (
        own if size == 1 else wanted
        for size, own, wanted in zip(source.shape, source.spacing, spacing, strict=True)
    )
    return x, y, z


def orders_between(source: Grid, grid: Grid, order: Literal[1, 3]) -> tuple[Order, Order, Order]:
    """The order of interpolation along each axis: 0 along the axis of separate slices, if any."""
    thick = [axis for axis, size in enumerate(source.shape) if size > 1]
    apart = separate_axis(source.spacing, grid.spacing, thick)
    x, y, z = (NEAREST if axis == apart else order for axis in range(3))
    return x, y, z


def prepare_label(label: Volume, prepared: Prepared) -> Integer[Tensor, "x y z"]:
    """A label, oriented, cropped and resampled like its image, but linearly instead of cubically.

    Args:
        label: the label on the grid of the original volume.
        prepared: the prepared image.
    """
    turned = prepared.orientation.turn(label.data)[prepared.box]
    return resample_labels(
        torch.from_numpy(np.array(turned, order="C")),
        prepared.source.positions_of(prepared.grid),
        [1 if order else 0 for order in prepared.orders],
    )


def body_box(values: Shaped[ndarray, "x y z channel"]) -> Box:
    """The smallest box around all voxels that are not 0 in every channel; all if there are none."""
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
    """The median voxel size of grids, in mm along right-left, back-front and foot-head.

    Along each axis, only grids with more than one voxel count, if there are any.
    """
    turned = [Orientation.of(grid.affine).turn_grid(grid) for grid in grids]
    spacings, shapes = [grid.spacing for grid in turned], [grid.shape for grid in turned]
    x, y, z = (np.median(measured_spacings(spacings, shapes, axis)) for axis in range(3))
    return rounded_spacing((float(x), float(y), float(z)))
