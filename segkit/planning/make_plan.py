"""`segkit plan`: a training config for a dataset, with the reason for each value."""

import logging
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from segkit.config.dataset_files import DatasetConfig, FilesConfig
from segkit.config.load import validated
from segkit.config.model import FirstStageConfig, ModelDescription, description_of
from segkit.config.pictures import PicturesConfig
from segkit.config.training import RUN_NAME, Config
from segkit.data.case_groups import told_of_split
from segkit.data.dataset import Dataset
from segkit.data.split import Split, split_with
from segkit.errors import counted, printable
from segkit.inference.window_seconds import mean_windows, scored_in
from segkit.io.file_names import is_file_name
from segkit.io.volume import read_picture_facts
from segkit.io.volume_names import is_picture
from segkit.planning import nnunet_rules as rules
from segkit.planning.absent_gpu import LIKE, estimated_seconds
from segkit.planning.augmentation import num_passes, planned_share
from segkit.planning.config_text import Sections, sections_of, text_of, values_of
from segkit.planning.fingerprint import Fingerprint
from segkit.planning.plan import Plan
from segkit.planning.planned_optimiser import planned_optimiser
from segkit.planning.planned_seconds import measured_step, measured_window
from segkit.planning.planning_task import (
    PlanningTask,
    Preset,
    planning_task,
    source_of,
    warn_if_busy,
)
from segkit.planning.preparing_seconds import seconds_to_prepare
from segkit.planning.schedule import Schedule, schedule_within
from segkit.system.progress import Track, untracked
from segkit.system.resources import precision_of

logger = logging.getLogger(__name__)


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
    began: float | None = None,
) -> Planned:
    """Measure a dataset and plan its training, in two stages if images are large.

    Args:
        folder: the folder of the dataset, with a dataset.json unless `files` is given; or the
            dataset settings of a config's section `data`.
        files: patterns or a table that name the files of each case.
        pictures: information that pictures lack, such as their pixel size.
        cache: the folder for measurements of cases. Default: `.cache` in `runs`.
        device: 'auto', 'cpu', 'cuda', or 'cuda:1' for a certain GPU. If this machine has no CUDA
            GPU, a plan for 'cuda' has patch and network for `gigabytes` by nnU-Net's rules, and as
            many steps as a fast GPU does in the minutes, by an estimate; the run measures its real
            speed.
        spatial_dims: 3 for volumes, 2 for slices. Default: 2 only if each case is one slice.
        gigabytes: memory of the device, in 10⁹ bytes. Default: nine tenths of the GPU's free
            memory, or 8.
        minutes: time for training on this machine, in minutes; two stages share it.
        preset: 'auto', or 'nnunet' for nnU-Net's own plan and schedule on every device.
        runs: the folder of runs, in which a second stage will find the first.
        track: shows the progress over cases.
        began: when the minutes began, by `time.monotonic`, if they include planning. By default
            they begin with training.

    Returns:
        The config, its text and its reasons. If there are two stages, this is the second stage, and
        `low` is the first.

    Raises:
        DatasetError: the dataset's files do not fit together, or its cases have fewer axes than
            the plan.
        ConfigError: the settings of the dataset are wrong.
        VolumeError: a file cannot be read.
        WorkerError: a process that measured cases was killed.
        TrainingError: the GPU's memory is too small for a step of the plan.

    Example:
        >>> planned = segkit.plan_dataset("my_dataset", minutes=60)
        >>> run = segkit.train(planned.config)
    """
    task = planning_task(
        source_of(folder, files, pictures),
        cache=Path(runs) / ".cache" if cache is None else Path(cache),
        device=device,
        spatial_dims=spatial_dims,
        gigabytes=gigabytes,
        minutes=minutes,
        preset=preset,
        runs=Path(runs),
        track=track,
        began=began,
    )
    planned = planned_task(task)
    warn_if_busy(task)
    return planned


def planned_task(task: PlanningTask) -> Planned:
    """The planned config, or the configs of two stages."""
    minutes, source = task.minutes, task.source
    (task, plan), share = task.stage(), counted(minutes, "minute")
    if task.minutes != minutes:
        share = f"{task.minutes:g} of {share}"
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
    for sentence in told_of_split(dataset, source):
        logger.warning("%s", printable(sentence))
    name = _run_name(source.folder)
    if plan.low_resolution is None:
        return _planned(task, plan, name, heading)
    first = f"{name}_low"
    before = f"{heading} This is the first of two stages: train it before {name}."
    low = _planned(task, plan.low_resolution, first, before)
    after = f"{heading} This is the second of two stages: train {first} first."
    second = _planned(task, plan, name, after, task.runs / first, _seconds_to_label(task, low))
    return replace(second, low=low)


def _seconds_to_label(task: PlanningTask, low: Planned) -> float:
    """Seconds in which the first stage labels all cases for the second one; 0 if not planned."""
    if task.own_schedule:
        return 0.0
    described = _described(task, low.config, with_labels=False)
    _, scored = _precisions(task)
    per_case = _seconds_of_case(task, low.plan, low.config, described, scored)
    return len(task.dataset.cases) * per_case


def _precisions(task: PlanningTask) -> tuple[torch.dtype, torch.dtype]:
    """The data types in which a plan is trained, and in which it is scored."""
    trained = precision_of(task.device) if task.timed else torch.bfloat16
    return trained, scored_in(task.device, trained)


