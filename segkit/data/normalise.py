"""Normalisation of intensities: by the statistics of each image, or by a window in HU."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float
from torch import Tensor

from segkit.config.data import CtWindowConfig, NormalisationConfig, ZScoreConfig

Normaliser = Callable[[Tensor], Tensor]
_PLANES_AT_ONCE = 8
"""Number of planes of which there is a copy in double precision at the same time."""


def build_normalisers(settings: Sequence[NormalisationConfig]) -> list[Normaliser]:
    """A normalisation function for each channel. All values of CT windows must be given."""
    return [_normaliser(setting) for setting in settings]


def _normaliser(setting: NormalisationConfig) -> Normaliser:
    match setting:
        case ZScoreConfig(nonzero=nonzero):
            return partial(zscore, nonzero=nonzero)
        case CtWindowConfig(lower=lower, upper=upper, mean=mean, std=std):
            assert lower is not None and upper is not None and mean is not None and std is not None
            return partial(ct_window, lower=lower, upper=upper, mean=mean, std=std)


def zscore(image: Float[Tensor, "*space"], *, nonzero: bool) -> Float[Tensor, "*space"]:
    """The image minus its mean, divided by its standard deviation; a constant image becomes 0.

    With `nonzero`, mean and deviation come only from voxels that are not 0, but all voxels are
    normalised. So a background of 0 stays darker than tissue. (nnU-Net sets the background to 0,
    which is the value of average tissue.)
    """
    count, mean = 0, 0.0
    for values in _counted(image, nonzero):
        count, mean = count + values.numel(), mean + float(values.sum())
    if count == 0:
        return image
    mean /= count
    squares = sum(float((values - mean).square().sum()) for values in _counted(image, nonzero))
    std = math.sqrt(squares / count)
    varies = std > 1e-8 * abs(mean)
    return (image - mean).div_(std if varies else 1.0)


def _counted(image: Tensor, nonzero: bool) -> Iterator[Tensor]:
    """The values, or only those that are not 0, in double precision, a few planes at a time."""
    for planes in image.split(_PLANES_AT_ONCE):
        yield (planes[planes != 0] if nonzero else planes).double()


def ct_window(
    image: Float[Tensor, "*space"], *, lower: float, upper: float, mean: float, std: float
) -> Float[Tensor, "*space"]:
    """Intensities in HU clipped to [lower, upper], minus mean, divided by standard deviation."""
    return (image.clamp(lower, upper) - mean) / std


def foreground_statistics(
    values: Float[np.ndarray, " voxels"],
) -> tuple[float, float, float, float]:
    """Percentiles 0.5 and 99.5, mean and standard deviation of foreground intensities (nnU-Net)."""
    lower, upper = np.percentile(values, [0.5, 99.5])
    return float(lower), float(upper), float(values.mean()), float(max(values.std(), 1e-8))
