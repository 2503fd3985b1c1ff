import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy import ndarray
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import map_coordinates
from torch import Tensor
from torch.testing import assert_close

from segkit.geometry.grid import Grid
from segkit.geometry.resample import (
    BLOCK,
    Order,
    nearest,
    resample,
    resample_known,
    resample_labels,
    sample_axis,
    spline_weights,
)
from tests.helpers import affine_of, grids, inside, linear_field

Positions = list[ndarray]
SPACINGS = st.tuples(*[st.floats(0.4, 6.0)] * 3)
ORDERS = st.tuples(*[st.sampled_from([0, 1, 3])] * 3)
Orders = tuple[Order, Order, Order]


NAN = float("nan")
KNOWN = pytest.mark.parametrize(
    ("unknown", "expected"),
    [
        ([], [0, 0.5, 1, 1.5, 2, 2.5, 3]),
        ([1], [0, 0, NAN, NAN, 2, 2.5, 3]),
        ([2, 3], [0, 0.5, 1, 1, NAN, NAN, NAN]),
        ([0, 1, 2, 3], [NAN] * 7),
    ],
)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    size = st.integers(1, 7)
    return draw(size), draw(size), draw(size)


@st.composite
def positions_in(draw: st.DrawFn, shape: tuple[int, ...], beyond: float) -> Positions:
    """Fractional indices along each axis, up to `beyond` voxels past the outermost centres."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [random.uniform(-beyond, size - 1 + beyond, draw(st.integers(1, 9))) for size in shape]


@st.composite
def images(draw: st.DrawFn) -> Tensor:
    """Noise of one to three channels, as float64."""
    channels, (x, y, z) = draw(st.integers(1, 3)), draw(shapes())
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return torch.from_numpy(random.normal(size=(channels, x, y, z)))


@st.composite
def label_maps(draw: st.DrawFn) -> Tensor:
    """Labels 0, 2 and 7, voxel by voxel."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return torch.from_numpy(random.choice(np.array([0, 2, 7], np.uint8), draw(shapes())))


def whole_numbers(shape: tuple[int, ...]) -> Positions:
    return [np.arange(size, dtype=float) for size in shape]


# Every order


@given(images(), ORDERS)
def test_reading_at_the_voxels_themselves_returns_them_bit_for_bit(
    image: Tensor, orders: Orders
) -> None:
    image[0, 0, 0, 0], image[-1, -1, -1, -1] = -0.0, torch.inf
    again = resample(image, whole_numbers(image.shape[1:]), orders)
    assert_array_equal(again.numpy().view(np.int64), image.numpy().view(np.int64))


@given(st.data(), ORDERS)
def test_resampling_keeps_a_constant(data: st.DataObject, orders: Orders) -> None:
    shape = data.draw(shapes())
    constant = torch.full((1, *shape), 0.1)
    again = resample(constant, data.draw(positions_in(shape, beyond=3)), orders)
    assert_close(again, torch.full_like(again, 0.1), rtol=1e-6, atol=0)


