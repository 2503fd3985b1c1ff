"""`segkit plan`: a training config for a dataset, with the reason for each value."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from segkit.config.data import SplitDatasetConfig
from segkit.config.dataset_files import DatasetConfig, FilesConfig
from segkit.config.load import validated
from segkit.config.model import FirstStageConfig, ModelDescription, description_of
from segkit.config.pictures import PicturesConfig
from segkit.config.training import LEAST_STEPS, MOST_FOR_SCORING, Config
from segkit.data.augment_spatial import Vary
from segkit.data.case_facts import CASES_PER_PROCESS
from segkit.data.case_groups import grouping_advice
from segkit.data.case_table import unused_columns
from segkit.data.dataset import Dataset, dataset_of, unlabelled
from segkit.data.variation import build_variation
from segkit.errors import counted, printable
from segkit.inference.window_seconds import num_windows, seconds_of_window
from segkit.io.file_names import is_file_name
from segkit.io.volume import is_picture, read_picture_facts
from segkit.model.build import build_network
from segkit.nn.normalisation import order_for
from segkit.planning import nnunet_rules as rules
from segkit.planning.absent_gpu import LIKE, estimated_seconds
from segkit.planning.config_text import Schedule, Sections, sections_of, text_of, values_of
from segkit.planning.fingerprint import Fingerprint, fingerprint
from segkit.planning.plan import (
    Plan,
    Steps,
    coarse_plan_for_time,
    flat_axes,
    plan_for_memory,
    plan_for_time,
)
from segkit.planning.speed import CPU, Figures, multiply_adds_per_second, step_seconds
from segkit.system.core_share import CoreShare
from segkit.system.progress import Track, untracked
from segkit.system.resources import (
    choose_device,
    free_memory_of,
    limit_threads,
    num_cores,
    precision_of,
)

logger = logging.getLogger(__name__)

Preset = Literal["auto", "nnunet"]

PLANNED_STEPS = Steps(for_batch=10_000, for_width=4000, for_patch=1200)
"""Numbers of steps that must fit into the time; docs/planning.md describes the measurements."""
SHARE_OF_PREPARING = 0.05
"""This share of the time is reserved for preparing; a run measures the real time."""
SHARE_OF_VALIDATION = 0.1
"""Validations take at most this share of the time."""
MOST_VALIDATIONS, FEWEST_VALIDATIONS = 10, 3
"""If there is no time for three validations, each uses fewer cases."""
DEFAULT_MEMORY = 8e9
SPEED = "speed.json"
"""The file in the cache with measurements of this processor, so that a plan can be repeated."""
STEP_OF = ("channels", "labels", "regions", "network", "slices", "patch_size", "first_stage")
"""Parts of a description that, with the batch size, decide how long a step takes."""
NNUNET_STEPS = 250_000
MORE_STEPS = 3
"""The narrower candidate of a race must allow so many times the steps."""


@dataclass(frozen=True)
class Planned:
    """A planned training: its config, and the reasons for it.

    Example:
        planned = segkit.plan_dataset("my_dataset")
        print(planned.text)  # the config, with a reason beside each value
        run = segkit.train(planned.config)
    """

    config: Config
    """The config, for `segkit.train`."""
    text: str
    """The config as YAML, with a comment on each value."""
    fingerprint: Fingerprint
    """Sizes, spacings, classes and intensities of the dataset."""
    plan: Plan
    """Patch, batch and network, by nnU-Net's rules."""
    low: "Planned | None" = None
    """The first stage at low resolution, to be trained before this one; only for large images."""


@dataclass(frozen=True)
class _Task:
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
    coarse: bool = False
    """Whether the plan uses a coarser grid, at which a patch covers enough of an image."""
    why_slices: str = ""
    """Why volumes are planned in slices, if nobody asked for that."""

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
        speed = self.figures.once(
            {"what": "multiply-adds"},
            partial(multiply_adds_per_second, self.device),
            self.device,
        )
        if self.coarse:
            coarse = coarse_plan_for_time(
                numbers,
                minutes=self.minutes,
                steps=self.steps,
                multiply_adds_per_second=speed,
                gigabytes=self.gigabytes,
            )
            if coarse is not None:
                return coarse
        return plan_for_time(
            numbers,
            spatial_dims=self.spatial_dims,
            minutes=self.minutes,
            steps=self.steps,
            multiply_adds_per_second=speed,
            gigabytes=self.gigabytes,
        )


