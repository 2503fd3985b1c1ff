"""Laws of the functions of the image that a gate is compared with."""

import numpy as np
import pytest
from numpy import ndarray
from numpy.testing import assert_allclose
from scipy.ndimage import (
    gaussian_filter,
    gaussian_filter1d,
    maximum_filter,
    median_filter,
    minimum_filter,
    uniform_filter,
)

from benchmarks.planted_images import block
from segkit.explain.measures.cells import Cells, pictures
from segkit.explain.measures.fixed_functions import squared_differences, standardised
from segkit.explain.verdicts import sides as sides_module
from segkit.explain.verdicts.comparators import (
    OTHER,
    closeness_comparators,
    deleted_comparators,
    image_comparators,
)
from segkit.explain.verdicts.sides import Sides, in_batches
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume

SHAPE = (16, 12, 8)
VOXELS = Grid(SHAPE, np.eye(4))
HALVES = VOXELS.placed((8, 6, 4), (2, 2, 2), (0.5, 0.5, 0.5))


def inside_of(shape: tuple[int, ...] = SHAPE) -> ndarray:
    inside = np.zeros(shape, bool)
    inside[4:8, 4:8, 2:6] = True
    return inside


def halved(values: ndarray) -> ndarray:
    x, y, z = (size // 2 for size in values.shape)
    return values.reshape(x, 2, y, 2, z, 2).mean(axis=(1, 3, 5))


def best(image: ndarray, inside: ndarray) -> tuple[str, float]:
    """The comparator that localises a structure best, on cells of two voxels."""
    cells = Cells(HALVES, VOXELS)
    pictures = {"intensity": image.astype(np.float32)}
    found = dict(image_comparators(pictures, cells, HALVES))
    found |= closeness_comparators(pictures, inside, cells, HALVES)
    sides = Sides(halved(inside) >= 0.5, cells.counted)
    scores = {name: abs(sides.auroc(values) - 0.5) for name, values in found.items()}
    name = max(scores, key=lambda one: scores[one])
    return name, scores[name]


def test_a_cell_has_the_lowest_voxel_that_it_covers() -> None:
    values = np.random.default_rng(0).normal(size=SHAPE)
    lowest = Cells(HALVES, VOXELS).lowest(values)
    assert_allclose(lowest, values.reshape(8, 2, 6, 2, 4, 2).min(axis=(1, 3, 5)))
    further = VOXELS.placed((9, 6, 4), (2, 2, 2), (0.5, 0.5, 0.5))
    assert_allclose(Cells(further, VOXELS).lowest(values)[-1], 0)


def test_a_texture_and_a_band_are_shown_by_functions_of_the_image() -> None:
    """Each structure is invisible in the mean intensity, and one comparator shows it."""
    random, inside = np.random.default_rng(1), inside_of()
    texture = random.normal(0, 1, SHAPE) * np.where(inside, 4, 1)
    band = np.where(inside, 1.0, np.where(random.random(SHAPE) < 0.5, 0.0, 2.0))
    for image, kinds in (
        (texture, ("deviation", "maximum", "minimum")),
        (band, ("closeness", "deviation", "minimum", "maximum")),
    ):
        name, score = best(image, inside)
        assert name.startswith(kinds) and score > 0.47, (name, score)
        assert name.startswith(OTHER)


def test_stripes_of_one_direction_and_two_values_are_shown_by_texture_and_entropy() -> None:
    """Noise of the same strength everywhere. Only its direction or its histogram differs."""
    random, inside = np.random.default_rng(3), inside_of()
    along, across = (
        gaussian_filter1d(random.normal(0, 1, SHAPE), 1.5, axis=axis, mode="wrap")
        for axis in (0, 1)
    )
    stripes = np.where(inside, along / along.std(), across / across.std())
    two = np.where(inside, np.sign(random.normal(0, 1, SHAPE)), random.normal(0, 1, SHAPE))
    for image, kind in ((stripes, "texture"), (two, "entropy")):
        name, score = best(image, inside)
        assert name.startswith(kind) and score > 0.47, (name, score)
        assert name.startswith(OTHER)


def test_salt_and_pepper_are_removed_by_filters_and_not_by_a_mean() -> None:
    random, inside = np.random.default_rng(5), inside_of()
    size = random.gamma(1, 300, SHAPE) * random.choice([-1, 0, 1], SHAPE, p=[0.05, 0.9, 0.05])
    image = (inside + random.normal(0, 0.5, SHAPE) + size).astype(np.float32)
    found = dict(image_comparators({"intensity": image}, Cells(VOXELS, VOXELS), VOXELS))
    sides = Sides(inside, np.ones(SHAPE, bool))
    assert sides.auroc(found["median over 3 voxels"]) > 0.95
    assert sides.auroc(found["intensity averaged over 3 cells"]) < 0.6
    salted, peppered = (np.abs(size) * sign + inside for sign in (1, -1))
    for name, values in (("opening", salted), ("closing", peppered)):
        shown = dict(
            image_comparators(
                {"intensity": values.astype(np.float32)}, Cells(VOXELS, VOXELS), VOXELS
            )
        )
        assert sides.auroc(shown[f"{name} over 3 voxels"]) > 0.9
        assert sides.auroc(shown["intensity averaged over 3 cells"]) < 0.7
        assert all(one.startswith(OTHER) for one in shown if " over 3 voxels" in one)


def test_an_image_on_a_strong_slope_is_shown_by_its_local_contrast() -> None:
    """The slices differ 3,000-fold in brightness."""
    random, inside = np.random.default_rng(6), inside_of()
    slope = np.exp(np.linspace(-4, 4, SHAPE[2]))
    image = slope * (3 + inside + random.normal(0, 0.2, SHAPE))
    found = dict(
        image_comparators(
            {"intensity": image.astype(np.float32)}, Cells(VOXELS, VOXELS), VOXELS, across=2
        )
    )
    sides = Sides(inside, np.ones(SHAPE, bool))
    assert sides.auroc(found["standardised smoothed over 4 cells"]) > 0.9
    assert sides.auroc(found["intensity"]) < 0.75


def test_the_local_contrast_is_that_of_a_standard_score() -> None:
    values, mean = np.array([[[3.0, 1.0, 5.0]]]), np.array([[[1.0, 1.0, 4.0]]])
    deviation = np.array([[[4.0, 0.0, 1e-5]]])
    assert_allclose(standardised(values, mean, deviation), [[[0.5, 0, 0]]])
    assert_allclose(standardised(values, mean, 0 * deviation), 0)
    alone = standardised(values, mean, deviation, across=2)
    assert_allclose(alone, [[[0.5, 0, 1e5]]], rtol=1e-6)


def test_differences_of_neighbours_are_those_of_each_direction() -> None:
    x, y, _ = np.indices((5, 6, 1)).astype(np.float32)
    found = squared_differences(2 * x + 3 * y)
    values = {"x": 4, "y": 9, "x and y": 25, "x and -y": 1}
    assert list(found) == list(values)
    for along, value in values.items():
        within = found[along][1:-1, 1:-1]
        assert_allclose(within, value)
    # A corner without a neighbour on this diagonal has none.
    assert found["x and -y"][0, 0, 0] == 0 and found["x and y"][0, 0, 0] == 25


def test_many_maps_at_once_have_the_auroc_of_each() -> None:
    random, inside = np.random.default_rng(4), inside_of()
    counted = random.random(SHAPE) < 0.8
    sides = Sides(inside, counted)
    maps = {f"{digits} digits": random.normal(size=SHAPE).round(digits) for digits in range(4)}
    maps |= {"constant": np.ones(SHAPE), "single": random.random(SHAPE).astype(np.float32)}
    assert sides.aurocs(maps) == {name: sides.auroc(values) for name, values in maps.items()}
    assert sides.aurocs({}) == {}
    none = Sides(np.zeros(SHAPE, bool), counted).aurocs(maps)
    assert list(none) == list(maps) and np.isnan(list(none.values())).all()


def test_few_comparators_of_a_large_map_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides_module, "RANKED_AT_ONCE", 25)
    maps = [(f"{number}", np.full((2, 2, 2), number)) for number in range(10)]
    batches = list(in_batches(iter(maps)))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [name for batch in batches for name in batch] == [name for name, _ in maps]


