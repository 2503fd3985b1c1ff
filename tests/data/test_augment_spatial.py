import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from segkit.data.augment_spatial import SpatialVariation, cubic_weights

PATCHES = [(24, 24, 1), (20, 17, 1), (16, 12, 20)]


def middle(image: Tensor, label: Tensor, patch_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The patch in the middle of each cut, unvaried."""
    region: tuple[slice, ...] = tuple(
        slice((cut - size) // 2, (cut - size) // 2 + size)
        for cut, size in zip(label.shape[1:], patch_size, strict=True)
    )
    every = slice(None)
    return image[(every, every, *region)], label[(every, *region)]


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def still(patch_size: tuple[int, ...], **changes: Any) -> SpatialVariation:
    """A variation that moves nothing but what `changes` says."""
    nothing = {"rotation_probability": 0.0, "scale_probability": 0.0, "mirror_probability": 0.0}
    return SpatialVariation(patch_size, (0, 1, 2), **{**nothing, **changes})


def coordinates(space: tuple[int, ...]) -> list[Tensor]:
    """Each voxel's place along each axis, from the middle."""
    axes = [torch.arange(size) - (size - 1) / 2 for size in space]
    return list(torch.meshgrid(*axes, indexing="ij"))


def world(space: tuple[int, ...], spacing: tuple[float, ...]) -> Tensor:
    """Each voxel's place in mm from the middle, one channel an axis; exact under interpolation."""
    places = zip(coordinates(space), spacing, strict=True)
    return torch.stack([place * width for place, width in places])


def blank(batch_size: int, space: tuple[int, ...]) -> Tensor:
    return torch.zeros(batch_size, *space, dtype=torch.uint8)


def likely(count: int, total: int, probability: float) -> bool:
    """Whether a count lies within four standard deviations of what is expected."""
    deviation = math.sqrt(total * probability * (1 - probability))
    return abs(count - total * probability) <= 4 * deviation


def waves(batch_size: int, space: tuple[int, ...]) -> Tensor:
    """Smooth images between 0 and 1, each with waves of its own in every direction."""
    generator = seeded(7)
    image = torch.zeros(batch_size, 1, *space)
    for sample in range(batch_size):
        for _ in range(4):
            direction = torch.randn(len(space), generator=generator) * 0.15
            phase = float(torch.rand((), generator=generator)) * 2 * math.pi
            along = sum(c * k for c, k in zip(coordinates(space), direction.tolist(), strict=True))
            image[sample, 0] += torch.sin(along + phase)
    return (image / 4 + 1) / 2


def steepest(image: Tensor) -> float:
    """The largest difference between neighbours, along all axes together."""
    steps = [image.diff(dim=axis).abs() for axis in range(2, image.ndim) if image.shape[axis] > 1]
    return math.sqrt(sum(float(step.max()) ** 2 for step in steps))


def blob(space: tuple[int, ...], centre: tuple[float, ...], width: float) -> Tensor:
    """A Gaussian about a place given from the middle, as a batch of one."""
    squares = [(c - at) ** 2 for c, at in zip(coordinates(space), centre, strict=True)]
    return torch.exp(-sum(squares) / (2 * width**2))[None, None]


def centroid(image: Tensor) -> Tensor:
    space = tuple(image.shape)
    return torch.stack([(image * c).sum() / image.sum() for c in coordinates(space)])


def in_plane_width(image: Tensor) -> float:
    """The standard deviation of a blob along the first axis."""
    along = coordinates(tuple(image.shape))[0]
    mean = (image * along).sum() / image.sum()
    return math.sqrt(float((image * (along - mean) ** 2).sum() / image.sum()))


@pytest.mark.parametrize("patch_size", PATCHES)
@pytest.mark.parametrize("elastic_probability", [0.0, 0.8])
def test_image_and_label_move_together(
    patch_size: tuple[int, ...], elastic_probability: float
) -> None:
    spatial = SpatialVariation(
        patch_size,
        (0, 1, 2),
        rotation_probability=0.8,
        scale_probability=0.8,
        elastic_probability=elastic_probability,
        elastic_spacing=8.0,
    )
    image = waves(6, spatial.cut_size)
    label = (image[:, 0] > 0.5).to(torch.uint8)

    turned, turned_label = spatial(image, label, seeded(1))

    # The label is read at most half a diagonal from where the image is.
    far = (turned[:, 0] - 0.5).abs() > steepest(image) * math.sqrt(3) / 2
    assert far.float().mean() > 0.4
    assert_close(turned_label[far], (turned[:, 0] > 0.5).to(torch.uint8)[far])
    unmoved, _ = middle(image, label, patch_size)
    assert ((turned - unmoved).abs().amax((1, 2, 3, 4)) > 0.1).all()


@pytest.mark.parametrize("patch_size", [*PATCHES, (10, 12, 14), (28, 44, 1), (5, 7, 1)])
def test_with_probabilities_zero_the_patch_is_the_middle_of_the_cut(
    patch_size: tuple[int, ...],
) -> None:
    spatial = still(patch_size)
    image = torch.rand(2, 2, *spatial.cut_size, generator=seeded(3))
    label = (image[:, 0] * 5).to(torch.uint8)

    turned, turned_label = spatial(image, label, seeded(0))

    expected, expected_label = middle(image, label, patch_size)
    assert torch.equal(turned, expected)
    assert torch.equal(turned_label, expected_label)


@pytest.mark.parametrize("patch_size", [*PATCHES, (8, 8, 8), (100, 36, 1)])
def test_the_cut_is_a_quarter_larger_and_evenly_so(patch_size: tuple[int, ...]) -> None:
    for size, cut in zip(patch_size, still(patch_size).cut_size, strict=True):
        assert (cut - size) % 2 == 0
        assert cut == 1 if size == 1 else 1.25 * size <= cut < 1.25 * size + 2


def test_the_middle_leaves_as_much_on_either_side() -> None:
    image = torch.arange(10.0).view(1, 1, 10, 1, 1)
    patch, label = middle(image, image[:, 0].long(), (4, 1, 1))
    assert patch.flatten().tolist() == label.flatten().tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_a_pure_mirror_is_a_flip_of_the_middle(axes: tuple[int, ...]) -> None:
    spatial = SpatialVariation(
        (8, 12, 10), axes, rotation_probability=0.0, scale_probability=0.0, mirror_probability=1.0
    )
    image = torch.rand(2, 1, *spatial.cut_size, generator=seeded(3))
    label = (image[:, 0] * 5).to(torch.uint8)

    turned, turned_label = spatial(image, label, seeded(0))

    expected, expected_label = middle(image, label, (8, 12, 10))
    assert torch.equal(turned, expected.flip([axis + 2 for axis in axes]))
    assert torch.equal(turned_label, expected_label.flip([axis + 1 for axis in axes]))


def test_a_patch_turned_and_mirrored_is_the_turned_patch_mirrored() -> None:
    plain = still((12, 10, 8), rotation_probability=1.0, scale_probability=1.0)
    mirroring = still(
        (12, 10, 8), rotation_probability=1.0, scale_probability=1.0, mirror_probability=1.0
    )
    image = waves(2, plain.cut_size)
    label = (image[:, 0] * 9).to(torch.uint8)
    turned, turned_label = plain(image, label, seeded(3))
    mirrored, mirrored_label = mirroring(image, label, seeded(3))
    assert torch.equal(mirrored, turned.flip(2, 3, 4))
    assert torch.equal(mirrored_label, turned_label.flip(1, 2, 3))


def test_mirroring_twice_is_the_identity() -> None:
    spatial = still((8, 6, 5), mirror_probability=1.0)
    image = torch.rand(2, 1, *spatial.cut_size, generator=seeded(3))
    label = (image[:, 0] * 5).to(torch.uint8)
    once = spatial(image, label, seeded(0))
    # A patch of its own size is its own middle.
    twice = spatial(*once, seeded(0))
    expected = middle(image, label, (8, 6, 5))
    assert not torch.equal(once[0], expected[0])
    assert torch.equal(twice[0], expected[0]) and torch.equal(twice[1], expected[1])


def test_each_axis_is_mirrored_at_its_probability() -> None:
    spatial = still((8, 8, 1), mirror_probability=0.5)
    places = coordinates(spatial.cut_size)
    image = torch.stack([places[0], places[1]]).expand(400, -1, -1, -1, -1)

    turned, _ = spatial(image, torch.zeros(400, *spatial.cut_size, dtype=torch.uint8), seeded(2))

    mirrored = turned[:, :, 0, 0, 0] > 0
    counts = [
        int((mirrored[:, 0] == a).logical_and(mirrored[:, 1] == b).sum())
        for a in (0, 1)
        for b in (0, 1)
    ]
    assert all(70 < count < 130 for count in counts), counts


@pytest.mark.parametrize("patch_size", [(32, 32, 1), (24, 24, 24)])
def test_turning_keeps_a_blobs_distance_from_the_middle(patch_size: tuple[int, ...]) -> None:
    spatial = still(patch_size, rotation_probability=1.0)
    place = (6.0, 3.0, 0.0) if patch_size[2] == 1 else (4.0, 2.0, -3.0)
    image = blob(spatial.cut_size, place, 1.5).expand(6, -1, -1, -1, -1)

    turned, _ = spatial(image, torch.zeros(6, *spatial.cut_size, dtype=torch.uint8), seeded(4))

    found = torch.stack([centroid(sample[0]) for sample in turned])
    assert_close(found.norm(dim=1), torch.full((6,), math.hypot(*place)), atol=0.05, rtol=0)
    assert torch.pdist(found).min() > 0.2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_quarter_turn_of_a_slice_is_rot90(axis: int) -> None:
    size = [16, 16]
    size.insert(axis, 1)
    quarter = (math.pi / 2, math.pi / 2)
    spatial = still(tuple(size), rotation_probability=1.0, angles=quarter)
    image = torch.rand(1, 1, *spatial.cut_size, generator=seeded(3))
    label = (image[:, 0] * 5).to(torch.uint8)

    turned, turned_label = spatial(image, label, seeded(0))

    first, second = [other for other in (0, 1, 2) if other != axis]
    expected, expected_label = middle(image, label, tuple(size))
    assert_close(turned, expected.rot90(-1, (first + 2, second + 2)), atol=1e-5, rtol=0)
    assert torch.equal(turned_label, expected_label.rot90(-1, (first + 1, second + 1)))


@pytest.mark.parametrize("size", [7, 8])
def test_quarter_turns_of_a_cube_are_rot90_in_each_plane(size: int) -> None:
    quarter = (math.pi / 2, math.pi / 2)
    spatial = still((size,) * 3, rotation_probability=1.0, angles=quarter, spacing=(0.7,) * 3)
    image = torch.rand(2, 1, *spatial.cut_size, generator=seeded(3))
    label = (image[:, 0] * 5).to(torch.uint8)

    turned, turned_label = spatial(image, label, seeded(0))

    expected, expected_label = middle(image, label, (size,) * 3)
    for first, second in [(0, 1), (0, 2), (1, 2)]:
        expected = expected.rot90(-1, (first + 2, second + 2))
        expected_label = expected_label.rot90(-1, (first + 1, second + 1))
    assert_close(turned, expected, atol=1e-5, rtol=0)
    assert torch.equal(turned_label, expected_label)


@pytest.mark.parametrize(
    ("patch_size", "spacing"),
    [
        ((16, 16, 12), (1.0, 1.0, 1.5)),
        ((9, 14, 20), (2.5, 1.0, 0.8)),
        ((20, 1, 12), (0.5, 3.0, 1.0)),
        ((12, 24, 6), (1.0, 1.0, 4.0)),
    ],
)
def test_turning_keeps_every_voxels_distance_from_the_middle_in_mm(
    patch_size: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    spatial = still(patch_size, spacing=spacing, rotation_probability=1.0)
    image = world(spatial.cut_size, spacing).expand(4, -1, -1, -1, -1)

    turned, _ = spatial(image, blank(4, spatial.cut_size), seeded(4))

    before = world(patch_size, spacing)
    reach = [
        (cut - 1) / 2 * width
        for cut, width, size in zip(spatial.cut_size, spacing, patch_size, strict=True)
        if size > 1
    ]
    # As far from the middle as every axis of the cut goes, no turn leads beyond the cut.
    inside = before.norm(dim=0) < min(reach)
    assert inside.float().mean() > 0.2
    found = turned.norm(dim=1)[:, inside]
    assert_close(found, before.norm(dim=0)[inside].expand(4, -1), atol=1e-4, rtol=0)
    assert (turned - before).abs().amax((1, 2, 3, 4)).min() > 0.5


def test_a_sphere_in_mm_stays_a_sphere() -> None:
    spacing = (1.0, 1.0, 2.0)
    spatial = still((24, 24, 12), spacing=spacing, rotation_probability=1.0)
    sphere = (world(spatial.cut_size, spacing).norm(dim=0) < 8).to(torch.uint8)
    label = sphere.expand(4, -1, -1, -1)

    _, turned = spatial(label[:, None].float(), label, seeded(0))

    # A voxel is read at most half a voxel's diagonal from where it should be.
    radius = world((24, 24, 12), spacing).norm(dim=0)
    away = math.hypot(*spacing) / 2
    assert turned[:, radius < 8 - away].all()
    assert not turned[:, radius > 8 + away].any()

    # Turned about its voxels, as if they were cubes, it leans.
    _, leaning = replace(spatial, spacing=None)(label[:, None].float(), label, seeded(0))
    assert not leaning[:, radius < 8 - away].all()


def angles_of(spatial: SpatialVariation, plane: tuple[int, int]) -> Tensor:
    """How far a hundred patches are turned in a plane, in degrees."""
    first, second = plane
    transforms = spatial._transforms(100, seeded(3))
    return torch.atan2(transforms[:, second, first], transforms[:, first, first]).rad2deg()


@pytest.mark.parametrize("patch_size", [(24, 15, 1), (1, 10, 16), (16, 10)])
def test_an_oblong_slice_is_turned_by_15_degrees_at_most(patch_size: tuple[int, ...]) -> None:
    first, second = [axis for axis, size in enumerate(patch_size) if size > 1]
    angles = angles_of(still(patch_size, rotation_probability=1.0), (first, second))
    assert angles.abs().max() <= 15
    assert angles.min() < -12 and angles.max() > 12


@pytest.mark.parametrize("patch_size", [(24, 16, 1), (16, 16)])
def test_a_slice_of_like_sides_is_turned_any_way(patch_size: tuple[int, ...]) -> None:
    angles = angles_of(still(patch_size, rotation_probability=1.0), (0, 1))
    assert angles.min() < -150 and angles.max() > 150


@pytest.mark.parametrize(
    ("patch_size", "spacing", "flat"),
    [
        ((6, 20, 20), None, 0),
        ((20, 20, 6), (1.0, 1.0, 5.0), 2),
        ((20, 6, 12), (1.0, 3.0, 1.0), 1),
        ((7, 21, 21), None, None),  # three times as long is not flat yet
        ((6, 20, 20), (1.0, 1.0, 2.0), None),  # short, but not along the coarsest axis
    ],
)
def test_a_flat_patch_is_turned_and_scaled_like_a_stack_of_slices(
    patch_size: tuple[int, ...], spacing: tuple[float, ...] | None, flat: int | None
) -> None:
    spatial = still(patch_size, spacing=spacing, rotation_probability=1.0, scale_probability=1.0)
    transforms = spatial._transforms(100, seeded(3))
    for axis in range(3):
        alone = torch.zeros(3, dtype=torch.float64)
        alone[axis] = 1
        kept = torch.equal(transforms[:, axis], alone.expand(100, 3)) and torch.equal(
            transforms[:, :, axis], alone.expand(100, 3)
        )
        assert kept == (axis == flat)
        assert (spatial.margin[axis] == 0) == (axis == flat)
    if flat is not None:
        first, second = [axis for axis in range(3) if axis != flat]
        angles = angles_of(
            still(patch_size, spacing=spacing, rotation_probability=1.0), (first, second)
        )
        assert angles.min() < -150 and angles.max() > 150


def test_in_3d_no_axis_leans_further_than_the_largest_angles_allow() -> None:
    spatial = still((8, 8, 8), rotation_probability=1.0)
    transforms = spatial._transforms(200, seeded(5))
    assert_close(transforms @ transforms.mT, torch.eye(3, dtype=torch.float64).expand(200, 3, 3))
    # Turned by 30° about both of the other axes, an axis keeps cos² 30° of itself.
    assert (transforms.diagonal(dim1=1, dim2=2)[:, 0] >= 0.75 - 1e-9).all()


@pytest.mark.parametrize("scale", [0.8, 1.25])
def test_a_scale_above_one_magnifies(scale: float) -> None:
    spatial = still((32, 32, 1), scale_probability=1.0, scales=(scale, scale))
    image = blob(spatial.cut_size, (4.0, -3.0, 0.0), 2.5)
    label = (image[:, 0] > 0.5).to(torch.uint8)

    turned, turned_label = spatial(image, label, seeded(0))

    expected = torch.tensor([4.0, -3.0, 0.0]) * scale
    assert_close(centroid(turned[0, 0]), expected, atol=0.02, rtol=0)
    assert in_plane_width(turned[0, 0]) == pytest.approx(2.5 * scale, rel=0.02)
    assert turned_label.sum() == pytest.approx(int(label.sum()) * scale**2, rel=0.15)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_slice_stays_in_its_plane_whichever_axis_is_thin(axis: int) -> None:
    """Every slice of a stack is turned alike and on its own, as a 2D image would be."""
    size = [16, 12]
    size.insert(axis, 1)
    spatial = SpatialVariation(tuple(size), (), rotation_probability=1.0, scale_probability=1.0)
    image = waves(3, (20, 16, 1))
    label = (image[:, 0] * 3).to(torch.uint8)

    turned, turned_label = spatial(
        image.movedim(4, 2 + axis), label.movedim(3, 1 + axis), seeded(6)
    )

    flat = SpatialVariation((16, 12, 1), (), rotation_probability=1.0, scale_probability=1.0)
    assert spatial.cut_size == tuple(torch.zeros(20, 16, 1).movedim(2, axis).shape)
    expected, expected_label = flat(image, label, seeded(6))
    assert_close(turned, expected.movedim(4, 2 + axis), atol=1e-5, rtol=0)
    assert_close(turned_label, expected_label.movedim(3, 1 + axis))


def test_beyond_the_cut_lie_its_outermost_voxels() -> None:
    spatial = still((8, 8, 1), scale_probability=1.0, scales=(0.25, 0.25))
    image = torch.rand(1, 1, *spatial.cut_size, generator=seeded(1))
    label = (image[:, 0] * 200).to(torch.uint8)

    turned, turned_label = spatial(image, label, seeded(0))

    for (row, column), corner in {(0, 0): (0, 0), (0, 7): (0, -1), (7, 7): (-1, -1)}.items():
        assert_close(turned[0, 0, row, column], image[0, 0, *corner])
        assert_close(turned_label[0, row, column], label[0, *corner])


def test_the_seed_decides_where_patches_move() -> None:
    spatial = SpatialVariation((12, 12, 12), (0,), rotation_probability=1.0)
    image = waves(2, spatial.cut_size)
    label = (image[:, 0] * 4).to(torch.uint8)
    first, first_label = spatial(image, label, seeded(1))
    again, again_label = spatial(image, label, seeded(1))
    other, other_label = spatial(image, label, seeded(2))
    assert torch.equal(first, again) and torch.equal(first_label, again_label)
    assert not torch.equal(first, other) and not torch.equal(first_label, other_label)
    assert not torch.equal(first[0], spatial(image[:1], label[:1], seeded(2))[0][0])


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int64])
def test_labels_are_moved_and_never_invented(kind: torch.dtype) -> None:
    spatial = SpatialVariation((16, 16, 1), (0, 1), rotation_probability=1.0, scale_probability=1.0)
    values = torch.tensor([0, 3, 90, 127]).to(kind)
    label = values[torch.randint(4, (8, *spatial.cut_size), generator=seeded(0))]
    _, turned = spatial(torch.zeros(8, 1, *spatial.cut_size), label, seeded(1))
    assert turned.dtype == kind
    assert_close(turned.unique(), values)


