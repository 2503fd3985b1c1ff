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
