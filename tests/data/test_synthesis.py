import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.testing import assert_close

from segkit.data.synthesis import deform, smooth_field, synthesise

BACKGROUND, OTHER, GREY, WHITE = range(4)
T1_LIKE = [(0.0, 0.0), (0.18, 0.22), (0.45, 0.5), (0.8, 0.85)]
SPACES = [(56, 56), (40, 48, 1), (44, 40, 44)]


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def nested(batch_size: int, space: tuple[int, ...]) -> Tensor:
    """Boxes about the middle, one label in the next: each shell is several voxels thick."""
    axes = [(torch.arange(size) - (size - 1) / 2).abs() / size for size in space]
    reach = torch.stack(torch.meshgrid(*axes, indexing="ij")).amax(0)
    labels = torch.bucketize(-reach, torch.tensor([-0.4, -0.27, -0.13])).to(torch.uint8)
    return labels.expand(batch_size, *space).clone()


def random_labels(batch_size: int, space: tuple[int, ...]) -> Tensor:
    return torch.randint(4, (batch_size, *space), generator=seeded(0)).to(torch.uint8)


def interior(labels: Tensor) -> Tensor:
    """Voxels whose neighbours within 2 all bear the same label."""
    pool = {3: F.max_pool2d, 4: F.max_pool3d}[labels.ndim]
    values = labels[:, None].float()
    window = [5 if size > 1 else 1 for size in labels.shape[1:]]
    padding = [size // 2 for size in window]
    highest = pool(values, window, 1, padding)
    lowest = -pool(-values, window, 1, padding)
    return (highest == lowest)[:, 0]


@pytest.mark.parametrize("space", SPACES)
def test_without_amplitude_deforming_is_the_identity(space: tuple[int, ...]) -> None:
    labels = random_labels(2, space)
    assert torch.equal(deform(labels, amplitude=0.0, generator=seeded(1)), labels)


@pytest.mark.parametrize("space", SPACES)
def test_deforming_moves_labels_and_never_invents_them(space: tuple[int, ...]) -> None:
    labels = nested(3, space) * 60  # 0, 60, 120, 180
    moved = deform(labels, amplitude=3.0, generator=seeded(1))
    assert moved.dtype == labels.dtype
    assert_close(moved.unique(), labels.unique())
    changed = (moved != labels).flatten(1).float().mean(1)
    assert (changed > 0.02).all() and (changed < 0.5).all()
    assert not torch.equal(moved[0], moved[1])
    assert torch.equal(moved, deform(labels, amplitude=3.0, generator=seeded(1)))
    assert not torch.equal(moved, deform(labels, amplitude=3.0, generator=seeded(2)))


def test_labels_are_read_at_the_place_plus_the_smooth_field() -> None:
    """The amplitude is in voxels, and component k displaces along axis k."""
    space = (30, 24)
    place = torch.stack(torch.meshgrid(torch.arange(30), torch.arange(24), indexing="ij"))
    for axis, size in enumerate(space):
        moved = deform(place[axis][None], amplitude=2.0, generator=seeded(5))[0]
        wanted = place[axis] + 2.0 * smooth_field(1, 2, space, generator=seeded(5))[0, axis]
        assert (moved - wanted.clamp(0, size - 1)).abs().max() <= 0.5 + 1e-3


def test_a_slice_is_deformed_within_its_plane() -> None:
    labels = nested(2, (40, 48))
    slices = deform(labels[..., None], amplitude=3.0, generator=seeded(3))
    assert slices.shape == (2, 40, 48, 1)
    assert (slices[..., 0] != labels).any()
    assert_close(slices.unique(), labels.unique())


@pytest.mark.parametrize("space", SPACES)
def test_one_seed_draws_one_image(space: tuple[int, ...]) -> None:
    labels = nested(2, space)
    first, again, other = (
        synthesise(labels, num_labels=4, intensities=None, generator=seeded(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("space", SPACES)
def test_narrow_ranges_keep_the_contrast_of_the_tissues(space: tuple[int, ...]) -> None:
    labels = nested(4, space)
    image = synthesise(labels, num_labels=4, intensities=T1_LIKE, generator=seeded(1))
    inner = interior(labels)
    for sample in range(4):
        means = [
            image[sample, 0][inner[sample] & (labels[sample] == label)].mean().item()
            for label in (BACKGROUND, OTHER, GREY, WHITE)
        ]
        assert means == sorted(means)
        assert min(b - a for a, b in pairwise(means)) > 0.2


@pytest.mark.parametrize("space", SPACES)
def test_a_silent_label_is_constant_and_the_darkest(space: tuple[int, ...]) -> None:
    labels = nested(4, space)
    image = synthesise(labels, num_labels=4, intensities=T1_LIKE, generator=seeded(1))
    for sample in range(4):
        silent = image[sample, 0][labels[sample] == BACKGROUND]
        rest = image[sample, 0][labels[sample] != BACKGROUND]
        assert silent.unique().numel() == 1
        assert silent[0] <= rest.min()
        assert silent[0] < rest.mean() - rest.std()


@pytest.mark.parametrize("space", SPACES)
def test_labels_with_a_mean_are_textured(space: tuple[int, ...]) -> None:
    labels = nested(2, space)
    image = synthesise(labels, num_labels=4, intensities=T1_LIKE, generator=seeded(1))
    for label in (OTHER, GREY, WHITE):
        assert (image[:, 0][labels == label].unique().numel()) > 50


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("space", SPACES)
def test_synthetic_images_have_mean_0_and_deviation_1_outside_a_silent_background(
    space: tuple[int, ...], silent: bool
) -> None:
    labels = nested(3, space)
    image = synthesise(
        labels, num_labels=4, intensities=T1_LIKE if silent else None, generator=seeded(4)
    )
    for sample in range(3):
        counted = image[sample, 0][(labels[sample] != BACKGROUND) | (not silent)].double()
        assert float(counted.mean()) == pytest.approx(0, abs=1e-4)
        assert float(counted.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_without_ranges_any_label_may_be_the_brightest() -> None:
    labels = nested(40, (24, 24))
    image = synthesise(labels, num_labels=4, intensities=None, generator=seeded(2))[:, 0]
    means = torch.stack(
        [(image * (labels == n)).sum((1, 2)) / (labels == n).sum((1, 2)) for n in range(4)]
    )
    assert torch.bincount(means.argmax(0), minlength=4).min() >= 2


@pytest.mark.parametrize("label", [BACKGROUND, WHITE])
@pytest.mark.parametrize("space", SPACES)
def test_maps_of_one_label_give_finite_images(space: tuple[int, ...], label: int) -> None:
    labels = torch.full((2, *space), label, dtype=torch.uint8)
    image = synthesise(labels, num_labels=4, intensities=T1_LIKE, generator=seeded(1))
    assert image.isfinite().all()
    assert (image == 0).all() == (label == BACKGROUND)


@pytest.mark.parametrize("space", SPACES)
def test_one_seed_draws_one_smooth_field(space: tuple[int, ...]) -> None:
    first, again, other = (smooth_field(2, 3, space, generator=seeded(s)) for s in (1, 1, 2))
    assert first.shape == (2, 3, *space)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("size", "points"), [(8, 2), (33, 3), (64, 5), (160, 11)])
def test_a_smooth_field_is_straight_between_normal_control_points(size: int, points: int) -> None:
    field = smooth_field(500, 1, (size, 1), generator=seeded(1))[:, 0, :, 0]
    bends = field.diff(n=2, dim=1).abs().amax(0) > 1e-4
    # An inner control point that lies between two voxels bends the line at both.
    assert points - 2 <= int(bends.sum()) <= 2 * (points - 2)
    ends = field[:, [0, -1]]
    assert_close(ends.mean(0), torch.zeros(2), atol=4 / math.sqrt(500), rtol=0)
    assert_close(ends.std(0), torch.ones(2), atol=4 / math.sqrt(1000), rtol=0)
