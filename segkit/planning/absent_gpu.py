"""Estimated time of a training step on a GPU that this machine does not have.

The two numbers were fitted to steps that were measured on an NVIDIA H200 (docs/gpu-server.md): 16
ms for 0.4 10¹² multiply-adds, and 42 ms for 2.9 10¹². Other GPUs are slower. A run measures its own
speed, and its learning rate follows the time, so the estimate decides only how long the schedule
and the distance between validations are at first.
"""

from segkit.planning.plan import Plan

OVERHEAD = 0.01
"""Seconds of a step that do not depend on its size."""
MULTIPLY_ADDS_PER_SECOND = 8e13
LIKE = "on a GPU like an NVIDIA H200"


def estimated_seconds(plan: Plan, *, in_channels: int, num_classes: int) -> tuple[float, float]:
    """Seconds of a training step of a plan, and of a window in a validation.

    Args:
        plan: the plan, with its patch, batch and network.
        in_channels: number of channels of the image.
        num_classes: number of outputs of the network.
    """
    work = plan.step_work(in_channels, num_classes)
    window = work.forward / MULTIPLY_ADDS_PER_SECOND
    return OVERHEAD + work.network / MULTIPLY_ADDS_PER_SECOND, OVERHEAD / 4 + window
