"""Intensities brought to one scale: by the image's own statistics, or by a window in HU."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float
from torch import Tensor

from segkit.config.data import CtWindowConfig, NormalisationConfig, ZScoreConfig

Normaliser = Callable[[Tensor], Tensor]
_PLANES_AT_ONCE = 8
"""Planes of an image of which a copy in double precision is held at a time."""


def build_normalisers(settings: Sequence[NormalisationConfig]) -> list[Normaliser]:
    """A function for each channel; CT windows must be complete."""
    return [_normaliser(setting) for setting in settings]


def _normaliser(setting: NormalisationConfig) -> Normaliser:
    match setting:
        case ZScoreConfig(nonzero=nonzero):
            return partial(zscore, nonzero=nonzero)
        case CtWindowConfig(lower=lower, upper=upper, mean=mean, std=std):
            assert lower is not None and upper is not None and mean is not None and std is not None
            return partial(ct_window, lower=lower, upper=upper, mean=mean, std=std)


def zscore(image: Float[Tensor, "*space"], *, nonzero: bool) -> Float[Tensor, "*space"]:
    """The image minus its mean over its standard deviation; a constant image becomes 0.

    With `nonzero`, the statistics come from the voxels other than 0. All voxels are shifted alike,
    so that a background of 0 stays the darkest (nnU-Net sets it to 0, the value of the average
    tissue).
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
    """The values, or those other than 0, in double precision, a few planes at a time."""
    for planes in image.split(_PLANES_AT_ONCE):
        yield (planes[planes != 0] if nonzero else planes).double()


def ct_window(
    image: Float[Tensor, "*space"], *, lower: float, upper: float, mean: float, std: float
) -> Float[Tensor, "*space"]:
    """Intensities in HU clipped to [lower, upper], minus a mean, over a standard deviation."""
    return (image.clamp(lower, upper) - mean) / std


def foreground_statistics(
    values: Float[np.ndarray, " voxels"],
) -> tuple[float, float, float, float]:
    """Percentiles 0.5 and 99.5, mean and standard deviation of foreground intensities (nnU-Net)."""
    lower, upper = np.percentile(values, [0.5, 99.5])
    return float(lower), float(upper), float(values.mean()), float(max(values.std(), 1e-8))
