"""Stability of attributions, by values worked out by hand."""

import math

import numpy as np
import pytest
from numpy import ndarray

from segkit.errors import SegkitError
from segkit.explain.attribution.stability import (
    max_sensitivity,
    noisy_copies,
    relative_input_stability,
    relative_output_stability,
)

IMAGE = np.array([1.0, 2.0])
COPIES = [np.array([1.1, 2.0]), np.array([1.1, 2.2])]


def square(image: ndarray) -> ndarray:
    """An attribution whose changes are 0.21 and 0.84 of (1, 4)."""
    found: ndarray = image**2
    return found


def test_an_attribution_that_never_changes_has_a_sensitivity_of_0() -> None:
    copies = noisy_copies(IMAGE, radius=0.5, draws=3)
    assert max_sensitivity(np.ones_like, IMAGE, copies) == 0


def test_sensitivity_is_the_largest_change_for_the_length() -> None:
    # |(0.21, 0.84)| / |(1, 4)| = 0.21, and |(0.21, 0)| / |(1, 4)| is less.
    assert max_sensitivity(square, IMAGE, COPIES) == pytest.approx(0.21)
    three_four = np.array([3.0, 4.0])
    copies = [np.array([3.0, 4.5]), np.array([3.0, 5.0])]
    assert max_sensitivity(lambda image: 7 * image, three_four, copies) == pytest.approx(0.2)


def test_stability_is_the_relative_change_for_the_relative_change_of_the_image() -> None:
    # Both relative changes of the attribution are 0.21 where those of the image are 0.1.
    assert relative_input_stability(square, IMAGE, COPIES[:1]) == pytest.approx(2.1)
    assert relative_input_stability(square, IMAGE, COPIES) == pytest.approx(2.1)
    linear = relative_input_stability(lambda image: 5 * image, IMAGE, COPIES)
    assert linear == pytest.approx(1)


def test_stability_is_the_relative_change_for_the_change_of_the_output() -> None:
    # The sum changes by 0.1 and by 0.3: 0.21 / 0.1, and 0.21 √2 / 0.3.
    total = relative_output_stability(square, np.sum, IMAGE, COPIES)
    assert total == pytest.approx(2.1)
    second = relative_output_stability(square, np.sum, IMAGE, COPIES[1:])
    assert second == pytest.approx(0.21 * math.sqrt(2) / 0.3)


def test_zeros_are_replaced_before_a_division_and_nan_is_left_out() -> None:
    def sometimes(image: ndarray) -> ndarray:
        return np.array([np.nan, image[1] - 2])

    # (0 - 0.2) / 1e-6, over |(-0.1, -0.1)|
    found = relative_input_stability(sometimes, IMAGE, COPIES[1:])
    assert found == pytest.approx(0.2e6 / (0.1 * math.sqrt(2)))
    assert max_sensitivity(lambda image: sometimes(image) + 1, IMAGE, COPIES) == pytest.approx(0.2)


def test_without_copies_or_without_an_attribution_nothing_is_known() -> None:
    assert math.isnan(max_sensitivity(square, IMAGE, []))
    assert math.isnan(max_sensitivity(np.zeros_like, IMAGE, COPIES))
    assert math.isnan(relative_input_stability(square, IMAGE, []))
    assert math.isnan(relative_output_stability(square, np.sum, IMAGE, []))


def test_noise_is_within_the_radius_and_follows_the_seed() -> None:
    image = np.zeros((20, 20), np.float32)
    first, other = noisy_copies(image, radius=0.2, draws=2)
    (again,) = noisy_copies(image, radius=0.2, draws=1)
    assert (first == again).all() and (first != other).any() and first.dtype == np.float32
    assert 0.19 < np.abs(first).max() <= 0.2 and abs(first.mean()) < 0.02


def test_another_shape_is_refused() -> None:
    def growing(image: ndarray) -> ndarray:
        return np.ones(2 if image is IMAGE else 3)

    with pytest.raises(SegkitError, match=r"expected an attribution of the shape \(2,\)"):
        max_sensitivity(growing, IMAGE, COPIES)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32])
@pytest.mark.parametrize("radius", [0.02, 0.9, 300.0])
def test_integer_images_have_the_noise_of_the_same_image_in_floating_point(
    kind: type, radius: float
) -> None:
    image = np.array([[0, 1, 2], [250, 254, 255]])
    copies = list(noisy_copies(image.astype(kind), radius=radius, draws=3))
    exact = noisy_copies(image.astype(float), radius=radius, draws=3)
    for copy, other in zip(copies, exact, strict=True):
        np.testing.assert_allclose(copy, other, rtol=1e-6, atol=1e-4)
        assert radius / 3 < np.abs(copy - image).max() <= radius * (1 + 1e-6)


def test_measures_of_integers_are_those_of_the_same_numbers_in_floating_point() -> None:
    image, copy = np.array([[3, 200], [7, 9]]), np.array([[4, 201], [6, 8]])

    def doubled(values: ndarray) -> ndarray:
        return 2 * values

    def measured(kind: type) -> list[float]:
        one, copies = image.astype(kind), [copy.astype(kind)]
        return [
            max_sensitivity(doubled, one, copies),
            relative_input_stability(doubled, one, copies),
            relative_output_stability(doubled, lambda values: values, one, copies),
        ]

    length = math.sqrt(3**2 + 200**2 + 7**2 + 9**2)
    shares = math.sqrt(sum(1 / value**2 for value in (3, 200, 7, 9)))
    for kind in (float, np.int16, np.int32):
        assert measured(kind) == pytest.approx([2 / length, 1, shares / 2])


def test_stability_of_bytes_does_not_wrap_around() -> None:
    image, copy = np.array([[3, 200], [7, 9]], np.uint8), np.array([[4, 201], [6, 8]], np.uint8)
    same = relative_input_stability(lambda values: values, image, [copy])
    assert same == pytest.approx(1)
    changed = max_sensitivity(lambda values: values, image, [copy])
    assert changed == pytest.approx(2 / math.sqrt(3**2 + 200**2 + 7**2 + 9**2))


def test_an_attribution_that_becomes_nan_has_no_stability() -> None:
    def broken(image: ndarray) -> ndarray:
        return image if image is IMAGE else np.array([np.nan, image[1]])

    assert math.isnan(max_sensitivity(broken, IMAGE, COPIES))
    assert math.isnan(relative_input_stability(broken, IMAGE, COPIES))
    assert math.isnan(relative_output_stability(broken, np.sum, IMAGE, COPIES))


@pytest.mark.parametrize("radius", [-1.0, math.inf, math.nan])
def test_noise_out_of_range_is_refused(radius: float) -> None:
    with pytest.raises(SegkitError, match="radius: expected 0 or more, found"):
        next(noisy_copies(IMAGE, radius=radius, draws=1))
