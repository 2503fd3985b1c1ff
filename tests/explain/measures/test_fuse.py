"""The fused map is the mean of all gates."""

from dataclasses import replace

import numpy as np
from numpy.testing import assert_allclose

from segkit.explain.measures.fuse import FUSED, with_fused
from segkit.geometry.grid import Orientation
from tests.explain.measures.test_measure_maps import SHAPE, map_of, scan_of


def test_the_fused_map_is_the_mean_on_the_finest_grid() -> None:
    scan = scan_of(np.zeros(SHAPE))
    fine = np.random.default_rng(4).random((4, 6, 8))
    coarse = map_of(np.full((2, 3, 4), 0.5), scan, 4, "skip.2/gate")
    maps = with_fused({"skip.2/gate": coarse, "skip.1/gate": map_of(fine, scan, 2)})
    assert list(maps) == ["skip.2/gate", "skip.1/gate", FUSED]
    fused = maps[FUSED]
    assert fused.volume is not None and fused.info.level == 1
    assert_allclose(fused.volume.data, (fine + 0.5) / 2, atol=1e-6)


def test_fusing_maps_of_a_linear_field_gives_the_same_field() -> None:
    scan = scan_of(np.zeros(SHAPE))
    turned = Orientation.of(scan.grid.affine).turn_grid(scan.grid)
    maps = {}
    for stride in (2, 4):
        one = map_of(np.zeros([size // stride for size in turned.shape]), scan, stride)
        assert one.volume is not None
        field = one.volume.grid.centres()[..., 0].astype(np.float32)
        maps[f"skip.{stride}/gate"] = replace(one, volume=one.volume.like(field))
    fused = with_fused(maps)[FUSED].volume
    assert fused is not None
    inner = (slice(1, -1),) * 3  # beyond the coarse map's outermost centres it goes on constant
    assert_allclose(fused.data[inner], fused.grid.centres()[..., 0][inner], atol=1e-4)


def test_one_gate_is_not_fused() -> None:
    scan = scan_of(np.zeros(SHAPE))
    maps = {"skip.1/gate": map_of(np.ones((4, 6, 8)), scan, 2)}
    assert with_fused(maps) == maps