def test_rotation_scale_and_bending_come_at_their_probabilities() -> None:
    size = (8, 8, 1)
    usual = SpatialVariation(size, ())
    assert usual.elastic_probability == 0
    for setting, probability in [
        ("rotation_probability", 0.2),
        ("scale_probability", 0.2),
        ("elastic_probability", 0.4),
    ]:
        spatial = still(size, **{setting: getattr(usual, setting) or probability})
        image = world(spatial.cut_size, (1.0, 1.0, 1.0))[:2].expand(500, -1, -1, -1, -1)
        turned, _ = spatial(image, blank(500, spatial.cut_size), seeded(2))
        unmoved, _ = middle(image, blank(500, spatial.cut_size), size)
        moved = int((turned != unmoved).flatten(1).any(1).sum())
        assert likely(moved, 500, probability), (setting, moved)


def test_bending_by_nothing_is_the_identity() -> None:
    for amplitude, tolerance in [(0.0, 0.0), (1e-7, 1e-5)]:
        spatial = still((9, 12, 6), elastic_probability=1.0, elastic_amplitude=amplitude)
        image = torch.rand(2, 2, *spatial.cut_size, generator=seeded(3))
        label = (image[:, 0] * 5).to(torch.uint8)
        bent, bent_label = spatial(image, label, seeded(0))
        expected, expected_label = middle(image, label, (9, 12, 6))
        assert_close(bent, expected, atol=tolerance, rtol=0)
        assert torch.equal(bent_label, expected_label)