def test_functions_of_voxels_are_averaged_over_cells() -> None:
    image = np.random.default_rng(2).gamma(1, 1, SHAPE).astype(np.float32)
    found = dict(image_comparators({"intensity of a": image}, Cells(HALVES, VOXELS), HALVES))
    highest = found["maximum of a over 3 voxels"]
    assert_allclose(highest, halved(maximum_filter(image, 3)), rtol=1e-5)
    assert_allclose(found["median of a over 3 voxels"], halved(median_filter(image, 3)), rtol=1e-5)
    opened = maximum_filter(minimum_filter(image, 3), 3)
    assert_allclose(found["opening of a over 3 voxels"], halved(opened), rtol=1e-5)
    closed = minimum_filter(maximum_filter(image, 3), 3)
    assert_allclose(found["closing of a over 3 voxels"], halved(closed), rtol=1e-5)
    variance = halved(image.astype(float) ** 2) - halved(image.astype(float)) ** 2
    assert_allclose(found["deviation of a"], np.sqrt(variance), atol=1e-4)
    precise = image.astype(float)
    squares = uniform_filter(precise**2, 3) - uniform_filter(precise, 3) ** 2
    expected = halved(np.sqrt(squares))
    assert_allclose(found["deviation of a over 3 voxels"], expected, atol=1e-3)
    fine, coarse = (found[f"intensity of a smoothed over {width} cells"] for width in (1, 4))
    assert_allclose(found["contrast of a of 1 and 4 cells"], fine - coarse)
    # A monotone change of the intensity does not change its ranks.
    ranks = found["rank of a"]
    changed = dict(
        image_comparators({"intensity of a": np.log(image)}, Cells(HALVES, VOXELS), HALVES)
    )
    assert_allclose(changed["rank of a"], ranks, atol=2 / 256)


