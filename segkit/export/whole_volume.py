"""Run an exported network on whole scans like segkit: resample, run windows, resample back.

A bundle contains a copy of this file. It needs PyTorch, NumPy and SciPy, but neither segkit nor
MONAI. It does the same as `segkit predict`, but in a simpler way that needs more memory.

    body's box ─▶ normalised ─▶ the network's spacing ─▶ windows ─▶ blended ─▶ the box's own spacing

An image is (channel, x, y, z) in RAS+ order (axes to the right, the front and the head), cropped to
the box of all voxels that are not 0. Logits are returned on the grid of the image.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

SLICES_APART = 3.0
"""If the distance of slices is more than this times that of pixels, the nearest slice is used
instead of interpolation."""
FAR_BELOW = -30.0
"""Logit of each class but the background, or of each region, at voxels without any window."""


@dataclass(frozen=True, kw_only=True)
class WholeVolume:
    """Computes the logits of every voxel of a scan. MONAI calls it like an `Inferer`.

    Axes are in RAS+ order. `WholeVolume` uses neither mirror images nor an ensemble.

    Example:
        >>> inferer = WholeVolume(
        ...     spacing=(2.0, 2.0, 2.0),
        ...     normalisation=[{"kind": "zscore", "nonzero": False}],
        ...     interpolation="linear",
        ...     patch_size=(16, 16, 16),
        ...     overlap=(0.5, 0.5, 0.5),
        ...     multiple=(1, 1, 1),
        ... )
        >>> image = torch.rand(1, 40, 48, 20)  # (channel, x, y, z)
        >>> network = torch.nn.Conv3d(1, 2, kernel_size=1)
        >>> inferer.logits(image, (1.0, 1.0, 3.0), network).shape  # (class, x, y, z)
        torch.Size([2, 40, 48, 20])
    """

    spacing: Sequence[float]
    """Spacing of the network's voxels, in mm."""
    normalisation: Sequence[Mapping[str, Any]]
    """Normalisation of each channel: {"kind": "zscore", "nonzero": …} or {"kind": "ct", "lower": …,
    "upper": …, "mean": …, "std": …}."""
    interpolation: str
    """Interpolation of images, "linear" or "cubic"."""
    patch_size: Sequence[int]
    """Size of a window, in voxels."""
    overlap: Sequence[float]
    """Share of a window that neighbours have in common, for each axis."""
    multiple: Sequence[int]
    """The first voxel of each window is a multiple of this, for each axis."""
    regions: bool = False
    """True if the outputs are regions, False if they are classes."""
    batch_size: int = 1
    """Number of windows in each call of the network."""
    skip_empty: bool = True
    """If True, the network does not run on windows in which every voxel of the scan is 0; they
    become background."""

    def __call__(self, image: Any, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of a MetaTensor of MONAI.

        Args:
            image: (1, channel, x, y, z); its `affine` gives the spacing in mm.
            network: as for `logits`.

        Returns:
            Logits (1, output, x, y, z).
        """
        affine = np.asarray(image.affine, dtype=np.float64).reshape(-1, 4, 4)[0]
        own_spacing = np.linalg.norm(affine[:3, :3], axis=0).tolist()
        return self.logits(image.as_tensor()[0], own_spacing, network)[None]

    @torch.no_grad()
    def logits(
        self, image: Tensor, own_spacing: Sequence[float], network: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Logits (output, x, y, z) of an image.

        Args:
            image: (channel, x, y, z).
            own_spacing: spacing of the image, in mm.
            network: maps windows (batch, channel, *patch) to logits (batch, output, *patch).

        Returns:
            Logits (output, x, y, z) on the grid of the image, float32.
        """
        axes = [
            Axis(size, own, wanted)
            for size, own, wanted in zip(image.shape[1:], own_spacing, self.spacing, strict=True)
        ]
        thick = [number for number, axis in enumerate(axes) if axis.size > 1]
        if (apart := slice_axis(own_spacing, self.spacing, thick)) is not None:
            axes[apart].nearest = True
        prepared = torch.stack(
            [
                self._resampled(normalised(channel.float(), setting), axes)
                for channel, setting in zip(image, self.normalisation, strict=True)
            ]
        )
        blended = self._blended(prepared, image, axes, network)
        for number, axis in enumerate(axes, start=1):
            blended = linear(blended, axis.of_source(), number)
        return blended

    def _resampled(self, channel: Tensor, axes: Sequence["Axis"]) -> Tensor:
        """A channel at the network's spacing; its values stay within the channel's range."""
        lowest, highest = channel.min(), channel.max()
        between = [self.interpolation == "cubic" and not axis.picks for axis in axes]
        for number, axis in enumerate(axes):
            if not between[number]:
                channel = linear(channel, axis.of_network(), number)
        if not any(between):
            return channel
        along = list(zip(axes, between, strict=True))
        spline = ndimage.affine_transform(
            channel.cpu().numpy(),
            [axis.stride if cubic else 1.0 for axis, cubic in along],
            offset=[axis.offset if cubic else 0.0 for axis, cubic in along],
            output_shape=tuple(axis.new_size for axis in axes),
            order=3,
            mode="nearest",
        )
        return torch.from_numpy(spline).to(channel.device).clamp(lowest, highest)

    def _blended(
        self,
        prepared: Tensor,
        image: Tensor,
        axes: Sequence["Axis"],
        network: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Logits on the network's grid: the mean over windows, weighted by a Gaussian.

        Args:
            prepared: the image at the network's spacing, normalised.
            image: the image before; it decides which windows are empty.
            axes: the three axes.
            network: maps windows to logits.
        """
        size = prepared.shape[1:]
        starts = [
            starts_of_windows(*numbers)
            for numbers in zip(size, self.patch_size, self.overlap, self.multiple, strict=True)
        ]
        # Beyond the end of an axis, windows repeat its last voxels.
        full = [first[-1] + patch for first, patch in zip(starts, self.patch_size, strict=True)]
        for number, (length, held) in enumerate(zip(full, size, strict=True), start=1):
            index = torch.arange(length, device=prepared.device).clamp(max=held - 1)
            prepared = prepared.index_select(number, index)
        weight = torch.ones(())
        for patch in self.patch_size:
            weight = weight[..., None] * window_profile(patch)
        weight = weight.to(prepared.device)
        places = list(itertools.product(*starts))
        wanted = [place for place in places if not self._is_empty(image, axes, place)]
        total = torch.zeros(full, device=prepared.device)
        summed: Tensor | None = None
        for first in range(0, max(len(wanted), 1), self.batch_size):
            # If all windows are empty, the network runs on one, to learn its number of outputs.
            batch = wanted[first : first + self.batch_size] or places[:1]
            spans = [
                tuple(slice(at, at + n) for at, n in zip(place, self.patch_size, strict=True))
                for place in batch
            ]
            outputs = network(torch.stack([prepared[(slice(None), *span)] for span in spans]))
            if summed is None:
                summed = torch.zeros(outputs.shape[1], *full, device=prepared.device)
            for logits, span in zip(outputs if wanted else (), spans, strict=False):
                summed[(slice(None), *span)] += logits.float() * weight
                total[span] += weight
        assert summed is not None
        for output, values in enumerate(summed):
            background = output == 0 and not self.regions
            values.div_(total).masked_fill_(total == 0, 0.0 if background else FAR_BELOW)
        return summed[(slice(None), *(slice(length) for length in size))]

    def _is_empty(self, image: Tensor, axes: Sequence["Axis"], place: Sequence[int]) -> bool:
        """True if every voxel from which a window is interpolated is 0."""
        if not self.skip_empty:
            return False
        spans = [
            axis.below(first, first + patch)
            for axis, first, patch in zip(axes, place, self.patch_size, strict=True)
        ]
        return not bool(image[(slice(None), *spans)].any())


class Axis:
    """An axis of a scan, and the network's voxels along it, with the same middle."""

    def __init__(self, size: int, own_spacing: float, spacing: float) -> None:
        self.size = size
        # An axis of one voxel keeps it: its spacing means nothing.
        self.stride = spacing / own_spacing if size > 1 else 1.0
        self.new_size = max(round(size / self.stride), 1)
        self.offset = (size - 1) / 2 - self.stride * (self.new_size - 1) / 2
        self.nearest = False
        """True if each voxel is copied from the nearest slice instead of interpolated."""

    @property
    def picks(self) -> bool:
        """True if each of the network's voxels is a copy of one of the scan's voxels."""
        return self.nearest or not bool((self._inside() % 1).any())

    def of_network(self) -> np.ndarray:
        """Positions of the network's voxels on the scan's axis, in the scan's voxels."""
        return self._taken(self._inside())

    def of_source(self) -> np.ndarray:
        """Positions of the scan's voxels on the network's axis, in the network's voxels."""
        return self._taken(np.round((np.arange(self.size) - self.offset) / self.stride, 9))

    def below(self, first: int, last: int) -> slice:
        """The scan's voxels from which the network's voxels `first` to `last` - 1 are made."""
        inside = self._inside()[first:last]
        low, high = (min(max(at, 0), self.size - 1) for at in (inside[0], inside[-1]))
        return slice(math.floor(low), math.ceil(high) + 1)

    def _inside(self) -> np.ndarray:
        return np.round(self.stride * np.arange(self.new_size) + self.offset, 9)

    def _taken(self, positions: np.ndarray) -> np.ndarray:
        return np.ceil(positions - 0.5) if self.nearest else positions


def slice_axis(
    own: Sequence[float], wanted: Sequence[float], axes: Sequence[int] = (0, 1, 2)
) -> int | None:
    """The axis with slices far apart in the scan, or else in the network's spacing; None if none.

    As in nnU-Net (Isensee et al. 2021), slices are far apart if their spacing is more than
    `SLICES_APART` times the finest spacing.

    Args:
        own: spacing of the scan, in mm.
        wanted: spacing of the network's voxels, in mm.
        axes: the axes to compare: those with more than one voxel.
    """
    for spacing in (own, wanted):
        compared = {axis: spacing[axis] for axis in axes} or {0: 1.0}
        largest = max(compared.values())
        if largest / min(compared.values()) > 1.000001 * SLICES_APART:  # but for rounding
            coarsest = [axis for axis, length in compared.items() if length > 0.9999 * largest]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def normalised(channel: Tensor, setting: Mapping[str, Any]) -> Tensor:
    """A channel with normalised intensities, as in training."""
    if setting["kind"] == "ct":
        clamped = channel.clamp(setting["lower"], setting["upper"])
        window: Tensor = (clamped - setting["mean"]) / setting["std"]
        return window
    counted = channel[channel != 0] if setting["nonzero"] else channel
    if counted.numel() == 0:
        return channel
    mean, std = (float(counted.double().mean()), float(counted.double().std(correction=0)))
    return (channel - mean) / (std if std > 1e-8 * abs(mean) else 1.0)


def linear(values: Tensor, positions: np.ndarray, axis: int) -> Tensor:
    """Values at fractional positions along an axis, interpolated linearly between neighbours.

    Beyond the ends of the axis, the outermost values are repeated.
    """
    last = values.shape[axis] - 1
    places = np.clip(positions, 0, last)
    lower = np.floor(places).astype(np.int64)
    below = torch.from_numpy(lower).to(values.device)
    found = values.index_select(axis, below)
    if (places == lower).all():
        return found
    above = values.index_select(axis, (below + 1).clamp(max=last))
    share = torch.from_numpy(places - lower).to(values).view(-1, *[1] * (values.ndim - axis - 1))
    return found * (1 - share) + above * share


def starts_of_windows(size: int, patch: int, overlap: float, multiple: int) -> list[int]:
    """First voxels of the windows of an axis, evenly spaced multiples of `multiple`.

    Args:
        size: number of voxels of the axis.
        patch: size of a window, in voxels.
        overlap: share of a window that neighbours have in common at least.
        multiple: number of which all starts are multiples.
    """
    last = max(math.ceil(size / multiple) * multiple - patch, 0)
    step = max(math.floor(patch * (1 - overlap) / multiple), 1) * multiple
    count = math.ceil(last / step)
    return [round(index * last / max(count, 1) / multiple) * multiple for index in range(count + 1)]


def window_profile(patch: int) -> Tensor:
    """Weights of a window's voxels along an axis: a Gaussian with sigma `patch / 8`."""
    distance = torch.arange(patch, dtype=torch.float64) - (patch - 1) / 2
    return torch.exp(-0.5 * (distance / (patch / 8)) ** 2).float()


@dataclass(frozen=True)
class WrittenRegions:
    """Computes labels (1, x, y, z) from the logits (region, x, y, z) of regions.

    A voxel with a logit above 0 gets the number of the region. Later regions overwrite earlier
    ones. Voxels in no region are 0.
    """

    numbers: Sequence[int]

    def __call__(self, logits: Tensor) -> Tensor:
        """The labels."""
        labels = torch.zeros_like(logits[:1])
        for region, number in zip(logits, self.numbers, strict=True):
            labels[0].masked_fill_(region > 0, number)
        return labels


@dataclass(frozen=True, kw_only=True)
class LargestComponents:
    """Keeps only the largest connected components of labels (1, x, y, z)."""

    of_foreground: bool
    """Keep only the largest component of all voxels that are not 0."""
    of_labels: Sequence[int]
    """After that, keep only the largest component of each of these labels."""

    def __call__(self, labels: Tensor) -> Tensor:
        """The labels that are kept. If several components are the largest, all are kept."""
        kept = labels.cpu().numpy()[0].copy()
        if self.of_foreground:
            self._remove_the_rest(kept, kept > 0)
        for label in self.of_labels:
            self._remove_the_rest(kept, kept == label)
        return torch.from_numpy(kept)[None].to(labels)

    @staticmethod
    def _remove_the_rest(kept: np.ndarray, mask: np.ndarray) -> None:
        pieces, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
        sizes = np.bincount(pieces.ravel(), minlength=count + 1)
        sizes[0] = 0
        kept[mask & (sizes < sizes.max())[pieces]] = 0
