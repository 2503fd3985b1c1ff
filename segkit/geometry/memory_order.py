"""The order of the axes of an array in memory."""

from collections.abc import Sequence


def slowest_first(strides: Sequence[int]) -> list[int]:
    """The axes of an array in the order of its memory, the one with the longest step first.

    Args:
        strides: the step in memory along each axis, of any sign.

    Example:
        >>> slowest_first(np.zeros((2, 3, 4), order="F").strides)
        [2, 1, 0]
    """
    return sorted(range(len(strides)), key=lambda axis: -abs(strides[axis]))
