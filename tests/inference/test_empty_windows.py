"""Windows count as empty where no voxel that they are read from holds anything."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from torch.testing import assert_close

from segkit.config.attention import AdditiveGridGateConfig, AttentionConfig
from segkit.config.network import NetworkConfig
from segkit.data.preprocess import prepare_image
from segkit.geometry.grid import Grid
from segkit.inference.attention_maps import map_on_source
from segkit.inference.empty_windows import empty_windows
from segkit.inference.engines.torch_eager import LOGITS
from segkit.inference.map_files import write_maps
from segkit.inference.predictor import Predictor
from segkit.inference.windows import WindowLayout
from segkit.io.volume import Volume, read_volume
from segkit.model.folder import Model
from tests.helpers import affine_of, grids
from tests.models import description, nearest_class, random_model


@settings(max_examples=30)
@given(grids(smallest=4, largest=12), st.integers(0, 2**16), st.floats(0.5, 2.0))
def test_an_empty_window_is_interpolated_only_from_zeros(
    grid: Grid, seed: int, ratio: float
) -> None:
    random = np.random.default_rng(seed)
    values = (random.random(grid.shape) < 0.02).astype(np.int16)
    values[tuple(random.integers(0, size) for size in grid.shape)] = 3
    volume = Volume(values, grid)
    spacing = min(grid.spacing) * ratio
    prepared = prepare_image(
        volume, spacing=(spacing, spacing, spacing), normalisers=[lambda image: image + 5]
    )
    layout = WindowLayout((4, 4, 4), (0.5, 0.5, 0.5), (2, 2, 2))
    found = empty_windows(volume, prepared, layout)
    for place in found:
        region = tuple(slice(first, first + 4) for first in place)
        # To the rounding of shares that sum to 1: a voxel of 1 nearby would show far above it.
        values = prepared.image[(0, *region)]
        assert_close(values, torch.full_like(values, 5.0), atol=1e-5, rtol=0)


def test_every_window_with_a_voxel_is_kept() -> None:
    values = np.zeros((16, 16, 16, 2), np.uint8)
    values[0, 0, 0, 1] = values[15, 15, 15, 0] = values[9, 6, 4, 1] = 1
    volume = Volume(values, Grid((16, 16, 16), np.eye(4)))
    prepared = prepare_image(volume, spacing=(1.0, 1.0, 1.0), normalisers=[lambda image: image] * 2)
    layout = WindowLayout((8, 8, 8), (0.5, 0.5, 0.5), (4, 4, 4))
    starts = [[0, 4, 8]] * 3
    assert layout.starts((16, 16, 16)) == starts
    found = empty_windows(volume, prepared, layout)
    held = {(x, y, z) for x in (4, 8) for y in (0, 4) for z in (0, 4)}
    assert found == set(itertools.product(*starts)) - held - {(0, 0, 0), (8, 8, 8)}


@dataclass
class Counting:
    """An engine that says class 1 wherever it is asked."""

    asked: int = 0

    def __call__(self, windows: torch.Tensor, keys: object) -> dict[str, torch.Tensor]:
        self.asked += len(windows)
        logits = torch.zeros(len(windows), 2, *windows.shape[2:])
        logits[:, 1] = 1
        return {LOGITS: logits}


@pytest.mark.parametrize("code", ["RAS", "LPI", "SAR"])
def test_the_network_does_not_run_on_empty_windows_and_they_are_background(code: str) -> None:
    grid = Grid((40, 40, 40), affine_of(code, spacing=(1.0, 1.0, 1.0), rotation=(0.0, 0.0, 0.0)))
    values = np.zeros(grid.shape, np.int16)
    values[:8, :8, :8] = values[-8:, -8:, -8:] = 9
    volume = Volume(values, grid)
    told = description(spacing=(1.0, 1.0, 1.0))
    labels, asked = [], []
    for skip_empty in (True, False):
        predictor = Predictor(Model(told, nearest_class(2)), skip_empty=skip_empty)
        predictor.members[0].engine = engine = Counting()
        prediction = predictor(volume, probabilities=True)
        labels.append(prediction.labels.data)
        asked.append(engine.asked)
    # Windows of 8 at 0, 4, … 32: the two corners' and those that share voxels with them.
    assert asked == [2 * 2**3, 9**3]
    assert labels[1].all()
    expected = np.zeros(grid.shape, bool)
    expected[:12, :12, :12] = expected[-12:, -12:, -12:] = True
    assert_array_equal(labels[0], expected)


def test_skipping_changes_nothing_at_voxels_outside_skipped_windows() -> None:
    random = np.random.default_rng(0)
    values = np.zeros((40, 24, 24), np.float32)
    values[:12] = random.normal(5, 1, (12, 24, 24))
    values[39, 23, 23] = 5
    volume = Volume(values, Grid((40, 24, 24), np.eye(4)))
    model = random_model(NetworkConfig(channels=[4, 4, 4]))
    skipping = Predictor(model)(volume, probabilities=True)
    asking = Predictor(model, skip_empty=False)(volume, probabilities=True)
    assert skipping.probabilities is not None and asking.probabilities is not None
    # Windows start at 0, 4, 8, 12 …: those from 12 on hold nothing, and reach voxels from 12 on.
    left, right = skipping.probabilities.data[:12], asking.probabilities.data[:12]
    np.testing.assert_allclose(left.astype(float), right.astype(float), atol=1e-3)
    assert not skipping.labels.data[16:28].any()


def test_of_a_volume_of_zeros_all_is_background() -> None:
    network = NetworkConfig(channels=[4, 4, 4])
    volume = Volume(np.zeros((20, 9, 12), np.int16), Grid((20, 9, 12), np.eye(4)))
    prediction = Predictor(random_model(network))(volume, probabilities=True, maps=True)
    assert not prediction.labels.data.any()
    assert prediction.probabilities is not None
    assert_array_equal(prediction.probabilities.data[..., 0], 1)


@pytest.mark.parametrize("disagreement", [False, True])
def test_cells_that_only_skipped_windows_cover_are_nan_in_maps_and_files(
    tmp_path: Path, disagreement: bool
) -> None:
    """Two bodies in opposite corners; windows of 8 begin at 0, 4, … 32."""
    values = np.zeros((40, 40, 40), np.float32)
    values[:8, :8, :8] = values[-8:, -8:, -8:] = np.random.default_rng(0).normal(5, 1, (8, 8, 8))
    volume = Volume(values, Grid(values.shape, np.eye(4)))
    network = NetworkConfig(
        channels=[4, 4, 4], attention=AttentionConfig(skip=AdditiveGridGateConfig())
    )
    model = random_model(network)
    found = Predictor(model)(volume, maps=True, disagreement=disagreement).maps["skip.1/gate"]
    assert found.volume is not None
    stride = 40 // found.volume.data.shape[0]
    looked = np.zeros(found.volume.data.shape, bool)
    reach = 12 // stride
    looked[:reach, :reach, :reach] = looked[-reach:, -reach:, -reach:] = True
    assert_array_equal(np.isfinite(found.volume.data), looked)
    if found.disagreement is not None:
        assert np.isnan(found.disagreement.data[~looked]).all()
    on_scan = map_on_source(found, volume).data
    fine = looked.repeat(stride, 0).repeat(stride, 1).repeat(stride, 2)
    assert np.isnan(on_scan[~fine]).all() and np.isfinite(on_scan[fine]).all()
    write_maps(tmp_path, "a", {"skip.1/gate": found}, volume)
    stored = read_volume(tmp_path / "a_map-skip.1-gate.nii.gz").data
    assert_array_equal(stored, on_scan)
    told = json.loads((tmp_path / "a_maps.json").read_text())["maps"][0]
    known = found.volume.data[looked]
    assert told["min"] == known.min() and told["mean"] == pytest.approx(known.mean())


def test_of_a_volume_of_zeros_no_cell_was_computed(tmp_path: Path) -> None:
    network = NetworkConfig(
        channels=[4, 4, 4], attention=AttentionConfig(skip=AdditiveGridGateConfig())
    )
    volume = Volume(np.zeros((20, 9, 12), np.int16), Grid((20, 9, 12), np.eye(4)))
    maps = Predictor(random_model(network))(volume, maps=True).maps
    assert all(one.volume is not None and np.isnan(one.volume.data).all() for one in maps.values())
    write_maps(tmp_path, "a", maps, volume)
    told = json.loads((tmp_path / "a_maps.json").read_text())["maps"][0]
    assert told["min"] is told["mean"] is told["max"] is None
