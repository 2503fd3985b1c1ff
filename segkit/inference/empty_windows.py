"""Find empty windows, in which every voxel is 0; the network need not run on them."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

from segkit.data.preprocess import Prepared
from segkit.inference.windows import WindowLayout, WindowPlace
from segkit.io.volume import Volume


def empty_windows(
    volume: Volume, prepared: Prepared, layout: WindowLayout
) -> frozenset[WindowPlace]:
    """Positions of the windows in which all voxels of the original volume are 0.

    Args:
        volume: the volume, before it was prepared.
        prepared: the image that was prepared from the volume.
        layout: the windows over the image.
    """
    turned = prepared.orientation.turn(volume.data.reshape(*volume.grid.shape, -1))[prepared.box]
    positions = prepared.source.positions_of(prepared.grid)
    starts = layout.starts(prepared.grid.shape)
    spans = [
        [_below(along[first : first + patch], size) for first in first_voxels]
        for along, size, first_voxels, patch in zip(
            positions, prepared.source.shape, starts, layout.patch_size, strict=True
        )
    ]
    holds = _any_within(turned, spans)
    places = zip(itertools.product(*starts), holds.ravel().tolist(), strict=True)
    return frozenset(place for place, held in places if not held)


def _below(positions: ndarray, size: int) -> slice:
    """The voxels of the volume from which the voxels of a window are interpolated, on one axis."""
    low, high = np.clip((math.floor(positions[0]), math.ceil(positions[-1])), 0, size - 1).tolist()
    return slice(low, high + 1)


def _any_within(
    values: Shaped[ndarray, "x y z channel"], spans: Sequence[Sequence[slice]]
) -> Shaped[ndarray, "x_windows y_windows z_windows"]:
    """True for each window with a value that is not 0.

    Windows overlap, so this reduces one axis after the other.
    """
    x, y, z = spans
    found = np.stack([values[:, :, span].any(axis=(2, 3)) for span in z], axis=2)
    found = np.stack([found[:, span].any(axis=1) for span in y], axis=1)
    return np.stack([found[span].any(axis=0) for span in x], axis=0)
