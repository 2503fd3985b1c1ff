"""Cases of one slice: the plane that they share."""

from collections.abc import Sequence

from segkit.errors import counted


def flat_axes(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Axes (RAS+) along which all shapes have only one voxel."""
    return [axis for axis in range(3) if all(shape[axis] == 1 for shape in shapes)]


def about_different_planes(shapes: Sequence[Sequence[int]]) -> str:
    """An error's sentence on single slices that share no plane.

    Args:
        shapes: shapes of the slices, in RAS+ order.
    """
    numbers = [sum(shape[axis] == 1 for shape in shapes) for axis in range(3)]
    listed = ", ".join(
        f"{counted(number, 'case')} along {axis}"
        for axis, number in zip("xyz", numbers, strict=True)
        if number
    )
    return (
        f"expected single slices in one plane, found one voxel in {listed} (RAS+, by their "
        "headers); rewrite the headers with the same directions, or train each plane on its own"
    )
