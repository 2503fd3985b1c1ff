"""Attention maps of whole volumes, each on its own grid, collected window by window."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from segkit.data.preprocess import Prepared
from segkit.errors import VolumeError
from segkit.geometry.grid import Grid, Orientation
from segkit.geometry.resample import resample_known
from segkit.inference.source_rows import WALK_AXIS
from segkit.inference.window_disagreement import SQUARES, WindowSpread, where_windows_meet
from segkit.inference.windows import Slab
from segkit.io.disk_arrays import Allocate, in_memory, release
from segkit.io.volume import Volume
from segkit.nn.map_tap import MapInfo

ROWS = 16
"""Number of rows of a volume to which a map is resampled at once."""


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """An attention map of a whole volume: one value for each cell, or one for each channel.

    Example:
        prediction = segkit.Predictor.load("runs/mine")(scan, maps=True)
        gate = prediction.maps["skip.1/gate"]
        gate.volume.data, gate.volume.grid.affine  # values (x, y, z), and their position in mm
    """

    info: MapInfo
    """Key, kind, level and range of values."""
    volume: Volume | None
    """Raw values, float32 (x, y, z) or (x, y, z, map), on the map's own coarser grid, whose affine
    is exact. NaN at cells that only skipped windows cover. None if the map is over channels."""
    seen: Grid
    """The part of the volume that the network saw, in RAS+ order."""
    channel_mean: Float[ndarray, " channel"] | None = None
    """Mean over windows of each channel; only for a map over channels."""
    channel_std: Float[ndarray, " channel"] | None = None
    """Standard deviation over windows of each channel; only for a map over channels."""
    disagreement: Volume | None = None
    """Standard deviation between the windows at each cell, averaged over channels: float32
    (x, y, z); NaN at cells that fewer than two windows cover. None if not requested."""


class ChannelStatistics:
    """Mean and standard deviation, over windows, of maps over channels."""

    def __init__(self) -> None:
        self.windows: dict[str, list[Tensor]] = {}

    def add(self, key: str, window_maps: Float[Tensor, "batch channel *ones"]) -> None:
        """Add the maps of a batch of windows."""
        # They stay on the device, because a copy of each would make a GPU wait.
        vectors = window_maps.amax(tuple(range(2, window_maps.ndim)))
        self.windows.setdefault(key, []).append(vectors)

    def result(self, info: MapInfo, seen: Grid) -> AttentionMap:
        """Mean and standard deviation of one map."""
        # If GPU memory ran out, some are on the host.
        vectors = torch.cat([each.cpu() for each in self.windows[info.key]]).double()
        mean, std = vectors.mean(dim=0), vectors.std(dim=0, correction=0)
        return AttentionMap(info, None, seen, mean.numpy(), std.numpy())


class MapCollector:
    """Collects the maps of a volume while the network runs over its windows.

    A map has a position unless it is over channels.

    Args:
        infos: the maps to collect, by key.
        prepared: the image from which the windows are cut.
        allocate: makes the arrays for maps with a position.
        disagreement: compute `AttentionMap.disagreement` for maps with a position.
    """

    def __init__(
        self,
        infos: Mapping[str, MapInfo],
        prepared: Prepared,
        *,
        allocate: Allocate,
        disagreement: bool = False,
    ) -> None:
        self.infos = infos
        self.prepared = prepared
        self.allocate = allocate
        self.vectors = ChannelStatistics()
        self.placed: dict[str, ndarray] = {}
        placed = [key for key, info in infos.items() if info.placement is not None]
        self.spread = WindowSpread(placed) if disagreement else None

    def take_vectors(self, outputs: dict[str, Tensor]) -> None:
        """Move the maps over channels out of the network's outputs for a batch of windows.

        If disagreement is requested, this also adds the squares of the other maps to the outputs.
        """
        for key, info in self.infos.items():
            if info.placement is None:
                self.vectors.add(key, outputs.pop(key))
        if self.spread is not None:
            self.spread.add_squares(outputs)

    def unseen(self) -> dict[str, Tensor]:
        """NaN for each map with a position: the value of cells that only skipped windows cover."""
        names = [key for key, info in self.infos.items() if info.placement is not None]
        if self.spread is not None:
            names += [key + SQUARES for key in names]
        return {name: torch.full((1,), torch.nan) for name in names}

    def take_rows(self, slab: Slab) -> None:
        """Move the finished rows of maps with a position out of a slab."""
        for key in [key for key in slab.rows if key in self.infos]:
            rows, first = slab.rows.pop(key), slab.starts[key]
            info = self.infos[key]
            if self.spread is not None:
                squares = slab.rows.pop(key + SQUARES)
                self._put(info, key + SQUARES, self.spread.deviation(key, rows, squares), first)
            # Rounding in the blending may leave the range by the last digit.
            self._put(info, key, rows.clamp(info.lowest, info.highest), first)

    def _put(self, info: MapInfo, name: str, rows: Tensor, first: int) -> None:
        assert info.placement is not None
        if name not in self.placed:
            size = self.prepared.grid.shape[WALK_AXIS]
            length = -(-size // int(info.placement.stride[WALK_AXIS]))
            shape = (*rows.shape[1:3], length, len(rows))
            self.placed[name] = self.allocate(shape, np.dtype(np.float32))
        values = rows.movedim(0, -1).cpu().numpy()
        self.placed[name][:, :, first : first + rows.shape[-1]] = values
        release(self.placed[name])

    def result(self, volume: Volume) -> dict[str, AttentionMap]:
        """The maps of the whole volume."""
        found = {}
        for key, info in self.infos.items():
            if info.placement is None:
                found[key] = self.vectors.result(info, self.prepared.source)
                continue
            values = self.placed[key]
            stride = info.placement.stride
            grid = self.prepared.grid.placed(values.shape[:3], stride, info.placement.offset)
            disagreement = None
            if self.spread is not None:
                windows = self.spread.windows_over(values.shape[:3], stride)
                deviation = where_windows_meet(self.placed[key + SQUARES], windows)
                disagreement = volume.on(grid, deviation)
            map_volume = volume.on(grid, values[..., 0] if values.shape[3] == 1 else values)
            found[key] = AttentionMap(
                info, map_volume, self.prepared.source, disagreement=disagreement
            )
        return found


def map_on_source(
    attention_map: AttentionMap, source: Volume, *, allocate: Allocate = in_memory
) -> Volume:
    """A map, resampled linearly to the grid of the volume that was predicted.

    Example:
        gate = segkit.map_on_source(prediction.maps["skip.1/gate"], scan)
        segkit.write_volume("gate.nii.gz", gate)

    Args:
        attention_map: a map that is not over channels.
        source: the volume that was predicted.
        allocate: makes the array of the result.

    Returns:
        Float32 (x, y, z) or (x, y, z, map) on the grid of `source`, with the map's raw values. NaN
        outside the part that the network saw, and at voxels whose nearest cell is NaN.

    Raises:
        VolumeError: the map is over channels, so it has no position.
    """
    native = attention_map.volume
    if native is None:
        raise VolumeError(
            f"map {attention_map.info.key}: expected a map over voxels, found one over channels, "
            f"which has no position; use its channel_mean"
        )
    orientation = Orientation.of(source.grid.affine)
    turned = orientation.turn_grid(source.grid)
    seen = attention_map.seen
    first = turned.index(seen.affine[:3, 3]).round().astype(int)
    x_box, y_box, _ = (slice(low, low + size) for low, size in zip(first, seen.shape, strict=True))
    cells = native.data.reshape(*native.grid.shape, -1)
    onto = allocate((*turned.shape, cells.shape[3]), np.dtype(np.float32))
    _fill_beyond(onto, seen.shape, first)
    x, y, rows = native.grid.positions_of(seen)
    clamped = np.clip(rows, 0, native.grid.shape[WALK_AXIS] - 1)
    for start in range(0, len(rows), ROWS):
        block = clamped[start : start + ROWS]
        lowest, highest = int(np.floor(block[0])), int(np.ceil(block[-1]))
        held = torch.from_numpy(np.moveaxis(cells[:, :, lowest : highest + 1], 3, 0).copy())
        values = resample_known(held, (x, y, block - lowest)).movedim(0, -1).numpy()
        low = int(first[WALK_AXIS]) + start
        onto[x_box, y_box, low : low + len(block)] = values
        release(onto)
        release(native.data)
    back = orientation.turn_back(onto)
    return source.like(back if native.data.ndim == 4 else back[..., 0])


def _fill_beyond(onto: ndarray, shape: Sequence[int], first: ndarray) -> None:
    """Write NaN outside a box of an array, a few rows at once.

    Args:
        onto: the array, which is changed.
        shape: size of the box.
        first: first voxel of the box.
    """
    x_box, y_box, rows_box = (
        slice(int(low), int(low) + size) for low, size in zip(first, shape, strict=True)
    )
    for start in range(0, onto.shape[WALK_AXIS], ROWS):
        rows = slice(start, start + ROWS)
        if start >= rows_box.start and start + ROWS <= rows_box.stop:
            for part in (
                onto[: x_box.start, :, rows],
                onto[x_box.stop :, :, rows],
                onto[x_box, : y_box.start, rows],
                onto[x_box, y_box.stop :, rows],
            ):
                part[...] = np.nan
        else:
            onto[:, :, rows] = np.nan
        release(onto)
