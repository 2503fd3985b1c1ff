"""Multiply-adds of a training step: those of the network, and those of Muon."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from segkit.planning.nnunet_rules import Size, multiply_adds


class StepWork(NamedTuple):
    """Numbers of multiply-adds in a training step of a batch."""

    forward: int
    """Those of a forward pass of the network for one patch."""
    network: int
    """Those of the network's convolutions, forward and backward."""
    orthogonal: int
    """Those with which Muon would make the step of each kernel orthogonal, on a CPU. They do not
    depend on patch and batch."""


def step_work(
    *,
    batch_size: int,
    channels: Sequence[int],
    strides: Sequence[Size],
    kernels: Sequence[Size],
    patch_size: Size,
    in_channels: int,
    num_classes: int,
) -> StepWork:
    """The multiply-adds of a training step; backward takes twice those of forward.

    Args:
        batch_size: number of patches in a batch.
        channels: number of channels of each level, the finest first.
        strides: stride along each axis, for each step to the next coarser level.
        kernels: kernel size along each axis, for each level.
        patch_size: size of a patch, in voxels.
        in_channels: number of channels of the image.
        num_classes: number of outputs.
    """
    forward = multiply_adds(
        channels=channels,
        strides=strides,
        kernels=kernels,
        patch_size=patch_size,
        in_channels=in_channels,
        num_classes=num_classes,
    )
    orthogonal = _orthogonal(channels, strides, kernels, in_channels)
    return StepWork(forward, 3 * batch_size * forward, orthogonal)


def _orthogonal(
    channels: Sequence[int], strides: Sequence[Size], kernels: Sequence[Size], in_channels: int
) -> int:
    """Multiply-adds with which Muon makes the step of each kernel orthogonal.

    Five iterations for a matrix of m x n, m <= n, take 2 m^2 n + 17 m^3 (see `orthogonal` in
    segkit/nn/muon.py). Kernels of gates are small and not counted.
    """
    sizes = [math.prod(kernel) for kernel in kernels]
    matrices: list[tuple[int, int]] = []
    for level, width in enumerate(channels):
        entering = channels[level - 1] if level else in_channels
        matrices += [(width, entering * sizes[level]), (width, width * sizes[level])]
    for level, step in enumerate(strides):
        width, coarse = channels[level : level + 2]
        # The transposed convolution, and two convolutions after the skip is joined.
        matrices.append((coarse, width * math.prod(step)))
        matrices += [(width, 2 * width * sizes[level]), (width, width * sizes[level])]
    total = 0
    for rows, columns in matrices:
        short, long = sorted((rows, columns))
        total += 2 * short**2 * long + 17 * short**3
    return total
