"""nnU-Net's rules for spacing, patch, network and batch.

The rules are those of Isensee et al. (2021, doi:10.1038/s41592-020-01008-z), as in version 2. Each
function names its rule. There are three differences from nnU-Net:

- Axes keep the order x, y, z (RAS+); nnU-Net has z, y, x, with the coarsest axis first.
- A network has at least one step down; an image too small for that gets a patch larger than itself.
- A patch that is made smaller loses voxels at every try, so that this ends; nnU-Net's patch may
  grow if one axis is no longer pooled and another is pooled instead.

Spacing is in mm; patches, shapes, strides and kernels are in voxels.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from segkit.config.data import is_ct
from segkit.geometry.grid import ANISOTROPY, measured_spacings

Spacing = tuple[float, ...]
Size = tuple[int, ...]
Lengths = tuple[int | float, ...]
"""A size. It may have halves, as the median of an even number of cases."""

SMALLEST_EDGE = 4
"""An axis keeps at least so many voxels when it is pooled."""
START_WIDTHS = (32, 16, 8)
MOST_CHANNELS = {2: 512, 3: 320}
INITIAL_VOXELS = {2: 2048**2, 3: 256**3}
# nnU-Net's limits for 8 GB: activations of a patch, and patches in a batch.
REFERENCE_ACTIVATIONS = {2: 85e6, 3: 560e6}
REFERENCE_BATCH = {2: 12, 3: 2}
REFERENCE_GIGABYTES = 8.0
SMALLEST_BATCH = 2
LARGEST_SHARE = 0.05
"""The share of the dataset's voxels that one batch may hold."""
LEAST_COVERED = 0.25
"""If a patch covers less than this share of the median image, a low-resolution stage is added."""
SLICE_PLANES: tuple[Literal["sagittal", "coronal", "axial"], ...] = ("sagittal", "coronal", "axial")


@dataclass(frozen=True)
class Intensities:
    """Foreground intensities of one channel, over all cases."""

    mean: float
    std: float
    median: float
    minimum: float
    maximum: float
    lower: float
    """Percentile 0.5."""
    upper: float
    """Percentile 99.5."""


@dataclass(frozen=True)
class Numbers:
    """The measurements of a dataset that decide its plan."""

    spacings: tuple[tuple[float, float, float], ...]
    """Voxel size of each case, in mm."""
    shapes: tuple[tuple[int, int, int], ...]
    """Size of the body's box of each case, in voxels."""
    box_shares: tuple[float, ...]
    """The share of each volume that lies in the body's box."""
    channels: tuple[str, ...]
    """Names of the channels."""
    intensities: tuple[Intensities | None, ...]
    """Foreground intensities of each channel; None if there is no foreground."""
    num_classes: int
    """Number of outputs of the network. Without regions, this includes the background."""


@dataclass(frozen=True)
class ChannelNormalisation:
    """The normalisation of one channel; only `ct` has values."""

    kind: Literal["zscore", "zscore nonzero", "ct"]
    lower: float | None = None
    upper: float | None = None
    mean: float | None = None
    std: float | None = None


class Topology(NamedTuple):
    """The strides and kernels of a network, and a patch that it can take."""

    patch_size: Size
    strides: tuple[Size, ...]
    kernels: tuple[Size, ...]

    @property
    def divisor(self) -> Size:
        """The patch is a multiple of this number, along each axis."""
        ones = (1,) * len(self.patch_size)
        return tuple(math.prod(steps) for steps in zip(ones, *self.strides, strict=True))


@dataclass(frozen=True)
class Setting:
    """The properties of the data that decide patch and network, along the network's axes."""

    spacing: Spacing
    median: Lengths
    """The median shape at that spacing."""
    dataset_voxels: float
    in_channels: int
    num_classes: int
    last_to_yield: int | None = None
    """If several axes could be shortened, this is the last: the coarsest, as in nnU-Net."""


# The grid


