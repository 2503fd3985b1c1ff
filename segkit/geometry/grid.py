"""Where voxels lie in the patient: grids, their orientation, and the grids that layers make.

World coordinates are RAS+ millimetres (x to the patient's right, y to the front, z to the head).
The centre of voxel (i, j, k) lies at `affine @ (i, j, k, 1)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10, prod
from typing import Self

import numpy as np
from jaxtyping import Float
from numpy import ndarray

AXIS_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))
ANISOTROPY = 3.0
"""An axis that is more than this many times coarser than the finest is resampled apart."""
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From the world of DICOM and ITK, whose x and y run the other way, and back."""
SAME_STEP = 0.01
"""From a voxel to the next, two grids that agree differ by at most this share of a voxel."""
SAME_PLACE = 0.1
"""Over the whole volume, they differ by at most this share of a voxel."""


def separate_axis(current: Sequence[float], target: Sequence[float]) -> int | None:
    """The axis whose slices lie so far apart that the nearest is taken, or None.

    It is the axis along which the scan's spacing, or else the target's, is more than 3 times as
    coarse as along the finest (nnU-Net, "resampling"). If two axes are coarsest, up to the rounding
    of a header, there is none. Spacings are in mm.
    """
    for spacing in (current, target):
        if max(spacing) / min(spacing) > ANISOTROPY:
            coarsest = [axis for axis in range(3) if spacing[axis] > 0.9999 * max(spacing)]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def are_sheared(directions: Float[ndarray, "axis world"]) -> bool:
    """Whether axes, given as unit vectors, do not stand at right angles to each other.

    Headers round: axes count as orthogonal up to a cosine of 1e-4 (0.006 degrees).
    """
    cosines = directions @ directions.T
    return bool(np.abs(cosines - np.diag(np.diag(cosines))).max() > 1e-4)


def ml_of_voxel(
    spacing: Sequence[float], directions: Float[ndarray, "axis world"] | None = None
) -> float:
    """Volume in ml of a voxel of three axes: steps in mm along unit vectors, or at right angles."""
    volume = prod(float(step) for step in spacing) / 1000
    if directions is not None and are_sheared(directions):
        volume *= abs(float(np.linalg.det(directions)))
    return volume


def rounded_spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    """A spacing in mm to 6 decimals, or to 6 digits of what is under 0.1 mm."""
    x, y, z = (round(float(s), 6 if s >= 0.1 else 5 - floor(log10(s))) for s in spacing)
    return x, y, z


