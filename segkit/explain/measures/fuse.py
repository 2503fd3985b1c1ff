"""The mean of the gate maps of all levels."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from segkit.geometry.resample import resample_known
from segkit.inference.attention_maps import AttentionMap
from segkit.io.volume import Volume

FUSED = "fused/gate"


def with_fused(maps: Mapping[str, AttentionMap]) -> dict[str, AttentionMap]:
    """The maps and, if there are several gates, their mean as the last entry, `FUSED`.

    The mean lies on the grid of the finest gate; the other gates are resampled to it linearly. All
    gates have the same weight. A gate with several channels enters with their mean.
    """
    gates = [one for one in maps.values() if one.info.kind == "gate" and one.volume is not None]
    if len(gates) < 2:
        return dict(maps)
    return {**maps, FUSED: _fused(gates)}


def scalar(placed: Volume) -> Volume:
    """A map with one value for each cell: the mean of its channels if it has several."""
    return placed if placed.data.ndim == 3 else placed.like(placed.data.mean(axis=3))


def _fused(gates: list[AttentionMap]) -> AttentionMap:
    placed = [(gate, scalar(gate.volume)) for gate in gates if gate.volume is not None]
    finest, onto = min(placed, key=lambda pair: np.prod(pair[1].grid.spacing))
    total = np.zeros(onto.grid.shape, np.float64)
    for _, values in placed:
        cells = torch.from_numpy(np.ascontiguousarray(values.data, np.float32))[None]
        total += resample_known(cells, values.grid.positions_of(onto.grid))[0].numpy()
    info = replace(
        finest.info,
        key=FUSED,
        lowest=min(gate.info.lowest for gate in gates),
        highest=max(gate.info.highest for gate in gates),
    )
    mean = (total / len(placed)).astype(np.float32)
    return AttentionMap(info, onto.like(mean), finest.seen)