def plan_dataset(
    folder: str | Path | DatasetConfig,
    files: FilesConfig | None = None,
    *,
    pictures: PicturesConfig | None = None,
    cache: str | Path | None = None,
    device: str = "auto",
    spatial_dims: int | None = None,
    gigabytes: float | None = None,
    minutes: float = 20.0,
    preset: Preset = "auto",
    runs: str | Path = "runs",
    track: Track = untracked,
) -> Planned:
    """Measure a dataset and plan its training, in two stages if images are large.

    Args:
        folder: the folder of the dataset, with a dataset.json unless `files` is given; or the
            dataset settings of a config's section `data`.
        files: patterns or a table that name the files of each case.
        pictures: information that pictures lack, such as their pixel size.
        cache: the folder for measurements of cases. Default: `.cache` in `runs`.
        device: 'auto', 'cpu' or 'cuda'. If this machine has no CUDA GPU, a plan for 'cuda' has
            patch and network for `gigabytes` by nnU-Net's rules, and as many steps as a fast GPU
            does in the minutes, by an estimate; the run measures its real speed.
        spatial_dims: 3 for volumes, 2 for slices. Default: 2 only if each case is one slice.
        gigabytes: memory of the device, in 10⁹ bytes. Default: the free memory of the GPU, or 8.
        minutes: time for training on this machine; two stages share it.
        preset: 'nnunet' gives nnU-Net's own plan and schedule on every device.
        runs: the folder of runs, in which a second stage will find the first.
        track: shows the progress over cases.

    Returns:
        The config, its text and its reasons. If there are two stages, this is the second stage, and
        `low` is the first.

    Raises:
        DatasetError: the dataset's files do not fit together, or its cases have fewer axes than
            the plan.
        VolumeError: a file cannot be read.
        WorkerError: a process that measured cases was killed.

    Example:
        >>> planned = segkit.plan_dataset("my_dataset", minutes=60)
        >>> run = segkit.train(planned.config)
    """
    task = _task(
        source_of(folder, files, pictures),
        cache=Path(runs) / ".cache" if cache is None else Path(cache),
        device=device,
        spatial_dims=spatial_dims,
        gigabytes=gigabytes,
        minutes=minutes,
        preset=preset,
        runs=Path(runs),
        track=track,
    )
    planned = _planned_task(task)
    _warn_if_busy(task)
    return planned


def source_of(
    folder: str | Path | DatasetConfig,
    files: FilesConfig | None,
    pictures: PicturesConfig | None,
) -> DatasetConfig:
    """The settings of a dataset: `folder` itself if it is settings, or made from the arguments."""
    if isinstance(folder, DatasetConfig):
        return folder
    return DatasetConfig(folder=Path(folder), files=files, pictures=pictures)


def plan_candidates(
    folder: str | Path | DatasetConfig,
    files: FilesConfig | None = None,
    *,
    pictures: PicturesConfig | None = None,
    cache: Path,
    device: str = "auto",
    spatial_dims: int | None = None,
    gigabytes: float | None = None,
    minutes: float = 20.0,
    preset: Preset = "auto",
    runs: Path = Path("runs"),
    track: Track = untracked,
    starters: Callable[[list[str]], list[str]] = list,
) -> dict[str, Planned]:
    """Candidate plans by name, for a race; the first is the plan of `plan_dataset`.

    The others are a 2D plan (3D if the first is 2D), a plan on a coarser grid, and a plan with more
    steps of a narrower network, if they differ from the first. If the budget is not time, there is
    only the first. `starters` gets the names and gives those to plan in full, which takes seconds.

    Arguments and errors are those of `plan_dataset`.
    """
    task = _task(
        source_of(folder, files, pictures),
        cache=cache,
        device=device,
        spatial_dims=spatial_dims,
        gigabytes=gigabytes,
        minutes=minutes,
        preset=preset,
        runs=runs,
        track=track,
    )
    wanted = {f"{task.spatial_dims}D": task}
    if task.timed:
        volumes = not flat_axes(task.fingerprint.numbers())
        if spatial_dims is None and volumes:
            other = 5 - task.spatial_dims
            wanted[f"{other}D"] = replace(task, spatial_dims=other, why_slices="")
        if spatial_dims != 2 and volumes:
            wanted["3D, coarser"] = replace(task, spatial_dims=3, coarse=True, why_slices="")
        narrow = replace(PLANNED_STEPS, for_width=MORE_STEPS * PLANNED_STEPS.for_width)
        wanted[f"{task.spatial_dims}D, narrower"] = replace(task, steps=narrow)
    plans: dict[str, Plan] = {}
    for name, each in wanted.items():
        plan = each.plan()
        if all(_differ(plan, other) for other in plans.values()):
            plans[name] = plan
    planned = {name: _planned_task(wanted[name]) for name in starters(list(plans))}
    _warn_if_busy(task)
    return planned


