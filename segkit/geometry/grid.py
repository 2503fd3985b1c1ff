"""Positions of voxels in the patient: grids, their orientation, and the grids of feature maps.

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

from segkit.errors import counted

AXIS_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))
ANISOTROPY = 3.0
"""An axis that is more than this many times coarser than the finest is resampled separately."""
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From the world of DICOM and ITK, whose x and y run the other way, and back."""
SAME_STEP = 0.01
"""Largest difference, in voxels, between the steps of two grids that agree."""
MORE_THAN_ROUNDING = 1.000001
"""Spacings whose ratio exceeds a limit by less than this factor are at the limit."""
SAME_PLACE = 0.1
"""Largest distance, in voxels, between corresponding voxels of two grids that agree."""


def separate_axis(
    current: Sequence[float], target: Sequence[float], axes: Sequence[int] = (0, 1, 2)
) -> int | None:
    """The axis with slices so far apart that the nearest slice is taken, or None.

    It is the axis along which the current spacing, or else the target spacing, is more than 3 times
    as coarse as along the finest axis (nnU-Net, "resampling"). If two axes are equally coarse, up
    to the rounding of a header, the answer is None. Exactly 3 times, up to rounding, is not more.

    Args:
        current: spacing of the image, in mm.
        target: spacing to which it is resampled, in mm.
        axes: the axes to compare: those with more than one voxel.
    """
    for spacing in (current, target):
        compared = {axis: spacing[axis] for axis in axes} or {0: 1.0}
        largest = max(compared.values())
        if largest / min(compared.values()) > ANISOTROPY * MORE_THAN_ROUNDING:
            coarsest = [axis for axis, length in compared.items() if length > 0.9999 * largest]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def measured_spacings(
    spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]], axis: int
) -> list[float]:
    """Spacings of images along an axis, in mm; of those with more than one voxel along it, if any.

    Args:
        spacings: spacing of each image, in mm.
        shapes: shape of each image, in voxels.
        axis: the axis.
    """
    known = [
        spacing[axis] for spacing, shape in zip(spacings, shapes, strict=True) if shape[axis] > 1
    ]
    return known or [spacing[axis] for spacing in spacings]


def are_sheared(directions: Float[ndarray, "axis world"]) -> bool:
    """Whether the axes, given as unit vectors, are not at right angles to each other.

    Headers round numbers, so axes count as orthogonal up to a cosine of 1e-4 (0.006 degrees).
    """
    cosines = directions @ directions.T
    return bool(np.abs(cosines - np.diag(np.diag(cosines))).max() > 1e-4)


def ml_of_voxel(
    spacing: Sequence[float], directions: Float[ndarray, "axis world"] | None = None
) -> float:
    """Volume of a voxel in ml.

    Args:
        spacing: length of the voxel along each of its three axes, in mm.
        directions: unit vectors of the axes; at right angles if None.
    """
    volume = prod(float(step) for step in spacing) / 1000
    if directions is not None and are_sheared(directions):
        volume *= abs(float(np.linalg.det(directions)))
    return volume


def rounded_spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    """The spacing in mm, rounded to 6 decimals, or to 6 significant digits if below 0.1 mm."""
    x, y, z = (round(float(s), 6 if s >= 0.1 else 5 - floor(log10(s))) for s in spacing)
    return x, y, z


