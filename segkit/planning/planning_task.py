"""The task of a plan: a measured dataset, and the budget in time and memory."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from segkit.config.dataset_files import DatasetConfig, FilesConfig
from segkit.config.pictures import PicturesConfig
from segkit.data.dataset import Dataset, dataset_of, unlabelled
from segkit.errors import ConfigError, TrainingError, counted, printable
from segkit.planning.budget_fit import Steps
from segkit.planning.fingerprint import Fingerprint, fingerprint
from segkit.planning.plan import (
    Plan,
    coarse_plan_for_time,
    flat_axis,
    median_image,
    plan_for_memory,
    plan_for_time,
)
from segkit.planning.planned_optimiser import COST_IN_HALF
from segkit.planning.schedule import MOST_VALIDATIONS, Schedule
from segkit.planning.speed import Figures, kernels_of_training, multiply_adds_per_second
from segkit.system.progress import Track
from segkit.system.resources import choose_device, free_memory_of, limit_threads, precision_of

logger = logging.getLogger(__name__)

Preset = Literal["auto", "nnunet"]
PLANNED_STEPS = Steps(for_batch=10_000, per_channel=64, for_patch=1200)
"""Numbers of steps that must fit into the time; docs/planning.md describes the measurements."""
DEFAULT_MEMORY = 8e9
SHARE_FOR_STEP = 0.9
"""A plan may use this share of a GPU's free memory. The rest is for what comes beside a step: cases
that stay on the GPU, windows of a validation, and what libraries keep."""
SPEED = "speed.json"
"""The file in the cache with measurements of this processor, so that a plan can be repeated."""
NNUNET_STEPS = 250_000


@dataclass(frozen=True)
class PlanningTask:
    """The dataset to plan for, and the budget."""

    source: DatasetConfig
    dataset: Dataset
    fingerprint: Fingerprint
    device: torch.device
    accelerator: str | None
    """Accelerator of the training: 'cpu' or 'gpu', if the user chose one."""
    own_schedule: bool
    """Whether plan and schedule are nnU-Net's own."""
    timed: bool
    """Whether patch and network must fit the time, because the device is here to be measured."""
    spatial_dims: int
    gigabytes: float
    minutes: float
    """Minutes of one stage; not used with nnU-Net's own schedule."""
    figures: Figures
    """Measurements of this processor."""
    runs: Path
    """The folder in which a second stage will find the run of the first."""
    steps: Steps = PLANNED_STEPS
    spent: float = 0.0
    """Seconds of the minutes that are over when training begins, because they began earlier."""
    coarse: bool = False
    """Whether the plan uses a coarser grid, at which a patch covers enough of an image."""
    why_slices: str = ""
    """Why volumes are planned in slices, if nobody asked for that."""

    @property
    def minutes_left(self) -> float:
        """The minutes that are left when training begins; a plan counts on half of all at least."""
        return max(self.minutes - self.spent / 60, self.minutes / 2)

    @property
    def muon_cost(self) -> float | None:
        """How long one of Muon's multiply-adds takes, in those of the network.

        None on a GPU, for which no plan has Muon.
        """
        if self.device.type != "cpu":
            return None
        half = self.timed and precision_of(self.device) != torch.float32
        return COST_IN_HALF if half else 1.0

    def measured(self, about: Mapping[str, Any], measure: Callable[[], float]) -> float:
        """A measurement on the device.

        Args:
            about: JSON values that describe the measurement.
            measure: makes the measurement.

        Raises:
            TrainingError: the GPU's memory is too small for it.
        """
        try:
            with kernels_of_training(self.device):
                return self.figures.once(about, measure, self.device)
        except torch.OutOfMemoryError:
            pass  # when this block ends, the memory of the failed call is free
        free = free_memory_of(self.device) / 1e9
        raise TrainingError(
            f"{self.device}: its memory is too small to time a training step of a plan for "
            f"{self.gigabytes:g} GB, and {free:.1f} GB are free; end other programs that use it, "
            f"or plan for less memory (segkit plan --memory)"
        )

    def draft(self) -> Schedule:
        """nnU-Net's own schedule, or a provisional one until steps are timed."""
        why = "nnU-Net's 1000 epochs of 250 steps."
        return Schedule(NNUNET_STEPS, why, validate_every=NNUNET_STEPS // MOST_VALIDATIONS)

    def plan(self) -> Plan:
        """The largest plan within the budget, on a coarser grid if `coarse` is set."""
        numbers = self.fingerprint.numbers()
        if not self.timed:
            return plan_for_memory(
                numbers, spatial_dims=self.spatial_dims, gigabytes=self.gigabytes
            )
        speed = self.measured(
            {"what": "multiply-adds"}, partial(multiply_adds_per_second, self.device)
        )
        if self.coarse:
            coarse = coarse_plan_for_time(
                numbers,
                minutes=self.minutes_left,
                steps=self.steps,
                multiply_adds_per_second=speed,
                gigabytes=self.gigabytes,
                muon_cost=self.muon_cost,
            )
            if coarse is not None:
                return coarse
        return plan_for_time(
            numbers,
            spatial_dims=self.spatial_dims,
            minutes=self.minutes_left,
            steps=self.steps,
            multiply_adds_per_second=speed,
            gigabytes=self.gigabytes,
            muon_cost=self.muon_cost,
        )

    def stage(self) -> "tuple[PlanningTask, Plan]":
        """The task of one stage and its plan: if there are two, each has half of the minutes."""
        plan = self.plan()
        if self.own_schedule or plan.low_resolution is None:
            return self, plan
        half = replace(self, minutes=self.minutes / 2, spent=self.spent / 2)
        return half, half.plan()


def source_of(
    folder: str | Path | DatasetConfig,
    files: FilesConfig | None,
    pictures: PicturesConfig | None,
) -> DatasetConfig:
    """The settings of a dataset: `folder` itself if it is settings, or made from the arguments."""
    if isinstance(folder, DatasetConfig):
        return folder
    return DatasetConfig(folder=Path(folder), files=files, pictures=pictures)


def warn_if_busy(task: PlanningTask) -> None:
    """Warn if other programs used the cores while the plan's speed was measured."""
    if (warning := task.figures.busy()) is not None:
        logger.warning("%s", warning)


def planning_task(
    source: DatasetConfig,
    *,
    cache: Path,
    device: str,
    spatial_dims: int | None,
    gigabytes: float | None,
    minutes: float,
    preset: Preset,
    runs: Path,
    track: Track,
    began: float | None = None,
) -> PlanningTask:
    """Measure the dataset and find out the budget. The arguments are those of `plan_dataset`."""
    _check(spatial_dims, gigabytes, minutes, preset)
    limit_threads()
    dataset = dataset_of(source)
    chosen, own_schedule = choose_device(device), preset == "nnunet"
    on_cpu = chosen.type == "cpu"
    present = on_cpu or torch.cuda.is_available()
    if gigabytes is None:
        on_card = present and not on_cpu
        free = SHARE_FOR_STEP * free_memory_of(chosen) if on_card else DEFAULT_MEMORY
        gigabytes = round(free / 1e9, 1)
    measured = fingerprint(dataset, cache=cache, track=track)
    labelled = {number for case in measured.cases for number in case.classes}
    if warning := unlabelled(dataset, labelled, f"the {counted(len(dataset.cases), 'case')}"):
        logger.warning("%s", printable(warning))
    task = PlanningTask(
        source,
        dataset,
        measured,
        device=chosen,
        accelerator=None if device == "auto" else "cpu" if on_cpu else "gpu",
        own_schedule=own_schedule,
        timed=present and not own_schedule,
        spatial_dims=spatial_dims or (3 if flat_axis(measured.numbers()) is None else 2),
        gigabytes=gigabytes,
        minutes=minutes,
        figures=Figures(cache / SPEED),
        runs=runs,
        spent=0.0 if began is None else time.monotonic() - began,
    )
    return task if spatial_dims else _in_slices_if_time_is_short(task)


def _check(
    spatial_dims: int | None, gigabytes: float | None, minutes: float, preset: Preset
) -> None:
    """Raises ConfigError if an argument of a plan is out of range."""
    if spatial_dims not in (None, 2, 3):
        raise ConfigError(f"spatial_dims: expected 2, 3 or None, found {spatial_dims}; choose one")
    if preset not in get_args(Preset):
        expected = " or ".join(get_args(Preset))
        raise ConfigError(f"preset: expected {expected}, found {preset!r}; choose one")
    for name, value, unit in (("minutes", minutes, "minutes"), ("memory", gigabytes, "GB")):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(
                f"{name}: expected a number of {unit} above 0, found {value}; give one"
            )


def _in_slices_if_time_is_short(task: PlanningTask) -> PlanningTask:
    """The task in 2D, if time leaves at most half of the 3D patch that fits 8 GB or less memory.

    If it is the memory that keeps a patch small, the task stays in 3D, because nnU-Net trains two
    stages then. It also stays in 3D if the patch is a piece of a tube that is as wide as the tube.
    """
    if not task.timed or task.spatial_dims == 2:
        return task
    numbers = task.fingerprint.numbers()
    (stage, plan), share = task.stage(), counted(task.minutes, "minute")
    if stage is not task:
        share = f"{stage.minutes:g} of {share}, for each of two stages,"
    # Not of more memory, which would make any patch small beside it.
    gigabytes = min(task.gigabytes, DEFAULT_MEMORY / 1e9)
    roomy = plan_for_memory(numbers, spatial_dims=3, gigabytes=gigabytes)
    patch, possible = math.prod(plan.patch_size), math.prod(roomy.patch_size)
    whole_axes = sum(
        size >= n for size, n in zip(plan.patch_size, median_image(numbers)[1], strict=True)
    )
    if 2 * patch > possible or whole_axes >= 2:
        return task
    why = (
        f" Slices, as {share} leave a 3D patch of "
        f"{'x'.join(map(str, plan.patch_size))}, which holds {patch / possible:.2g} of the patch "
        f"that {gigabytes:g} GB hold; more minutes, or segkit plan --dims 3, train in 3D."
    )
    return replace(task, spatial_dims=2, why_slices=why)
