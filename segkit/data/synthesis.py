"""Synthetic scans, drawn from label maps, so that a network learns anatomy instead of contrast.

The method is SynthSeg (Billot et al. 2023, Medical Image Analysis 86, arXiv:2107.09559). The map is
deformed smoothly; each label gets a random intensity and texture; then follow blur, a bias field,
noise and gamma. All steps run in batches on the device of the labels, in 2D and 3D. A generator on
the CPU draws single numbers; the device draws numbers for every voxel.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Generator, Tensor

from segkit.data.augment_intensity import blur, generator_on
from segkit.nn.blocks import LINEAR_MODE

CONTROL_SPACING = 16
"""Voxels between the control points of a smooth field."""


def smooth_field(
    batch_size: int,
    channels: int,
    space: Sequence[int],
    *,
    generator: Generator,
    device: torch.device | None = None,
) -> Float[Tensor, "batch channel *space"]:
    """A smooth random field: normal numbers at points about 16 voxels apart, interpolated linearly.

    The numbers have mean 0 and standard deviation 1 at the control points.

    Args:
        batch_size, channels: number of samples, and of fields in each.
        space: number of voxels along each axis.
        generator: a generator on the CPU.
        device: the device of the result; the CPU if None.
    """
    points = [max(round(size / CONTROL_SPACING) + 1, 2) if size > 1 else 1 for size in space]
    coarse = torch.randn(batch_size, channels, *points, generator=generator)
    return F.interpolate(
        coarse.to(device, non_blocking=True),
        size=tuple(space),
        mode=LINEAR_MODE[len(space)],
        align_corners=True,
    )


def deform(
    labels: Integer[Tensor, "batch *space"], *, amplitude: float, generator: Generator
) -> Integer[Tensor, "batch *space"]:
    """Labels, deformed by a smooth random displacement, by nearest neighbour.

    Axes of one voxel are not deformed. Outside the map, its outermost labels are repeated.

    Args:
        labels: label maps.
        amplitude: standard deviation of the displacement at the control points, in voxels.
        generator: a generator on the CPU.
    """
    space, device = labels.shape[1:], labels.device
    displacement = amplitude * smooth_field(
        len(labels), len(space), space, generator=generator, device=device
    )
    for axis, size in enumerate(space):
        if size == 1:
            displacement[:, axis] = 0
        # In grid_sample, an axis has length 2, and the last axis comes first.
        displacement[:, axis] /= size / 2
    offset = displacement.flip(1).movedim(1, -1)
    identity = torch.eye(len(space), len(space) + 1, device=device).expand(len(labels), -1, -1)
    grid = F.affine_grid(identity, [len(labels), 1, *space], align_corners=False) + offset
    read = F.grid_sample(
        labels[:, None].float(),
        grid,
        mode="nearest",
        padding_mode="border",
        align_corners=False,
    )
    return read[:, 0].to(labels.dtype)


def synthesise(
    labels: Integer[Tensor, "batch *space"],
    *,
    num_labels: int,
    intensities: Sequence[tuple[float, float]] | None,
    generator: Generator,
) -> Float[Tensor, "batch 1 *space"]:
    """A synthetic image for each label map, normalised over its non-zero voxels.

    A label whose mean is 0 has neither texture nor noise, like the background of a skull-stripped
    scan. Mean and deviation are taken over the other voxels, as in the normalisation `zscore` with
    `nonzero`.

    Args:
        labels: label maps.
        num_labels: number of labels.
        intensities: the range from which the mean intensity of each label is drawn. None means
            [0, 1] for all labels, so that contrasts are completely random.
        generator: a generator on the CPU.
    """
    batch, *space = labels.shape
    device = labels.device
    ranges = torch.tensor(intensities if intensities is not None else [(0.0, 1.0)] * num_labels)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    def on_device(values: Tensor) -> Tensor:
        return values.to(device, non_blocking=True)

    means = ranges[:, 0] + (ranges[:, 1] - ranges[:, 0]) * draw(0.0, 1.0, num_labels)
    deviations = draw(0.0, 0.06, num_labels) * (means > 0)
    flat = labels.long().flatten(1)
    mean = on_device(means).gather(1, flat).view(batch, 1, *space)
    deviation = on_device(deviations).gather(1, flat).view(batch, 1, *space)
    voxels = generator_on(device, generator)
    image = mean + deviation * torch.randn(mean.shape, generator=voxels, device=device)
    sigmas = draw(0.3, 1.2)[:, None].expand(-1, len(space))
    image = blur(image[:, 0], sigmas)[:, None]
    shape = (batch, 1, *[1] * len(space))
    field = smooth_field(batch, 1, space, generator=generator, device=device)
    bias = field * on_device(draw(0.0, 0.2).view(shape))
    noise = torch.randn(mean.shape, generator=voxels, device=device)
    noise = noise * on_device(draw(0.0, 0.04).view(shape))
    image = (image * bias.exp() + noise).clamp(min=0)
    image = image ** on_device(draw(-0.3, 0.3).exp().view(shape))
    silent = mean == 0
    return _normalised(image.masked_fill(silent, 0), ~silent)


def _normalised(image: Tensor, counted: Tensor) -> Tensor:
    axes = tuple(range(1, image.ndim))
    number = counted.sum(axes, keepdim=True).clamp(min=1)
    mean = (image * counted).sum(axes, keepdim=True) / number
    variance = ((image - mean).square() * counted).sum(axes, keepdim=True) / number
    return (image - mean) / variance.sqrt().clamp(min=1e-6)