def test_bending_displaces_control_points_by_its_amplitude_in_mm() -> None:
    """The middle voxel of an odd patch lies at a control point."""
    spacing = (1.0, 2.0, 0.5)
    spatial = still(
        (9, 9, 9),
        spacing=spacing,
        elastic_probability=1.0,
        elastic_amplitude=0.2,
        elastic_spacing=4.0,
    )
    image = world(spatial.cut_size, spacing).expand(400, -1, -1, -1, -1)
    bent, _ = spatial(image, blank(400, spatial.cut_size), seeded(0))
    displacement = bent[:, :, 4, 4, 4]
    assert_close(displacement.std(0), torch.full((3,), 0.2), atol=0.03, rtol=0)
    assert_close(displacement.mean(0), torch.zeros(3), atol=0.04, rtol=0)
    # Two voxels on along the second axis, 4 mm, lies the next one, which knows nothing of it.
    both = torch.stack([displacement[:, 0], bent[:, 0, 4, 6, 4]])
    assert both.corrcoef()[0, 1].abs() < 0.2


def test_bending_is_smooth_and_leaves_the_thin_and_the_coarse_axis() -> None:
    for patch_size, still_axis in [((12, 10, 1), 2), ((3, 12, 12), 0)]:
        spatial = still(
            patch_size, elastic_probability=1.0, elastic_amplitude=0.4, elastic_spacing=6.0
        )
        image = world(spatial.cut_size, (1.0, 1.0, 1.0)).expand(4, -1, -1, -1, -1)
        bent, _ = spatial(image, blank(4, spatial.cut_size), seeded(0))
        displacement = bent - world(patch_size, (1.0, 1.0, 1.0))
        assert_close(displacement[:, still_axis], torch.zeros_like(displacement[:, 0]))
        moving = [axis for axis in range(3) if axis != still_axis]
        assert displacement[:, moving].abs().amax((1, 2, 3, 4)).min() > 0.3
        for axis in moving:
            assert displacement.diff(dim=axis + 2).abs().max() < 0.5


