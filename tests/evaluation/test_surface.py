import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from segkit.evaluation.surface import (
    SurfaceDistances,
    average_symmetric_surface_distance,
    hausdorff95,
    normalised_surface_dice,
    surface_distances,
)

Mask = np.ndarray
Case = tuple[Mask, Mask, tuple[float, ...]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two masks of 2 or 3 axes, sparse or dense, neither of them empty, and a spacing."""
    shape = tuple(draw(st.lists(st.integers(1, 8), min_size=2, max_size=3)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.floats(0.05, 0.95))
    prediction, reference = random.random((2, *shape)) < share
    for mask in (prediction, reference):
        mask.flat[random.integers(mask.size)] = True
    return prediction, reference, tuple(random.uniform(0.3, 4, len(shape)).tolist())


def scores(distances: SurfaceDistances, tolerance: float = 1.0) -> tuple[float, float, float]:
    return (
        hausdorff95(distances),
        average_symmetric_surface_distance(distances),
        normalised_surface_dice(distances, tolerance),
    )


def cube(corner: tuple[int, int, int], size: int = 5) -> Mask:
    mask = np.zeros((12, 13, 14), dtype=bool)
    mask[tuple(slice(start, start + size) for start in corner)] = True
    return mask


def brute_force_surface(mask: Mask) -> np.ndarray:
    """Voxels with a face neighbour outside the mask, or outside the image, one at a time.

    Along an axis of size 1 there are no neighbours, unless there is no other axis.
    """
    surface = []
    steps = np.eye(mask.ndim, dtype=int)
    steps = steps[np.array(mask.shape) > 1] if mask.size > 1 else steps
    for place in np.argwhere(mask):
        neighbours = [place + sign * step for step in steps for sign in (1, -1)]
        inside = [
            bool((near >= 0).all() and (near < mask.shape).all() and mask[tuple(near)])
            for near in neighbours
        ]
        if not all(inside):
            surface.append(place)
    return np.array(surface)


@settings(deadline=None, max_examples=50)
@given(cases())
def test_distances_equal_a_search_over_every_pair_of_surface_voxels(case: Case) -> None:
    prediction, reference, spacing = case
    ours = surface_distances(prediction, reference, spacing)
    first, second = (brute_force_surface(mask) * spacing for mask in (prediction, reference))
    every_pair = np.linalg.norm(first[:, None] - second, axis=-1)
    np.testing.assert_allclose(np.sort(ours.to_reference), np.sort(every_pair.min(1)), atol=1e-9)
    np.testing.assert_allclose(np.sort(ours.to_prediction), np.sort(every_pair.min(0)), atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(cases())
def test_swapping_the_masks_changes_no_score(case: Case) -> None:
    prediction, reference, spacing = case
    forward = scores(surface_distances(prediction, reference, spacing))
    assert scores(surface_distances(reference, prediction, spacing)) == pytest.approx(forward)


@settings(deadline=None, max_examples=30)
@given(cases())
def test_a_mask_against_itself_is_perfect_at_any_tolerance(case: Case) -> None:
    mask, _, spacing = case
    assert scores(surface_distances(mask, mask, spacing), tolerance=0.0) == (0, 0, 1)


@settings(deadline=None, max_examples=30)
@given(cases(), st.sampled_from([0.5, 2.0, 10.0]))
def test_scaling_the_spacing_scales_every_distance(case: Case, factor: float) -> None:
    prediction, reference, spacing = case
    hd95, assd, nsd = scores(surface_distances(prediction, reference, spacing), tolerance=1.7)
    scaled = surface_distances(prediction, reference, [factor * step for step in spacing])
    expected = (factor * hd95, factor * assd, nsd)
    assert scores(scaled, tolerance=1.7 * factor) == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(cases(), st.integers(1, 6), st.integers(0, 6))
def test_padding_with_background_changes_no_score(case: Case, before: int, after: int) -> None:
    prediction, reference, spacing = case
    # An axis of size 1 is none; padded, it would be one.
    widths = [(before, after) if size > 1 else (0, 0) for size in prediction.shape]
    padded = [np.pad(mask, widths) for mask in (prediction, reference)]
    expected = scores(surface_distances(prediction, reference, spacing))
    assert scores(surface_distances(padded[0], padded[1], spacing)) == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(cases())
def test_turning_the_image_changes_no_score(case: Case) -> None:
    prediction, reference, spacing = case
    expected = scores(surface_distances(prediction, reference, spacing))
    turned = surface_distances(np.flip(prediction).T, np.flip(reference).T, spacing[::-1])
    assert scores(turned) == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(cases())
def test_every_distance_is_shorter_than_the_diagonal(case: Case) -> None:
    distances = surface_distances(*case)
    assert max(distances.to_reference.max(), distances.to_prediction.max()) < distances.diagonal


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_two_shifted_cubes_have_the_distances_worked_out_by_hand(axis: int, shift: int) -> None:
    # A 5-cube has 98 surface voxels. A step along the shift is 3 mm, and 1 mm across it. Of the
    # cube shifted by k steps, seen from the other:
    #   far face, 25 voxels      k steps beyond the other's far face                      3k mm
    #   walls, 16 in a layer     k - 1 layers between those two faces       3, 6 .. 3(k - 1) mm
    #                            the other layers lie on the other's walls                 0 mm
    #   near face, 16 + 9        its rim lies on the other's walls                         0 mm
    #                            8 of the 9 within are a step across from a wall           1 mm
    #                            and its centre is two                                     2 mm
    spacing = [1.0, 1.0, 1.0]
    spacing[axis] = 3.0
    corner = [3, 3, 3]
    reference = cube((3, 3, 3))
    corner[axis] += shift
    distances = surface_distances(cube((corner[0], corner[1], corner[2])), reference, spacing)
    walls = [3.0 * steps for steps in range(1, shift) for _ in range(16)]
    by_hand = sorted([3.0 * shift] * 25 + walls + [1.0] * 8 + [2.0])
    by_hand = [0.0] * (98 - len(by_hand)) + by_hand
    np.testing.assert_allclose(np.sort(distances.to_reference), by_hand, atol=1e-12)
    np.testing.assert_allclose(np.sort(distances.to_prediction), by_hand, atol=1e-12)
    # The far face's 25 of 98 voxels are more than 5 %, so HD95 is the shift itself.
    assert hausdorff95(distances) == pytest.approx(3.0 * shift)
    total = 25 * 3 * shift + 16 * 3 * sum(range(1, shift)) + 8 * 1 + 2
    assert average_symmetric_surface_distance(distances) == pytest.approx(total / 98)
    assert normalised_surface_dice(distances, 1.0) == pytest.approx(
        (98 - 25 - 16 * (shift - 1) - 1) / 98
    )


def test_hd95_is_the_larger_of_both_directions() -> None:
    # One row: the reference's one voxel is on the prediction (0 mm away), while the prediction's
    # are 0, 2 and 20 mm away; between the last two, the 95th percentile is 2 + .9 * 18 = 18.2.
    prediction, reference = np.zeros((2, 1, 11), dtype=bool)
    prediction[0, [0, 1, 10]] = True
    reference[0, 0] = True
    distances = surface_distances(prediction, reference, (1.0, 2.0))
    assert hausdorff95(distances) == pytest.approx(18.2)
    assert average_symmetric_surface_distance(distances) == pytest.approx((0 + 2 + 20 + 0) / 4)
    assert normalised_surface_dice(distances, 2.0) == pytest.approx(3 / 4)


def test_a_stray_voxel_in_the_far_corner_is_measured() -> None:
    reference = cube((0, 0, 0))
    prediction = reference.copy()
    prediction[-1, -1, -1] = True
    distances = surface_distances(prediction, reference, (1.0, 1.0, 1.0))
    assert distances.to_reference.max() == pytest.approx(math.sqrt(7**2 + 8**2 + 9**2))
    assert hausdorff95(distances) == 0  # 1 of 99 voxels: what the 95 % is for


def test_a_distance_equal_to_the_tolerance_is_within_it_despite_rounding() -> None:
    # 3 * 0.7 is 2.0999999999999996 and, from a float32 header, 2.0999999642: apart in both senses.
    prediction, reference = np.zeros((2, 5, 1), dtype=bool)
    prediction[0], reference[3] = True, True
    for step, tolerance in ((0.7, 2.1), (float(np.float32(0.7)), 2.1), (0.1, 0.3), (0.7, 0.7 * 3)):
        distances = surface_distances(prediction, reference, (step, 1.0))
        assert normalised_surface_dice(distances, tolerance) == 1
        assert normalised_surface_dice(distances, tolerance * 0.999) == 0


def test_two_empty_masks_leave_every_score_undefined() -> None:
    empty = np.zeros((4, 5, 6), dtype=bool)
    assert all(
        math.isnan(score) for score in scores(surface_distances(empty, empty, (1.0, 1.0, 2.0)))
    )


@pytest.mark.parametrize("empty_prediction", [True, False])
def test_with_one_empty_mask_the_distance_is_the_diagonal_of_the_image(
    empty_prediction: bool,
) -> None:
    mask, empty = np.zeros((2, 3, 4, 6), dtype=bool)
    mask[1, 1, 1] = True
    pair = (empty, mask) if empty_prediction else (mask, empty)
    # (3, 4, 6) voxels of (4.0, 4.0, 0.5) mm: 12, 16 and 3 mm, whose diagonal is sqrt(409).
    diagonal = math.sqrt(12**2 + 16**2 + 3**2)
    expected = (diagonal, diagonal, 0)
    assert scores(surface_distances(*pair, (4.0, 4.0, 0.5)), tolerance=1e6) == pytest.approx(
        expected
    )
    padded = [np.pad(one, ((0, 3), (0, 0), (0, 0))) for one in pair]
    grown = math.sqrt(24**2 + 16**2 + 3**2)
    distances = surface_distances(padded[0], padded[1], (4.0, 4.0, 0.5))
    assert scores(distances) == pytest.approx((grown, grown, 0))


def test_masks_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(3, 2\); resample"):
        surface_distances(np.ones((2, 3), dtype=bool), np.ones((3, 2), dtype=bool), (1.0, 1.0))


def test_label_maps_in_place_of_masks_are_refused() -> None:
    # TypeError either way: ours, or jaxtyping's where it checks the arguments.
    with pytest.raises(TypeError, match=r"[Bb]ool"):
        surface_distances(np.full((2, 2), 2), np.full((2, 2), 2), (1.0, 1.0))


@pytest.mark.parametrize(
    "spacing", [(1.0,), (1.0, 1.0, 1.0), (1.0, 0.0), (1.0, -1.0), (1.0, math.nan)]
)
def test_a_spacing_that_is_not_positive_for_each_axis_is_refused(
    spacing: tuple[float, ...],
) -> None:
    mask = np.ones((2, 3), dtype=bool)
    with pytest.raises(ValueError, match="positive spacing in mm for each of 2 axes"):
        surface_distances(mask, mask, spacing)


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_is_negative_or_not_finite_is_refused(tolerance: float) -> None:
    mask = np.ones((2, 3), dtype=bool)
    with pytest.raises(ValueError, match="finite tolerance of 0 mm or more"):
        normalised_surface_dice(surface_distances(mask, mask, (1.0, 1.0)), tolerance)


# Axes of size 1


def discs() -> tuple[Mask, Mask]:
    """Two concentric discs of 23 and 25 mm, in pixels of 0.5 mm."""
    away = np.hypot(*(np.indices((120, 120)) - 60))
    return away <= 46, away <= 50


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_concentric_discs_have_the_distance_of_their_radii_in_any_plane(axis: int) -> None:
    spacing = [0.5, 0.5]
    spacing.insert(axis, 7.0)  # the thickness of the slice, which has no say
    pair = [np.expand_dims(mask, axis) for mask in discs()]
    hd95, assd, nsd = scores(surface_distances(pair[0], pair[1], spacing))
    # Radii are 2 mm apart; a pixel's centre lies up to a pixel's diagonal inside its circle.
    assert abs(assd - 2) < 0.1 and 2 <= hd95 < 2.4 and nsd == 0
    assert (hd95, assd, nsd) == scores(surface_distances(*discs(), (0.5, 0.5)))


@settings(deadline=None, max_examples=50)
@given(cases(), st.lists(st.integers(0, 3), min_size=1, max_size=3), st.floats(0.1, 9.0))
def test_axes_of_size_1_change_no_distance(case: Case, places: list[int], step: float) -> None:
    prediction, reference, spacing = case
    thin, steps = [prediction, reference], list(spacing)
    for place in places:
        axis = min(place, thin[0].ndim)
        thin = [np.expand_dims(mask, axis) for mask in thin]
        steps.insert(axis, step)
    plain, same = surface_distances(*case), surface_distances(thin[0], thin[1], steps)
    if prediction.size > 1:
        assert same.diagonal == plain.diagonal
    np.testing.assert_array_equal(same.to_reference, plain.to_reference)
    np.testing.assert_array_equal(same.to_prediction, plain.to_prediction)


def test_in_a_missed_slice_the_distance_is_the_diagonal_of_its_plane() -> None:
    mask = np.ones((3, 4, 1), dtype=bool)
    distances = surface_distances(mask, ~mask, (1.0, 1.0, 100.0))
    assert scores(distances) == (5, 5, 0)


# Sheared axes


@st.composite
def steps(draw: st.DrawFn, num_axes: int) -> np.ndarray:
    """Directions of axes that lean towards each other, and turned as a whole."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    leaning = np.eye(3) + np.triu(random.uniform(-1, 1, (3, 3)), 1)
    turned = leaning @ np.linalg.qr(random.normal(size=(3, 3)))[0]
    return (turned / np.linalg.norm(turned, axis=1)[:, None])[:num_axes]


@settings(deadline=None, max_examples=50)
@given(st.data(), cases())
def test_sheared_distances_equal_a_search_over_every_pair_in_the_world(
    data: st.DataObject, case: Case
) -> None:
    prediction, reference, spacing = case
    directions = data.draw(steps(prediction.ndim))
    ours = surface_distances(prediction, reference, spacing, directions)
    first, second = (
        (brute_force_surface(mask) * spacing) @ directions for mask in (prediction, reference)
    )
    every_pair = np.linalg.norm(first[:, None] - second, axis=-1)
    np.testing.assert_allclose(np.sort(ours.to_reference), np.sort(every_pair.min(1)), atol=1e-9)
    np.testing.assert_allclose(np.sort(ours.to_prediction), np.sort(every_pair.min(0)), atol=1e-9)
    assert every_pair.max() < ours.diagonal


@settings(deadline=None, max_examples=30)
@given(cases(), st.integers(0, 2**32 - 1))
def test_axes_at_right_angles_change_no_bit_wherever_they_point(case: Case, seed: int) -> None:
    prediction, reference, spacing = case
    turned = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    directions = turned[: prediction.ndim].astype(np.float32).astype(np.float64)
    plain = surface_distances(*case)
    ours = surface_distances(prediction, reference, spacing, directions)
    np.testing.assert_array_equal(ours.to_reference, plain.to_reference)
    np.testing.assert_array_equal(ours.to_prediction, plain.to_prediction)
    assert ours.diagonal == plain.diagonal


def test_two_voxels_of_a_sheared_grid_have_the_distance_of_their_world_coordinates() -> None:
    # Slices 3 mm up and 4 mm aside: two voxels of one column lie 5 mm apart. Moved 2 columns of
    # 2 mm against the lean, they lie 3 mm apart, whereas the steps' lengths say sqrt(25 + 16).
    prediction, reference = np.zeros((2, 5, 1, 2), dtype=bool)
    prediction[2, 0, 0] = reference[0, 0, 1] = True
    directions = np.array([[1.0, 0, 0], [0, 1, 0], [0.8, 0, 0.6]])
    distances = surface_distances(prediction, reference, (2.0, 2.0, 5.0), directions)
    assert scores(distances) == pytest.approx((3, 3, 0))
    # The longest diagonal of the image runs with the lean: 10 + 8 mm aside and 6 mm up.
    assert distances.diagonal == pytest.approx(math.hypot(18, 6))


def test_directions_for_other_axes_are_refused() -> None:
    mask = np.ones((2, 3), dtype=bool)
    with pytest.raises(ValueError, match=r"a direction for each of 2 axes, got 3; read them"):
        surface_distances(mask, mask, (1.0, 1.0), np.eye(3))


def blobs(shape: tuple[int, ...], seed: int) -> Mask:
    """A few overlapping boxes, some of them cut by the image's edge."""
    random = np.random.default_rng(seed)
    mask = np.zeros(shape, dtype=bool)
    for _ in range(4):
        corner = random.integers(0, shape)
        size = random.integers(1, 7, len(shape))
        mask[
            tuple(slice(start, start + length) for start, length in zip(corner, size, strict=True))
        ] = True
    return mask


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((17, 20), (0.8, 2.5)), ((14, 15, 16), (1.0, 1.0, 1.0)), ((16, 15, 9), (0.7, 0.75, 5.0))],
)
def test_the_three_scores_equal_monai(
    shape: tuple[int, ...], spacing: tuple[float, ...], seed: int
) -> None:
    """Where neither mask is empty; where one is, MONAI gives infinity or NaN for distances."""
    metrics = pytest.importorskip("monai.metrics")
    prediction, reference = blobs(shape, seed), blobs(shape, seed + 100)
    pair = [torch.from_numpy(mask)[None, None] for mask in (prediction, reference)]
    options = {"include_background": True, "spacing": list(spacing)}
    theirs = (
        metrics.compute_hausdorff_distance(*pair, percentile=95, **options),
        metrics.compute_average_surface_distance(*pair, symmetric=True, **options),
        metrics.compute_surface_dice(*pair, class_thresholds=[2.1], **options),
    )
    expected = tuple(float(value) for value in theirs)
    ours = scores(surface_distances(prediction, reference, spacing), tolerance=2.1)
    assert ours == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert ours[2] < 1 < ours[0]  # and the case is worth comparing