@dataclass(frozen=True, eq=False)
class Grid:
    """A block of voxels in the world: a shape, and the affine that places voxel centres in mm."""

    shape: tuple[int, int, int]
    affine: Float[ndarray, "4 4"]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along each array axis, in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @property
    def directions(self) -> Float[ndarray, "axis world"]:
        """Unit vector along each array axis."""
        return self.affine[:3, :3].T / np.linalg.norm(self.affine[:3, :3], axis=0)[:, None]

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in ml: the affine's determinant."""
        return ml_of_voxel(self.spacing, self.directions)

    def world(self, index: Float[ndarray, "*points 3"]) -> Float[ndarray, "*points 3"]:
        """World coordinates (mm) of voxel indices, which may be fractions."""
        return index @ self.affine[:3, :3].T + self.affine[:3, 3]

    def index(self, world: Float[ndarray, "*points 3"]) -> Float[ndarray, "*points 3"]:
        """Voxel indices, as fractions, of world coordinates (mm)."""
        return (world - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T

    def centres(self) -> Float[ndarray, "x y z 3"]:
        """World coordinates (mm) of every voxel centre."""
        axes = [np.arange(size, dtype=float) for size in self.shape]
        return self.world(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1))

    def positions_of(self, other: "Grid") -> tuple[ndarray, ndarray, ndarray]:
        """The centres of `other`'s cells along each axis of this grid, as fractional indices.

        The grids' axes run alike (one was made from the other by placing, cropping or respacing).
        Indices are rounded to 1e-9, so that equal grids give whole numbers.
        """
        step = np.linalg.inv(self.affine) @ other.affine
        assert np.abs(step[:3, :3] - np.diag(np.diag(step)[:3])).max() < 1e-4, "axes differ"
        x, y, z = (
            np.round(step[axis, axis] * np.arange(size) + step[axis, 3], 9)
            for axis, size in enumerate(other.shape)
        )
        return x, y, z

    def agrees_with(self, other: "Grid", *, tolerance: float | None = None) -> bool:
        """Whether both grids have one shape and hold the same voxels in the same order.

        Headers round: a spacing of 0.703125 mm may be written as 0.7031, which comes to 2 % of a
        voxel over 512 of them. So each voxel may lie up to a tenth of a voxel (along each axis)
        from its namesake, and the step to the next voxel may differ by 1 % of a voxel. With a
        `tolerance`, no corner may lie further off than so many mm along x, y or z instead.
        """
        if tolerance is None:
            return not self.difference_from(other)
        corners = _corners(self.shape)
        apart = np.abs(self.world(corners) - other.world(corners)).max()
        return self.shape == other.shape and bool(apart <= tolerance)

    def difference_from(self, other: "Grid") -> str:
        """In what this grid differs from another and by how much, or '' if they agree.

        It is part of a sentence, such as 'its first voxel lies 2 mm off, so that voxels lie up to 1
        voxel apart'. The axes of both should run alike (`Orientation.between`).
        """
        own, its = np.array(self.spacing), np.array(other.spacing)
        ends, corners = np.array(other.shape) - 1.0, _corners(other.shape)
        step = self.affine[:3, :3] - other.affine[:3, :3]
        shift = self.affine[:3, 3] - other.affine[:3, 3]
        turn = self.affine[:3, :3] / own - other.affine[:3, :3] / its
        per_voxel = [np.linalg.inv(grid.affine[:3, :3]) for grid in (self, other)]

        def voxels(apart: Float[ndarray, "*points 3"]) -> float:
            """The longest of distances in the world, in voxels of either grid along their axes."""
            return max(float(np.abs(apart @ each.T).max()) for each in per_voxel)

        apart = voxels(corners @ step.T + shift)
        # An axis of one voxel has no next one.
        steps = voxels((step * (ends > 0)).T)
        if self.shape == other.shape and steps <= SAME_STEP and apart <= SAME_PLACE:
            return ""
        said = []
        if self.shape != other.shape:
            said.append(f"its shape is {_sizes(self.shape)}, not {_sizes(other.shape)}")
        # Three parts add up to `apart`, and two to `steps`, so that one at least is told.
        told = SAME_STEP / 3
        if (np.abs(own / its - 1) * ends).max() > told:
            sizes = _told_apart(self.spacing, other.spacing)
            said.append(f"its spacing is {sizes[0]} mm, not {sizes[1]} mm")
        if voxels(corners @ (turn * own).T) > told:
            angle = np.degrees(2 * np.arcsin(np.linalg.norm(turn, axis=0).max() / 2))
            said.append(f"its axes are turned by {angle:.3g} degrees")
        if voxels(shift) > told:
            said.append(f"its first voxel lies {np.linalg.norm(shift):.3g} mm off")
        listed = " and ".join(filter(None, [", ".join(said[:-1]), said[-1]]))
        if self.shape != other.shape:
            return listed
        return f"{listed}, so that voxels lie up to {apart:.3g} voxels apart"

    def placed(
        self, shape: Sequence[int], stride: Sequence[float], offset: Sequence[float]
    ) -> "Grid":
        """The grid of `shape` whose cell j has its centre at this one's `stride * j + offset`."""
        step = np.eye(4)
        step[:3, :3] = np.diag(stride)
        step[:3, 3] = offset
        x, y, z = shape
        return Grid((x, y, z), self.affine @ step)

    def with_spacing(self, spacing: Sequence[float]) -> "Grid":
        """The grid of this field of view at another spacing (mm).

        The outer edges stay, up to the rounding of the new shape to whole voxels. Both ends share
        that rounding: the two grids have the same centre.
        """
        old = np.array(self.shape)
        stride = np.array(spacing) / self.spacing
        new = np.maximum(np.round(old / stride), 1).astype(int)
        offset = (old - 1) / 2 - stride * (new - 1) / 2
        return self.placed(new.tolist(), stride.tolist(), offset.tolist())


def _corners(shape: Sequence[int]) -> Float[ndarray, "2 2 2 3"]:
    return np.stack(np.meshgrid(*[(0.0, size - 1.0) for size in shape]), axis=-1)