def target_spacing(
    spacings: Sequence[Spacing], shapes: Sequence[Size]
) -> tuple[float, float, float]:
    """The spacing to which all cases are resampled ("target spacing"): the median along each axis.

    If an axis is more than 3 times coarser than the others, with less than a third of their voxels,
    it takes the 10th percentile of its spacings, so that fewer cases lose slices. It remains the
    coarsest axis. The spacing of a case along an axis of one voxel is not counted, and an axis of
    one voxel in all cases is not compared.
    """
    target = list(median_spacing(spacings, shapes))
    sizes = np.median(np.array(shapes, float), axis=0).tolist()
    thick = thick_axes(shapes)
    if len(thick) < 2:
        return target[0], target[1], target[2]
    worst = max(thick, key=lambda axis: (target[axis], axis))
    others = [axis for axis in thick if axis != worst]
    next_coarsest = max(target[axis] for axis in others)
    fewest = min(sizes[axis] for axis in others)
    if target[worst] > ANISOTROPY * next_coarsest and sizes[worst] * ANISOTROPY < fewest:
        low = float(np.percentile(measured_spacings(spacings, shapes, worst), 10))
        target[worst] = low if low >= next_coarsest else next_coarsest + 1e-5
    return target[0], target[1], target[2]


def thick_axes(shapes: Sequence[Size]) -> list[int]:
    """Axes along which a case has more than one voxel."""
    return [axis for axis in range(3) if any(shape[axis] > 1 for shape in shapes)]


def median_spacing(
    spacings: Sequence[Spacing], shapes: Sequence[Size]
) -> tuple[float, float, float]:
    """The median spacing along each axis, over cases with more than one voxel there, if any."""
    x, y, z = (float(np.median(measured_spacings(spacings, shapes, axis))) for axis in range(3))
    return x, y, z


def coarsest_axis(spacing: Spacing | list[float]) -> int:
    """The coarsest axis, which nnU-Net puts first. If several are equal, it is the last of them."""
    return max(range(len(spacing)), key=lambda axis: (spacing[axis], axis))


def resampled_shapes(
    spacings: Sequence[Spacing], shapes: Sequence[Size], target: Spacing
) -> list[list[int]]:
    """The shape of each case at the target spacing, rounded to whole voxels.

    An axis of one voxel keeps it, as in preprocessing.
    """
    return [
        [
            max(round(s * n / t), 1) if n > 1 else 1
            for s, n, t in zip(spacing, shape, target, strict=True)
        ]
        for spacing, shape in zip(spacings, shapes, strict=True)
    ]


def median_shape(
    spacings: Sequence[Spacing], shapes: Sequence[Size], target: Spacing
) -> tuple[float, float, float]:
    """The median shape of the cases at the target spacing, each rounded to whole voxels."""
    resampled = resampled_shapes(spacings, shapes, target)
    x, y, z = np.median(np.array(resampled, float), axis=0).tolist()
    return x, y, z


# The network


def initial_patch(spacing: Spacing, median: Lengths) -> Lengths:
    """A patch of 256³ voxels (2D: 2048²) with equal sides in mm, limited to the median shape.

    This is nnU-Net's "initial patch size". It is too large on purpose and is made smaller later.
    """
    num_axes = len(spacing)
    edge = (INITIAL_VOXELS[num_axes] * math.prod(spacing)) ** (1 / num_axes)
    return tuple(min(round(edge / s), size) for s, size in zip(spacing, median, strict=True))


