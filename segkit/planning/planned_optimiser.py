"""The planned optimiser: Muon on a CPU, unless its own arithmetic takes longer than the network's.

Muon makes the step of each kernel orthogonal. This does not depend on the size of the patch, so in
a deep 2D network, whose coarse levels have many channels and few pixels, it can take most of the
time. docs/training.md has the measurements.
"""

from segkit.config.training import OptimiserName
from segkit.planning.step_work import StepWork

MOST = 1.5
"""The largest number of Muon's multiply-adds, as a share of those of the network in a step."""


def planned_optimiser(
    work: StepWork, *, own_schedule: bool, on_cpu: bool
) -> tuple[OptimiserName, str]:
    """The optimiser, and the reason.

    Args:
        work: the multiply-adds of a training step.
        own_schedule: whether the schedule is nnU-Net's own.
        on_cpu: whether the training is planned for a CPU.
    """
    if own_schedule:
        return "sgd", ""
    if not on_cpu:
        return "adamw", "Muon, which is better on a CPU, has not been measured on a GPU."
    if work.muons_share > MOST:
        return (
            "adamw",
            f"Muon is better at equal steps, but with these channels its own arithmetic takes "
            f"{work.muons_share:.2g} times as long as the network's.",
        )
    return "muon", "On a CPU, networks reach a higher Dice than with adamw in the same time."


def planned_work(work: StepWork, *, on_cpu: bool) -> int:
    """Multiply-adds of a training step with the planned optimiser; those of AdamW are few.

    Args:
        work: the multiply-adds of a training step.
        on_cpu: whether the training is planned for a CPU.
    """
    optimiser, _ = planned_optimiser(work, own_schedule=False, on_cpu=on_cpu)
    return work.network + (work.orthogonal if optimiser == "muon" else 0)
