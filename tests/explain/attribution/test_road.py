"""ROAD: what fills deleted voxels, and in which order they are deleted."""

import numpy as np
import pytest
from numpy import ndarray
from numpy.testing import assert_allclose

from segkit.errors import SegkitError
from segkit.explain.attribution import road as module
from segkit.explain.attribution.road import impute, road


def ramp(shape: tuple[int, ...]) -> ndarray:
    """Two channels that grow linearly along each axis."""
    index = np.indices(shape).astype(float)
    weights = np.array([1.0, -2.0, 0.5])[: len(shape)]
    one = np.tensordot(weights, index, axes=1)
    return np.stack([one, 3 - 2 * one])


def test_a_voxel_gets_the_weighted_mean_of_its_neighbours() -> None:
    image = np.arange(9.0).reshape(1, 3, 3) ** 2
    deleted = np.zeros((3, 3), bool)
    deleted[1, 1] = True
    # Weights of the paper: 1/6 for 1, 3, 5, 7 and 1/12 for 0, 2, 6, 8 (squared).
    expected = (1 + 9 + 25 + 49) / 6 + (0 + 4 + 36 + 64) / 12
    assert impute(image, deleted, noise=0)[0, 1, 1] == pytest.approx(expected)
    corner = np.zeros((3, 3), bool)
    corner[0, 0] = True  # neighbours 1 and 3, and 4 at half the weight
    assert impute(image, corner, noise=0)[0, 0, 0] == pytest.approx((1 + 9 + 16 / 2) / 2.5)
    assert image[0, 1, 1] == 16


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("shape", [(9, 8), (7, 6, 8)])
def test_linear_images_are_filled_exactly(
    shape: tuple[int, ...], direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr(module, "DIRECT", 0)
        monkeypatch.setattr(module, "TOLERANCE", 1e-10)
    image = ramp(shape)
    deleted = np.zeros(shape, bool)
    deleted[tuple(slice(2, size - 2) for size in shape)] = True
    image_with_hole = np.where(deleted, 1e3, image)
    assert_allclose(impute(image_with_hole, deleted, noise=0), image, atol=1e-6)


def test_noise_is_added_to_deleted_voxels_only() -> None:
    image = np.zeros((1, 40, 40), np.float32)
    deleted = np.zeros((40, 40), bool)
    deleted[5:35, 5:35] = True
    found = impute(image, deleted, noise=0.3, seed=2)
    assert found.dtype == np.float32 and (found[0][~deleted] == 0).all()
    assert found[0][deleted].std() == pytest.approx(0.3, rel=0.1)
    assert (found == impute(image, deleted, noise=0.3, seed=2)).all()


def test_the_highest_voxels_are_deleted_first() -> None:
    image = np.zeros((1, 5, 4))
    image[0, 0] = 1.0
    attribution = -np.arange(20.0).reshape(5, 4)
    attribution[4, 3] = np.nan

    def first_row(filled: ndarray) -> float:
        return float(filled[0, 0].sum())

    found = road(image, attribution, first_row, fractions=(0.0, 4 / 19, 0.5), noise=0)
    # Without its first row, the image is 0 everywhere, and so is what fills the row.
    assert found == {0.0: 4.0, 4 / 19: pytest.approx(0), 0.5: pytest.approx(0)}
    last = road(image, -attribution, first_row, fractions=(0.5,), noise=0)
    assert last[0.5] == pytest.approx(4.0)


def test_a_constant_image_shows_no_deletion() -> None:
    image = np.full((2, 6, 6, 6), 3.0)
    attribution = np.random.default_rng(0).random((6, 6, 6))
    found = road(image, attribution, lambda filled: float(np.ptp(filled)), noise=0)
    assert list(found) == [0.1, 0.2, 0.4, 0.7, 0.9]
    assert_allclose(list(found.values()), 0, atol=1e-9)


def test_impossible_deletions_are_refused() -> None:
    image = np.zeros((1, 3, 3))
    with pytest.raises(SegkitError, match="expected some voxels that are not deleted"):
        impute(image, np.ones((3, 3), bool))
    assert (impute(image, np.zeros((3, 3), bool)) == image).all()
    with pytest.raises(SegkitError, match=r"expected an attribution of the image's shape \(3, 3\)"):
        road(image, np.zeros((3, 4)), np.sum)
    with pytest.raises(SegkitError, match="expected shares from 0 to below 1"):
        road(image, np.zeros((3, 3)), np.sum, fractions=(1.0,))


@pytest.mark.parametrize("kind", [np.uint8, np.int16])
def test_integers_are_filled_as_the_same_numbers_in_floating_point(kind: type) -> None:
    image = np.array([[[7, 8, 7], [9, 0, 7], [8, 7, 9]]])
    deleted = np.zeros((3, 3), bool)
    deleted[1, 1] = True
    found = impute(image.astype(kind), deleted)
    assert_allclose(found, impute(image.astype(float), deleted), rtol=1e-6)
    assert 7 < found[0, 1, 1] < 8  # between two whole numbers


def test_road_refuses_noise_out_of_range_and_an_order_of_nothing() -> None:
    image = ramp((4, 5))
    for noise in (-1.0, np.inf, np.nan):
        with pytest.raises(SegkitError, match="noise: expected 0 or more, found"):
            road(image, image[0], np.sum, noise=noise)
    with pytest.raises(SegkitError, match="expected an attribution with values, found none"):
        road(image, np.full((4, 5), np.nan), np.sum)
