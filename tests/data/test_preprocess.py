from typing import Literal

import hypothesis.strategies as st
import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy import ndarray
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor
from torch.testing import assert_close

from segkit.data.preprocess import (
    Prepared,
    median_spacing,
    prepare_image,
    prepare_label,
)
from segkit.geometry.grid import Grid, Orientation, separate_axis
from segkit.geometry.resample import resample
from segkit.io.volume import Volume
from tests.helpers import ORIENTATIONS, affine_of, grids, inside, linear_field

ANATOMY = Grid((6, 7, 5), affine_of("RAS", spacing=(0.9, 1.2, 3.0)))
SPACING = (1.1, 1.0, 1.5)


def unchanged(image: Tensor) -> Tensor:
    return image


def scanned_as(code: str, values: ndarray) -> Volume:
    """The same anatomy from a scanner with other axes, turned by nibabel."""
    image = nib.Nifti1Image(values, ANATOMY.affine)
    turn = ornt_transform(io_orientation(ANATOMY.affine), axcodes2ornt(tuple(code)))
    turned = image.as_reoriented(turn)
    x, y, z = turned.shape[:3]
    return Volume(np.asanyarray(turned.dataobj), Grid((x, y, z), turned.affine))


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_the_same_anatomy_gives_the_same_image_however_it_was_scanned(code: str) -> None:
    noise = np.random.default_rng(0).normal(size=(*ANATOMY.shape, 2)).astype(np.float32)
    expected = prepare_image(
        Volume(noise, ANATOMY), spacing=SPACING, normalisers=[unchanged, torch.square]
    )
    volume = scanned_as(code, noise)
    assert "".join(nib.aff2axcodes(volume.grid.affine)) == code
    prepared = prepare_image(volume, spacing=SPACING, normalisers=[unchanged, torch.square])
    assert prepared.orientation.code == code
    assert prepared.grid.agrees_with(expected.grid, tolerance=1e-9)
    assert_close(prepared.image, expected.image, rtol=0, atol=1e-5)


@given(grids(smallest=2), st.tuples(*[st.floats(0.5, 5.0)] * 3))
def test_a_prepared_grid_tells_where_its_voxels_lie(
    grid: Grid, spacing: tuple[float, float, float]
) -> None:
    field = grid.centres().astype(np.float32)
    prepared = prepare_image(Volume(field, grid), spacing=spacing, normalisers=[unchanged] * 3)
    assert Orientation.of(prepared.grid.affine).code == "RAS"
    assert_allclose(prepared.grid.spacing, spacing, rtol=1e-6)
    apart = separate_axis(prepared.source.spacing, prepared.grid.spacing)
    assert prepared.orders == tuple(0 if axis == apart else 1 for axis in range(3))
    index = prepared.source.index(prepared.grid.centres())
    if apart is not None:  # the place of the nearest slice
        last = prepared.source.shape[apart] - 1
        index[..., apart] = np.clip(np.ceil(np.round(index[..., apart], 9) - 0.5), 0, last)
    within = ((index >= -1e-9) & (index <= np.array(prepared.source.shape) - 1 + 1e-9)).all(-1)
    # float32 places a voxel 500 mm away to 3e-5 mm.
    assert_allclose(
        prepared.image.movedim(0, 3).numpy()[within],
        prepared.source.world(index)[within],
        atol=1e-3,
    )


