"""Seconds in which a planned training prepares its cases, measured on one of them."""

import math
import tempfile
import time
from pathlib import Path

from segkit.config.data import ZScoreConfig, is_ct
from segkit.config.model import ModelDescription
from segkit.data.dataset import read_case
from segkit.data.normalise import build_normalisers
from segkit.data.prepared_cache import preparing_processes, store_cases
from segkit.io.checksums import file_states
from segkit.planning.planning_task import PlanningTask
from segkit.system.resources import num_cores

FEW_VOXELS = 50_000_000
"""If all cases together have fewer voxels, preparing them fits into the time that any plan has for
it, and is not measured."""


def seconds_to_prepare(task: PlanningTask, description: ModelDescription) -> float:
    """Seconds in which all cases are read, resampled and stored; 0 if there are few voxels.

    The case with the median number of voxels is prepared, and the time of all is estimated from
    it. A CT window is measured before, for which all training cases are read once more.

    Args:
        task: the task; its device is on this machine.
        description: the planned model.
    """
    dataset, channels = task.dataset, len(description.channels)
    voxels = [math.prod(case.shape) / case.box_share for case in task.fingerprint.cases]
    if channels * sum(voxels) < FEW_VOXELS:
        return 0.0
    median = sorted(range(len(voxels)), key=voxels.__getitem__)[len(voxels) // 2]
    case = dataset.cases[median]
    in_ct = any(is_ct(name) for name in dataset.channels)

    def measure() -> float:
        processes = preparing_processes(dataset.cases, dataset, description.spacing, channels)
        started = time.perf_counter()
        if in_ct:
            read_case(case, dataset)
        with tempfile.TemporaryDirectory(
            prefix="segkit-plan-", dir=task.figures.file.parent
        ) as here:
            store_cases(
                [case],
                dataset,
                folder=Path(here),
                spacing=description.spacing,
                normalisers=build_normalisers([ZScoreConfig(nonzero=False)] * channels),
                order=description.interpolation_order,
                settings=[],
                num_processes=1,
            )
        seconds = time.perf_counter() - started
        return seconds * len(voxels) / min(processes, len(voxels))

    about = {
        "what": "preparing",
        "files": file_states((*case.images, case.label)),
        "cases": len(voxels),
        "cores": num_cores(),
        "spacing": description.spacing,
        "order": description.interpolation_order,
        "in_ct": in_ct,
    }
    return task.figures.once(about, measure)
