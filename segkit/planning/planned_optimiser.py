"""The planned optimiser: Muon on a CPU, unless its own arithmetic takes longer than the network's.

Muon makes the step of each kernel orthogonal. This does not depend on the size of the patch, so in
a deep 2D network, whose coarse levels have many channels and few pixels, it can take most of the
time. docs/training.md has the measurements.
"""

import math

from segkit.config.training import OptimiserName
from segkit.planning.plan import Plan

MOST = 1.5
"""The largest number of Muon's multiply-adds, as a share of those of the network in a step."""


def planned_optimiser(
    plan: Plan, *, in_channels: int, num_classes: int, own_schedule: bool, on_cpu: bool
) -> tuple[OptimiserName, str]:
    """The optimiser, and the reason.

    Args:
        plan: the plan, with its patch, batch and network.
        in_channels: number of channels of the image.
        num_classes: number of outputs of the network.
        own_schedule: whether the schedule is nnU-Net's own.
        on_cpu: whether the training is planned for a CPU.
    """
    if own_schedule:
        return "sgd", ""
    if not on_cpu:
        return "adamw", "Muon, which is better on a CPU, has not been measured on a GPU."
    network = 3 * plan.batch_size * plan.multiply_adds(in_channels, num_classes)
    share = orthogonal_multiply_adds(plan, in_channels=in_channels) / network
    if share > MOST:
        return (
            "adamw",
            f"Muon is better at equal steps, but with these channels its own arithmetic takes "
            f"{share:.2g} times as long as the network's.",
        )
    return "muon", "On a CPU, networks reach a higher Dice than with adamw in the same time."


def orthogonal_multiply_adds(plan: Plan, *, in_channels: int) -> int:
    """Multiply-adds with which Muon makes the step of each kernel orthogonal, on a CPU.

    Five iterations for a matrix of m x n, m <= n, take 4 m^2 n + 14 m^3 (see `orthogonal` in
    segkit/nn/muon.py). Kernels of gates are small and not counted.

    Args:
        plan: the plan of the network.
        in_channels: number of channels of the image.
    """
    sizes = [math.prod(kernel) for kernel in plan.kernels]
    matrices: list[tuple[int, int]] = []
    for level, width in enumerate(plan.channels):
        entering = plan.channels[level - 1] if level else in_channels
        matrices += [(width, entering * sizes[level]), (width, width * sizes[level])]
    for level, step in enumerate(plan.strides):
        width, coarse = plan.channels[level : level + 2]
        # The transposed convolution, and two convolutions after the skip is joined.
        matrices.append((coarse, width * math.prod(step)))
        matrices += [(width, 2 * width * sizes[level]), (width, width * sizes[level])]
    total = 0
    for rows, columns in matrices:
        short, long = sorted((rows, columns))
        total += 4 * short**2 * long + 14 * short**3
    return total
