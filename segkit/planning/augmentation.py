"""How often a planned training augments its patches: the fewer its passes over the data, the less.

Augmentation keeps a network from learning its training cases by heart. A short training cannot do
that: it sees each voxel a few times only, and learns more from patches as they are. Mirroring is
not counted here: a network that was trained on one side only may miss a structure on the other.
docs/planning.md has the measurements from which the limits were chosen.
"""

import math
from collections.abc import Sequence

from segkit.errors import counted

PASSES = (10.0, 120.0)
STEPS = (2_500.0, 10_000.0)
"""Up to the first number of passes and of steps, patches are only mirrored. From the second number
of either on, they are augmented as often as in nnU-Net."""


def num_passes(
    steps: int,
    *,
    batch_size: int,
    patch_size: Sequence[int],
    median: Sequence[float],
    training_cases: int,
) -> float:
    """How often a training sees each voxel of its training cases, on average.

    A part of a patch that lies outside the image does not count.

    Args:
        steps: number of training steps.
        batch_size: number of patches in a step.
        patch_size: size of a patch along x, y and z, in voxels; 1 across the slices of a 2D
            network.
        median: the median shape of the cases along x, y and z, in voxels.
        training_cases: number of training cases.

    Example:
        >>> num_passes(
        ...     100, batch_size=2, patch_size=(16, 16, 1), median=(16, 16, 10), training_cases=4
        ... )
        5.0
    """
    seen = math.prod(min(size, n) for size, n in zip(patch_size, median, strict=True))
    return steps * batch_size * seen / (math.prod(median) * training_cases)


def planned_share(passes: float, steps: int) -> tuple[float, str]:
    """The planned `data.augment_share`, and the reason.

    It rises with the logarithm of the passes, and with that of the steps; the larger share counts.
    A long training of a large dataset has few passes, but it is augmented as in nnU-Net.

    Args:
        passes: how often training sees each voxel of its training cases, on average.
        steps: number of training steps.
    """
    share = round(max(_risen(passes, *PASSES), _risen(steps, *STEPS)), 2)
    seen = f"Training sees each voxel {counted(float(f'{passes:.2g}'), 'time')}, on average"
    if share == 0:
        return share, f"{seen}. In so short a training, patches as they are teach more."
    often = "as often as in" if share == 1 else f"with {share:g} times the probabilities of"
    return share, f"{seen}. Patches are augmented {often} nnU-Net."


def _risen(value: float, low: float, high: float) -> float:
    """0 up to the lower value, 1 from the higher value on, and linear in the logarithm between."""
    return min(math.log(max(value, low) / low) / math.log(high / low), 1.0)
