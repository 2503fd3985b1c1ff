"""Volumes and intensities of structures, by hand and against NumPy on the masks themselves."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from segkit.config.labels import Labelling
from segkit.geometry.grid import Grid
from segkit.inference.label_statistics import label_statistics
from segkit.io.volume import Volume
from tests.helpers import affine_of, grids

CLASSES = Labelling({"background": 0, "kidney": 1, "tumour": 2})
REGIONS = Labelling({"background": 0, "whole": 1, "core": 2}, {"whole": (1, 2), "core": (2,)})


def test_statistics_of_two_voxels_equal_values_worked_out_by_hand() -> None:
    grid = Grid((2, 2, 1), affine_of("LPS", spacing=(1.0, 2.0, 5.0)))
    labels = np.array([[[1], [1]], [[0], [0]]], np.uint8)
    image = np.array([[[10.0], [14.0]], [[99.0], [99.0]]], np.float32)
    found = label_statistics(Volume(labels, grid), Volume(image, grid), CLASSES, ["CT"])
    assert math.isclose(found["voxel_ml"], 0.01)
    kidney, tumour = found["structures"]["kidney"], found["structures"]["tumour"]
    assert kidney["voxels"] == 2 and math.isclose(kidney["ml"], 0.02)
    assert kidney["mean"] == {"CT": 12.0} and kidney["sd"] == {"CT": 2.0}
    assert tumour["voxels"] == 0 and tumour["ml"] == 0 and math.isnan(tumour["mean"]["CT"])
    assert math.isnan(tumour["sd"]["CT"])


@given(grid=grids(), seed=st.integers(0, 9), offset=st.sampled_from([0.0, 1e6]))
def test_structures_measure_as_their_masks_do(grid: Grid, seed: int, offset: float) -> None:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, grid.shape).astype(np.uint8)
    image = random.normal(offset, 3, (*grid.shape, 2))
    for labelling in (CLASSES, REGIONS):
        found = label_statistics(Volume(labels, grid), Volume(image, grid), labelling, "ab")
        for name, numbers in labelling.members.items():
            mask = np.isin(labels, numbers)
            said = found["structures"][name]
            assert said["voxels"] == mask.sum()
            assert_allclose(said["ml"], mask.sum() * np.prod(grid.spacing) / 1000)
            if mask.any():
                for number, channel in enumerate("ab"):
                    inside = image[..., number][mask]
                    assert_allclose(said["mean"][channel], inside.mean(), rtol=1e-9, atol=1e-9)
                    assert_allclose(said["sd"][channel], inside.std(), rtol=1e-6, atol=1e-9)
