import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segkit.data.patches import cut, read_ahead

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_WILLNEED"), reason="this system cannot be told what will be read"
)


class Told:
    """What the kernel would be told of a mapping."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def madvise(self, advice: int, start: int, length: int) -> None:
        assert advice == mmap.MADV_WILLNEED and start % mmap.PAGESIZE == 0
        self.ranges.append((start, start + length))


@given(
    shape=st.tuples(st.integers(1, 2), *[st.integers(1, 40)] * 3),
    corner=st.tuples(*[st.floats(0, 1)] * 3),
    far=st.tuples(*[st.floats(0, 1)] * 3),
    kind=st.sampled_from([np.uint8, np.float16, np.float32]),
)
def test_every_byte_of_a_block_is_announced_and_nothing_beyond_the_file(
    shape: tuple[int, ...],
    corner: tuple[float, ...],
    far: tuple[float, ...],
    kind: type,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("mapped") / "array.npy"
    np.save(path, np.zeros(shape, kind))
    array: Any = np.load(path, mmap_mode="r")
    region = []
    for size, one, two in zip(shape[1:], corner, far, strict=True):
        first = min(int(one * size), size - 1)
        region.append(slice(first, first + 1 + int(two * (size - first - 1))))
    begin = array.offset % mmap.ALLOCATIONGRANULARITY
    numbers = np.arange(array.size).reshape(shape)[(slice(None), *region)]
    needed = begin + numbers.ravel() * array.itemsize
    array._mmap = told = Told()
    read_ahead(array, region)
    held = np.zeros(begin + array.nbytes + 1, bool)
    for start, end in told.ranges:
        assert end <= begin + array.nbytes
        held[start:end] = True
    assert held[needed].all() and held[needed + array.itemsize - 1].all()


@pytest.mark.parametrize("mapped", [True, False])
def test_a_cut_is_the_same_from_a_file_and_from_memory(mapped: bool, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(2, 20, 9, 13)).astype(np.float16)
    np.save(tmp_path / "array.npy", values)
    array = np.load(tmp_path / "array.npy", mmap_mode="r" if mapped else None)
    found = cut(array, (-2, 3, 5), (9, 9, 9))
    inside = np.pad(values[:, :7, 3:, 5:], [(0, 0), (2, 0), (0, 3), (0, 1)], mode="edge")
    assert (found == inside).all()


def test_advice_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    class Refusing:
        def madvise(self, *_: int) -> None:
            raise OSError(38, "Function not implemented")

    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    np.save(tmp_path / "array.npy", values)
    array: Any = np.load(tmp_path / "array.npy", mmap_mode="r")
    array._mmap = Refusing()
    assert (cut(array, (1, 1, 1), (2, 2, 2)) == values[1:3, 1:3, 1:3]).all()


def test_views_in_another_order_are_left_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros((4, 5, 6), np.float32))
    array: Any = np.load(tmp_path / "array.npy", mmap_mode="r")
    turned = array.transpose(2, 1, 0)
    turned._mmap = told = Told()
    read_ahead(turned, [slice(0, 2)] * 3)
    assert told.ranges == []
