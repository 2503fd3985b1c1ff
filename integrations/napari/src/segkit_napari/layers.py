"""From volumes to napari's layers, as tuples of data, keywords and kind.

napari shows the last two axes of an array, and its world has the axes of the array. So arrays are
turned from (x, y, z) to (z, y, x), and so is each affine. napari's world is then (z, y, x) in RAS+
mm: read backwards, a point is the one that segkit and nibabel give.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy import ndarray

from segkit import Grid, Volume

LayerTuple = tuple[ndarray, dict[str, Any], Literal["image", "labels"]]
OURS = "segkit"
"""Key of a layer's metadata under which the plugin keeps what it knows."""
BACKWARDS = [2, 1, 0, 3]


def layer_affine(affine: ndarray) -> ndarray:
    """The affine of a layer (z, y, x) from that of a volume (x, y, z), and the other way round.

    Example:
        >>> layer_affine(np.diag([1.0, 2.0, 3.0, 1.0])).diagonal()
        array([3., 2., 1., 1.])
    """
    return np.asarray(affine, float)[np.ix_(BACKWARDS, BACKWARDS)]


def image_layers(volume: Volume, name: str, channels: Sequence[str] = ()) -> list[LayerTuple]:
    """A grey layer for each channel of a volume; only the first is visible.

    Args:
        volume: (x, y, z) or (x, y, z, channel).
        name: the name of the scan.
        channels: names of the channels; their numbers if not given.
    """
    if volume.data.ndim == 3:
        return [(volume.data.T, {**_placed(volume), "name": name}, "image")]
    count = volume.data.shape[3]
    named = channels if len(channels) == count else [str(number) for number in range(count)]
    return [
        (
            volume.data[..., number].T,
            {**_placed(volume), "name": f"{name} {channel}", "visible": number == 0},
            "image",
        )
        for number, channel in enumerate(named)
    ]


def labels_layer(
    volume: Volume,
    name: str,
    numbers: Mapping[str, int],
    colours: Mapping[str, str] | None = None,
) -> LayerTuple:
    """A layer of labels, with the name of each in the status bar.

    Args:
        volume: labels, (x, y, z).
        name: name of the layer.
        numbers: the number of each class or region, by name; the background is first.
        colours: the colour of each class or region; napari chooses if not given.
    """
    highest = max([*numbers.values(), int(volume.data.max(initial=0))])
    data = volume.data.astype(np.min_scalar_type(highest)).T
    keywords: dict[str, Any] = {
        **_placed(volume),
        "name": name,
        "opacity": 0.5,
        "features": {"index": [*numbers.values()], "name": [*numbers]},
        "metadata": {OURS: {"labels": dict(numbers)}},
    }
    if colours:
        background = next(iter(numbers.values()))
        shown = {numbers[name]: colour for name, colour in colours.items() if name in numbers}
        keywords["colormap"] = {None: "transparent", background: "transparent", **shown}
    return data, keywords, "labels"


def map_layers(
    volume: Volume, key: str, limits: tuple[float, float] | None = None, *, visible: bool = True
) -> list[LayerTuple]:
    """A layer for an attention map on its own grid, or one for each of its values per cell.

    Values that were not computed are NaN, which napari draws transparent. Cells are not
    interpolated, so that each shows.

    Args:
        volume: (x, y, z) or (x, y, z, value), NaN where nothing was computed.
        key: the map's key, such as `skip.1/gate`.
        limits: the values between which the colours lie; the map's own range if not given.
        visible: whether the first layer is visible.
    """
    low, high = (np.nan, np.nan) if limits is None else limits
    known = volume.data[np.isfinite(volume.data)]
    low = low if np.isfinite(low) else float(known.min(initial=0, where=known == known))
    high = high if np.isfinite(high) else float(known.max(initial=1, where=known == known))
    found = []
    for data, keywords, kind in image_layers(volume, key):
        keywords |= {
            "colormap": "inferno",
            "contrast_limits": (low, max(high, low + 1e-6)),
            "opacity": 0.6,
            "blending": "translucent",
            "interpolation2d": "nearest",
            "visible": visible and not found,
            "metadata": {OURS: {"map": key}},
        }
        found.append((data.astype(np.float32, copy=False), keywords, kind))
    return found


def _placed(volume: Volume) -> dict[str, Any]:
    """Where a layer lies; a picture of unknown scale has no unit."""
    unit = {} if volume.unit == "pixel" else {"units": ("mm", "mm", "mm")}
    return {
        "affine": layer_affine(volume.grid.affine),
        "axis_labels": ("z", "y", "x"),
        **unit,
    }


def volume_of(arrays: Sequence[ndarray], affine: ndarray) -> Volume:
    """The volume whose channels are the arrays of layers.

    Args:
        arrays: (z, y, x) or, for one slice, (y, x); one for each channel.
        affine: from indices of the first three axes (z, y, x) to world (z, y, x) in mm.
    """
    turned = [(data if data.ndim == 3 else data[None]).T for data in arrays]
    data = turned[0] if len(turned) == 1 else np.stack(turned, axis=-1)
    x, y, z = data.shape[:3]
    return Volume(data, Grid((x, y, z), layer_affine(affine)))
