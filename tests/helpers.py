"""Grids of every orientation, and fields that say by their values where a voxel lies."""

import itertools
from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
from numpy import ndarray
from scipy.spatial.transform import Rotation

from segkit.geometry.grid import Grid


def _orientations() -> dict[str, ndarray]:
    """The 48 ways to lay three array axes along the world's, by their codes such as 'LPS'."""
    letters = np.array([["L", "R"], ["P", "A"], ["I", "S"]])
    found = {}
    for worlds in itertools.permutations(range(3)):
        for signs in itertools.product((-1, 1), repeat=3):
            directions = np.zeros((3, 3))
            directions[worlds, range(3)] = signs
            code = "".join(
                letters[world, (sign + 1) // 2] for world, sign in zip(worlds, signs, strict=True)
            )
            found[code] = directions
    return found


ORIENTATIONS = _orientations()


def affine_of(
    code: str,
    spacing: tuple[float, float, float] = (0.7, 1.3, 4.0),
    origin: tuple[float, float, float] = (-81.0, 23.5, 140.25),
    rotation: tuple[float, float, float] = (0.2, -0.3, 0.25),
) -> ndarray:
    """An orientation turned by a rotation vector (radians), with a spacing per array axis (mm)."""
    affine = np.eye(4)
    turned = Rotation.from_rotvec(rotation).as_matrix() @ ORIENTATIONS[code]
    affine[:3, :3] = turned * spacing
    affine[:3, 3] = origin
    return affine


@st.composite
def affines(draw: st.DrawFn) -> ndarray:
    """Any orientation, oblique by less than 40°, of any spacing, anywhere in a scanner.

    40° is less than where two orientations could be equally near.
    """
    part = st.floats(-0.4, 0.4)
    size = st.floats(0.3, 6.0)
    place = st.floats(-500.0, 500.0)
    code = draw(st.sampled_from(sorted(ORIENTATIONS)))
    return affine_of(
        code,
        draw(st.tuples(size, size, size)),
        draw(st.tuples(place, place, place)),
        draw(st.tuples(part, part, part)),
    )


@st.composite
def grids(draw: st.DrawFn, smallest: int = 1, largest: int = 7) -> Grid:
    """A grid on any of the affines."""
    size = st.integers(smallest, largest)
    return Grid(draw(st.tuples(size, size, size)), draw(affines()))


def brute_force_centres(shape: tuple[int, ...], affine: ndarray) -> ndarray:
    """World coordinates (mm) of every voxel centre, one voxel at a time."""
    centres = np.empty((*shape, 3))
    for index in np.ndindex(*shape):
        centres[index] = (affine @ (*index, 1.0))[:3]
    return centres


def linear_field(world: ndarray) -> ndarray:
    """A value that tells places apart along every axis, and that linear interpolation keeps."""
    return world @ np.array([0.31, -0.73, 1.17]) + 12.5


def inside(source: Grid, grid: Grid) -> ndarray:
    """Which cell centres of `grid` lie between the outermost centres of `source`."""
    index = source.index(grid.centres())
    return ((index >= -1e-9) & (index <= np.array(source.shape) - 1 + 1e-9)).all(axis=-1)


STORED = [
    (order, flipped)
    for order in itertools.permutations(range(3))
    for count in range(4)
    for flipped in itertools.combinations(range(3), count)
]
"""Every order of axes that a file may have, and along which of them it may run the other way."""


def stored_otherwise(
    values: ndarray, grid: Grid, order: Sequence[int], flipped: Sequence[int]
) -> tuple[ndarray, Grid]:
    """The same voxels as a file holds them whose axes run otherwise."""

    def turned(array: ndarray) -> ndarray:
        return np.flip(array.transpose(*order, *range(3, array.ndim)), tuple(flipped))

    places = turned(brute_force_centres(grid.shape, grid.affine))
    affine = np.eye(4)
    affine[:3, 3] = places[0, 0, 0]
    for axis in range(3):
        affine[:3, axis] = np.take(places, 1, axis)[0, 0] - places[0, 0, 0]
    x, y, z = places.shape[:3]
    return turned(values), Grid((x, y, z), affine)
