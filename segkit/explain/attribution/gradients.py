"""Attributions from gradients: integrated gradients and SmoothGrad."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from segkit.explain.attribution.target import NetworkInput, SummedOutput
from segkit.system.progress import Track, untracked

Gradients = Float[Tensor, "structure channel x y z"]


def integrated_gradients(
    target: SummedOutput,
    image: NetworkInput,
    baseline: NetworkInput,
    *,
    steps: int,
    track: Track = untracked,
) -> Gradients:
    """The part of each voxel in the difference of each sum between the image and a baseline.

    Sundararajan et al. (2017, arXiv:1703.01365, Eq. 1): the difference of the voxel, multiplied by
    the mean gradient on the straight line from the baseline to the image. The mean is computed by
    Gauss-Legendre quadrature, which is exact for a gradient that is a polynomial of degree
    2 steps - 1 along the line.

    Args:
        target: the sums.
        image: the image as the network receives it.
        baseline: the image with which it is compared.
        steps: number of points on the line.
        track: reports the progress.
    """
    points, weights = np.polynomial.legendre.leggauss(steps)
    along = image - baseline
    images = (baseline + float(point + 1) / 2 * along for point in points)
    mean = target.gradient(images, (weights / 2).tolist(), what="integrated gradients", track=track)
    return mean * along


def smoothgrad(
    target: SummedOutput,
    image: NetworkInput,
    spread: Float[Tensor, " channel"],
    *,
    draws: int,
    seed: int = 0,
    track: Track = untracked,
) -> Gradients:
    """The mean gradient of each sum over noisy copies of the image.

    Smilkov et al. (2017, arXiv:1706.03825). It says how the sum reacts to a small change of a
    voxel; it is not a part of the sum.

    Args:
        target: the sums.
        image: the image as the network receives it.
        spread: the standard deviation of the noise in each channel.
        draws: number of noisy copies.
        seed: seed of the noise.
        track: reports the progress.
    """

    def noisy() -> Iterator[Tensor]:
        random = torch.Generator().manual_seed(seed)
        for _ in range(draws):
            noise = torch.randn(image.shape, generator=random)
            yield image + noise * spread[:, None, None, None]

    return target.gradient(noisy(), [1 / draws] * draws, what="SmoothGrad", track=track)
