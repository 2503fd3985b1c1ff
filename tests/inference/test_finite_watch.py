"""Every value that is not finite is found, wherever and whenever it was."""

import math

import pytest
import torch

from segkit.inference.finite_watch import FiniteWatch


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_among_the_largest_numbers_is_found(bad: float) -> None:
    values = torch.tensor([3e38, -3e38]).repeat(500).view(10, 10, 10)
    watch = FiniteWatch()
    watch.add(values)  # their sum overflows, but they are finite
    watch.add(torch.empty(3, 0))
    watch.send()
    assert watch.so_far() and watch.at_end()
    values[4, 5, 6] = bad
    watch.add(values.movedim(0, -1))
    assert watch.so_far()  # it has not been sent
    watch.add(torch.zeros(3))
    watch.send()
    watch.add(torch.zeros(3))
    assert not watch.so_far() and not watch.at_end() and not watch.so_far()
    late = FiniteWatch()
    late.add(torch.zeros(3))
    late.send()
    late.add(values)
    assert not late.at_end()
