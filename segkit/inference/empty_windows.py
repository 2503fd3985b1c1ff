"""Windows that hold nothing, which need no network: every voxel below them is 0."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

from segkit.data.preprocess import Prepared
from segkit.inference.windows import WindowPlace
from segkit.io.volume import Volume


def empty_windows(
    volume: Volume,
    prepared: Prepared,
    *,
    patch_size: Sequence[int],
    starts: Sequence[Sequence[int]],
) -> frozenset[WindowPlace]:
    """The windows of the prepared image under which the volume, as it was given, is 0 throughout.

    Args:
        volume: what the image was prepared from.
        prepared: the image.
        patch_size: of a window, in voxels of the image.
        starts: first voxels of windows along each axis.
    """
    turned = prepared.orientation.turn(volume.data.reshape(*volume.grid.shape, -1))[prepared.box]
    spans = []
    for positions, size, first_voxels, patch in zip(
        prepared.source.positions_of(prepared.grid),
        prepared.source.shape,
        starts,
        patch_size,
        strict=True,
    ):
        spans.append([_below(positions[first : first + patch], size) for first in first_voxels])
    holds = _any_within(turned, spans)
    return frozenset(
        place
        for place, held in zip(itertools.product(*starts), holds.ravel().tolist(), strict=True)
        if not held
    )


def _below(positions: ndarray, size: int) -> slice:
    """The voxels that a window's own are interpolated between."""
    last = size - 1
    return slice(
        min(max(math.floor(positions[0]), 0), last), min(max(math.ceil(positions[-1]), 0), last) + 1
    )


def _any_within(
    values: Shaped[ndarray, "x y z channel"], spans: Sequence[Sequence[slice]]
) -> Shaped[ndarray, "x_windows y_windows z_windows"]:
    """Whether any value of each window is not 0; one axis after the other, as windows overlap."""
    x, y, z = spans
    found = np.stack([values[:, :, span].any(axis=(2, 3)) for span in z], axis=2)
    found = np.stack([found[:, span].any(axis=1) for span in y], axis=1)
    return np.stack([found[span].any(axis=0) for span in x], axis=0)