def _sizes(sizes: Sequence[float], digits: int = 9) -> str:
    return "x".join(f"{size:.{digits}g}" for size in sizes)


def _told_apart(one: Sequence[float], other: Sequence[float]) -> tuple[str, str]:
    """Two sizes in as many digits as tell them apart, 3 at least."""
    for digits in range(3, 17):
        texts = _sizes(one, digits), _sizes(other, digits)
        if texts[0] != texts[1]:
            break
    return texts


@dataclass(frozen=True)
class Orientation:
    """How an array's axes run through the patient, and how to turn them to RAS+ and back.

    `order[i]` is the array axis that runs along world axis i; `flip[i]` says that it runs the
    other way. Turning is a view: no voxel is copied or interpolated.
    """

    order: tuple[int, int, int]
    flip: tuple[bool, bool, bool]

    @classmethod
    def of(cls, affine: Float[ndarray, "4 4"]) -> Self:
        """The orientation closest to `affine`: each array axis takes the world axis nearest to it.

        If two axes are nearest to the same world axis, the permutation with the largest sum of
        absolute direction cosines decides.
        """
        directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        permutations = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
        order = max(
            permutations,
            key=lambda axes: sum(abs(directions[world, axis]) for world, axis in enumerate(axes)),
        )
        x, y, z = (bool(directions[world, axis] < 0) for world, axis in enumerate(order))
        return cls(order, (x, y, z))

    @classmethod
    def between(cls, grid: Grid, other: Grid) -> Self:
        """How an array on a grid is turned so that its axes run as those of another grid do."""
        directions = np.eye(4)
        directions[:3, :3] = other.affine[:3, :3] / other.spacing
        return cls.of(np.linalg.inv(directions) @ grid.affine)

    @property
    def code(self) -> str:
        """Three letters, such as 'LPS': where each array axis points, in the array's own order."""
        letters = [""] * 3
        for world, axis in enumerate(self.order):
            letters[axis] = AXIS_LETTERS[world][not self.flip[world]]
        return "".join(letters)

    def flipped_axes(self) -> tuple[int, ...]:
        """The world axes along which the turned array must be reversed."""
        return tuple(axis for axis in range(3) if self.flip[axis])

    def turn_grid(self, grid: Grid) -> Grid:
        """The same voxels in RAS+ order: the world coordinate of every voxel stays."""
        turn = np.zeros((4, 4))
        turn[3, 3] = 1
        for world, axis in enumerate(self.order):
            turn[axis, world] = -1 if self.flip[world] else 1
            turn[axis, 3] = grid.shape[axis] - 1 if self.flip[world] else 0
        x, y, z = (grid.shape[axis] for axis in self.order)
        return Grid((x, y, z), grid.affine @ turn)

    def turn(self, array: ndarray) -> ndarray:
        """The array (x, y, z, …) in RAS+ order, as a view."""
        turned = np.transpose(array, (*self.order, *range(3, array.ndim)))
        return np.flip(turned, self.flipped_axes())

    def turn_back(self, array: ndarray) -> ndarray:
        """The inverse of `turn`, as a view."""
        unflipped = np.flip(array, self.flipped_axes())
        back = [self.order.index(axis) for axis in range(3)]
        return np.transpose(unflipped, (*back, *range(3, array.ndim)))


@dataclass(frozen=True)
class Placement:
    """The places of a feature map's cells: cell j has its centre at `stride * j + offset`.

    Both are in voxels of the network's input, one entry per axis. `through` composes layers from
    the input down (Araujo et al. 2019, "Computing Receptive Fields of CNNs", Sec. 2.2).
    """

    stride: tuple[float, ...]
    offset: tuple[float, ...]

    @classmethod
    def identity(cls, num_axes: int) -> Self:
        """The placement of the input itself."""
        return cls((1.0,) * num_axes, (0.0,) * num_axes)

    def through(
        self,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int] | None = None,
    ) -> "Placement":
        """The placement behind a layer with this kernel, stride, padding and dilation per axis."""
        dilation = dilation or (1,) * len(kernel)
        local = [d * (k - 1) / 2 - p for k, p, d in zip(kernel, padding, dilation, strict=True)]
        return Placement(
            tuple(outer * inner for outer, inner in zip(self.stride, stride, strict=True)),
            tuple(
                start + outer * shift
                for start, outer, shift in zip(self.offset, self.stride, local, strict=True)
            ),
        )
