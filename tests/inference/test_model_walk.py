"""A model is asked about the mirror images that it was trained on, and no others."""

from collections.abc import Collection

import numpy as np
import pytest
from torch import Tensor

from segkit.config.model import ACROSS
from segkit.config.network import NetworkConfig
from segkit.geometry.grid import Grid
from segkit.inference.engines.torch_eager import TorchEngine
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.model.build import build_network
from segkit.model.folder import Model
from tests.models import random_model


def test_a_model_that_knows_of_no_mirroring_is_not_mirrored() -> None:
    predictor = Predictor(random_model(NetworkConfig(channels=[4, 4, 4])), tta=True)
    assert not predictor.mirrors
    assert predictor.model.description.mirror == []


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("slices", [1, 3, 9])
def test_a_2d_network_sees_as_many_slices_as_there_are_and_each_as_if_by_itself(
    slices: int, plane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    axis = ACROSS[plane]
    known = random_model(NetworkConfig(spatial_dims=2, channels=[4, 4, 4]), patch_size=(8, 8))
    told = known.description.model_copy(update={"slices": plane})
    model = Model(told, build_network(told).eval())
    shape = [12, 12]
    shape.insert(axis, slices)
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    depths = []
    compute = TorchEngine.__call__

    def counted(engine: TorchEngine, windows: Tensor, keys: Collection[str]) -> dict[str, Tensor]:
        depths.append(windows.shape[2 + axis])
        return compute(engine, windows, keys)

    monkeypatch.setattr(TorchEngine, "__call__", counted)
    predictor = Predictor(model, device="cpu", engine="torch")
    grid = Grid(tuple(shape), np.eye(4))
    whole = predictor(Volume(values, grid), probabilities=True)
    assert set(depths) == {min(slices, 8)}
    assert whole.probabilities is not None
    for number in range(slices):
        one = values.take([number], axis)
        corner = np.zeros(3)
        corner[axis] = number
        affine = np.eye(4)
        affine[:3, 3] = corner
        alone = predictor(Volume(one, Grid(one.shape, affine)), probabilities=True)
        assert alone.probabilities is not None
        np.testing.assert_allclose(
            alone.probabilities.data,
            whole.probabilities.data.take([number], axis),
            rtol=0,
            atol=1e-6,
        )