def _warn_if_busy(task: _Task) -> None:
    if (warning := task.figures.busy()) is not None:
        logger.warning("%s", warning)


def _differ(one: Plan, other: Plan) -> bool:
    parts = ("spatial_dims", "spacing", "patch_size", "channels", "batch_size")
    return any(getattr(one, part) != getattr(other, part) for part in parts)


def _task(
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
) -> _Task:
    """Measure the dataset and find out the budget."""
    limit_threads()
    dataset = dataset_of(source)
    workers = min(num_cores(), len(dataset.cases) // CASES_PER_PROCESS)
    chosen, own_schedule = choose_device(device), preset == "nnunet"
    on_cpu = chosen.type == "cpu"
    present = on_cpu or torch.cuda.is_available()
    if gigabytes is None:
        free = free_memory_of(chosen) if present and not on_cpu else DEFAULT_MEMORY
        gigabytes = round(free / 1e9, 1)
    measured = fingerprint(dataset, cache=cache, workers=workers, track=track)
    labelled = {number for case in measured.cases for number in case.classes}
    if warning := unlabelled(dataset, labelled, f"the {counted(len(dataset.cases), 'case')}"):
        logger.warning("%s", printable(warning))
    task = _Task(
        source,
        dataset,
        measured,
        device=chosen,
        accelerator=None if device == "auto" else "cpu" if on_cpu else "gpu",
        own_schedule=own_schedule,
        timed=present and not own_schedule,
        spatial_dims=spatial_dims or (2 if flat_axes(measured.numbers()) else 3),
        gigabytes=gigabytes,
        minutes=minutes,
        figures=Figures(cache / SPEED),
        runs=runs,
    )
    return task if spatial_dims else _in_slices_if_time_is_short(task)


def _in_slices_if_time_is_short(task: _Task) -> _Task:
    """The task in 2D, if time leaves a 3D patch that holds little of an image.

    A patch that memory itself keeps so small is no reason: there nnU-Net has two stages.
    """
    if not task.timed or task.spatial_dims == 2:
        return task
    numbers = task.fingerprint.numbers()
    plan = task.plan()
    roomy = plan_for_memory(numbers, spatial_dims=3, gigabytes=task.gigabytes)
    image = math.prod(rules.median_shape(numbers.spacings, numbers.shapes, plan.spacing))
    patch, possible = math.prod(plan.patch_size), math.prod(roomy.patch_size)
    if not rules.needs_low_resolution(plan.patch_size, image) or 2 * patch > possible:
        return task
    why = (
        f" Slices, as {counted(task.minutes, 'minute')} leave a 3D patch of "
        f"{'x'.join(map(str, plan.patch_size))}, which holds {patch / image:.2g} of the median "
        f"image; more minutes or --dims 3 train in 3D."
    )
    return replace(task, spatial_dims=2, why_slices=why)


def _planned_task(task: _Task) -> Planned:
    """The planned config, or the configs of two stages."""
    minutes, source = task.minutes, task.source
    plan, share = task.plan(), counted(minutes, "minute")
    if not task.own_schedule and plan.low_resolution is not None:
        task = replace(task, minutes=minutes / 2)
        plan, share = task.plan(), f"{minutes / 2:g} of {counted(minutes, 'minute')}"
    budget = f"{task.gigabytes:g} GB of memory"
    if task.timed:
        on_cpu = task.device.type == "cpu"
        machine = "this machine's CPU" if on_cpu else torch.cuda.get_device_name(task.device)
        budget = f"{share} of training on {machine}"
    elif not task.own_schedule:
        budget += f" and {share} of training on a GPU that this machine does not have"
    dataset = task.dataset
    size = f"{counted(len(dataset.cases), 'case')}, channels {', '.join(dataset.channels)}"
    heading = f"Planned for {source.folder} ({size}) and {budget}."
    heading += task.why_slices + _about_lengths(dataset)
    advice = grouping_advice(dataset, source if isinstance(source, SplitDatasetConfig) else None)
    for sentence in ([advice] if advice else []) + unused_columns(source):
        logger.warning("%s", printable(sentence))
    name = _run_name(source.folder)
    if plan.low_resolution is None:
        return _planned(task, plan, name, heading)
    first = f"{name}_low"
    before = f"{heading} This is the first of two stages: train it before {name}."
    low = _planned(task, plan.low_resolution, first, before)
    after = f"{heading} This is the second of two stages: train {first} first."
    return replace(_planned(task, plan, name, after, task.runs / first), low=low)


def _planned(
    task: _Task, plan: Plan, name: str, heading: str, first: Path | None = None
) -> Planned:
    """The planned config of one stage; `first` is the run of the stage before it, if any."""
    written = partial(_sections, task, plan, first=first)
    schedule = task.draft()
    if not task.own_schedule:
        draft = validated(
            Config, values_of(name, written(schedule)), f"plan of {task.source.folder}"
        )
        schedule = _schedule(task, plan, draft, with_labels=first is not None)
    sections = written(schedule)
    config = validated(Config, values_of(name, sections), f"plan of {task.source.folder}")
    return Planned(config, text_of(name, sections, heading), task.fingerprint, plan)


def _sections(
    task: _Task, plan: Plan, schedule: Schedule, *, first: Path | None = None
) -> Sections:
    return sections_of(
        plan,
        task.source,
        schedule=schedule,
        own_schedule=task.own_schedule,
        labels=list(task.dataset.labels),
        accelerator=task.accelerator,
        first_stage=first,
    )


def _schedule(task: _Task, plan: Plan, config: Config, *, with_labels: bool) -> Schedule:
    """A schedule with validations of at most a tenth of the time, and steps in the rest."""
    description = _described(task, config, with_labels=with_labels)
    place = "here"
    if task.timed:
        seconds, window = _timed(task, config, description)
    else:
        place = LIKE
        seconds, window = estimated_seconds(
            plan,
            in_channels=description.channels_in,
            num_classes=len(description.labelling.outputs),
        )
    shapes = task.fingerprint.numbers()
    median = rules.median_shape(shapes.spacings, shapes.shapes, plan.spacing)
    size = [round(n) for n in median]
    per_case = window * num_windows(size, description.volume_patch)
    held_out = _num_held_out(config.data, len(task.dataset.cases))
    return schedule_within(
        task.minutes,
        seconds_per_step=seconds,
        seconds_per_case=per_case,
        held_out=held_out,
        precision=precision_of(task.device) if task.timed else torch.bfloat16,
        place=place,
    )


def _num_held_out(data: SplitDatasetConfig, count: int) -> int:
    """About how many of `count` cases a split holds out."""
    if data.fold is not None or data.splits is not None:
        folds = len(data.splits) if isinstance(data.splits, list) else data.num_folds
        return count // folds
    if isinstance(data.validation, list):
        return len(data.validation)
    return max(round(data.validation * count), 1) if count > 1 else 0


def _timed(task: _Task, config: Config, description: ModelDescription) -> tuple[float, float]:
    """Seconds of a step, and of a window in a validation, measured on the task's device."""
    step = {
        "what": "step",
        "batch_size": config.data.batch_size,
        **description.model_dump(mode="json", include=set(STEP_OF)),
    }
    seconds = task.figures.once(
        step, partial(seconds_of_step, config, description, task.device), task.device
    )
    window = task.figures.once(
        {**step, "what": "window"},
        partial(seconds_of_windows, description, task.device),
        task.device,
    )
    return seconds, window


def schedule_within(
    minutes: float,
    *,
    seconds_per_step: float,
    seconds_per_case: float,
    held_out: int,
    precision: torch.dtype = torch.float32,
    place: str = "here",
) -> Schedule:
    """Validations and steps that fit into the time of a run.

    Args:
        minutes: time of the whole run.
        seconds_per_step: time of a training step.
        seconds_per_case: time of a case in validations and in the final scores.
        held_out: number of held-out cases.
        precision: precision of the training.
        place: the machine that trains, in words.
    """
    total = 60 * minutes
    count, cases = _validations(SHARE_OF_VALIDATION * total, seconds_per_case, held_out)
    validating = count * cases * seconds_per_case
    scoring = min(held_out * seconds_per_case, MOST_FOR_SCORING * total)
    preparing = SHARE_OF_PREPARING * total
    steps = max(int((total - validating - scoring - preparing) / seconds_per_step), LEAST_STEPS)
    name = "single precision" if precision == torch.float32 else str(precision).split(".")[-1]
    reserved = [f"{preparing:.0f} s are reserved for preparing"]
    if cases:
        each = f"{counted(count, 'validation')} of {counted(cases, 'case')}"
        reserved.append(f"{validating:.0f} s for {each}")
    if held_out:
        reserved.append(f"{scoring:.0f} s for the final scores")
    *most, last = reserved
    parts = f"{', '.join(most)} and {last}" if most else last
    why = (
        f"A step takes {seconds_per_step:.3g} s {place}, in {name}. "
        f"Of {counted(minutes, 'minute')}, {parts}; "
        f"{counted(steps, 'step', form=',')} fit{'s' * (steps == 1)} into the rest."
    )
    if held_out and not cases:
        why += (
            f" There is no validation, as a single case takes {seconds_per_case:.0f} s, over a "
            f"tenth of the time."
        )
    elif not held_out:
        why += " No case is held out, so there are no scores."
    if steps == LEAST_STEPS:
        why += " This is the smallest number of steps, so the run may take longer."
    return Schedule(
        steps,
        why,
        validate_every=max(math.ceil(steps / (count + 0.5)), 1),
        validation_cases=cases if cases < held_out else None,
        minutes=minutes,
    )


def _validations(seconds: float, per_case: float, held_out: int) -> tuple[int, int]:
    """The number of validations that fit into the time, and the number of cases in each.

    If not even one case fits, there are checkpoints without validation: validations of 0 cases.
    """
    whole = held_out * per_case
    if not whole or MOST_VALIDATIONS * whole <= seconds:
        return MOST_VALIDATIONS, held_out
    if FEWEST_VALIDATIONS * whole <= seconds:
        return int(seconds / whole), held_out
    cases = int(seconds / FEWEST_VALIDATIONS / per_case)
    if cases:
        return FEWEST_VALIDATIONS, cases
    return (1, 1) if per_case <= seconds else (MOST_VALIDATIONS, 0)


def _described(task: _Task, config: Config, *, with_labels: bool) -> ModelDescription:
    """The description of a config's model; `with_labels` if it receives first-stage labels."""
    dataset, spacing = task.dataset, config.data.spacing
    assert spacing is not None, "a plan has a spacing"
    classes = list(dataset.labelling.value_names[1:])
    return description_of(
        config,
        channels=dataset.channels,
        labelling=dataset.labelling,
        codes=dataset.codes,
        pictures=dataset.pictures,
        unit=dataset.unit,
        spacing=spacing,
        normalisation=[],
        first_stage=FirstStageConfig(models=1, classes=classes) if with_labels else None,
    )


def seconds_of_windows(description: ModelDescription, device: torch.device) -> float:
    """Seconds for a window in a validation, which runs two at once; on a CPU, on free cores."""
    network = build_network(description).to(device)
    order_for(network, device)
    windows = torch.zeros(2, description.channels_in, *description.volume_patch, device=device)
    watch = CoreShare()
    seconds = seconds_of_window(network, windows)
    return seconds * watch.share() if device.type == "cpu" else seconds


def seconds_of_step(
    config: Config, description: ModelDescription, device: torch.device = CPU
) -> float:
    """Seconds of a training step with a config's network on a device of this machine."""
    batch, patch = config.data.batch_size, description.volume_patch
    network = build_network(description).to(device)
    vary: Vary | None = None
    margin: tuple[int, ...] = (0, 0, 0)
    if device.type != "cpu":
        vary, margin = build_variation(
            config.data,
            patch,
            spacing=description.spacing,
            labels=description.labelling.value_names,
            first_classes=len(description.first_stage.classes) if description.first_stage else 0,
        )
    cut = [size + 2 * beyond for size, beyond in zip(patch, margin, strict=True)]
    channels = len(description.channels) + (description.first_stage is not None)
    image = torch.zeros(batch, channels if vary else description.channels_in, *cut, device=device)
    label = torch.zeros(batch, *cut, dtype=torch.long if vary is None else torch.uint8)
    return step_seconds(network, image, label.to(device), vary=vary, repeats=3)


def _about_lengths(dataset: Dataset) -> str:
    """A sentence about the pixel size of pictures and the unit of spacing; empty for volumes."""
    case = dataset.cases[0]
    if not is_picture(case.label):
        return ""
    facts = read_picture_facts((*case.images, case.label)[0], rules=dataset.rules)[1]
    if facts.sized:
        return f" Pixel sizes here are in mm; {facts.source}."
    return f" Lengths are in pixels, and a pixel counts as 1 mm: {facts.source}."


def _run_name(folder: Path) -> str:
    """The name of the folder, with only characters that the name of a run may have."""
    name = folder.resolve().name
    name = "".join(c if c.isalnum() or c in "_.-" else "_" for c in name).strip("_.-") or "run"
    return name if is_file_name(name) else f"run_{name}"
