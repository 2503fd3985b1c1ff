"""The axes in the order of memory."""

import itertools

import numpy as np

from segkit.geometry.memory_order import slowest_first


def test_axes_in_the_order_of_memory_make_an_array_contiguous() -> None:
    for axes in itertools.permutations(range(3)):
        values = np.zeros((2, 3, 4)).transpose(axes)
        assert values.transpose(slowest_first(values.strides)).flags.c_contiguous
        assert slowest_first(values[::-1, :, ::-1].strides) == slowest_first(values.strides)


def test_axes_with_equal_steps_keep_their_order() -> None:
    assert slowest_first((8, 8, 16)) == [2, 0, 1]