def _planned(
    task: PlanningTask,
    plan: Plan,
    name: str,
    heading: str,
    first: Path | None = None,
    labelling: float = 0.0,
) -> Planned:
    """The planned config of one stage.

    Args:
        task: the task.
        plan: the plan of this stage.
        name: the name of the run.
        heading: the first line of the config's text.
        first: the run of the stage before it, if any.
        labelling: seconds in which that stage labels all cases.
    """
    written = partial(_sections, task, plan, first=first)
    schedule, augmenting = task.draft(), None

    def valid(sections: Sections) -> Config:
        return validated(Config, values_of(name, sections), f"plan of {task.source.folder}")

    if not task.own_schedule:
        # The number of steps decides how often patches are augmented, which changes the time of a
        # step; so it is timed once more.
        for _ in range(2):
            draft = valid(written(schedule, augmenting=augmenting))
            described = _described(task, draft, with_labels=first is not None)
            split = split_with(task.dataset, draft.data, draft.train.seed)
            schedule = _schedule(task, plan, draft, described, len(split.held_out), labelling)
            augmenting = _augmenting(task, plan, described.volume_patch, schedule.steps, split)
            if augmenting[0] == draft.data.augment_share:
                break
    sections = written(schedule, augmenting=augmenting)
    return Planned(valid(sections), text_of(name, sections, heading), task.fingerprint, plan)


def _sections(
    task: PlanningTask,
    plan: Plan,
    schedule: Schedule,
    *,
    augmenting: tuple[float, str] | None = None,
    first: Path | None = None,
) -> Sections:
    return sections_of(
        plan,
        task.source,
        schedule=schedule,
        augmenting=augmenting,
        own_schedule=task.own_schedule,
        labels=list(task.dataset.labels),
        accelerator=task.accelerator,
        gpu=task.device.index if task.device.type == "cuda" else None,
        optimiser=planned_optimiser(
            plan.step_work(
                in_channels=len(task.dataset.channels) + (first is not None),
                num_classes=len(task.dataset.labelling.outputs),
            ),
            own_schedule=task.own_schedule,
            muon_cost=task.muon_cost,
        ),
        first_stage=first,
    )


def _schedule(
    task: PlanningTask,
    plan: Plan,
    config: Config,
    description: ModelDescription,
    held_out: int,
    labelling: float,
) -> Schedule:
    """A schedule with validations of at most a tenth of the time, and steps in the rest."""
    if task.timed:
        place, per_step = "here", measured_step(task, config, description)
    else:
        place, per_step = LIKE, _estimated(plan, description)[0]
    precision, scored = _precisions(task)
    return schedule_within(
        task.minutes,
        seconds_per_step=per_step,
        seconds_per_case=_seconds_of_case(task, plan, config, description, precision),
        seconds_per_score=_seconds_of_case(task, plan, config, description, scored),
        held_out=held_out,
        spent=task.spent,
        preparing=seconds_to_prepare(task, description) if task.timed else 0.0,
        labelling=labelling,
        precision=precision,
        place=place,
    )


def _seconds_of_case(
    task: PlanningTask,
    plan: Plan,
    config: Config,
    description: ModelDescription,
    precision: torch.dtype,
) -> float:
    """Seconds of the prediction of a case in a precision, on average over the cases."""
    if task.timed:
        window = measured_window(task, config, description, precision)
    else:
        window = _estimated(plan, description)[1]
    numbers = task.fingerprint.numbers()
    sizes = rules.resampled_shapes(numbers.spacings, numbers.shapes, plan.spacing)
    return window * mean_windows(sizes, description, task.device, precision)


def _estimated(plan: Plan, description: ModelDescription) -> tuple[float, float]:
    """Estimated seconds of a step and of a window on a GPU that is not here."""
    outputs = len(description.labelling.outputs)
    return estimated_seconds(plan, in_channels=description.channels_in, num_classes=outputs)


def _augmenting(
    task: PlanningTask, plan: Plan, patch_size: Sequence[int], steps: int, split: Split
) -> tuple[float, str]:
    """How often patches are augmented, and why, for a number of steps."""
    passes = num_passes(
        steps,
        batch_size=plan.batch_size,
        patch_size=patch_size,
        median=_median_shape(task, plan),
        training_cases=len(split.train),
    )
    return planned_share(passes, steps)


def _median_shape(task: PlanningTask, plan: Plan) -> tuple[float, float, float]:
    """The median shape of the cases at the plan's spacing."""
    numbers = task.fingerprint.numbers()
    return rules.median_shape(numbers.spacings, numbers.shapes, plan.spacing)


def _described(task: PlanningTask, config: Config, *, with_labels: bool) -> ModelDescription:
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
    """The name of the folder, with only characters that the name of a run may have.

    Letters lose their accents. What is no letter, digit, `_`, `.` or `-` becomes `_`.
    """
    plain = unicodedata.normalize("NFKD", folder.resolve().name)
    plain = "".join(character for character in plain if not unicodedata.combining(character))
    name = re.sub(r"[^\w.-]", "_", plain).strip("_.-") or "run"
    if not re.fullmatch(RUN_NAME, name) or not is_file_name(name):
        return f"run_{name}"
    return name
