"""The place of this process among several that torchrun or SLURM launched."""

from dataclasses import dataclass

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from segkit.errors import SegkitError


@dataclass(frozen=True)
class ProcessPlace:
    """One process among several."""

    number: int
    """From 1 on."""
    count: int
    local: int
    """Its number on its machine, from 0: the number of its device."""


def place_of_process() -> ProcessPlace:
    """This process's place, as Lightning reads it from the launcher's variables.

    Raises SegkitError if neither launched it.
    """
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            try:
                environment = kind()
            except RuntimeError as error:  # of a job that was asked for in a way it cannot be told
                raise SegkitError(f"--shard auto: {' '.join(str(error).split())}") from None
            return ProcessPlace(
                environment.global_rank() + 1, environment.world_size(), environment.local_rank()
            )
    raise SegkitError(
        "--shard auto: expected a process that torchrun or srun has launched, found none; "
        "give --shard I/N"
    )