@pytest.mark.parametrize("code", ["RAS", "LPS", "SLA", "PIR"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("thick", [2.0, 3.5])
def test_world_coordinates_come_back_by_every_order_and_anisotropy(
    thick: float, order: Literal[1, 3], axis: int, code: str
) -> None:
    """In the middle, where no end is near: exactly, but along slices that lie far apart."""
    spacing = [1.0, 1.1, 0.9]
    spacing[axis] = thick
    x, y, z = (spacing["RLAPSI".index(letter) // 2] for letter in code)
    grid = Grid((30, 31, 29), affine_of(code, spacing=(x, y, z)))
    field = grid.centres().astype(np.float32) + 200
    prepared = prepare_image(
        Volume(field, grid), spacing=(0.8, 0.85, 1.3), normalisers=[unchanged] * 3, order=order
    )
    separate = thick > 3
    assert prepared.orders == tuple(
        0 if separate and number == axis else order for number in range(3)
    )
    index = prepared.source.index(prepared.grid.centres())
    middle = ((index > 9) & (index < np.array(prepared.source.shape) - 10)).all(axis=-1)
    assert middle.any()
    found = prepared.image.movedim(0, 3).numpy()[middle] - 200
    off = prepared.source.index(found.astype(float)) - index[middle]
    linear = [number for number in range(3) if not (separate and number == axis)]
    assert_allclose(off[:, linear], 0, atol=1e-3)
    if separate:  # a slice itself, and none is nearer
        slices = index[middle][:, axis] + off[:, axis]
        assert_allclose(slices, slices.round(), atol=1e-3)
        assert np.abs(off[:, axis]).max() < 0.501


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("thickness", [0.1, 2.5, 20.0])
@pytest.mark.parametrize("order", [1, 3])
def test_the_spacing_along_an_axis_of_one_voxel_has_no_effect(
    order: Literal[1, 3], thickness: float, axis: int
) -> None:
    def prepared(thickness: float) -> Prepared:
        plane = np.random.default_rng(0).normal(size=(20, 24)).astype(np.float32) + 5
        spacing, target = [1.0, 1.8], [1.0, 1.5]
        spacing.insert(axis, thickness)
        target.insert(axis, 3.75)
        values = np.expand_dims(plane, axis)
        x, y, z = spacing
        volume = Volume(values, Grid(values.shape, affine_of("RAS", (x, y, z))))
        return prepare_image(volume, spacing=target, normalisers=[unchanged], order=order)

    found, expected = prepared(thickness), prepared(3.75)
    shape = [20, 29]
    shape.insert(axis, 1)
    assert found.grid.shape == tuple(shape) and found.orders == (order,) * 3
    assert_close(found.image, expected.image, rtol=0, atol=0)
    assert found.grid.spacing[axis] == pytest.approx(thickness)
    assert_array_equal(found.positions_of_source()[axis], [0])
    middle = (np.array(found.grid.shape) - 1) / 2
    there = (np.array(found.source.shape) - 1) / 2
    assert_allclose(found.grid.world(middle), found.source.world(there), atol=1e-9)


def test_grids_of_one_voxel_along_an_axis_have_no_spacing_there() -> None:
    volume = Grid((9, 9, 9), affine_of("RAS", (1.0, 1.0, 3.0)))
    plane = Grid((9, 9, 1), affine_of("RAS", (1.0, 1.0, 50.0)))
    assert median_spacing([volume, plane, plane]) == (1.0, 1.0, 3.0)
    assert median_spacing([plane]) == (1.0, 1.0, 50.0)


def test_median_spacing_counts_along_the_worlds_axes() -> None:
    # 1 mm to the right, 2 to the front and 3 to the head, whichever array axis that is.
    grids = [
        Grid((2, 2, 2), affine_of("RAS", (1.0, 2.0, 3.0))),
        Grid((2, 2, 2), affine_of("SRP", (3.0, 1.0, 2.0))),
        Grid((2, 2, 2), affine_of("PIL", (9.0, 9.0, 9.0))),
    ]
    assert median_spacing(grids) == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("code", ["RAS", "LPI", "PIR"])
@pytest.mark.parametrize("target", [1.0, 1.7, 4.4])
def test_labels_of_slices_far_apart_are_those_of_the_nearest_slice(
    code: str, target: float
) -> None:
    """Slices 4 mm apart, of labels 1 to 7 from foot to head, at other distances."""
    labels = np.broadcast_to(np.arange(1, 8, dtype=np.uint8), (5, 6, 7))
    head_first = Grid((5, 6, 7), affine_of("RAS", (1.0, 1.0, 4.0), rotation=(0.0, 0.0, 0.0)))
    image = nib.Nifti1Image(labels, head_first.affine)
    turn = ornt_transform(io_orientation(head_first.affine), axcodes2ornt(tuple(code)))
    turned = image.as_reoriented(turn)
    x, y, z = turned.shape
    volume = Volume(np.asanyarray(turned.dataobj), Grid((x, y, z), turned.affine))
    prepared = prepare_image(volume, spacing=(1.2, 0.9, target), normalisers=[unchanged], order=3)
    assert prepared.orders == (3, 3, 0)
    heights = prepared.grid.centres()[0, 0, :, 2]
    slices = np.abs(heights[:, None] - head_first.centres()[0, 0, :, 2]).argmin(axis=1)
    found = prepare_label(volume, prepared).numpy()
    assert_array_equal(found, np.broadcast_to(1 + slices, found.shape))
    assert_allclose(prepared.image[0].numpy(), found, rtol=1e-6)


def test_overshoots_of_a_spline_are_clipped_to_the_channels_range() -> None:
    step = np.ones((16, 3, 3), np.float32)
    step[8:] = 5.0
    volume = Volume(np.stack([step, -step], axis=3), Grid((16, 3, 3), np.eye(4)))
    prepared = prepare_image(volume, spacing=(0.7, 1.0, 1.0), normalisers=[unchanged] * 2, order=3)
    positions = prepared.source.positions_of(prepared.grid)
    free = resample(torch.from_numpy(np.moveaxis(volume.data, 3, 0)), positions, (3, 3, 3))
    assert free[0].max() > 5.1 and free[1].max() > -0.9
    # Two sums of the same numbers in another order, so equal but for rounding.
    assert_allclose(prepared.image[0], free[0].clamp(1, 5), rtol=1e-6)
    assert_allclose(prepared.image[1], free[1].clamp(-5, -1), rtol=1e-6)
    assert prepared.image[0].min() >= 1 and prepared.image[0].max() <= 5


@pytest.mark.parametrize("code", ["RAS", "LPS", "SLA", "IPR"])
def test_the_source_is_the_scan_itself_in_ras(code: str) -> None:
    volume = scanned_as(code, linear_field(ANATOMY.centres()).astype(np.float32))
    prepared = prepare_image(volume, spacing=SPACING, normalisers=[unchanged])
    turned = prepared.orientation.turn(volume.data)
    assert_allclose(linear_field(prepared.source.centres()), turned, atol=1e-4)
    assert_allclose(prepared.source.spacing, ANATOMY.spacing, rtol=1e-6)


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_a_label_is_prepared_onto_the_images_grid(code: str) -> None:
    """Half of the world is 1: so is what lies on that side, but for what a voxel spans."""
    side = linear_field(ANATOMY.centres()) - linear_field(ANATOMY.centres()).mean()
    image = prepare_image(scanned_as(code, side), spacing=SPACING, normalisers=[unchanged])
    label = prepare_label(scanned_as(code, (side > 0).astype(np.uint8)), image)
    assert label.dtype == torch.uint8
    assert tuple(label.shape) == image.grid.shape
    distance = linear_field(image.grid.centres()) - linear_field(ANATOMY.centres()).mean()
    reach = np.abs(np.array([0.31, 0.73, 1.17])) @ np.abs(ANATOMY.affine[:3, :3]).sum(axis=1)
    clear = inside(image.source, image.grid) & (np.abs(distance) > reach)
    assert clear.sum() > 10
    assert_array_equal(label.numpy()[clear], distance[clear] > 0)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("code", ["RAS", "LPI"])
def test_preparing_leaves_the_volume_as_it_was(code: str, order: str) -> None:
    values = np.asarray(np.arange(60, dtype=np.float32).reshape(3, 4, 5), order=order)
    volume = Volume(values, Grid((3, 4, 5), affine_of(code)))
    prepare_image(volume, spacing=(1.0, 1.0, 1.0), normalisers=[lambda image: image * 0 - 1])
    assert_array_equal(values, np.arange(60).reshape(3, 4, 5))


@pytest.mark.parametrize("shape", [(4, 5, 1), (1, 4, 5), (4, 1, 5), (1, 1, 5), (1, 1, 1)])
@pytest.mark.parametrize("code", ["RAS", "LPI", "PIR"])
def test_a_single_slice_is_prepared_however_it_was_scanned(
    code: str, shape: tuple[int, int, int]
) -> None:
    values = 1 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    grid = Grid(shape, affine_of(code))
    spacing = Orientation.of(grid.affine).turn_grid(grid).spacing
    prepared = prepare_image(Volume(values, grid), spacing=spacing, normalisers=[unchanged])
    assert_array_equal(prepared.orientation.turn_back(prepared.image[0].numpy()), values)
    label = prepare_label(Volume(values.astype(np.uint8), grid), prepared)
    assert_array_equal(prepared.orientation.turn_back(label.numpy()), values)


def test_each_channel_has_its_own_normaliser() -> None:
    values = np.stack([np.full((2, 2, 2), 3.0), np.full((2, 2, 2), 5.0)], axis=3)
    volume = Volume(values, Grid((2, 2, 2), np.eye(4)))
    prepared = prepare_image(
        volume,
        spacing=(1.0, 1.0, 1.0),
        normalisers=[lambda image: image + 1, lambda image: image * 2],
    )
    assert prepared.image[:, 0, 0, 0].tolist() == [4.0, 10.0]
    with pytest.raises(AssertionError, match="one normaliser per channel"):
        prepare_image(volume, spacing=(1.0, 1.0, 1.0), normalisers=[unchanged])


@pytest.mark.parametrize("code", ["RAS", "LPI", "PIR"])
def test_a_background_of_zeros_is_cut_off_and_the_body_stays_in_its_place(code: str) -> None:
    grid = Grid((9, 8, 7), affine_of(code))
    values = np.zeros(grid.shape)
    values[2:7, 3:6, 1:5] = linear_field(grid.centres())[2:7, 3:6, 1:5] + 1000
    spacing = Orientation.of(grid.affine).turn_grid(grid).spacing
    prepared = prepare_image(Volume(values, grid), spacing=spacing, normalisers=[unchanged])
    assert sorted(prepared.grid.shape) == [3, 4, 5]
    expected = linear_field(prepared.grid.centres()) + 1000
    assert_allclose(prepared.image[0].numpy(), expected, rtol=1e-6)
    whole = Orientation.of(grid.affine).turn(values)
    assert_allclose(whole[prepared.box], prepared.image[0].numpy(), rtol=1e-6)


def test_an_image_with_only_zeros_is_not_cropped() -> None:
    prepared = prepare_image(
        Volume(np.zeros((3, 4, 5)), Grid((3, 4, 5), np.eye(4))),
        spacing=(1.0, 1.0, 1.0),
        normalisers=[unchanged],
    )
    assert prepared.grid.shape == (3, 4, 5)


@pytest.mark.parametrize("kind", ["i2", ">i2", "u2", "u4", "f2", "f8", "?", "u1"])
@pytest.mark.parametrize("code", ["RAS", "LPI", "SAR"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_values_of_any_type_and_order_in_memory_reach_the_network_unchanged(
    kind: str, code: str, order: Literal["C", "F"]
) -> None:
    anatomy = np.random.default_rng(0).integers(1, 100, ANATOMY.shape).astype(kind)
    back = Orientation.of(affine_of(code, spacing=(1.0, 1.0, 1.0)))
    scanned = np.array(back.turn_back(anatomy), order=order)
    scanned.flags.writeable = False
    placed = Volume(scanned, Grid(scanned.shape, affine_of(code, spacing=(1.0, 1.0, 1.0))))
    image = prepare_image(placed, spacing=(1.0, 1.0, 1.0), normalisers=[unchanged]).image
    assert image.dtype == torch.float32 and image.is_contiguous()
    assert_array_equal(image[0].numpy(), anatomy.astype(np.float32))
