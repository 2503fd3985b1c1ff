"""How often a planned training augments its patches: the fewer its passes over the data, the less.

Augmentation keeps a network from learning its training cases by heart. A short training cannot do
that: it sees each voxel a few times only, and learns more from patches as they are.
docs/planning.md has the measurements from which the limits were chosen.
"""

import math
from collections.abc import Sequence

from segkit.errors import counted

PASSES_WITHOUT = 30.0
"""With at most this number of passes, patches are neither augmented nor mirrored."""
PASSES_WITH_ALL = 120.0
"""From this number of passes on, patches are augmented as often as in nnU-Net."""


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


def planned_share(passes: float) -> tuple[float, str]:
    """The planned `data.augment_share`, and the reason.

    It rises with the logarithm of the passes, from 0 at `PASSES_WITHOUT` to 1 at `PASSES_WITH_ALL`.
    """
    rise = math.log(max(passes, PASSES_WITHOUT) / PASSES_WITHOUT)
    share = min(rise / math.log(PASSES_WITH_ALL / PASSES_WITHOUT), 1.0)
    times = counted(float(f"{passes:.2g}"), "time")
    return round(share, 2), (
        f"Training sees each voxel {times}, on average. With at most {PASSES_WITHOUT:g} times, "
        f"networks learn more from patches as they are; from {PASSES_WITH_ALL:g} times on, patches "
        "are augmented as often as in nnU-Net."
    )
