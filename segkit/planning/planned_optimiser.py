"""The planned optimiser: Muon on a CPU, unless its own arithmetic takes longer than the network's.

Muon makes the step of each kernel orthogonal. This does not depend on the size of the patch, so in
a deep 2D network, whose coarse levels have many channels and few pixels, it can take most of the
time. docs/training.md has the measurements.
"""

from segkit.config.training import OptimiserName
from segkit.planning.step_work import StepWork

MOST = 1.25
"""The longest time of Muon's own arithmetic, as a share of that of the network in a step."""
COST_IN_HALF = 1.4
"""How long one of Muon's multiply-adds takes, in those of a network that trains in half precision.

Muon's are in single precision. Measured on an AMD EPYC (Zen 5), where networks train in bfloat16 in
0.47 to 0.82 of the time; the number is that of sarcoma CT in 2D on one core."""


def planned_optimiser(
    work: StepWork, *, own_schedule: bool, muon_cost: float | None
) -> tuple[OptimiserName, str]:
    """The optimiser, and the reason.

    Args:
        work: the multiply-adds of a training step.
        own_schedule: whether the schedule is nnU-Net's own.
        muon_cost: how long one of Muon's multiply-adds takes, in those of the network; None if the
            plan is not for a CPU.
    """
    if own_schedule:
        return "sgd", ""
    if muon_cost is None:
        return "adamw", "Muon, which is better on a CPU, has not been measured on a GPU."
    share = muon_cost * work.orthogonal / work.network
    if share > MOST:
        return (
            "adamw",
            f"Muon is better at equal steps, but with these channels its own arithmetic takes "
            f"{share:.2g} times as long as the network's.",
        )
    return "muon", "On a CPU, networks reach a higher Dice than with adamw in the same time."


def planned_work(work: StepWork, *, muon_cost: float | None) -> float:
    """The time of a training step with the planned optimiser, in multiply-adds of the network.

    AdamW takes little time.

    Args:
        work: the multiply-adds of a training step.
        muon_cost: how long one of Muon's multiply-adds takes, in those of the network; None if the
            plan is not for a CPU.
    """
    optimiser, _ = planned_optimiser(work, own_schedule=False, muon_cost=muon_cost)
    if optimiser != "muon" or muon_cost is None:
        return work.network
    return work.network + muon_cost * work.orthogonal
