"""The number of this process among several that torchrun or SLURM launched."""

from dataclasses import dataclass

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from segkit.errors import SegkitError


@dataclass(frozen=True)
class ProcessPlace:
    """The number of one process among several."""

    number: int
    """Number of the process, from 1 to `count`."""
    count: int
    """Number of processes."""
    local: int
    """Number of the process on its machine, from 0; it uses the device of this number."""


def place_of_process() -> ProcessPlace:
    """The number of this process, from the environment variables of its launcher.

    Raises SegkitError if neither torchrun nor SLURM launched the process.
    """
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            try:
                environment = kind()
            except RuntimeError as error:  # Lightning cannot use the options of this SLURM job
                raise SegkitError(
                    f"--shard auto: {' '.join(str(error).split())}; pass --shard I/N"
                ) from None
            return ProcessPlace(
                environment.global_rank() + 1, environment.world_size(), environment.local_rank()
            )
    raise SegkitError(
        "--shard auto: expected a process that torchrun or srun launched, found neither; "
        "pass --shard I/N"
    )
