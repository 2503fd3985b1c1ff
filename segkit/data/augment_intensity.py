"""Random changes of the intensities of a batch of patches, on the training device.

Kinds, order, ranges and probabilities are nnU-Net's (Isensee et al. 2021), but noise is stronger. A
change that is not drawn for a sample takes no time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from segkit.nn.blocks import LINEAR_MODE

Range = tuple[float, float]
IntensityRows = Float[Tensor, "row *space"]
"""The channels of all samples of a batch, as rows."""


@dataclass(frozen=True)
class IntensityVariation:
    """Random changes of intensities, with the probability and the range of each.

    A change is drawn for each sample. If it has a channel probability, it is also drawn for each
    channel. Its strength is drawn for each channel.
    """

    share: float = 1.0
    """Factor of the probability that a sample is changed, between 0 and 1."""
    noise_probability: float = 0.1
    noise_variance: Range = (0.0, 0.1)
    """Drawn once for all channels of a sample; the noise itself differs between channels. nnU-Net's
    code takes the drawn number as the standard deviation, so its noise is weaker."""
    blur_probability: float = 0.2
    blur_channel_probability: float = 0.5
    blur_sigma: Range = (0.5, 1.0)
    """In voxels, drawn for each axis."""
    brightness_probability: float = 0.15
    brightness: Range = (0.75, 1.25)
    contrast_probability: float = 0.15
    contrast: Range = (0.75, 1.25)
    low_resolution_probability: float = 0.25
    low_resolution_channel_probability: float = 0.5
    low_resolution_zoom: Range = (0.5, 1.0)
    low_resolution_kept_axes: tuple[int, ...] = ()
    """Axes whose resolution is not lowered, because it is low already."""
    inverted_gamma_probability: float = 0.1
    gamma_probability: float = 0.3
    gamma: Range = (0.7, 1.5)

    def __call__(
        self, image: Float[Tensor, "batch channel *space"], generator: Generator
    ) -> Float[Tensor, "batch channel *space"]:
        """The batch with intensities changed at random."""
        batch, channels, *space = image.shape
        steps: list[tuple[float, float, Callable[[IntensityRows, Generator], IntensityRows]]] = [
            (self.noise_probability, 1.0, partial(self._noise, channels=channels)),
            (self.blur_probability, self.blur_channel_probability, self._blur),
            (self.brightness_probability, 1.0, self._brightness),
            (self.contrast_probability, 1.0, self._contrast),
            (
                self.low_resolution_probability,
                self.low_resolution_channel_probability,
                self._low_resolution,
            ),
            (self.inverted_gamma_probability, 1.0, self._inverted_gamma),
            (self.gamma_probability, 1.0, self._gamma),
        ]
        with torch.autocast(image.device.type, enabled=False):
            varied = image.to(torch.float32, copy=True).flatten(0, 1)
            for of_samples, of_channels, step in steps:
                samples = torch.rand(batch, 1, generator=generator) < self.share * of_samples
                chosen = samples & (torch.rand(batch, channels, generator=generator) < of_channels)
                rows = chosen.flatten().nonzero().flatten()
                if len(rows) > 0:
                    rows = rows.to(image.device, non_blocking=True)
                    varied.index_copy_(0, rows, step(varied.index_select(0, rows), generator))
        return varied.view(batch, channels, *space).to(image.dtype)

    def _noise(self, rows: IntensityRows, generator: Generator, *, channels: int) -> IntensityRows:
        variance = _uniform(self.noise_variance, len(rows) // channels, generator)
        deviation = variance.sqrt().repeat_interleave(channels)
        own = generator_on(rows.device, generator)
        noise = torch.randn(rows.shape, generator=own, device=rows.device)
        return rows + noise * _each(deviation, rows)

    def _blur(self, rows: IntensityRows, generator: Generator) -> IntensityRows:
        num_axes = rows.ndim - 1
        sigmas = _uniform(self.blur_sigma, len(rows) * num_axes, generator)
        return blur(rows, sigmas.view(-1, num_axes), reach=math.ceil(3 * self.blur_sigma[1]))

    def _brightness(self, rows: IntensityRows, generator: Generator) -> IntensityRows:
        return rows * _each(_about_one(self.brightness, len(rows), generator), rows)

    def _contrast(self, rows: IntensityRows, generator: Generator) -> IntensityRows:
        return stretch_contrast(rows, _about_one(self.contrast, len(rows), generator))

    def _low_resolution(self, rows: IntensityRows, generator: Generator) -> IntensityRows:
        zooms = _uniform(self.low_resolution_zoom, len(rows), generator)
        return lower_resolution(rows, zooms, kept_axes=self.low_resolution_kept_axes)

    def _gamma(self, rows: IntensityRows, generator: Generator) -> IntensityRows:
        return gamma_curve(rows, _about_one(self.gamma, len(rows), generator))

    def _inverted_gamma(self, rows: IntensityRows, generator: Generator) -> IntensityRows:
        return -self._gamma(-rows, generator)


def generator_on(device: torch.device, generator: Generator) -> Generator:
    """A generator on the device, for random numbers of every voxel, so that none need be copied.

    On a CPU it is the given generator. On another device, the given generator draws its seed.
    """
    if device.type == "cpu":
        return generator
    seed = torch.randint(2**62, (), generator=generator)
    return Generator(device).manual_seed(int(seed))


def gaussian_weights(
    sigmas: Float[Tensor, "row axis"], reach: int
) -> Float[Tensor, "row axis tap"]:
    """Weights of a Gaussian at the distances -reach … reach, whose sum is 1, for each sigma.

    Args:
        sigmas: standard deviations, in voxels.
        reach: the largest distance, in voxels.
    """
    distance = torch.arange(-reach, reach + 1, dtype=sigmas.dtype)
    weights = torch.exp(-0.5 * (distance / sigmas[..., None]) ** 2)
    return weights / weights.sum(-1, keepdim=True)


def blur(
    rows: Float[Tensor, "row *space"], sigmas: Float[Tensor, "row axis"], *, reach: int = 3
) -> Float[Tensor, "row *space"]:
    """Each row, blurred by its own Gaussian along each axis. Outermost voxels are repeated outside.

    The blur is a weighted sum of shifted images. If kernels differ between rows, torch's grouped
    convolution takes ten times as long on a CPU.

    Args:
        rows: images.
        sigmas: standard deviation for each row and axis, in voxels.
        reach: half the width of the kernel, in voxels.
    """
    weights = gaussian_weights(sigmas, reach).to(rows.device, non_blocking=True)
    for axis, size in enumerate(rows.shape[1:]):
        if size == 1:
            continue
        padding = [0, 0] * (rows.ndim - 1)
        padding[-2 * axis - 2] = padding[-2 * axis - 1] = reach
        padded = F.pad(rows[None], padding, mode="replicate")[0]
        taps = [_each(tap, rows) for tap in weights[:, axis].unbind(1)]
        rows = padded.narrow(axis + 1, reach, size) * taps[reach]
        for step in range(1, reach + 1):
            before = padded.narrow(axis + 1, reach - step, size)
            after = padded.narrow(axis + 1, reach + step, size)
            rows = torch.addcmul(rows, before + after, taps[reach + step])
    return rows


def stretch_contrast(
    rows: Float[Tensor, "row *space"], factors: Float[Tensor, " row"]
) -> Float[Tensor, "row *space"]:
    """Each row with its distance from its mean multiplied by a factor, clipped to its old range."""
    flat = rows.flatten(1)
    mean = flat.mean(1, keepdim=True)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    stretched = (flat - mean) * _each(factors, flat) + mean
    return torch.clamp(stretched, low, high).view(rows.shape)


def lower_resolution(
    rows: Float[Tensor, "row *space"],
    zooms: Float[Tensor, " row"],
    *,
    kept_axes: Sequence[int] = (),
) -> Float[Tensor, "row *space"]:
    """Each row as if scanned at a lower resolution.

    Voxels are picked by nearest neighbour, and the row is interpolated linearly between them.

    Args:
        rows: images.
        zooms: for each row, the number of voxels along an axis is multiplied by this factor.
        kept_axes: axes that keep their resolution.
    """
    space = rows.shape[1:]
    lowered = []
    for row, zoom in zip(rows, zooms.tolist(), strict=True):
        fewer = [
            size if axis in kept_axes else max(round(size * zoom), 1)
            for axis, size in enumerate(space)
        ]
        picked = F.interpolate(row[None, None], size=fewer, mode="nearest-exact")
        lowered.append(F.interpolate(picked, size=tuple(space), mode=LINEAR_MODE[len(space)])[0, 0])
    return torch.stack(lowered)


def gamma_curve(
    rows: Float[Tensor, "row *space"], exponents: Float[Tensor, " row"]
) -> Float[Tensor, "row *space"]:
    """Each row after a gamma curve over its range; its mean and deviation are kept."""
    flat = rows.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    # Only the shape of the curve counts; mean and deviation are restored below.
    bent = ((flat - low) / (high - low).clamp(min=1e-7)) ** _each(exponents, flat)
    bent = bent - bent.mean(1, keepdim=True)
    mean = flat.mean(1, keepdim=True)
    # On a CPU, torch.std takes ten times as long, and vector_norm rounds badly.
    std = (flat - mean).square().mean(1, keepdim=True).sqrt()
    bent_std = bent.square().mean(1, keepdim=True).sqrt()
    return (bent * (std / bent_std.clamp(min=1e-7)) + mean).view(rows.shape)


def _uniform(limits: Range, count: int, generator: Generator) -> Float[Tensor, " count"]:
    low, high = limits
    return low + (high - low) * torch.rand(count, generator=generator)


def _about_one(limits: Range, count: int, generator: Generator) -> Float[Tensor, " count"]:
    """Factors that are below 1 as often as above, uniform on each side, as in nnU-Net."""
    low, high = limits
    if not low < 1 < high:
        return _uniform(limits, count, generator)
    side = torch.rand(count, generator=generator) < 0.5
    below, above = (_uniform(half, count, generator) for half in ((low, 1.0), (1.0, high)))
    return torch.where(side, below, above)


def _each(values: Float[Tensor, " row"], rows: Tensor) -> Tensor:
    """One value for each row, on the device of the rows, in a shape that broadcasts with them."""
    return values.to(rows.device, non_blocking=True).view(-1, *[1] * (rows.ndim - 1))
