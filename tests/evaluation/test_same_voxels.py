"""Predictions are held against references voxel by voxel, however their files store them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from numpy import ndarray

from segkit.errors import VolumeError
from segkit.evaluation.evaluate import evaluate
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, write_volume
from tests.helpers import STORED, affine_of, affines, stored_otherwise

SHAPE = (6, 7, 8)
RANDOM = np.random.default_rng(0)
REFERENCE = RANDOM.integers(0, 3, SHAPE).astype(np.uint8)
# A fifth of the voxels is wrong, each in a way that no turn would repair.
PREDICTION = np.where(RANDOM.random(SHAPE) < 0.2, RANDOM.integers(0, 3, SHAPE), REFERENCE)
GRID = Grid(SHAPE, affine_of("LPS", (0.7, 0.7, 2.5), rotation=(0.2, -0.3, 0.25)))


def scores(folder: Path, prediction: Volume, reference: Volume) -> list[dict[str, float]]:
    write_volume(folder / "p.nii.gz", prediction)
    write_volume(folder / "r.nii.gz", reference)
    found = evaluate(folder / "p.nii.gz", folder / "r.nii.gz")
    return [dict(row.metrics) for row in found.cases]


def labels(values: ndarray, grid: Grid = GRID) -> Volume:
    return Volume(values.astype(np.uint8), grid)


@pytest.mark.parametrize(("order", "flipped"), STORED)
def test_scores_do_not_depend_on_the_order_in_which_axes_are_stored(
    tmp_path: Path, order: Sequence[int], flipped: Sequence[int]
) -> None:
    expected = scores(tmp_path, labels(PREDICTION), labels(REFERENCE))
    values, grid = stored_otherwise(PREDICTION, GRID, order, flipped)
    assert scores(tmp_path, labels(values, grid), labels(REFERENCE)) == expected
    assert 0.5 < expected[0]["dice"] < 0.95


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(affines())
def test_scores_do_not_depend_on_rounding_in_headers_and_labels(
    tmp_path: Path, affine: ndarray
) -> None:
    expected = scores(
        tmp_path, labels(PREDICTION, Grid(SHAPE, affine)), labels(REFERENCE, Grid(SHAPE, affine))
    )
    rounded = Grid(SHAPE, np.round(affine, 3))
    prediction = Volume((PREDICTION * (1 - 2.3e-10)).astype(np.float64), rounded)
    found = scores(tmp_path, prediction, labels(REFERENCE, Grid(SHAPE, affine)))
    assert found == expected


def test_a_fraction_of_a_label_is_refused_with_its_value(tmp_path: Path) -> None:
    half = Volume(REFERENCE * np.float32(1.0625), GRID)
    told = r"p\.nii\.gz: expected whole numbers.*, found (1\.0625|2\.125);"
    with pytest.raises(VolumeError, match=told):
        scores(tmp_path, half, labels(REFERENCE))


def test_a_prediction_of_another_spacing_is_refused_with_the_difference(tmp_path: Path) -> None:
    other = Grid(SHAPE, GRID.affine @ np.diag([1.0, 1.0, 1.2, 1.0]))
    with pytest.raises(
        VolumeError,
        match=r"p\.nii\.gz: lies on another grid than .*r\.nii\.gz: its spacing is 0\.7x0\.7x3 mm, "
        r"not 0\.7x0\.7x2\.5 mm, so that voxels lie up to 1\.4 voxels apart; resample one onto",
    ):
        scores(tmp_path, labels(PREDICTION, other), labels(REFERENCE))
