from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray
from numpy.testing import assert_array_equal

from segkit.data.patches import ForegroundSampler, PatchDataset, cut
from segkit.data.prepared_cache import StoredCase

SPACE = (20, 16, 12)


class CaseInMemory(StoredCase):
    """A case whose arrays are its own, so that no file is read."""

    image = label = positions = None  # type: ignore[assignment]


def case_of(image: ndarray, label: ndarray, name: str = "case") -> StoredCase:
    case = CaseInMemory(name, Path())
    classes = np.unique(label[label > 0]).tolist()
    positions = {number: np.argwhere(label == number).astype(np.int32) for number in classes}
    case.__dict__.update(image=image, label=label, positions=positions)
    return case


def numbered(space: tuple[int, int, int], label: ndarray | None = None) -> StoredCase:
    """A case whose three channels say where each voxel lies."""
    image = np.stack(np.meshgrid(*map(np.arange, space), indexing="ij")).astype(np.float32)
    return case_of(image, np.zeros(space, np.uint8) if label is None else label)


def random_case(seed: int) -> StoredCase:
    random = np.random.default_rng(seed)
    image = random.normal(size=(1, *SPACE)).astype(np.float32)
    return case_of(image, random.integers(0, 3, SPACE).astype(np.uint8))


def dataset_of(
    cases: Sequence[StoredCase],
    patch_size: tuple[int, ...],
    *,
    share: float,
    seed: int,
    margin: tuple[int, ...] = (0, 0, 0),
) -> PatchDataset:
    return PatchDataset(
        cases,
        patch_size=patch_size,
        margin=margin,
        sampler=ForegroundSampler(patch_size, share),
        seed=seed,
    )


def patches(
    cases: Sequence[StoredCase], cut_size: tuple[int, ...] = (8, 8, 8), share: float = 0.0
) -> PatchDataset:
    return dataset_of(cases, cut_size, share=share, seed=11)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[ndarray, list[int], list[int]]:
    """An array, and a block of which at least one voxel lies within it."""
    space = draw(st.lists(st.integers(1, 6), min_size=3, max_size=3))
    size = [draw(st.integers(1, 9)) for _ in space]
    start = [
        draw(st.integers(1 - count, extent - 1)) for count, extent in zip(size, space, strict=True)
    ]
    lead = draw(st.sampled_from([(), (2,)]))
    return np.arange(np.prod([*lead, *space])).reshape(*lead, *space), start, size


@given(blocks())
def test_a_cut_is_an_index_into_the_array_with_its_edges_repeated_for_ever(
    block: tuple[ndarray, list[int], list[int]],
) -> None:
    array, start, size = block
    margin = 10
    lead = [(0, 0)] * (array.ndim - 3)
    endless = np.pad(array, [*lead, *[(margin, margin)] * 3], mode="edge")
    inside = tuple(
        slice(first + margin, first + margin + count)
        for first, count in zip(start, size, strict=True)
    )
    assert_array_equal(cut(array, start, size), endless[(..., *inside)])


def test_a_cut_is_a_copy() -> None:
    array = np.zeros((4, 4, 4))
    cut(array, (0, 0, 0), (4, 4, 4))[:] = 1
    assert_array_equal(array, 0)


def test_a_patch_depends_only_on_the_seed_and_its_number() -> None:
    cases = [random_case(seed) for seed in range(3)]
    forward = patches(cases, share=0.5)
    there = [forward[index] for index in range(12)]
    backward = dataset_of(cases, (8, 8, 8), share=0.5, seed=11)
    back = {index: backward[index] for index in reversed(range(12))}
    for index, patch in enumerate(there):
        assert torch.equal(patch["image"], back[index]["image"])
        assert torch.equal(patch["label"], back[index]["label"])
    assert len({patch["image"].numpy().tobytes() for patch in there}) == 12
    other = dataset_of(cases, (8, 8, 8), share=0.5, seed=12)
    assert not any(torch.equal(patch["image"], other[i]["image"]) for i, patch in enumerate(there))


def test_image_and_label_are_cut_at_one_place() -> None:
    label = np.arange(np.prod(SPACE)).reshape(SPACE).astype(np.int32)
    dataset = patches([numbered(SPACE, label)], (9, 24, 5), share=0.5)
    for index in range(20):
        patch = dataset[index]
        x, y, z = patch["image"].long().numpy()
        assert_array_equal(patch["label"].numpy(), label[x, y, z])


