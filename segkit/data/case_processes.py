"""The number of processes that read or prepare cases: limited by cores, memory and the work."""

from collections.abc import Callable, Sequence

from segkit.data.dataset import CaseFiles, Dataset, grid_of_case
from segkit.errors import SegkitError
from segkit.system.memory import free_memory
from segkit.system.resources import num_cores

READ_PER_PROCESS = 60_000_000
"""About so many voxels are read in the time that another process needs to start."""
READ_PER_CASE = 200_000
"""About so many voxels are read in the time that opening the files of a case takes."""
BYTES_TO_READ = 24
"""Peak memory of reading a case, for each voxel and channel."""


def reading_processes(cases: Sequence[CaseFiles], dataset: Dataset) -> int:
    """The number of processes in which all voxels of these cases are read fastest."""

    def voxels(case: CaseFiles) -> int:
        return READ_PER_CASE + max(len(case.images), 1) * _voxels(case, dataset)

    return worthwhile_processes(cases, voxels, READ_PER_PROCESS, BYTES_TO_READ)


def worthwhile_processes(
    cases: Sequence[CaseFiles],
    voxels_of: Callable[[CaseFiles], int],
    per_process: int,
    bytes_per_voxel: int,
) -> int:
    """The number of processes that fit into memory and save more time than they need to start.

    Args:
        cases: the cases. Their headers are read only if there are several cases and cores.
        voxels_of: the number of voxels of a case.
        per_process: number of voxels for which another process is worth its start.
        bytes_per_voxel: peak memory of a case, for each voxel.
    """
    if len(cases) < 2 or num_cores() < 2:
        return 1
    voxels = [voxels_of(case) for case in cases]
    bearable = free_memory() // (max(voxels) * bytes_per_voxel)
    return max(min(num_cores(), sum(voxels) // per_process, bearable), 1)


def _voxels(case: CaseFiles, dataset: Dataset) -> int:
    """Number of voxels of a case; 0 if its header is wrong, which reading the case reports."""
    try:
        x, y, z = grid_of_case(case, dataset).shape
    except SegkitError:
        return 0
    return x * y * z