@dataclass(frozen=True, eq=False)
class Grid:
    """A block of voxels: its shape, and the affine from voxel indices to world coordinates (mm).

    Example:
        >>> grid = Grid((40, 48, 20), np.diag([1.0, 1.0, 3.0, 1.0]))
        >>> grid.spacing  # in mm
        (1.0, 1.0, 3.0)
        >>> grid.world(np.array([2.0, 0.0, 1.0]))  # in mm
        array([2., 0., 3.])
    """

    shape: tuple[int, int, int]
    affine: Float[ndarray, "4 4"]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along each array axis, in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @property
    def directions(self) -> Float[ndarray, "axis world"]:
        """Unit vector along each array axis, in world coordinates."""
        return self.affine[:3, :3].T / np.linalg.norm(self.affine[:3, :3], axis=0)[:, None]

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in ml."""
        return ml_of_voxel(self.spacing, self.directions)

    def world(self, index: Float[ndarray, "*points 3"]) -> Float[ndarray, "*points 3"]:
        """World coordinates (mm) of voxel indices, which may be fractional.

        Args:
            index: voxel indices, (…, 3).
        """
        return index @ self.affine[:3, :3].T + self.affine[:3, 3]

    def index(self, world: Float[ndarray, "*points 3"]) -> Float[ndarray, "*points 3"]:
        """Fractional voxel indices of world coordinates (mm).

        Args:
            world: world coordinates in mm, RAS+, (…, 3).
        """
        return (world - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T

    def centres(self) -> Float[ndarray, "x y z 3"]:
        """World coordinates (mm) of the centre of every voxel."""
        axes = [np.arange(size, dtype=float) for size in self.shape]
        return self.world(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1))

    def positions_of(self, other: "Grid") -> tuple[ndarray, ndarray, ndarray]:
        """Fractional indices on this grid of the voxel centres of `other`, for each axis.

        The axes of both grids must be parallel: one grid was made from the other by `placed`,
        `with_spacing` or cropping. Indices are rounded to 1e-9, so that equal grids give whole
        numbers.

        Args:
            other: the other grid.
        """
        step = np.linalg.inv(self.affine) @ other.affine
        assert np.abs(step[:3, :3] - np.diag(np.diag(step)[:3])).max() < 1e-4, "axes differ"
        x, y, z = (
            np.round(step[axis, axis] * np.arange(size) + step[axis, 3], 9)
            for axis, size in enumerate(other.shape)
        )
        return x, y, z

    def agrees_with(self, other: "Grid", *, tolerance: float | None = None) -> bool:
        """Whether both grids have the same shape and the same voxels in the same order.

        Headers round numbers: a spacing of 0.703125 mm may be written as 0.7031, which shifts the
        last of 512 voxels by 2 % of a voxel. So each voxel may lie up to a tenth of a voxel (along
        each axis) from its counterpart, and the steps between voxels may differ by 1 % of a voxel.

        Args:
            other: the other grid.
            tolerance: if given, corners may lie up to so many mm apart along x, y and z, instead of
                the tenth of a voxel.
        """
        if tolerance is None:
            return not self.difference_from(other)
        corners = _corners(self.shape)
        apart = np.abs(self.world(corners) - other.world(corners)).max()
        return self.shape == other.shape and bool(apart <= tolerance)

    def difference_from(self, other: "Grid") -> str:
        """The differences between this grid and another, as part of a sentence; '' if they agree.

        An example is 'its first voxel lies 2 mm off, so that voxels lie up to 1 voxel apart'. The
        axes of both grids should run in the same directions (`Orientation.between`).

        Args:
            other: the other grid.
        """
        own, its = np.array(self.spacing), np.array(other.spacing)
        ends, corners = np.array(other.shape) - 1.0, _corners(other.shape)
        step = self.affine[:3, :3] - other.affine[:3, :3]
        shift = self.affine[:3, 3] - other.affine[:3, 3]
        turn = self.affine[:3, :3] / own - other.affine[:3, :3] / its
        per_voxel = [np.linalg.inv(grid.affine[:3, :3]) for grid in (self, other)]

        def voxels(apart: Float[ndarray, "*points 3"]) -> float:
            """The largest of these world distances, in voxels of either grid along its axes."""
            return max(float(np.abs(apart @ each.T).max()) for each in per_voxel)

        apart = voxels(corners @ step.T + shift)
        # An axis of one voxel has no step to a next voxel.
        steps = voxels((step * (ends > 0)).T)
        if self.shape == other.shape and steps <= SAME_STEP and apart <= SAME_PLACE:
            return ""
        differences = []
        if self.shape != other.shape:
            differences.append(f"its shape is {_sizes(self.shape)}, not {_sizes(other.shape)}")
        # Three parts add up to `apart`, and two to `steps`, so at least one of them is reported.
        threshold = SAME_STEP / 3
        if (np.abs(own / its - 1) * ends).max() > threshold:
            sizes = _distinct_texts(self.spacing, other.spacing)
            differences.append(f"its spacing is {sizes[0]} mm, not {sizes[1]} mm")
        if voxels(corners @ (turn * own).T) > threshold:
            angle = np.degrees(2 * np.arcsin(np.linalg.norm(turn, axis=0).max() / 2))
            differences.append(f"its axes are turned by {counted(angle, 'degree', form='.3g')}")
        if voxels(shift) > threshold:
            differences.append(f"its first voxel lies {np.linalg.norm(shift):.3g} mm off")
        listed = " and ".join(filter(None, [", ".join(differences[:-1]), differences[-1]]))
        if self.shape != other.shape:
            return listed
        return f"{listed}, so that voxels lie up to {counted(apart, 'voxel', form='.3g')} apart"

    def placed(
        self, shape: Sequence[int], stride: Sequence[float], offset: Sequence[float]
    ) -> "Grid":
        """The grid of this shape whose voxel j has its centre at index `stride * j + offset` here.

        Args:
            shape: number of voxels along each axis.
            stride: distance between its voxels, in voxels of this grid, along each axis.
            offset: index of its first voxel on this grid, along each axis.
        """
        step = np.eye(4)
        step[:3, :3] = np.diag(stride)
        step[:3, 3] = offset
        x, y, z = shape
        return Grid((x, y, z), self.affine @ step)

    def with_spacing(self, spacing: Sequence[float]) -> "Grid":
        """A grid with the same field of view and another spacing (mm).

        The outer edges stay in place, except that the new shape is rounded to whole voxels. The
        rounding is shared by both ends, so the two grids have the same centre.

        Args:
            spacing: distance between voxels along each axis, in mm.
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