def topology(spacing: Spacing, patch: Lengths) -> Topology:
    """The steps down that a patch allows, and the patch padded to a multiple of them ("topology").

    An axis is pooled by 2 as long as it keeps 4 voxels and is less than twice as coarse as the
    finest axis that can be pooled. If only one axis can be pooled, it needs 12 voxels. The kernel
    along an axis is 1 until the axis is less than twice as coarse as the finest, and 3 from then
    on; at the coarsest level it is 3. So a coarse axis is pooled only after the finer axes have
    become as coarse.
    """
    num_axes = len(spacing)
    spacings, sizes = list(spacing), list(patch)
    kernel: Size = (1,) * num_axes
    strides: list[Size] = []
    kernels: list[Size] = []
    while pooled := _pooled(spacings, sizes):
        kernel = tuple(
            3 if edge == 3 or s / min(spacings) < 2 else 1
            for edge, s in zip(kernel, spacings, strict=True)
        )
        kernels.append(kernel)
        strides.append(tuple(2 if axis in pooled else 1 for axis in range(num_axes)))
        for axis in pooled:
            spacings[axis] *= 2
            sizes[axis] = math.ceil(sizes[axis] / 2)
    if not strides:
        fine = [s / min(spacing) < 2 for s in spacing]
        least = (2 if sum(fine) > 1 else 3) * SMALLEST_EDGE
        raised = [max(n, least) if f else n for n, f in zip(patch, fine, strict=True)]
        return topology(spacing, tuple(raised))
    divisors = [math.prod(steps) for steps in zip(*strides, strict=True)]
    padded = tuple(math.ceil(n / d) * d for n, d in zip(patch, divisors, strict=True))
    return Topology(padded, tuple(strides), (*kernels, (3,) * num_axes))


def _pooled(spacings: Sequence[float], sizes: Sequence[int | float]) -> list[int]:
    large = [axis for axis, size in enumerate(sizes) if size >= 2 * SMALLEST_EDGE]
    finest = min((spacings[axis] for axis in large), default=math.inf)
    pooled = [axis for axis in large if spacings[axis] / finest < 2]
    alone = len(pooled) == 1 and sizes[pooled[0]] < 3 * SMALLEST_EDGE
    return [] if alone else pooled


def shrinking(setting: Setting, first: Topology) -> Iterator[Topology]:
    """The topology, then smaller and smaller ones ("shrink to budget").

    Each step shortens the axis that is longest in relation to the median image, by as little as a
    network of the smaller size allows: 256, pooled 6 times, loses 32, not 64. If several axes are
    equal, they are shortened in the order x, y, z, with the coarsest last. An axis that can be
    pooled remains so.
    """
    candidate: Topology | None = first
    while candidate is not None:
        yield candidate
        candidate = _smaller(setting, candidate)


def _smaller(setting: Setting, current: Topology) -> Topology | None:
    patch = current.patch_size
    ratios = [size / median for size, median in zip(patch, setting.median, strict=True)]
    last = setting.last_to_yield
    order = sorted(range(len(patch)), key=lambda axis: (-ratios[axis], axis == last, axis))
    for axis in order:
        trial = max(patch[axis] - current.divisor[axis], 1)
        tried = topology(setting.spacing, (*patch[:axis], trial, *patch[axis + 1 :]))
        for size in range(patch[axis] - tried.divisor[axis], 2 * SMALLEST_EDGE - 1, -1):
            found = topology(setting.spacing, (*patch[:axis], size, *patch[axis + 1 :]))
            if math.prod(found.patch_size) < math.prod(patch):
                return found
    return None


def widths(num_levels: int, *, spatial_dims: int, start: int = START_WIDTHS[0]) -> tuple[int, ...]:
    """Channels of each level: doubled at each step down, at most 320 in 3D and 512 in 2D."""
    return tuple(min(start * 2**level, MOST_CHANNELS[spatial_dims]) for level in range(num_levels))


# Costs


def activations(
    *, channels: Sequence[int], strides: Sequence[Size], patch_size: Size, num_classes: int
) -> int:
    """Number of values in the outputs of a U-Net's layers for one patch ("memory estimate").

    Each level has two convolutions in the encoder, and a transposed convolution and two more
    convolutions in the decoder; then follows the head. As in nnU-Net, heads of deep supervision are
    not counted.

    Args:
        channels: number of channels of each level, the finest first.
        strides: stride along each axis, for each step to the next coarser level.
        patch_size: size of a patch, in voxels.
        num_classes: number of outputs.
    """
    voxels = _voxels(patch_size, strides)
    down = sum(2 * width * count for width, count in zip(channels, voxels, strict=True))
    up = sum(3 * width * count for width, count in zip(channels[:-1], voxels[:-1], strict=True))
    return down + up + num_classes * voxels[0]