@pytest.mark.parametrize(("size", "step"), [(9, 4.0), (12, 3.5), (1, 2.0), (40, 24.0), (3, 0.5)])
def test_cubic_weights_sum_to_one_and_leave_straight_lines_straight(size: int, step: float) -> None:
    weights = cubic_weights(size, step)
    points = torch.arange(weights.shape[1]) * step
    voxels = torch.arange(size, dtype=torch.float32)
    assert_close(weights.sum(1), torch.ones(size))
    along = weights @ points
    assert_close(along - along[0], voxels, atol=1e-4, rtol=0)


def test_cubic_weights_go_through_the_control_points() -> None:
    # Of five voxels, points at voxels 0, 2 and 4; halfway, Keys's -1, 9, 9 and -1 sixteenths.
    weights = cubic_weights(5, 2.0)
    assert_close(weights[[0, 2, 4]], torch.eye(weights.shape[1])[1:4])
    assert_close(weights[1], torch.tensor([-1, 9, 9, -1, 0, 0]) / 16)


def test_half_precision_around_it_moves_no_voxel() -> None:
    spatial = SpatialVariation(
        (12, 12, 12), (0,), rotation_probability=1.0, elastic_probability=1.0, elastic_spacing=6.0
    )
    image = waves(2, spatial.cut_size)
    label = (image[:, 0] * 4).to(torch.uint8)
    expected, expected_label = spatial(image, label, seeded(1))
    with torch.autocast("cpu", torch.bfloat16):
        turned, turned_label = spatial(image, label, seeded(1))
    assert torch.equal(turned, expected) and torch.equal(turned_label, expected_label)
    half, _ = spatial(image.half(), label, seeded(1))
    assert half.dtype == torch.float16
    assert_close(half.float(), expected, atol=2e-3, rtol=0)


def test_large_label_numbers_survive_turning() -> None:
    spatial = still((6, 6, 1), rotation_probability=1.0)
    label = torch.full((1, *spatial.cut_size), 2**24 + 1)  # which a float cannot hold
    _, turned = spatial(torch.zeros(1, 1, *spatial.cut_size), label, seeded(1))
    assert turned.unique().tolist() == [2**24 + 1]


@pytest.mark.parametrize("cut", [(9, 12, 12), (12, 12, 7)])
def test_a_cut_without_a_patch_in_its_middle_is_refused(cut: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a cut of \(10, 10"):
        still((8, 8, 8))(torch.zeros(1, 1, *cut), blank(1, cut), seeded(0))


def test_the_input_is_not_changed() -> None:
    spatial = still((8, 8, 1), rotation_probability=0.5, mirror_probability=0.5)
    image = torch.rand(4, 1, *spatial.cut_size, generator=seeded(0))
    label = (image[:, 0] * 5).to(torch.uint8)
    before = image.clone(), label.clone()
    turned, _ = spatial(image, label, seeded(1))
    turned.zero_()
    assert torch.equal(image, before[0]) and torch.equal(label, before[1])
