"""A cell of a map holds the mean of the voxels that it covers."""

import numpy as np
import pytest
from numpy import ndarray
from numpy.testing import assert_allclose, assert_array_equal

from segkit.explain.measures.cells import Cells, constant_background, gradient_length, seen_part
from segkit.geometry.grid import Grid
from tests.explain.measures.test_measure_maps import map_of, pooled, scan_of


@pytest.mark.parametrize("code", ["RAS", "LPS", "IRP"])
def test_a_cell_has_the_mean_of_the_voxels_that_it_covers(code: str, labels: ndarray) -> None:
    scan = scan_of(labels.astype(np.float32), code)
    one = map_of(np.zeros((4, 6, 8)), scan, 2)
    assert one.volume is not None
    seen = seen_part(scan.data, scan.grid, one.seen)
    assert_array_equal(seen, labels)
    cells = Cells(one.volume.grid, one.seen)
    assert cells.counted.all()
    assert_allclose(cells.mean(seen), pooled(labels.astype(float), 2), atol=1e-6)


def test_cells_beyond_the_scan_do_not_count_and_those_at_its_end_hold_its_part() -> None:
    scan = scan_of(np.arange(5 * 4 * 4.0).reshape(5, 4, 4), "RAS")
    one = map_of(np.zeros((4, 2, 2)), scan, 2)  # cells 0-1, 2-3, 4-5, 6-7 of voxels 0 … 4
    assert one.volume is not None
    cells = Cells(one.volume.grid, one.seen)
    assert cells.counted[:, 0, 0].tolist() == [True, True, True, False]
    ones = cells.mean(np.ones((5, 4, 4), np.float32))
    assert_allclose(ones[:3], 1, atol=1e-6)
    assert_allclose(cells.mean(scan.data)[2], pooled(scan.data[[4, 4]], 2)[0], atol=1e-4)


def test_a_gradient_is_per_millimetre() -> None:
    x, y, _ = np.meshgrid(np.arange(4.0), np.arange(5.0), [0.0], indexing="ij")
    slope = gradient_length(3 * x * 0.5 + 4 * y * 2.0, (0.5, 2.0, 7.0))
    assert_allclose(slope, 5)
    within = gradient_length(3 * x * 0.5 + 4 * y * 2.0, (0.5, 2.0, 7.0), across=1)
    assert_allclose(within, 3)


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 1)])
def test_a_gradient_on_leaning_axes_is_that_of_the_world(shape: tuple[int, int, int]) -> None:
    """The image 3 x - 2 y + 6 z of the world has the gradient 7 everywhere.

    One slice shows only the part in its plane, sqrt(3^2 + 2^2).
    """
    affine = np.array([[2.0, 0, 4, 5], [0, 2, 1, -7], [0, 0, 3, 9], [0, 0, 0, 1]])
    grid = Grid(shape, affine)
    values = grid.centres() @ [3.0, -2.0, 6.0]
    found = gradient_length(values, grid.spacing, grid.directions)
    assert_allclose(found, 7 if shape[2] > 1 else 13**0.5)
    within = gradient_length(values, grid.spacing, grid.directions, across=2)
    assert_allclose(within, 13**0.5)


def test_constant_background_is_air_and_not_a_voxel_of_the_body_with_the_same_value() -> None:
    random = np.random.default_rng(0)
    x, y, _ = np.indices((12, 12, 6))
    air = (np.abs(x - 5.5) > 2) & (np.abs(y - 5.5) > 2)
    body = random.integers(0, 4, air.shape).astype(np.float32)
    image = np.where(air, np.float32(0), body)
    assert_array_equal(constant_background([image]), air)
    assert (image[~air] == 0).any()
    # Another channel that varies in the air leaves no constant background, nor has plain noise any.
    noise = random.normal(size=air.shape).astype(np.float32)
    assert not constant_background([image, noise]).any()
    assert not constant_background([noise]).any()
    assert_array_equal(constant_background([image, image - 1024]), air)