def test_planes_of_one_voxel_and_a_constant_image_have_finite_comparators() -> None:
    flat = Grid((8, 8, 1), np.eye(4))
    cells = Cells(flat, flat)
    for image in (np.ones((8, 8, 1), np.float32), np.zeros((8, 8, 1), np.float32)):
        found = dict(image_comparators({"intensity": image}, cells, flat))
        found |= closeness_comparators({"intensity": image}, image > 0, cells, flat)
        assert all(np.isfinite(values).all() for values in found.values())
        assert all(values.shape == (8, 8, 1) for values in found.values())


def test_deletion_has_only_intensity_and_gradient_of_its_own() -> None:
    found = dict(
        image_comparators(
            {"intensity": np.ones(SHAPE, np.float32), "gradient": np.ones(SHAPE, np.float32)},
            Cells(HALVES, VOXELS),
            HALVES,
        )
    )
    assert sorted(deleted_comparators(list(found))) == [
        "gradient",
        "intensity",
        "intensity smoothed over 1 cells",
        "intensity smoothed over 4 cells",
    ]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 5.0), (0.5, 2.0, 1.0)])
def test_smoothing_has_the_same_width_in_mm_along_each_axis(
    spacing: tuple[float, float, float],
) -> None:
    grid = Grid((21, 21, 21), np.diag([*spacing, 1.0]))
    image = np.zeros((21, 21, 21), np.float32)
    image[10, 10, 10] = 1
    found = dict(image_comparators({"intensity": image}, Cells(grid, grid), grid))
    smooth = found["intensity smoothed over 2 cells"]
    finest = min(spacing)
    for axis, step in enumerate(spacing):
        line = np.moveaxis(smooth, axis, 0)[:, 10, 10]
        ratio = line[11] / line[10]
        expected = np.exp(-0.5 * (step / (2 * finest)) ** 2)
        assert ratio == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 5.0), (0.5, 2.0, 1.0)])
