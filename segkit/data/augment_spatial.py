"""Random rotation, scaling, deformation and mirroring of patches, on the training device.

Image and label are transformed together. Ranges and probabilities of rotation, scaling and
mirroring are nnU-Net's (Isensee et al. 2021).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Integer
from numpy import ndarray
from torch import Generator, Tensor

Batch = tuple[Float[Tensor, "batch channel *space"], Integer[Tensor, "batch *space"]]
Vary = Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor]]
"""A function that augments a batch of images and labels with a generator."""
LARGEST_ANGLE = math.pi / 6
"""Largest angle about each axis in 3D, in radians; in 2D it is half a turn."""
LARGEST_ANGLE_OF_AN_OBLONG = math.pi / 12
"""Largest angle of an oblong image in 2D, in radians."""
OBLONG = 1.5
"""An image in 2D is oblong if the ratio of its sides is larger than this."""
FLAT = 3
"""A patch in 3D is rotated like a stack of slices if the ratio of its sides is larger than this."""

EXACT_IN_FLOAT32 = 2**24
"""float32 holds each whole number up to this one."""


@dataclass(frozen=True)
class SpatialVariation:
    """Random rotation, scaling, elastic deformation and mirroring, with their ranges.

    Patches are rotated and deformed in millimetres, so that a sphere stays a sphere even if voxels
    are anisotropic; nnU-Net rotates in voxels. Elastic deformation is off by default, as in
    nnU-Net.
    """

    patch_size: tuple[int, ...]
    mirror_axes: tuple[int, ...]
    spacing: tuple[float, ...] | None = None
    """Voxel size in mm along each axis. Default: 1 along all axes."""
    share: float = 1.0
    """Factor of the probability of each change but mirroring, between 0 and 1."""
    rotation_probability: float = 0.2
    angles: tuple[float, float] | None = None
    """Smallest and largest angle in each plane of rotation, in radians. Default: by the shape of
    the patch."""
    scale_probability: float = 0.2
    scales: tuple[float, float] = (0.7, 1.4)
    """Smallest and largest scale; above 1 magnifies."""
    elastic_probability: float = 0.0
    elastic_amplitude: float = 2.0
    """Standard deviation of the displacement along each axis at the control points, in mm."""
    elastic_spacing: float = 24.0
    """Distance between control points, in mm."""
    mirror_probability: float = 0.5

    @property
    def moving_axes(self) -> tuple[int, ...]:
        """The axes along which patches are rotated, scaled and deformed. (Mirroring uses any axis.)

        An axis of one voxel is left out, so that a slice stays in its plane. The coarsest axis of a
        3D patch is left out if another axis has more than three times as many voxels, so that
        slices are not mixed.
        """
        axes = [axis for axis, size in enumerate(self.patch_size) if size > 1]
        if len(axes) == 3:
            spacing = self._spacing
            coarsest = max(axes, key=lambda axis: (spacing[axis], -self.patch_size[axis]))
            if max(self.patch_size) / self.patch_size[coarsest] > FLAT:
                axes.remove(coarsest)
        return tuple(axes)

    @property
    def margin(self) -> tuple[int, ...]:
        """Number of voxels to cut in addition at each end of a patch, which rotation needs.

        It is 0 if patches are only mirrored. Otherwise it is, along moving axes, an eighth of the
        patch, plus twice the amplitude of deformation. Then rotated patches seldom look outside the
        cut. It is the same at both ends; otherwise a patch that is not rotated would be shifted by
        half a voxel.
        """
        moving = self.moving_axes if self.share > 0 else ()
        bent = 2 * self.elastic_amplitude if self.elastic_probability > 0 else 0.0
        return tuple(
            math.ceil(size / 8) + math.ceil(bent / self._spacing[axis]) if axis in moving else 0
            for axis, size in enumerate(self.patch_size)
        )

    @property
    def cut_size(self) -> tuple[int, ...]:
        """Size of a patch with its margins."""
        return tuple(
            size + 2 * beyond for size, beyond in zip(self.patch_size, self.margin, strict=True)
        )

    def __call__(
        self,
        image: Float[Tensor, "batch channel *cut"],
        label: Integer[Tensor, "batch *cut"],
        generator: Generator,
    ) -> Batch:
        """Patches from the middle of each cut, after a random transform.

        Intensities are interpolated linearly and labels by nearest neighbour, at the same
        positions. Outside the cut, its outermost voxels are repeated. A patch that is not rotated,
        scaled or deformed is only cut and flipped, bit for bit.
        """
        transforms = self._transforms(len(image), generator)
        bent = torch.rand(len(image), generator=generator) < self.share * self.elastic_probability
        if self.elastic_amplitude == 0:
            bent = torch.zeros_like(bent)
        flips = torch.rand(len(image), len(self.mirror_axes), generator=generator)
        identity = torch.eye(len(self.patch_size), dtype=torch.float64)
        moved = ((transforms != identity).flatten(1).any(1) | bent).nonzero().flatten()

        middle = self._middle(tuple(label.shape[1:]))
        patch, patch_label = image[:, :, *middle], label[:, *middle]
        if len(moved) > 0:
            rows = moved.to(image.device, non_blocking=True)
            displacement = None
            if bent.any():
                displacement = self._displacement(bent[moved], generator, image.device)
            places = _places(self.patch_size, transforms[moved], displacement, image.device)
            seen, seen_label = _resample(
                image.index_select(0, rows), label.index_select(0, rows), places
            )
            patch = patch.index_copy(0, rows, seen)
            patch_label = patch_label.index_copy(0, rows, seen_label)
        mirrored = flips < self.mirror_probability
        from_last = [axis - len(self.patch_size) for axis in self.mirror_axes]
        return _mirror(patch, from_last, mirrored), _mirror(patch_label, from_last, mirrored)

    @property
    def _spacing(self) -> tuple[float, ...]:
        return self.spacing or (1.0,) * len(self.patch_size)

    def _angles(self) -> tuple[float, float]:
        if self.angles is not None:
            return self.angles
        moving = self.moving_axes
        sides = [self.patch_size[axis] for axis in moving]
        largest = LARGEST_ANGLE
        if len(moving) == 2:
            is_a_slice = sum(size > 1 for size in self.patch_size) == 2
            oblong = is_a_slice and max(sides) / min(sides) > OBLONG
            largest = LARGEST_ANGLE_OF_AN_OBLONG if oblong else math.pi
        return -largest, largest

    def _transforms(self, batch_size: int, generator: Generator) -> Float[Tensor, "batch n n"]:
        """Matrices from voxels of the patch to voxels of the cut, relative to their centres.

        Mirroring is not included.
        """
        num_axes = len(self.patch_size)
        moving = list(self.moving_axes)
        planes = [(a, b) for i, a in enumerate(moving) for b in moving[i + 1 :]]
        low, high = self._angles()
        spacing = np.array(self._spacing)
        transforms = np.tile(np.eye(num_axes), (batch_size, 1, 1))
        draws = torch.rand(batch_size, 3 + len(planes), generator=generator).tolist()
        for matrix, (turn, resize, scale, *turns) in zip(transforms, draws, strict=True):
            if turn < self.share * self.rotation_probability:
                for (first, second), angle in zip(planes, turns, strict=True):
                    angle = low + (high - low) * angle
                    matrix[:] = matrix @ _rotation(num_axes, first, second, angle)
                matrix *= spacing / spacing[:, None]
            if resize < self.share * self.scale_probability:
                matrix[:, moving] /= self.scales[0] + (self.scales[1] - self.scales[0]) * scale
        return torch.from_numpy(transforms)

    def _displacement(
        self, bent: Bool[Tensor, " row"], generator: Generator, device: torch.device
    ) -> Float[Tensor, "row n *patch"]:
        """Smooth random displacements in voxels; 0 for patches that are not `bent`."""
        weights = [
            cubic_weights(size, self.elastic_spacing / spacing)
            for size, spacing in zip(self.patch_size, self._spacing, strict=True)
        ]
        points = [weight.shape[1] for weight in weights]
        field = torch.zeros(len(bent), len(points), *points)
        for axis in self.moving_axes:
            drawn = torch.randn(int(bent.sum()), *points, generator=generator)
            field[bent, axis] = drawn * self.elastic_amplitude / self._spacing[axis]
        field = field.to(device, non_blocking=True)
        with torch.autocast(device.type, enabled=False):
            for axis, weight in enumerate(weights, start=2):
                spread = weight.T.to(device, non_blocking=True)
                field = (field.movedim(axis, -1) @ spread).movedim(-1, axis)
        return field

    def _middle(self, cut: Sequence[int]) -> tuple[slice, ...]:
        region = []
        for size, extent in zip(self.patch_size, cut, strict=True):
            beyond = extent - size
            if beyond < 0 or beyond % 2 == 1:
                raise ValueError(
                    f"expected a cut of {self.cut_size} for patches of {self.patch_size}, found "
                    f"{tuple(cut)}; cut patches with this margin"
                )
            region.append(slice(beyond // 2, beyond // 2 + size))
        return tuple(region)


def cubic_weights(size: int, step: float) -> Float[Tensor, "size point"]:
    """Weights of control points, `step` voxels apart, at each voxel of an axis.

    This is the cubic convolution of Keys (1981, IEEE TASSP 29) with a = -1/2. It passes through the
    points, has a continuous slope, and keeps straight lines straight. One point lies in the middle
    of the axis.
    """
    half = (size - 1) / 2 / step
    middle = math.ceil(half) + 1
    at = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) / step + middle
    distance = (at[:, None] - torch.arange(2 * middle + 2)).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    worth = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))
    return worth.float()


def _places(
    patch_size: Sequence[int],
    transforms: Float[Tensor, "row n n"],
    displacement: Float[Tensor, "row n *patch"] | None,
    device: torch.device,
) -> Float[Tensor, "row n *patch"]:
    """The position at which each voxel of the patch is read, in voxels from the middle of the cut.

    These are sums instead of a matrix product, because a product may run in TF32 on a GPU, with
    errors of a fraction of a voxel. All axes are computed at once, because a GPU takes as long to
    begin an operation as to do it.

    Args:
        patch_size: size of a patch, in voxels.
        transforms: matrices from voxels of the patch to voxels of the cut, relative to their
            centres.
        displacement: elastic displacement of each voxel, in voxels; None for none.
        device: the device that computes.

    Returns:
        The position of each voxel along each axis.
    """
    num_axes = len(patch_size)
    offsets = [torch.arange(size, dtype=torch.float32) - (size - 1) / 2 for size in patch_size]
    matrices = transforms.float()
    # For each axis of the patch, its part of the position along every axis: (row, n, size).
    along = [matrices[:, :, axis, None] * offset for axis, offset in enumerate(offsets)]
    parts = torch.cat(along, dim=2).to(device, non_blocking=True).split(list(patch_size), dim=2)
    places = torch.zeros((), device=device)
    for axis, part in enumerate(parts):
        shape = [1] * num_axes
        shape[axis] = patch_size[axis]
        places = places + part.reshape(*part.shape[:2], *shape)
    if displacement is not None:
        columns = matrices.to(device, non_blocking=True)
        for axis in range(num_axes):
            column = columns[:, :, axis].reshape(*columns.shape[:2], *[1] * num_axes)
            places = places + column * displacement[:, axis, None]
    return places


def _resample(
    image: Float[Tensor, "row channel *cut"],
    label: Integer[Tensor, "row *cut"],
    places: Float[Tensor, "row n *patch"],
) -> Batch:
    cut, patch = label.shape[1:], places.shape[2:]
    # A stack of one slice is sampled in 2D, which takes torch a tenth of the time.
    thin = [axis for axis, size in enumerate(patch) if cut[axis] == size == 1]
    thin = thin if len(thin) == len(cut) - 2 else []
    wide = [axis for axis in range(len(cut)) if axis not in thin]

    # In grid_sample, the outer edges are -1 and 1, and the last axis comes first. The positions are
    # written into one tensor, because another order would take as long as the sampling.
    flat = [axis + 2 for axis in thin]
    grid = torch.empty(len(places), *(patch[axis] for axis in wide), len(wide), device=image.device)
    for number, axis in enumerate(reversed(wide)):
        along = places[:, axis].squeeze([each - 1 for each in flat])
        torch.mul(along, 2 / cut[axis], out=grid[..., number])
    seen = F.grid_sample(
        image.float().squeeze(flat),
        grid,
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    # Sums of whole numbers, which floating point holds exactly.
    exact = torch.float32 if math.prod(cut) < EXACT_IN_FLOAT32 else torch.float64
    index = torch.zeros((), dtype=exact, device=places.device)
    for axis, extent in enumerate(cut):
        voxel = (places[:, axis] + (extent - 1) / 2).round_().clamp_(0, extent - 1)
        index = torch.add(voxel.to(exact), index, alpha=extent)
    index = index.long()
    seen_label = label.flatten(1).gather(1, index.flatten(1)).view(index.shape)
    seen = seen.view(*image.shape[:2], *patch)
    return seen.to(image.dtype), seen_label


def _mirror(patches: Tensor, axes: Sequence[int], mirrored: Bool[Tensor, "row axis"]) -> Tensor:
    """Patches that are flipped along those of the axes that are drawn for them.

    Args:
        patches: patches, one for each row.
        axes: the axes, counted from the last.
        mirrored: whether a patch is flipped along each of the axes.
    """
    for axis, drawn in zip(axes, mirrored.unbind(1), strict=True):
        if drawn.all():
            patches = patches.flip(axis)
        elif drawn.any():
            rows = drawn.view(-1, *[1] * (patches.ndim - 1)).to(patches.device, non_blocking=True)
            patches = torch.where(rows, patches.flip(axis), patches)
    return patches.contiguous()


def _rotation(num_axes: int, first: int, second: int, angle: float) -> Float64[ndarray, "n n"]:
    matrix = np.eye(num_axes)
    matrix[first, first] = matrix[second, second] = math.cos(angle)
    matrix[first, second], matrix[second, first] = -math.sin(angle), math.sin(angle)
    return matrix