def multiply_adds(
    *,
    channels: Sequence[int],
    strides: Sequence[Size],
    kernels: Sequence[Size],
    patch_size: Size,
    in_channels: int,
    num_classes: int,
    deep_supervision: bool = True,
) -> int:
    """Number of multiply-adds in a forward pass of `UNet` for one patch.

    Only convolutions are counted, because normalisation and activation cost little in comparison. A
    training step takes three times as many.

    Args:
        channels: number of channels of each level, the finest first.
        strides: stride along each axis, for each step to the next coarser level.
        kernels: kernel size along each axis, for each level.
        patch_size: size of a patch, in voxels.
        in_channels: number of channels of the image.
        num_classes: number of outputs.
        deep_supervision: whether coarser levels have heads.
    """
    voxels = _voxels(patch_size, strides)
    kernel_voxels = [math.prod(kernel) for kernel in kernels]
    num_skips = len(strides)
    total = 0
    for level, width in enumerate(channels):
        entering = channels[level - 1] if level else in_channels
        total += voxels[level] * kernel_voxels[level] * width * (entering + width)
    for level in range(num_skips):
        width, coarse = channels[level], channels[level + 1]
        # The kernel of the transposed convolution equals its stride: an output has one input.
        total += voxels[level] * width * (coarse + kernel_voxels[level] * (2 * width + width))
    for level in range(max(num_skips - 1, 1) if deep_supervision else 1):
        total += voxels[level] * channels[level] * num_classes
    return total


def _voxels(patch_size: Size, strides: Sequence[Size]) -> list[int]:
    """Number of voxels of each level."""
    sizes = [patch_size]
    for step in strides:
        sizes.append(tuple(n // stride for n, stride in zip(sizes[-1], step, strict=True)))
    return [math.prod(size) for size in sizes]


def largest_batch(budget: float, cost: int, patch_size: Size, dataset_voxels: float) -> int:
    """The largest batch in the budget: at most 5 % of the dataset's voxels, at least 2 patches.

    Args:
        budget: the memory that a batch may need, in the unit of `cost`.
        cost: the memory that a patch needs.
        patch_size: size of a patch, in voxels.
        dataset_voxels: number of voxels of the dataset, at the target spacing.
    """
    covered = round(dataset_voxels * LARGEST_SHARE / math.prod(patch_size))
    return max(min(round(budget / cost), covered), SMALLEST_BATCH)


# Low resolution and intensities


def needs_low_resolution(patch_size: Size, median_voxels: int | float) -> bool:
    """Whether a patch covers less than 25 % of an image's voxels ("low resolution")."""
    return math.prod(patch_size) < LEAST_COVERED * median_voxels


def coarser(spacing: Spacing) -> Spacing:
    """A spacing that is 3 % coarser along axes over twice as fine as the coarsest, or along all."""
    finer = [max(spacing) / s > 2 for s in spacing]
    return tuple(
        s * 1.03 if f or not any(finer) else s for s, f in zip(spacing, finer, strict=True)
    )


def normalisations(numbers: Numbers) -> tuple[ChannelNormalisation, ...]:
    """The normalisation of each channel ("intensity normalisation").

    A channel named CT is clipped to percentiles 0.5 and 99.5 of the foreground, and normalised by
    the foreground's mean and deviation. Other channels are normalised by the mean and deviation of
    each image. If the body's box has less than 75 % of the volume in the median case, voxels that
    are 0 are left out of them.
    """
    nonzero = float(np.median(numbers.box_shares)) < 0.75
    return tuple(
        ChannelNormalisation(
            "ct",
            *((found.lower, found.upper, found.mean, found.std) if found else (None,) * 4),
        )
        if is_ct(name)
        else ChannelNormalisation("zscore nonzero" if nonzero else "zscore")
        for name, found in zip(numbers.channels, numbers.intensities, strict=True)
    )
