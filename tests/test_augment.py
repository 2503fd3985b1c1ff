import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from segkit.data import augment
from segkit.data.augment import IntensityVariation, SpatialVariation

PATCHES = [(24, 24, 1), (20, 17, 1), (16, 12, 20)]
UNIT = {
    "noise_probability": 0.0,
    "brightness_probability": 0.0,
    "contrast_probability": 0.0,
    "gamma_probability": 0.0,
}


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
def test_image_and_label_move_together(patch_size: tuple[int, ...]) -> None:
    spatial = SpatialVariation(
        patch_size, (0, 1, 2), rotation_probability=0.8, scale_probability=0.8
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
    assert_close(turned, expected, atol=1e-5, rtol=0)
    assert_close(turned_label, expected_label)


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
    assert_close(turned, expected.flip([axis + 2 for axis in axes]), atol=1e-5, rtol=0)
    assert_close(turned_label, expected_label.flip([axis + 1 for axis in axes]))


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


def test_a_quarter_turn_is_rot90(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "_uniform", lambda low, high, generator: math.pi / 2)
    spatial = still((16, 16, 1), rotation_probability=1.0)
    image = torch.rand(1, 1, *spatial.cut_size, generator=seeded(3))
    label = (image[:, 0] * 5).to(torch.uint8)

    turned, turned_label = spatial(image, label, seeded(0))

    expected, expected_label = middle(image, label, (16, 16, 1))
    assert_close(turned, expected.rot90(-1, (2, 3)), atol=1e-5, rtol=0)
    assert_close(turned_label, expected_label.rot90(-1, (1, 2)))


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


def test_with_probabilities_zero_intensities_stay() -> None:
    image = torch.randn(3, 2, 6, 5, 4, generator=seeded(0))
    assert_close(IntensityVariation(**UNIT)(image, seeded(1)), image)


def test_brightness_multiplies() -> None:
    image = torch.randn(3, 2, 6, 5, 4, generator=seeded(0))
    vary = IntensityVariation(**{**UNIT, "brightness_probability": 1.0, "brightness": (1.2, 1.2)})
    assert_close(vary(image, seeded(1)), image * 1.2)


def test_every_channel_of_every_sample_is_varied_on_its_own() -> None:
    image = torch.rand(4, 3, 6, 5, 1, generator=seeded(0)) + 1
    vary = IntensityVariation(**{**UNIT, "brightness_probability": 1.0})
    ratio = (vary(image, seeded(1)) / image).flatten(2)
    assert_close(ratio, ratio[..., :1].expand_as(ratio))
    factors = ratio[..., 0].flatten()
    assert len(factors.unique()) == 12
    assert 0.75 <= factors.min() < 0.9 and 1.1 < factors.max() <= 1.25


@pytest.mark.parametrize("factor", [0.75, 1.25])
def test_contrast_scales_about_the_mean_within_the_range(factor: float) -> None:
    image = torch.randn(2, 2, 8, 8, 8, generator=seeded(0))
    vary = IntensityVariation(**{**UNIT, "contrast_probability": 1.0, "contrast": (factor, factor)})
    expected = torch.empty_like(image)
    for index in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        channel = image[index]
        stretched = (channel - channel.mean()) * factor + channel.mean()
        expected[index] = stretched.clamp(channel.min(), channel.max())
    assert_close(vary(image, seeded(1)), expected)


@pytest.mark.parametrize("exponent", [0.7, 1.5])
def test_gamma_bends_the_range_and_keeps_mean_deviation_and_order(exponent: float) -> None:
    image = torch.randn(2, 2, 8, 8, 8, generator=seeded(0)) * 3 - 5
    vary = IntensityVariation(**{**UNIT, "gamma_probability": 1.0, "gamma": (exponent, exponent)})

    bent = vary(image, seeded(1)).flatten(2)

    flat = image.flatten(2)
    assert_close(bent.mean(2), flat.mean(2), atol=1e-4, rtol=0)
    assert_close(bent.std(2), flat.std(2), atol=1e-4, rtol=0)
    assert (bent.gather(2, flat.argsort(2)).diff(dim=2) >= -1e-6).all()
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    curve = ((flat - low) / (high - low)) ** exponent
    bent_low, bent_high = bent.amin(2, keepdim=True), bent.amax(2, keepdim=True)
    assert_close((bent - bent_low) / (bent_high - bent_low), curve, atol=1e-4, rtol=0)


def test_a_constant_image_survives_every_variation_but_noise() -> None:
    certain = {name: float(name != "noise_probability") for name in UNIT}
    vary = IntensityVariation(**{**certain, "brightness": (1.0, 1.0)})
    image = torch.full((2, 1, 4, 4, 4), -0.3)
    assert_close(vary(image, seeded(0)), image)


def test_noise_is_normal_with_a_variance_up_to_the_largest() -> None:
    vary = IntensityVariation(**{**UNIT, "noise_probability": 1.0, "largest_noise_variance": 0.1})
    image = torch.ones(30, 1, 16, 16, 16)
    noise = (vary(image, seeded(0)) - image).flatten(1)
    variances = noise.var(1)
    assert (noise.mean(1).abs() < 5 * (variances / 4096).sqrt()).all()
    assert 0 < variances.min() < 0.02 and 0.08 < variances.max() < 0.1 * 1.1
    standard = noise / noise.std(1, keepdim=True)
    assert_close((standard.abs() < 1).float().mean(), torch.tensor(0.6827), atol=0.01, rtol=0)


def test_the_seed_decides_the_intensities() -> None:
    image = torch.randn(4, 2, 6, 5, 4, generator=seeded(0))
    vary = IntensityVariation(noise_probability=0.5, gamma_probability=0.5)
    first, again, other = (vary(image, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
