import hypothesis.strategies as st
import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from nibabel.orientations import io_orientation
from numpy import ndarray
from numpy.testing import assert_allclose, assert_array_equal

from segkit.geometry.grid import Grid, Orientation, Placement, separate_axis
from tests.helpers import (
    ORIENTATIONS,
    STORED,
    affine_of,
    affines,
    brute_force_centres,
    grids,
    stored_otherwise,
)

SPACINGS = st.tuples(*[st.floats(0.4, 6.0)] * 3)
Layer = tuple[tuple[int], tuple[int], tuple[int], tuple[int]]


def test_a_voxels_volume_is_the_determinant_of_its_affine() -> None:
    # Slices 4 mm apart that lean 3 mm aside: the voxel is as large as an upright one.
    affine = affine_of("LPS", spacing=(0.5, 2.0, 4.0))
    upright = Grid((2, 3, 4), affine.copy())
    affine[:3, 2] += affine[:3, 0] / 0.5 * 3
    leaning = Grid((2, 3, 4), affine)
    assert_allclose(leaning.spacing, (0.5, 2.0, 5.0))
    assert_allclose((upright.voxel_ml, leaning.voxel_ml), (0.004, 0.004), rtol=1e-12)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Kernel, stride, padding and dilation along one axis."""
    kernel = draw(st.integers(1, 4))
    # A pool takes no more padding than half its kernel.
    padding = draw(st.integers(0, kernel // 2))
    return (kernel,), (draw(st.integers(1, 3)),), (padding,), (draw(st.integers(1, 3)),)


def numbered(shape: tuple[int, ...]) -> ndarray:
    return np.arange(np.prod(shape)).reshape(shape)


@given(grids())
def test_centres_are_the_affine_applied_to_every_index(grid: Grid) -> None:
    assert_allclose(grid.centres(), brute_force_centres(grid.shape, grid.affine), atol=1e-9)


@given(grids())
def test_index_undoes_world(grid: Grid) -> None:
    points = np.random.default_rng(0).uniform(-5, 12, (20, 3))
    assert_allclose(grid.index(grid.world(points)), points, atol=1e-8)


@given(SPACINGS)
def test_spacing_is_the_distance_between_neighbours(spacing: tuple[float, float, float]) -> None:
    grid = Grid((2, 2, 2), affine_of("SLA", spacing))
    centres = grid.centres()
    steps = [centres[1, 0, 0], centres[0, 1, 0], centres[0, 0, 1]] - centres[0, 0, 0]
    assert_allclose(np.linalg.norm(steps, axis=1), spacing, rtol=1e-9)
    assert_allclose(grid.spacing, spacing, rtol=1e-9)


@pytest.mark.parity
@pytest.mark.parametrize("code", ORIENTATIONS)
def test_the_code_equals_nibabels_for_every_orientation(code: str) -> None:
    for rotation in ((0.0, 0.0, 0.0), (0.2, -0.3, 0.25)):
        affine = affine_of(code, rotation=rotation)
        orientation = Orientation.of(affine)
        assert orientation.code == code == "".join(nib.aff2axcodes(affine))
        world_axes, signs = io_orientation(affine).T
        assert orientation.order == tuple(np.argsort(world_axes))
        assert orientation.flip == tuple(signs[list(orientation.order)] < 0)


@pytest.mark.parity
@given(affines())
def test_the_code_equals_nibabels_for_oblique_grids(affine: ndarray) -> None:
    assert Orientation.of(affine).code == "".join(nib.aff2axcodes(affine))


def test_axes_near_the_same_world_axis_take_the_order_with_the_largest_sum() -> None:
    # Both are nearest to x: 0.80 + 0.66 (the second along x) is more than 0.75 + 0.60, however far
    # apart the voxels are along the first.
    affine = np.eye(4)
    affine[:3, :3] = np.array([[7.5, 6.6, 0.0], [0.80, -0.60, 0.0], [0.0, 0.0, 1.0]]).T
    assert Orientation.of(affine).code == "ARS"
    assert Orientation.of(affine).order == (1, 0, 2)


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_turning_back_undoes_turning(code: str) -> None:
    orientation = Orientation.of(affine_of(code))
    for shape in ((2, 3, 4), (2, 3, 4, 5)):
        array = numbered(shape)
        assert_array_equal(orientation.turn_back(orientation.turn(array)), array)
        assert_array_equal(orientation.turn(orientation.turn_back(array)), array)


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_turning_copies_no_voxel(code: str) -> None:
    orientation = Orientation.of(affine_of(code))
    array = numbered((2, 3, 4, 5))
    assert np.shares_memory(orientation.turn(array), array)
    assert np.shares_memory(orientation.turn_back(array), array)


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_a_turned_grid_runs_right_front_up(code: str) -> None:
    grid = Grid((2, 3, 4), affine_of(code))
    turned = Orientation.of(grid.affine).turn_grid(grid)
    assert Orientation.of(turned.affine).code == "RAS"


@given(grids())
@example(Grid((2, 3, 4), affine_of("IPL")))
def test_turning_moves_no_voxel_in_the_world(grid: Grid) -> None:
    orientation = Orientation.of(grid.affine)
    field = brute_force_centres(grid.shape, grid.affine)
    turned = orientation.turn_grid(grid)
    assert_allclose(orientation.turn(field), turned.centres(), atol=1e-9)
    assert_allclose(orientation.turn_back(turned.centres()), field, atol=1e-9)


@given(grids(), SPACINGS)
def test_respacing_keeps_the_centre(grid: Grid, spacing: tuple[float, float, float]) -> None:
    respaced = grid.with_spacing(spacing)
    middle, respaced_middle = (
        g.world((np.array(g.shape, dtype=float) - 1) / 2) for g in (grid, respaced)
    )
    assert_allclose(respaced_middle, middle, atol=1e-8)
    assert_allclose(respaced.spacing, spacing, rtol=1e-9)


@given(grids(largest=40), SPACINGS)
def test_respacing_keeps_outer_edges_to_half_a_voxel(
    grid: Grid, spacing: tuple[float, float, float]
) -> None:
    respaced = grid.with_spacing(spacing)
    extent, respaced_extent = (np.array(g.shape) * g.spacing for g in (grid, respaced))
    # Half a voxel of rounding is shared by both ends; a grid thinner than that keeps one voxel.
    excess = np.abs(respaced_extent - extent)
    assert ((excess <= np.array(spacing) / 2 + 1e-6) | (np.array(respaced.shape) == 1)).all()


@given(grids())
def test_respacing_to_the_same_spacing_changes_nothing(grid: Grid) -> None:
    assert grid.agrees_with(grid.with_spacing(grid.spacing), tolerance=1e-8)


@given(grids(), SPACINGS)
def test_positions_of_a_respaced_grid_lead_to_its_centres(
    grid: Grid, spacing: tuple[float, float, float]
) -> None:
    respaced = grid.with_spacing(spacing)
    index = np.stack(np.meshgrid(*grid.positions_of(respaced), indexing="ij"), axis=-1)
    assert_allclose(grid.world(index), respaced.centres(), atol=1e-6)


@given(grids())
def test_positions_of_the_same_grid_are_whole_numbers(grid: Grid) -> None:
    for size, positions in zip(grid.shape, grid.positions_of(grid), strict=True):
        assert_array_equal(positions, np.arange(size))


def test_positions_between_grids_whose_axes_differ_fail_an_assertion() -> None:
    with pytest.raises(AssertionError, match="axes differ"):
        Grid((2, 2, 2), affine_of("RAS")).positions_of(Grid((2, 2, 2), affine_of("ARS")))


def test_voxel_j_of_a_placed_grid_lies_at_stride_times_j_plus_offset() -> None:
    grid = Grid((8, 8, 8), affine_of("PIR"))
    placed = grid.placed((2, 3, 4), (4, 2, 1), (1.5, 0.5, 0.0))
    cells = np.stack(np.indices((2, 3, 4)), axis=-1)
    index = cells * np.array([4, 2, 1]) + np.array([1.5, 0.5, 0.0])
    assert_allclose(placed.centres(), grid.world(index), atol=1e-9)


@given(grids(smallest=2), st.integers(0, 2), st.floats(0.11, 50.0), st.floats(-0.09, 0.09))
def test_grids_agree_until_a_voxel_is_a_tenth_of_one_off(
    grid: Grid, axis: int, far: float, near: float
) -> None:
    for share, same in ((far, False), (-far, False), (near, True)):
        moved = grid.placed(grid.shape, (1.0, 1.0, 1.0), share * np.eye(3)[axis])
        assert grid.agrees_with(moved) is moved.agrees_with(grid) is same
        assert grid.agrees_with(moved, tolerance=abs(share) * grid.spacing[axis] * 1.01 + 1e-9)


@given(grids(smallest=2), st.integers(0, 2), st.floats(-0.3, 0.3))
def test_grids_agree_until_a_step_is_a_hundredth_of_a_voxel_off(
    grid: Grid, axis: int, share: float
) -> None:
    stretched = grid.placed(grid.shape, 1 + share * np.eye(3)[axis], (0.0, 0.0, 0.0))
    steps = max(abs(share), abs(1 / (1 + share) - 1))
    # At the limits themselves, rounding decides.
    assume(abs(steps - 0.01) > 1e-9 and abs(steps * (grid.shape[axis] - 1) - 0.1) > 1e-9)
    same = steps <= 0.01 and steps * (grid.shape[axis] - 1) <= 0.1
    assert grid.agrees_with(stretched) is stretched.agrees_with(grid) is same


@pytest.mark.parametrize("code", ["RAS", "LPS", "SLA"])
@pytest.mark.parametrize("rotation", [(0.0, 0.0, 0.0), (0.2, -0.3, 0.25)])
def test_grids_that_differ_by_the_rounding_of_headers_agree(
    code: str, rotation: tuple[float, float, float]
) -> None:
    shape, spacing = (512, 512, 400), (0.703125, 0.703125, 1.25)
    affine = affine_of(code, spacing, rotation=rotation)
    exact = Grid(shape, affine)
    rounded = affine_of(code, (0.7031, 0.7031, 1.25), rotation=rotation)
    turned, moved = affine.copy(), affine.copy()
    turned[:3, :3] = np.round(affine[:3, :3] / spacing, 5) * spacing
    moved[:3, 3] += (0.004, -0.004, 0.004)
    for other in (rounded, turned, moved, affine.astype(np.float32).astype(float)):
        assert exact.difference_from(Grid(shape, other)) == ""
        assert Grid(shape, other).difference_from(exact) == ""


def test_a_shift_is_measured_in_the_spacing_of_its_own_axis() -> None:
    thick = Grid((4, 4, 30), np.diag([0.5, 0.5, 5.0, 1.0]))
    for axis, moved in ((0, "0.06"), (2, "0.6")):
        affine = thick.affine.copy()
        affine[axis, 3] += float(moved)
        assert thick.difference_from(Grid(thick.shape, affine)) == (
            f"its first voxel lies {moved} mm off, so that voxels lie up to 0.12 voxels apart"
        )
        affine[axis, 3] -= 0.8 * float(moved)
        assert thick.agrees_with(Grid(thick.shape, affine))


def test_the_thickness_of_a_single_slice_does_not_count() -> None:
    assert Grid((4, 4, 1), np.eye(4)).agrees_with(Grid((4, 4, 1), np.diag([1.0, 1.0, 5.0, 1.0])))


def changed(*, spacing: float = 1.0, degrees: float = 0.0, shift: float = 0.0) -> ndarray:
    affine = affine_of("RAS", (1.0, 1.0, spacing), rotation=(0.0, 0.0, np.radians(degrees)))
    affine[:3, 3] = (0.0, shift, 0.0)
    return affine


DIFFERENCES = {
    "shape": ((11, 21, 31), changed(), "its shape is 11x21x31, not 11x21x30"),
    "spacing": (
        (11, 21, 30),
        changed(spacing=1.1),
        "its spacing is 1x1x1.1 mm, not 1x1x1 mm, so that voxels lie up to 2.9 voxels apart",
    ),
    "spacing in the fifth digit": (
        (11, 21, 30),
        changed(spacing=1.00402),
        "its spacing is 1x1x1.004 mm, not 1x1x1 mm, so that voxels lie up to 0.117 voxels apart",
    ),
    "origin": (
        (11, 21, 30),
        changed(shift=-2.0),
        "its first voxel lies 2 mm off, so that voxels lie up to 2 voxels apart",
    ),
    "axes": (
        (11, 21, 30),
        changed(degrees=1.0),
        "its axes are turned by 1 degree, so that voxels lie up to 0.351 voxels apart",
    ),
    "all at once": (
        (11, 21, 30),
        changed(spacing=2.0, degrees=3.0, shift=7.0),
        "its spacing is 1x1x2 mm, not 1x1x1 mm, its axes are turned by 3 degrees and its first "
        "voxel lies 7 mm off, so that voxels lie up to 29 voxels apart",
    ),
    "shape and spacing": (
        (11, 21, 15),
        changed(spacing=2.0),
        "its shape is 11x21x15, not 11x21x30 and its spacing is 1x1x2 mm, not 1x1x1 mm",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_between_grids_has_its_kind_and_size(name: str) -> None:
    shape, affine, said = DIFFERENCES[name]
    assert Grid(shape, affine).difference_from(Grid((11, 21, 30), changed())) == said


@given(affines(), affines())
def test_grids_that_disagree_always_name_a_difference(one: ndarray, other: ndarray) -> None:
    first = Grid((5, 6, 7), one)
    # Somewhere on the way from one to the other they stop to agree, by whatever is left by then.
    for share in (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5):
        between = one + share * (other - one)
        if abs(np.linalg.det(between[:3, :3])) < 0.01:
            continue
        said = Grid((5, 6, 7), between).difference_from(first)
        assert not said or said.startswith("its ")


@given(grids(smallest=2), st.sampled_from(STORED))
def test_an_array_is_turned_into_the_order_of_another_grid(
    grid: Grid, stored: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    values = numbered(grid.shape)
    other, held = stored_otherwise(values, grid, *stored)
    way = Orientation.between(held, grid)
    assert way.turn_grid(held).difference_from(grid) == ""
    assert_array_equal(way.turn(other), values)


@given(grids(), st.floats(-1e-6, 1e-6))
def test_grids_that_agree_are_not_turned(grid: Grid, noise: float) -> None:
    # Even at 45 degrees, where rounding decides which world axis is the nearest.
    way = Orientation.between(Grid(grid.shape, grid.affine * (1 + noise)), grid)
    assert (way.order, way.flip) == ((0, 1, 2), (False, False, False))


def test_grids_of_different_shapes_do_not_agree() -> None:
    assert not Grid((2, 3, 4), np.eye(4)).agrees_with(Grid((2, 3, 5), np.eye(4)))


@given(st.lists(layers(), min_size=1, max_size=3))
def test_a_feature_voxel_lies_at_the_mean_position_of_its_inputs(stack: list[Layer]) -> None:
    # The deepest stack sees 118 places at once.
    field = torch.arange(160, dtype=torch.float64)[None, None]
    whole = torch.ones_like(field)
    placement = Placement.identity(1)
    for kernel, stride, padding, dilation in stack:
        weight = torch.full((1, 1, *kernel), 1 / kernel[0], dtype=torch.float64)
        field, whole = (
            F.conv1d(values, weight, None, stride, padding, dilation) for values in (field, whole)
        )
        placement = placement.through(kernel, stride, padding, dilation)
    # Zeros that pad the image have no place: only cells that saw none of them are compared.
    unpadded = np.isclose(whole[0, 0].numpy(), 1, atol=1e-9)
    assert unpadded.any()
    expected = placement.stride[0] * np.arange(len(unpadded)) + placement.offset[0]
    assert_allclose(field[0, 0].numpy()[unpadded], expected[unpadded], atol=1e-8)


@given(layers())
def test_a_max_pooled_voxel_lies_in_the_middle_of_its_window(layer: Layer) -> None:
    kernel, stride, padding, dilation = layer
    places = torch.arange(24.0)[None]
    highest = F.max_pool1d(places, kernel, stride, padding, dilation)[0].numpy()
    lowest = -F.max_pool1d(-places, kernel, stride, padding, dilation)[0].numpy()
    placement = Placement.identity(1).through(*layer)
    expected = placement.stride[0] * np.arange(len(highest)) + placement.offset[0]
    reach = dilation[0] * (kernel[0] - 1) / 2
    unpadded = (expected >= reach) & (expected + reach <= 23)
    assert unpadded.any()
    assert_allclose((highest + lowest)[unpadded] / 2, expected[unpadded])


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
        ((3, 3, 1), (2, 2, 1), (1, 1, 0), (1, 1, 1)),
        ((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1)),
        ((4, 1, 2), (2, 3, 2), (1, 0, 1), (1, 1, 2)),
    ],
)
def test_a_feature_maps_grid_gives_the_world_position_of_each_voxel(
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
    dilation: tuple[int, int, int],
) -> None:
    grid = Grid((9, 10, 11), affine_of("PSR"))
    weight = torch.full((1, 1, *kernel), 1 / np.prod(kernel), dtype=torch.float64)
    field = torch.from_numpy(grid.centres()).movedim(3, 0)[:, None]
    through = [
        F.conv3d(values, weight, None, stride, padding, dilation)[:, 0].numpy()
        for values in (field, torch.ones_like(field))
    ]
    placement = Placement.identity(3).through(kernel, stride, padding, dilation)
    placed = grid.placed(through[0].shape[1:], placement.stride, placement.offset)
    unpadded = np.isclose(through[1][0], 1)
    assert unpadded.sum() >= 12
    assert_allclose(through[0][:, unpadded].T, placed.centres()[unpadded], atol=1e-8)


def test_the_inputs_placement_is_the_identity_and_dilation_is_1_by_default() -> None:
    identity = Placement.identity(3)
    assert identity == Placement((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    assert identity.through((3, 3, 3), (1, 1, 1), (1, 1, 1)) == identity
    given_dilation = identity.through((3, 2, 1), (2, 2, 2), (1, 0, 0), (1, 1, 1))
    assert identity.through((3, 2, 1), (2, 2, 2), (1, 0, 0)) == given_dilation
    assert given_dilation == Placement((2.0, 2.0, 2.0), (0.0, 0.5, 0.0))


def test_axes_of_one_voxel_are_not_compared_for_separate_slices() -> None:
    assert separate_axis((1.0, 1.8, 0.1), (1.0, 1.5, 0.1), (0, 1)) is None
    assert separate_axis((1.0, 4.0, 0.1), (1.0, 1.0, 20.0), (0, 1)) == 1
    assert separate_axis((1.0, 4.0, 0.1), (1.0, 1.0, 20.0), ()) is None


def test_slices_are_resampled_separately_if_only_one_axis_is_coarse() -> None:
    fine = (1.0, 1.0, 1.0)
    assert separate_axis((1.0, 1.0, 3.1), fine) == 2
    assert separate_axis(fine, (3.1, 1.0, 1.0)) == 0
    assert separate_axis((1.0, 1.0, 3.0), fine) is None
    assert separate_axis((3.1, 1.0, 3.1), fine) is None
    assert separate_axis((3.1, 1.0, 3.10001), fine) is None  # equal, but for rounding
    # What the scan says goes before what the target says.
    assert separate_axis((3.1, 1.0, 3.1), (1.0, 1.0, 3.1)) is None
    assert separate_axis((3.1, 1.0, 1.0), (1.0, 1.0, 3.1)) == 0
