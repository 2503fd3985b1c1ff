import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray
from torch import Tensor
from torch.testing import assert_close

from segkit.inference import windows
from segkit.inference.windows import (
    Blend,
    WindowFunction,
    WindowLayout,
    slide,
    stream,
    window_starts,
    window_weight,
)

OVERLAPS = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9]), st.floats(0, 0.95))


@dataclass(frozen=True)
class Walk:
    """An image and a way to walk over it. `pooling` divides `multiple`, which divides the patch."""

    size: tuple[int, ...]
    patch_size: tuple[int, ...]
    overlap: tuple[float, ...]
    multiple: tuple[int, ...]
    pooling: tuple[int, ...]
    axis: int
    batch_size: int

    def image(self, num_channels: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(sum(self.size))
        return torch.randn(num_channels, *self.size, generator=generator) + 0.5

    @property
    def layout(self) -> WindowLayout:
        return WindowLayout(self.patch_size, self.overlap, self.multiple)

    @property
    def places(self) -> list[tuple[int, ...]]:
        """The first voxels of all windows."""
        return list(itertools.product(*self.layout.starts(self.size)))

    def slide(self, image: Tensor, function: WindowFunction) -> dict[str, Tensor]:
        return slide(image, function, self.layout, axis=self.axis, batch_size=self.batch_size)

    def stream(self, image: Tensor, function: WindowFunction) -> list[windows.Slab]:
        return copies(
            stream(
                image,
                function,
                self.layout,
                axis=self.axis,
                batch_size=self.batch_size,
            )
        )


def copies(slabs: Iterable[windows.Slab]) -> list[windows.Slab]:
    """All slabs, each of which is gone when the next is asked for."""
    return [
        windows.Slab(slab.starts, {name: rows.clone() for name, rows in slab.rows.items()})
        for slab in slabs
    ]


@st.composite
def walks(draw: st.DrawFn) -> Walk:
    """Any walk in one to three dimensions of no more than some two hundred windows."""
    num_axes = draw(st.integers(1, 3))
    longest = {1: 40, 2: 14, 3: 7}[num_axes]
    size, patch_size, overlap, multiple, pooling = [], [], [], [], []
    for _ in range(num_axes):
        inner = draw(st.integers(1, 3))
        step = inner * draw(st.integers(1, 2))
        size.append(draw(st.integers(1, longest)))
        patch_size.append(step * draw(st.integers(1, 4)))
        overlap.append(draw(OVERLAPS))
        multiple.append(step)
        pooling.append(inner)
    return Walk(
        tuple(size),
        tuple(patch_size),
        tuple(overlap),
        tuple(multiple),
        tuple(pooling),
        axis=draw(st.integers(0, num_axes - 1)),
        batch_size=draw(st.integers(1, 5)),
    )


def identity(batch: Tensor) -> dict[str, Tensor]:
    return {"image": batch}


def mean_pooled(image: Tensor, steps: Sequence[int]) -> Tensor:
    """Means of blocks of voxels. (batch or channel, channel, *space) with whole blocks."""
    for axis, step in enumerate(steps, start=image.ndim - len(steps)):
        image = image.unflatten(axis, (-1, step)).mean(axis + 1)
    return image


def extended(image: Tensor, space: Sequence[int]) -> Tensor:
    """The image, its last voxels repeated beyond its far ends up to a size."""
    for axis, size in enumerate(space, start=1):
        rows = torch.arange(size).clamp(max=image.shape[axis] - 1)
        image = image.index_select(axis, rows)
    return image


@settings(max_examples=100)
@given(walks())
def test_sliding_the_identity_returns_the_image(walk: Walk) -> None:
    image = walk.image()
    assert_close(walk.slide(image, identity)["image"], image, rtol=1e-5, atol=1e-6)


@settings(max_examples=60)
@given(walks(), st.floats(-1e3, 1e3, width=32))
def test_a_constant_stays_constant(walk: Walk, constant: float) -> None:
    def answer(batch: Tensor) -> dict[str, Tensor]:
        fine = torch.full_like(batch[:, :1], constant)
        return {"fine": fine, "coarse": mean_pooled(fine, walk.pooling)}

    for blended in walk.slide(walk.image(), answer).values():
        assert_close(blended, torch.full_like(blended, constant), rtol=1e-5, atol=1e-5)


@settings(max_examples=100)
@given(walks())
def test_coarse_outputs_are_the_pooled_image_with_its_far_ends_repeated(walk: Walk) -> None:
    def pool(batch: Tensor) -> dict[str, Tensor]:
        return {
            "fine": batch,
            "coarse": mean_pooled(batch, walk.pooling),
            "coarsest": mean_pooled(batch, walk.multiple),
        }

    image = walk.image()
    blended = walk.slide(image, pool)
    assert_close(blended["fine"], image, rtol=1e-5, atol=1e-6)
    for name, steps in (("coarse", walk.pooling), ("coarsest", walk.multiple)):
        space = [-(-size // step) * step for size, step in zip(walk.size, steps, strict=True)]
        expected = mean_pooled(extended(image, space), steps)
        assert_close(blended[name], expected, rtol=1e-5, atol=1e-6)


# A function that is not local: what it makes of a voxel depends on the window, so that windows
# disagree wherever they meet, and the weights decide.


def times_window_mean(batch: Tensor) -> Tensor:
    means = batch.flatten(1).mean(dim=1)
    return batch * means.reshape(-1, *[1] * (batch.ndim - 1))


def gaussian_by_definition(patch: int) -> ndarray:
    return np.array(
        [
            math.exp(-((voxel - (patch - 1) / 2) ** 2) / (2 * (patch / 8) ** 2))
            for voxel in range(patch)
        ]
    )


def blended_densely(
    image: Tensor,
    function: Callable[[Tensor], Tensor],
    walk: Walk,
    pooling: Sequence[int],
    skip: Collection[tuple[int, ...]] = (),
    unseen: float | ndarray = 0.0,
) -> ndarray:
    """Every window's answer and weight added up over the whole grid, in float64, then divided."""
    starts = walk.layout.starts(walk.size)
    reach = [
        max(size, axis_starts[-1] + patch)
        for size, axis_starts, patch in zip(walk.size, starts, walk.patch_size, strict=True)
    ]
    padded = extended(image, reach)

    kernel = np.ones(())
    for patch, step in zip(walk.patch_size, pooling, strict=True):
        along = gaussian_by_definition(patch).reshape(-1, step).mean(axis=1)
        kernel = np.multiply.outer(kernel, along)
    extent = [-(-length // step) for length, step in zip(reach, pooling, strict=True)]
    total, weight = np.zeros((image.shape[0], *extent)), np.zeros(extent)
    for place in itertools.product(*starts):
        if place in skip:
            continue
        voxels = tuple(
            slice(first, first + patch) for first, patch in zip(place, walk.patch_size, strict=True)
        )
        cells = tuple(
            slice(first // step, (first + patch) // step)
            for first, patch, step in zip(place, walk.patch_size, pooling, strict=True)
        )
        answer = function(padded[(slice(None), *voxels)][None])[0]
        total[(slice(None), *cells)] += answer.numpy().astype(float) * kernel
        weight[cells] += kernel
    inside = [slice(0, -(-size // step)) for size, step in zip(walk.size, pooling, strict=True)]
    blended = np.where(weight > 0, total / np.maximum(weight, 1e-300), unseen)
    return blended[(slice(None), *inside)]


@settings(max_examples=100)
@given(walks())
def test_slabs_together_are_the_image_blended_all_at_once(walk: Walk) -> None:
    def function(batch: Tensor) -> dict[str, Tensor]:
        scaled = times_window_mean(batch)
        return {"coarse": mean_pooled(scaled, walk.pooling), "fine": scaled}

    def coarse(batch: Tensor) -> Tensor:
        return mean_pooled(times_window_mean(batch), walk.pooling)

    image = walk.image()
    slabs = walk.stream(image, function)
    ones = [1] * len(walk.size)
    for name, alone, pooling in (
        ("fine", times_window_mean, ones),
        ("coarse", coarse, walk.pooling),
    ):
        streamed = torch.cat([slab.rows[name] for slab in slabs], dim=walk.axis + 1)
        expected = torch.from_numpy(blended_densely(image, alone, walk, pooling)).float()
        assert_close(streamed, expected, rtol=1e-4, atol=1e-5)


def test_the_window_nearest_to_its_centre_counts_most() -> None:
    # Windows of 8 that start at 0 and 4 of a size-12 axis answer 0 and 1. In rows 4 to 7, a voxel
    # has the first one's weight g(row) and the second one's g(row - 4), with sigma 1 and the
    # centre 3.5: the second's share is 1 / (1 + exp((d1^2 - d0^2) / 2)) with d0 = row - 3.5 and
    # d1 = row - 7.5, so with (d1^2 - d0^2) / 2 = 22 - 4 row.
    answers = iter([0.0, 1.0])

    def order(batch: Tensor) -> dict[str, Tensor]:
        return {"order": torch.full_like(batch, next(answers))}

    blended = slide(torch.zeros(1, 12), order, WindowLayout((8,), (0.5,), (4,)), batch_size=1)[
        "order"
    ]
    shares = [1 / (1 + math.exp(22 - 4 * row)) for row in range(4, 8)]
    expected = torch.tensor([[0.0] * 4 + shares + [1.0] * 4])
    assert_close(blended, expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=60)
@given(walks())
def test_slabs_follow_one_another_and_cover_every_row(walk: Walk) -> None:
    def pool(batch: Tensor) -> dict[str, Tensor]:
        return {"fine": batch, "coarse": mean_pooled(batch, walk.pooling)}

    reached = {"fine": 0, "coarse": 0}
    for slab in walk.stream(walk.image(), pool):
        assert slab.starts.keys() == slab.rows.keys() == reached.keys()
        for name, rows in slab.rows.items():
            assert slab.starts[name] == reached[name]
            assert rows.shape[walk.axis + 1] > 0
            reached[name] += rows.shape[walk.axis + 1]
    size = walk.size[walk.axis]
    assert reached == {"fine": size, "coarse": -(-size // walk.pooling[walk.axis])}


@settings(max_examples=40)
@given(walks())
def test_neither_the_axis_nor_the_batch_size_changes_the_result(walk: Walk) -> None:
    def function(batch: Tensor) -> dict[str, Tensor]:
        return {"fine": times_window_mean(batch)}

    image = walk.image()
    expected = slide(image, function, walk.layout)
    assert_close(walk.slide(image, function)["fine"], expected["fine"], rtol=1e-4, atol=1e-5)


@settings(max_examples=300)
@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 12), OVERLAPS)
def test_windows_start_at_multiples_and_have_at_least_the_overlap(
    size: int, multiple: int, num_multiples: int, overlap: float
) -> None:
    patch = multiple * num_multiples
    starts = window_starts(size, patch, overlap, multiple)
    assert starts[0] == 0
    assert all(start % multiple == 0 for start in starts)
    # Every window but one on an axis shorter than a patch lies inside, up to a multiple.
    if len(starts) > 1:
        assert starts[-1] + patch == -(-size // multiple) * multiple
    assert starts[-1] + patch >= size
    steps = [following - start for start, following in itertools.pairwise(starts)]
    # Steps of one multiple are the shortest there are, and may be too long for a large overlap.
    assert all(0 < step <= max(patch * (1 - overlap) + 1e-9, multiple) for step in steps)
    assert not steps or max(steps) - min(steps) <= multiple


@pytest.mark.parametrize(
    ("size", "patch", "overlap", "multiple", "starts"),
    [
        (10, 6, 0.5, 2, [0, 2, 4]),  # the drawing in the module: at most 3 apart, so 2
        (75, 32, 0.5, 8, [0, 16, 32, 48]),  # up to 80, of which 5 rows are padding
        (5, 8, 0.5, 4, [0]),  # one window, partly padding
        (16, 8, 0.0, 4, [0, 8]),
        (17, 8, 0.0, 4, [0, 8, 12]),  # up to 20: two steps of 6, on multiples of 4
        (64, 32, 0.5, 32, [0, 32]),  # no smaller step than a multiple
    ],
)
def test_windows_start_at_the_voxels_worked_out_by_hand(
    size: int, patch: int, overlap: float, multiple: int, starts: list[int]
) -> None:
    assert window_starts(size, patch, overlap, multiple) == starts


def test_a_patch_that_is_not_a_multiple_is_refused() -> None:
    with pytest.raises(AssertionError, match="patch 10 is not a multiple of 4"):
        window_starts(20, 10, 0.5, 4)


def test_an_output_of_a_size_that_does_not_divide_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"divides a window of \(8,\), found \(3,\)"):
        slide(
            torch.zeros(1, 20),
            lambda batch: {"odd": batch[:, :, :3]},
            WindowLayout((8,), (0.5,), (4,)),
        )


@pytest.mark.parametrize("patch", [1, 2, 7, 32])
def test_weights_of_a_window_are_a_gaussian_about_its_centre(patch: int) -> None:
    weights = window_weight(patch)
    assert_close(weights, torch.from_numpy(gaussian_by_definition(patch)).float())
    assert_close(weights, weights.flip(0))
    assert weights.min() > 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_memory_held_does_not_grow_with_the_depth(
    axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    class WatchedBlend(Blend):
        def add(self, window: Tensor, start: Sequence[int]) -> None:
            super().add(window, start)
            held.append(self.sum.numel())

    monkeypatch.setattr(windows, "Blend", WatchedBlend)

    def largest(depth: int) -> tuple[int, int]:
        """Numbers held by the running sum, and by the largest slab."""
        held.clear()
        size = [6, 6]
        size.insert(axis, depth)
        rows = max(
            slab.rows["image"].numel()
            for slab in stream(
                torch.ones(2, *size),
                identity,
                WindowLayout((4, 4, 4), (0.5, 0.5, 0.5), (2, 2, 2)),
                axis=axis,
            )
        )
        return max(held), rows

    # Two channels, four rows (a patch), six by six across.
    assert largest(8) == largest(200) == (2 * 4 * 6 * 6, 2 * 4 * 6 * 6)


def test_slabs_come_as_soon_as_they_are_finished() -> None:
    calls = 0

    def count(batch: Tensor) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        return {"image": batch}

    # Three windows, as drawn in the module.
    slabs = stream(torch.arange(10.0)[None], count, WindowLayout((6,), (0.5,), (2,)))
    seen = [(slab.starts["image"], slab.rows["image"].tolist(), calls) for slab in slabs]
    assert [(start, called) for start, _, called in seen] == [(0, 1), (2, 2), (4, 3)]
    assert_close(torch.tensor([row for _, rows, _ in seen for row in rows[0]]), torch.arange(10.0))


def test_half_precision_windows_are_blended_in_float32() -> None:
    image = torch.linspace(0, 1, 20)[None]
    blended = slide(
        image,
        lambda batch: {"image": batch.bfloat16()},
        WindowLayout((8,), (0.75,), (1,)),
    )["image"]
    assert blended.dtype == torch.float32
    assert_close(blended, image.bfloat16().float(), rtol=1e-5, atol=1e-6)


@settings(max_examples=30)
@given(walks(), st.data())
def test_skipped_windows_have_no_weight_and_uncovered_voxels_the_given_value(
    walk: Walk, data: st.DataObject
) -> None:
    skip = frozenset(data.draw(st.sets(st.sampled_from(walk.places))))
    asked = 0

    def function(batch: Tensor) -> dict[str, Tensor]:
        nonlocal asked
        asked += len(batch)
        scaled = times_window_mean(batch)
        return {"coarse": mean_pooled(scaled, walk.pooling), "fine": scaled}

    image = walk.image()
    slabs = copies(
        stream(
            image,
            function,
            walk.layout,
            axis=walk.axis,
            batch_size=walk.batch_size,
            skip=skip,
            unseen={"fine": torch.tensor([-7.0, 4.0])},
        )
    )

    def coarse(batch: Tensor) -> Tensor:
        return mean_pooled(times_window_mean(batch), walk.pooling)

    of_channel = np.reshape([-7.0, 4.0], (2, *[1] * len(walk.size)))
    first_row = [place for place in walk.places if place[walk.axis] == 0]
    kept = len(walk.places) - len(skip)
    assert asked == kept + (set(first_row) <= skip)  # one for the form of outputs alone
    for name, alone, pooling, unseen in (
        ("fine", times_window_mean, [1] * len(walk.size), of_channel),
        ("coarse", coarse, walk.pooling, 0.0),
    ):
        streamed = torch.cat([slab.rows[name] for slab in slabs], dim=walk.axis + 1)
        expected = blended_densely(image, alone, walk, pooling, skip, unseen)
        assert_close(streamed, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_the_running_sum_advances_in_place(count: int) -> None:
    rows = torch.arange(42.0).reshape(2, 7, 3)
    expected = torch.cat([rows[:, count:], torch.zeros(2, count, 3)], dim=1)
    windows._advance(rows, 1, count)
    assert torch.equal(rows, expected)


@settings(max_examples=30)
@given(walks())
def test_how_an_output_lies_in_memory_changes_nothing(walk: Walk) -> None:
    def turned(batch: Tensor) -> dict[str, Tensor]:
        """As OpenVINO has it, the channels of a voxel side by side."""
        return {"image": times_window_mean(batch).movedim(1, -1).contiguous().movedim(-1, 1)}

    image = walk.image()
    plain = walk.stream(image, lambda batch: {"image": times_window_mean(batch)})
    for slab, other in zip(plain, walk.stream(image, turned), strict=True):
        assert torch.equal(slab.rows["image"], other.rows["image"])


def test_the_classes_of_a_voxel_lie_side_by_side() -> None:
    slabs = stream(
        torch.randn(3, 8, 8, 12),
        identity,
        WindowLayout((4, 4, 4), (0.5, 0.5, 0.5), (2, 2, 2)),
        axis=2,
    )
    assert {slab.rows["image"].stride()[0] for slab in slabs} == {1}