def _distinct_texts(one: Sequence[float], other: Sequence[float]) -> tuple[str, str]:
    """Two sizes as text, with as many digits as are needed to tell them apart, but at least 3."""
    for digits in range(3, 17):
        texts = _sizes(one, digits), _sizes(other, digits)
        if texts[0] != texts[1]:
            break
    return texts


@dataclass(frozen=True)
class Orientation:
    """The directions of an array's axes in the patient. It turns arrays to RAS+ order and back.

    `order[i]` is the array axis that runs along world axis i; `flip[i]` is true if it runs in the
    opposite direction. A turned array is a view: no voxel is copied or interpolated.

    Example:
        >>> orientation = Orientation.of(np.diag([-1.0, -1.0, 2.5, 1.0]))
        >>> orientation.code
        'LPS'
        >>> orientation.turn(np.arange(2).reshape(2, 1, 1)).ravel()  # in RAS+ order
        array([1, 0])
    """

    order: tuple[int, int, int]
    flip: tuple[bool, bool, bool]

    @classmethod
    def of(cls, affine: Float[ndarray, "4 4"]) -> Self:
        """The orientation closest to `affine`: each array axis gets the world axis nearest to it.

        If two array axes are nearest to the same world axis, the permutation with the largest sum
        of absolute direction cosines is taken.

        Args:
            affine: affine from voxel indices to world coordinates, RAS+.
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
        """The orientation that turns arrays on `grid` into the axis directions of `other`.

        Args:
            grid: the grid of the arrays.
            other: the grid whose axis directions they get.
        """
        directions = np.eye(4)
        directions[:3, :3] = other.affine[:3, :3] / other.spacing
        return cls.of(np.linalg.inv(directions) @ grid.affine)

    @property
    def code(self) -> str:
        """Three letters, such as 'LPS': the direction of each array axis, in the array's order."""
        letters = [""] * 3
        for world, axis in enumerate(self.order):
            letters[axis] = AXIS_LETTERS[world][not self.flip[world]]
        return "".join(letters)

    def flipped_axes(self) -> tuple[int, ...]:
        """The world axes along which the turned array must be reversed."""
        return tuple(axis for axis in range(3) if self.flip[axis])

    def turn_grid(self, grid: Grid) -> Grid:
        """The grid of the turned array: every voxel keeps its world coordinates.

        Args:
            grid: the grid of the array before it is turned.
        """
        turn = np.zeros((4, 4))
        turn[3, 3] = 1
        for world, axis in enumerate(self.order):
            turn[axis, world] = -1 if self.flip[world] else 1
            turn[axis, 3] = grid.shape[axis] - 1 if self.flip[world] else 0
        x, y, z = (grid.shape[axis] for axis in self.order)
        return Grid((x, y, z), grid.affine @ turn)

    def turn(self, array: ndarray) -> ndarray:
        """The array (x, y, z, …) in RAS+ order, as a view.

        Args:
            array: (x, y, z, …) in the array's own order.
        """
        turned = np.transpose(array, (*self.order, *range(3, array.ndim)))
        return np.flip(turned, self.flipped_axes())

    def turn_back(self, array: ndarray) -> ndarray:
        """The inverse of `turn`, as a view.

        Args:
            array: (x, y, z, …) in RAS+ order.
        """
        unflipped = np.flip(array, self.flipped_axes())
        back = [self.order.index(axis) for axis in range(3)]
        return np.transpose(unflipped, (*back, *range(3, array.ndim)))


@dataclass(frozen=True)
class Placement:
    """Position of a feature map: its voxel j has its centre at `stride * j + offset`.

    Both are in voxels of the network's input, with one entry per axis. `through` composes layers
    from the input down (Araujo et al. 2019, "Computing Receptive Fields of CNNs", Sec. 2.2).

    Example:
        >>> image = Placement.identity(num_axes=3)
        >>> level = image.through(kernel=(2, 2, 2), stride=(2, 2, 2), padding=(0, 0, 0))
        >>> level.stride, level.offset  # in voxels of the image
        ((2.0, 2.0, 2.0), (0.5, 0.5, 0.5))
    """

    stride: tuple[float, ...]
    offset: tuple[float, ...]

    @classmethod
    def identity(cls, num_axes: int) -> Self:
        """The placement of the input itself.

        Args:
            num_axes: number of axes of space, 2 or 3.
        """
        return cls((1.0,) * num_axes, (0.0,) * num_axes)

    def through(
        self,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int] | None = None,
    ) -> "Placement":
        """The placement of a layer's output.

        Args:
            kernel: size of the layer's kernel along each axis, in cells of its input.
            stride: its stride along each axis.
            padding: number of cells that are added before the first cell of each axis.
            dilation: distance between neighbouring kernel elements along each axis; 1 if None.
        """
        dilation = dilation or (1,) * len(kernel)
        local = [d * (k - 1) / 2 - p for k, p, d in zip(kernel, padding, dilation, strict=True)]
        return Placement(
            tuple(outer * inner for outer, inner in zip(self.stride, stride, strict=True)),
            tuple(
                start + outer * shift
                for start, outer, shift in zip(self.offset, self.stride, local, strict=True)
            ),
        )
