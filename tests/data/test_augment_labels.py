"""Laws of labels made worse: what is not drawn stays, and each kind does what its name says."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy import ndimage
from torch import Generator, Tensor

from segkit.data.augment_labels import (
    LabelCorruption,
    closed,
    dilate,
    erode,
    opened,
    small_component,
)


def blobs(seed: int, shape: tuple[int, ...] = (12, 11, 10)) -> Tensor:
    """Smooth noise above its middle: parts of several sizes."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return torch.from_numpy(ndimage.gaussian_filter(noise, 1.2) > 0.1)


def labels_of(seed: int) -> Tensor:
    """Two samples with the labels 0 to 3."""
    first, second, third = (torch.stack([blobs(seed + i), blobs(seed + i + 9)]) for i in range(3))
    return torch.where(third, 3, torch.where(second, 2, first.int())).to(torch.int32)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


NEVER = LabelCorruption(reshaping_probability=0.0, removal_probability=0.0)
ALWAYS = LabelCorruption(reshaping_probability=1.0, removal_probability=1.0, radii=(1, 3))


@given(st.integers(0, 10_000))
@settings(max_examples=10)
def test_with_probability_zero_labels_stay(seed: int) -> None:
    labels = labels_of(seed)
    assert torch.equal(NEVER(labels, 3, generator(seed)), labels)


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_augmented_labels_are_still_labels_and_the_input_is_unchanged(seed: int) -> None:
    labels = labels_of(seed)
    before = labels.clone()
    changed = ALWAYS(labels, 3, generator(seed))
    assert torch.equal(labels, before)
    assert changed.dtype == labels.dtype and set(changed.unique().tolist()) <= {0, 1, 2, 3}
    assert torch.equal(changed, ALWAYS(labels, 3, generator(seed)))


def test_most_labels_are_changed_when_everything_is_drawn_and_fewer_by_default() -> None:
    labels = labels_of(3)
    by_default = [LabelCorruption()(labels, 3, generator(seed)) for seed in range(100)]
    untouched = [
        sum(torch.equal(changed[row], labels[row]) for changed in by_default) for row in (0, 1)
    ]
    # A sample stays where none of 3 classes is reshaped and no part is taken: 0.6³ · 0.8 = 17 %.
    assert all(8 <= count <= 30 for count in untouched)
    assert all(not torch.equal(ALWAYS(labels, 3, generator(s)), labels) for s in range(10))


@pytest.mark.parametrize("radius", range(1, 9))
def test_the_ball_is_exact_along_the_axes_and_at_most_a_fifth_too_wide(radius: int) -> None:
    mask = torch.zeros(21, 21, 21, dtype=torch.bool)
    mask[10, 10, 10] = True
    ball = dilate(mask, radius)
    distance = torch.from_numpy(
        np.linalg.norm(np.argwhere(np.ones((21, 21, 21))) - 10, axis=1).reshape(21, 21, 21)
    )
    assert ball[distance <= radius].all()
    assert float(distance[ball].max()) <= radius * 1.25
    for axis in range(3):
        reached = ball.any(dim=tuple(other for other in range(3) if other != axis))
        assert int(reached.sum()) == 2 * radius + 1


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=25)
def test_growing_contains_the_mask_and_shrinking_lies_within(seed: int, radius: int) -> None:
    mask = blobs(seed)

    def within(inner: Tensor, outer: Tensor) -> bool:
        return not bool((inner & ~outer).any())

    assert within(mask, dilate(mask, radius)) and within(erode(mask, radius), mask)
    assert within(mask, closed(mask, radius)) and within(opened(mask, radius), mask)
    for idempotent in (opened, closed):
        once = idempotent(mask, radius)
        assert torch.equal(idempotent(once, radius), once)


def test_one_step_is_scipys_and_in_planes_as_in_volumes() -> None:
    mask = blobs(5)
    assert torch.equal(dilate(mask, 1), torch.from_numpy(ndimage.binary_dilation(mask.numpy())))
    eroded = ndimage.binary_erosion(mask.numpy(), border_value=1)
    assert torch.equal(erode(mask, 1), torch.from_numpy(eroded))
    plane = blobs(5, (16, 15))
    for change in (dilate, erode, opened, closed):
        assert torch.equal(change(plane[:, None], 3)[:, 0], change(plane, 3))


@pytest.mark.parametrize("share", np.linspace(0, 0.999, 7))
def test_one_component_is_removed_completely_and_no_other(share: float) -> None:
    mask = blobs(11)
    parts, count = ndimage.label(mask.numpy())
    assert count > 2
    removed = small_component(mask, float(share), largest=1.0)
    (number,) = set(parts[removed.numpy()].tolist())
    assert number > 0
    assert torch.equal(removed, torch.from_numpy(parts == number))


def test_large_parts_are_never_removed() -> None:
    mask = torch.zeros(10, 10, 10, dtype=torch.bool)
    mask[:5, :5, :8] = True  # a fifth of the patch
    assert not small_component(mask, 0.5, largest=0.15).any()
    mask[8, 8, 8] = True
    for draw in (0.0, 0.5, 0.999):
        assert small_component(mask, draw, largest=0.15).nonzero().tolist() == [[8, 8, 8]]


def test_removal_leaves_background_and_reshaping_takes_from_others() -> None:
    labels = torch.zeros(1, 9, 9, 9, dtype=torch.int32)
    labels[0, 4, 4, 4] = 2
    labels[0, :2] = 1
    gone = LabelCorruption(reshaping_probability=0.0, removal_probability=1.0)
    lone = labels.clone()
    lone[0, 4, 4, 4] = 0
    assert torch.equal(gone(labels, 2, generator()), lone)  # label 1 covers over 15 %
    grown = LabelCorruption(reshaping_probability=1.0, removal_probability=0.0, radii=(4, 4))
    taken = [grown(labels, 2, generator(seed))[0] for seed in range(40)]
    ball = dilate(labels[0] == 2, 4)
    assert any(torch.equal(each == 2, ball) and not (each == 1)[ball].any() for each in taken)
    assert math.prod(ball.shape) > int(ball.sum()) > 100