@given(images(), st.data(), ORDERS)
def test_axes_can_be_read_one_at_a_time_in_any_order(
    image: Tensor, data: st.DataObject, orders: Orders
) -> None:
    positions = data.draw(positions_in(image.shape[1:], beyond=1))
    for sequence in ((0, 1, 2), (2, 0, 1)):
        again = image
        for axis in sequence:
            again = sample_axis(again, positions[axis], axis + 1, orders[axis])
        assert_close(again, resample(image, positions, orders), rtol=0, atol=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("order", [0, 1, 3])
@given(images(), st.data())
def test_values_equal_those_of_scipy(order: Order, image: Tensor, data: st.DataObject) -> None:
    positions = data.draw(positions_in(image.shape[1:], beyond=6))
    points = np.stack(np.meshgrid(*positions, indexing="ij"))
    single = resample(image.float(), positions, (order,) * 3).double()
    for number, again in enumerate(resample(image, positions, (order,) * 3)):
        expected = map_coordinates(image[number].numpy(), points, order=order, mode="nearest")
        assert_allclose(again, expected, atol=1e-11)
        assert_allclose(single[number], expected, atol=1e-5)


# Linear


@given(st.data())
def test_linear_fields_stay_linear_inside_the_grid(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    positions = data.draw(positions_in(shape, beyond=0))
    field = linear_field(np.stack(np.indices(shape), axis=-1))
    expected = linear_field(np.stack(np.meshgrid(*positions, indexing="ij"), axis=-1))
    assert_allclose(resample(torch.from_numpy(field)[None], positions)[0], expected, atol=1e-12)


@given(images(), st.data())
def test_values_stay_between_the_least_and_the_greatest(image: Tensor, data: st.DataObject) -> None:
    again = resample(image, data.draw(positions_in(image.shape[1:], beyond=3)))
    assert again.min() >= image.min()
    assert again.max() <= image.max()


@given(images(), st.data())
def test_beyond_the_ends_the_outermost_values_are_repeated(
    image: Tensor, data: st.DataObject
) -> None:
    positions = data.draw(positions_in(image.shape[1:], beyond=4))
    clamped = [np.clip(p, 0, n - 1) for p, n in zip(positions, image.shape[1:], strict=True)]
    assert torch.equal(resample(image, positions), resample(image, clamped))


@given(grids(smallest=2), SPACINGS)
def test_resampling_world_coordinates_gives_those_of_the_new_grid(
    grid: Grid, spacing: tuple[float, float, float]
) -> None:
    respaced = grid.with_spacing(spacing)
    field = torch.from_numpy(grid.centres()).movedim(3, 0)
    again = resample(field, grid.positions_of(respaced)).movedim(0, 3).numpy()
    within = inside(grid, respaced)
    assert_allclose(again[within], respaced.centres()[within], atol=1e-4)


def test_most_of_a_respaced_grid_lies_inside() -> None:
    # So that the law above compares what it should: 8 of 10 samples an axis, at the least.
    grid = Grid((10, 11, 12), affine_of("PIR", spacing=(1.0, 0.8, 3.0)))
    assert inside(grid, grid.with_spacing((0.9, 1.1, 1.5))).mean() > 0.5


# Nearest


@settings(max_examples=50)
@given(images(), st.data())
def test_order_0_takes_the_nearest_voxel(image: Tensor, data: st.DataObject) -> None:
    positions = data.draw(positions_in(image.shape[1:], beyond=3))
    picked = [
        np.array([min(range(n), key=lambda voxel: abs(voxel - place)) for place in samples])
        for samples, n in zip(positions, image.shape[1:], strict=True)
    ]
    assert_array_equal(resample(image, positions, (0, 0, 0)), image.numpy()[:, *np.ix_(*picked)])


@KNOWN
def test_nan_values_are_ignored_unless_they_are_nearest(
    unknown: list[int], expected: list[float]
) -> None:
    """Of the ramp 0, 1, 2, 3 read at every half: nearest of two alike is the lower."""
    ramp = torch.arange(4.0).repeat(2, 1)[:, :, None, None].clone()
    ramp[:, unknown] = torch.nan
    one = np.zeros(1)
    found = resample_known(ramp, (np.arange(7) / 2, one, one))
    assert_allclose(found[0, :, 0, 0], expected)
    assert_array_equal(found[0], found[1])


@settings(max_examples=50)
@given(images(), ORDERS, st.permutations(range(4)), st.data())
def test_the_order_in_memory_is_kept_and_changes_nothing(
    image: Tensor, orders: Orders, order: list[int], data: st.DataObject
) -> None:
    positions = data.draw(positions_in(image.shape[1:], 2.0))
    back = [order.index(axis) for axis in range(4)]
    turned = image.permute(order).contiguous().permute(back)
    sampled = resample(turned, positions, orders)
    assert_close(sampled, resample(image, positions, orders))
    longer = [axis for axis in order if image.shape[axis] > 1 and sampled.shape[axis] > 1]
    strides = [sampled.stride()[axis] for axis in longer]
    assert strides == sorted(strides, reverse=True)


def test_voxels_in_a_row_are_not_copied() -> None:
    image = torch.randn(2, 3, 4, 5)
    cut = resample(image, [np.arange(1.0, 3.0), np.arange(4.0), np.arange(2.0, 5.0)])
    assert torch.equal(cut, image[:, 1:3, :, 2:5])
    assert cut.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()


def test_the_lower_of_two_equally_near_voxels_is_taken() -> None:
    assert nearest(np.array([-0.5, 0.5, 1.5, 2.4999, 2.5001])).tolist() == [-1, 0, 1, 2, 3]


# Cubic


def test_cubic_polynomials_are_exact_away_from_the_ends() -> None:
    """What the constant beyond an end disturbs fades by √3 - 2 a voxel: by 1e-12 within 20."""
    size = 70
    positions = np.random.default_rng(0).uniform(25, size - 26, 3 * BLOCK)

    def cubic(place: ndarray) -> ndarray:
        unit = place / size
        return 4 * unit**3 - 5 * unit**2 + 0.7 * unit + 0.3

    line = torch.from_numpy(cubic(np.arange(size, dtype=float)))
    assert_allclose(sample_axis(line, positions, 0, 3), cubic(positions), rtol=0, atol=1e-11)
    linear = sample_axis(line, positions, 0, 1).numpy()
    assert np.abs(linear - cubic(positions)).max() > 1e-5


@given(st.integers(1, 40), st.floats(-30, 70))
def test_spline_weights_sum_to_one(size: int, place: float) -> None:
    assert_allclose(spline_weights(np.array([place]), size).sum(), 1, atol=1e-13)


def test_far_beyond_an_end_the_outermost_voxel_has_all_the_weight() -> None:
    weights = spline_weights(np.array([-1e6, -40.5, 50.5, 1e6]), 9)
    assert_allclose(weights[:2], np.eye(9)[[0, 0]], atol=1e-13)
    assert_allclose(weights[2:], np.eye(9)[[8, 8]], atol=1e-13)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_cubic_value_keeps_its_type_and_is_rounded_once(kind: torch.dtype) -> None:
    image = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 9, 5, 7))).to(kind)
    positions = [np.linspace(-0.3, n - 0.7, 2 * n) for n in image.shape[1:]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = resample(image, positions, (3, 0, 0))
    assert again.dtype == kind
    exact = resample(image.double(), positions, (3, 0, 0))
    assert_close(again.double(), exact, rtol=torch.finfo(kind).eps, atol=1e-6)


# Labels


@given(label_maps())
def test_labels_at_the_voxels_themselves_are_returned(labels: Tensor) -> None:
    assert torch.equal(resample_labels(labels, whole_numbers(labels.shape)), labels)


@given(label_maps(), st.data())
def test_no_label_is_invented(labels: Tensor, data: st.DataObject) -> None:
    again = resample_labels(labels, data.draw(positions_in(labels.shape, beyond=2)))
    assert again.dtype == labels.dtype
    assert set(again.unique().tolist()) <= set(labels.unique().tolist())


@given(label_maps(), st.data())
def test_the_label_with_the_largest_trilinear_weight_wins(
    labels: Tensor, data: st.DataObject
) -> None:
    positions = data.draw(positions_in(labels.shape, beyond=1))
    points = np.stack(np.meshgrid(*positions, indexing="ij"))
    present = labels.unique().tolist()
    shares = np.stack(
        [
            map_coordinates(
                (labels == label).numpy().astype(float), points, order=1, mode="nearest"
            )
            for label in present
        ]
    )
    first, second = np.sort(np.concatenate([shares, np.zeros_like(shares)]), axis=0)[-1:-3:-1]
    clear = first - second > 1e-5
    again = resample_labels(labels, positions).numpy()
    assert_array_equal(again[clear], np.array(present)[shares.argmax(axis=0)][clear])


def test_the_lowest_of_tied_labels_wins() -> None:
    labels = torch.tensor([7, 2, 0, 7], dtype=torch.uint8)[:, None, None]
    halfway = [np.array([0.5, 1.5, 2.5]), np.zeros(1), np.zeros(1)]
    assert resample_labels(labels, halfway).flatten().tolist() == [2, 0, 0]


@settings(max_examples=20)
@given(label_maps(), st.data())
def test_along_an_axis_of_order_0_labels_are_those_of_the_nearest_slice(
    labels: Tensor, data: st.DataObject
) -> None:
    x, y, z = data.draw(positions_in(labels.shape, beyond=2))
    slices = np.clip(nearest(z), 0, labels.shape[2] - 1).astype(int)
    again = resample_labels(labels, [x, y, z], (1, 1, 0))
    planes = [
        resample_labels(labels[:, :, [chosen]], [x, y, np.zeros(1)]) for chosen in slices.tolist()
    ]
    assert torch.equal(again, torch.cat(planes, dim=2))


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "int32", "int64"])
def test_labels_keep_their_type(kind: str) -> None:
    highest = np.iinfo(kind).max
    labels = torch.from_numpy(np.array([0, highest], kind))[:, None, None]
    again = resample_labels(labels, [np.array([0.2, 0.4, 0.6, 0.8]), np.zeros(1), np.zeros(1)])
    assert_array_equal(again.flatten().numpy(), np.array([0, 0, highest, highest], kind))


@pytest.mark.parametrize("kind", [torch.uint8, torch.uint16, torch.uint32, torch.int16])
def test_labels_of_every_type_are_resampled_alike(kind: torch.dtype) -> None:
    labels = torch.randint(0, 200, (5, 4, 3), generator=torch.Generator().manual_seed(0))
    positions = [np.linspace(0, size - 1, 7) for size in labels.shape]
    again = resample_labels(labels.to(kind), positions)
    assert again.dtype == kind
    assert torch.equal(again.long(), resample_labels(labels, positions))