def test_cases_are_drawn_evenly() -> None:
    cases = [case_of(np.full((1, *SPACE), n, np.float32), np.zeros(SPACE)) for n in range(4)]
    dataset = patches(cases, (1, 1, 1))
    drawn = np.bincount([int(dataset[index]["image"]) for index in range(800)])
    assert (abs(drawn - 200) < 50).all(), drawn  # 4 standard deviations


def test_with_a_share_of_one_every_patch_is_centred_on_a_class_drawn_evenly() -> None:
    label = np.zeros(SPACE, np.uint8)
    label[:, :, 0] = 1  # common, and at the edge
    label[4, 5, 6] = 5  # rare
    dataset = patches([numbered(SPACE, label)], (6, 7, 8), share=1.0)
    centres = [dataset[index]["label"][3, 3, 4].item() for index in range(400)]
    counts = np.bincount(centres, minlength=6)
    assert counts[[1, 5]].sum() == 400
    assert abs(counts[1] - 200) < 40  # 4 standard deviations


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_share_says_how_many_patches_are_centred_on_foreground(share: float) -> None:
    label = np.zeros((1001, 1, 1), np.uint8)
    label[500] = 1
    dataset = patches([numbered((1001, 1, 1), label)], (3, 1, 1), share=share)
    centred = sum(dataset[index]["label"][1, 0, 0].item() for index in range(600))
    assert abs(centred - 600 * share) <= 4 * np.sqrt(600 * share * (1 - share)) + 3


def test_with_a_share_of_zero_patches_reach_both_ends_and_no_further() -> None:
    dataset = patches([numbered((7, 6, 5))], (3, 3, 3))
    corners = [dataset[index]["image"][:, 0, 0, 0].tolist() for index in range(300)]
    for axis, last in enumerate((4, 3, 2)):
        starts = [corner[axis] for corner in corners]
        counts = np.bincount(np.array(starts, int), minlength=last + 1)
        assert len(counts) == last + 1
        assert (counts > 300 / (last + 1) / 2).all(), counts


def test_a_case_without_foreground_is_cut_anywhere() -> None:
    dataset = patches([numbered((7, 6, 5))], (3, 3, 3), share=1.0)
    starts = {dataset[index]["image"][0, 0, 0, 0].item() for index in range(100)}
    assert starts == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_patch_larger_than_the_volume_repeats_its_edges(share: float) -> None:
    space = (3, 2, 1)
    label = np.ones(space, np.uint8)
    dataset = patches([numbered(space, label)], (6, 6, 4), share=share)
    firsts = set()
    for index in range(40):
        patch = dataset[index]
        for axis, (extent, size) in enumerate(zip(space, (6, 6, 4), strict=True)):
            line = patch["image"][axis].movedim(axis, 0)[:, 0, 0].int().tolist()
            start = line.count(0) - 1  # how often the first voxel is repeated
            expected = [min(max(place - start, 0), extent - 1) for place in range(size)]
            assert line == expected if extent > 1 else line == [0] * size
            firsts.add((axis, start))
    if share == 0:  # the volume lies whole in the patch, at every place that it can
        assert {start for axis, start in firsts if axis == 0} == {0, 1, 2, 3}
        assert {start for axis, start in firsts if axis == 1} == {0, 1, 2, 3, 4}


def test_a_margin_adds_to_either_end_and_moves_no_patch() -> None:
    """What lies within the margin is the patch that would have been cut without one."""
    cases = [random_case(seed) for seed in range(3)]
    bare = dataset_of(cases, (8, 6, 4), share=0.5, seed=2)
    wide = dataset_of(cases, (8, 6, 4), share=0.5, seed=2, margin=(2, 1, 3))
    for index in range(20):
        inner = wide[index]["label"][2:-2, 1:-1, 3:-3]
        assert torch.equal(inner, bare[index]["label"])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_in_a_case_with_ignored_voxels_no_patch_is_centred_on_one(share: float) -> None:
    label = np.full(SPACE, 3, np.uint8)
    label[4, 5] = 0  # one line that somebody drew, and a class within it
    label[4, 5, 2:4] = 1
    case = numbered(SPACE, label)
    del case.positions[3]
    case.positions[0] = np.argwhere(label != 3).astype(np.int32)
    dataset = patches([case], share=share)
    centres = {tuple(dataset[index]["image"][:, 4, 4, 4].long().tolist()) for index in range(80)}
    on_the_class = {(4, 5, 2), (4, 5, 3)}
    if share == 1:
        assert centres == on_the_class
    else:
        assert centres > on_the_class and all(label[centre] != 3 for centre in centres)