def test_a_blur_that_counts_voxels_is_a_comparator_if_cells_are_longer_along_one_axis(
    spacing: tuple[float, float, float],
) -> None:
    image = np.random.default_rng(5).normal(size=(12, 12, 12)).astype(np.float32)
    grid = Grid(image.shape, np.diag([*spacing, 1.0]))
    inside = inside_of(image.shape)
    found = dict(image_comparators({"intensity": image}, Cells(grid, grid), grid))
    found |= closeness_comparators({"intensity": image}, inside, Cells(grid, grid), grid)
    blurred = gaussian_filter(image.astype(float), 2, mode="nearest")
    assert_allclose(found["intensity smoothed over 2 cells along each axis"], blurred, atol=1e-6)
    finer = gaussian_filter(image.astype(float), 1, mode="nearest")
    contrast = found["contrast of 1 and 2 cells along each axis"]
    assert_allclose(contrast, finer - blurred, atol=1e-6)
    for kind in ("gradient", "entropy", "texture along x", "closeness to the median"):
        assert f"{kind} smoothed over 2 cells along each axis" in found
    even = Grid(image.shape, np.eye(4))
    same = dict(image_comparators({"intensity": image}, Cells(even, even), even))
    assert not [name for name in same if "along each axis" in name]


def test_a_2d_network_is_compared_with_functions_of_single_slices() -> None:
    """Slices in another order have the same comparators in that order. In 3D they have not."""
    random = np.random.default_rng(6)
    image, order = random.normal(size=SHAPE).astype(np.float32), random.permutation(SHAPE[2])
    inside = inside_of()
    grid = VOXELS.placed((8, 6, 8), (2, 2, 1), (0.5, 0.5, 0))
    cells = Cells(grid, VOXELS)

    def comparators_of(slices: ndarray, across: int | None) -> dict[str, ndarray]:
        shown = pictures(Volume(image[..., slices], VOXELS), VOXELS, ["ct"], across=across)
        found = dict(image_comparators(shown, cells, grid, across=across))
        return found | closeness_comparators(shown, inside[..., slices], cells, grid, across=across)

    alone, turned = (comparators_of(slices, 2) for slices in (np.arange(SHAPE[2]), order))
    for name, values in alone.items():
        assert_allclose(turned[name], values[..., order], rtol=1e-4, atol=1e-5, err_msg=name)
    through = comparators_of(order, None)
    assert len(alone) > 100 and alone.keys() < through.keys()
    changed = [name for name in alone if not np.allclose(through[name], turned[name], atol=1e-3)]
    assert {"intensity smoothed over 2 cells", "gradient", "deviation smoothed over 2 cells"} < {
        *changed
    }


def test_a_blur_in_the_plane_of_a_2d_network_shows_no_more_than_its_comparators() -> None:
    """The gate is a Gaussian of two pixels. The structure lies elsewhere in each slice."""
    random = np.random.default_rng(7)
    inside = block(random, (24, 24, 4))
    assert all((inside[..., 0] != inside[..., other]).any() for other in range(1, 4))
    image = (inside + random.normal(0, 1.5, inside.shape)).astype(np.float32)
    gate = gaussian_filter(image.astype(float), (2, 2, 0), truncate=2, mode="nearest")
    grid = Grid((24, 24, 4), np.eye(4))
    cells = Cells(grid, grid)
    sides = Sides(inside, cells.counted)

    def most(across: int | None) -> float:
        found = dict(image_comparators({"intensity": image}, cells, grid, across=across))
        scores = sides.aurocs(found)
        return max(max(score, 1 - score) for score in scores.values())

    assert most(2) > sides.auroc(gate) - 0.005
    assert most(None) < sides.auroc(gate) - 0.02
