"""Variations of a batch of patches, on the training device, image and label together.

The ranges and probabilities are nnU-Net's (Isensee et al. 2021) for rotation, scale, mirroring,
brightness, contrast, gamma and noise. Geometry is composed into one resampling.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Generator, Tensor

Batch = tuple[Float[Tensor, "batch channel *space"], Integer[Tensor, "batch *space"]]


@dataclass(frozen=True)
class SpatialVariation:
    """How far patches are turned, scaled and mirrored."""

    patch_size: tuple[int, ...]
    mirror_axes: tuple[int, ...]
    rotation_probability: float = 0.2
    largest_angle: float = math.pi / 6
    """Radians, about each axis in 3D."""
    scale_probability: float = 0.2
    scales: tuple[float, float] = (0.7, 1.4)
    """Above 1 magnifies."""
    mirror_probability: float = 0.5

    @property
    def margin(self) -> tuple[int, ...]:
        """What to cut beyond either end of a patch, so that turning seldom looks further.

        An eighth of the patch; as much at either end, or else a patch that is not turned would lie
        half a voxel off. Axes of one voxel stay: a slice is turned within its plane.
        """
        return tuple(0 if size == 1 else math.ceil(size / 8) for size in self.patch_size)

    @property
    def cut_size(self) -> tuple[int, ...]:
        """A patch and its margins."""
        return tuple(
            size + 2 * beyond for size, beyond in zip(self.patch_size, self.margin, strict=True)
        )

    def __call__(self, image: Tensor, label: Tensor, generator: Generator) -> Batch:
        """A patch out of the middle of each cut, seen through a random affine transform.

        Intensities are interpolated linearly, labels by nearest neighbour, both at the same places;
        beyond the cut lie its outermost voxels.
        """
        transform = self._transforms(len(image), generator)
        cut = torch.tensor(image.shape[2:], dtype=torch.float64)
        patch = torch.tensor(self.patch_size, dtype=torch.float64)
        # From patch voxels about the patch's centre to cut voxels about the cut's centre; then to
        # grid_sample's own units, in which the outer edges lie at -1 and 1 and axes run backwards.
        scaled = transform * patch[None, None, :] / cut[None, :, None]
        backwards = scaled.flip(1, 2)
        theta = F.pad(backwards, (0, 1)).to(image.device, torch.float32)
        size = [len(image), 1, *self.patch_size]
        grid = F.affine_grid(theta, size, align_corners=False)
        turned = F.grid_sample(
            image, grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        indices = label[:, None].to(image.dtype)
        turned_label = F.grid_sample(
            indices, grid, mode="nearest", padding_mode="border", align_corners=False
        )
        return turned, turned_label[:, 0].to(label.dtype)

    def _transforms(self, batch_size: int, generator: Generator) -> Float[Tensor, "batch n n"]:
        num_axes = len(self.patch_size)
        in_plane = [axis for axis, size in enumerate(self.patch_size) if size > 1]
        pairs = [(a, b) for i, a in enumerate(in_plane) for b in in_plane[i + 1 :]]
        largest = math.pi if len(pairs) == 1 else self.largest_angle
        transforms = []
        for _ in range(batch_size):
            matrix = torch.eye(num_axes, dtype=torch.float64)
            turn = _chance(self.rotation_probability, generator)
            for first, second in pairs:
                angle = _uniform(-largest, largest, generator)
                if turn:
                    matrix = matrix @ _rotation(num_axes, first, second, angle)
            scale = _uniform(*self.scales, generator)
            if _chance(self.scale_probability, generator):
                matrix[:, in_plane] /= scale
            for axis in self.mirror_axes:
                if _chance(self.mirror_probability, generator):
                    matrix[:, axis] *= -1
            transforms.append(matrix)
        return torch.stack(transforms)


@dataclass(frozen=True)
class IntensityVariation:
    """How far intensities are varied; each channel of each sample on its own."""

    noise_probability: float = 0.1
    largest_noise_variance: float = 0.1
    brightness_probability: float = 0.15
    brightness: tuple[float, float] = (0.75, 1.25)
    contrast_probability: float = 0.15
    contrast: tuple[float, float] = (0.75, 1.25)
    gamma_probability: float = 0.3
    gamma: tuple[float, float] = (0.7, 1.5)

    def __call__(
        self, image: Float[Tensor, "batch channel *space"], generator: Generator
    ) -> Float[Tensor, "batch channel *space"]:
        """The batch with noise, brightness, contrast and gamma changed at random."""
        lead = image.shape[:2]
        shape = (*lead, *[1] * (image.ndim - 2))

        def draw(low: float, high: float, probability: float, neutral: float) -> Tensor:
            value = low + (high - low) * torch.rand(lead, generator=generator)
            chosen = torch.rand(lead, generator=generator) < probability
            drawn = torch.where(chosen, value, torch.tensor(neutral))
            return drawn.view(shape).to(image.device, image.dtype)

        variance = draw(0.0, self.largest_noise_variance, self.noise_probability, 0.0)
        if bool((variance > 0).any()):
            noise = torch.randn(image.shape, generator=generator)
            image = image + noise.to(image.device, image.dtype) * variance.sqrt()
        image = image * draw(*self.brightness, self.brightness_probability, 1.0)
        factor = draw(*self.contrast, self.contrast_probability, 1.0)
        axes = tuple(range(2, image.ndim))
        mean = image.mean(axes, keepdim=True)
        low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
        image = torch.clamp((image - mean) * factor + mean, low, high)
        exponent = draw(*self.gamma, self.gamma_probability, 1.0)
        return torch.where(exponent == 1, image, _gamma(image, exponent))


def _gamma(image: Tensor, exponent: Tensor) -> Tensor:
    """The image's range to the power of `exponent`, with its mean and deviation kept."""
    axes = tuple(range(2, image.ndim))
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    span = (high - low).clamp(min=1e-7)
    bent = ((image - low) / span).clamp(min=0) ** exponent * span + low
    mean, std = image.mean(axes, keepdim=True), image.std(axes, keepdim=True, correction=0)
    new_mean, new_std = bent.mean(axes, keepdim=True), bent.std(axes, keepdim=True, correction=0)
    return (bent - new_mean) / new_std.clamp(min=1e-7) * std + mean


def _rotation(num_axes: int, first: int, second: int, angle: float) -> Float[Tensor, "n n"]:
    matrix = torch.eye(num_axes, dtype=torch.float64)
    matrix[first, first] = matrix[second, second] = math.cos(angle)
    matrix[first, second], matrix[second, first] = -math.sin(angle), math.sin(angle)
    return matrix


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _chance(probability: float, generator: Generator) -> bool:
    return float(torch.rand((), generator=generator)) < probability
