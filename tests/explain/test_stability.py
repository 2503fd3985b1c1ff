"""Laws of how far models agree on their maps."""

import numpy as np
import pytest
from numpy import ndarray

from segkit.errors import ModelError
from segkit.explain.stability import stability
from segkit.geometry.grid import Grid
from segkit.inference.attention_maps import AttentionMap
from segkit.io.volume import Volume
from segkit.nn.map_tap import MapInfo

GRID = Grid((2, 2, 2), np.eye(4))


def gate(values: ndarray, grid: Grid = GRID) -> AttentionMap:
    info = MapInfo("skip.0/gate", "gate", 0, None, 0.0, 1.0)
    return AttentionMap(info, Volume(values, grid), grid)


def test_agreement_is_the_mean_over_pairs() -> None:
    """Two rise alike, the third falls: of three pairs, 1, -1 and -1."""
    rising = np.arange(8.0).reshape(2, 2, 2)
    maps = [{"skip.0/gate": gate(values)} for values in (rising, rising**2, -rising)]
    (row,) = stability("x", maps)
    assert (row.case, row.map, row.models) == ("x", "skip.0/gate", 3)
    assert row.spearman == pytest.approx(-1 / 3) and row.lowest == pytest.approx(-1)


def test_constant_maps_have_no_ranks_and_maps_of_one_model_alone_no_pair() -> None:
    rising, flat = np.arange(8.0).reshape(2, 2, 2), np.ones((2, 2, 2))
    (row,) = stability("x", [{"a": gate(rising), "b": gate(flat)}, {"a": gate(flat)}])
    assert (row.map, row.spearman, row.lowest) == ("a", None, None)


def test_models_that_cannot_be_compared_are_refused() -> None:
    maps = {"a": gate(np.ones((2, 2, 2)))}
    with pytest.raises(ModelError, match="found 1; name two or more"):
        stability("x", [maps])
    moved = gate(np.ones((2, 2, 2)), Grid((2, 2, 2), np.diag([2.0, 1.0, 1.0, 1.0])))
    with pytest.raises(ModelError, match="a: the models' maps lie on different grids"):
        stability("x", [maps, {"a": moved}])
