"""`segkit plan`: a training config for a dataset, with the reason for each value."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from segkit.config.dataset_files import FilesConfig
from segkit.config.load import validated
from segkit.config.model import FirstStageConfig, ModelDescription, description_of
from segkit.config.training import Config
from segkit.data.augment_spatial import Vary
from segkit.data.dataset import Dataset, read_dataset, unlabelled
from segkit.data.variation import build_variation
from segkit.errors import printable
from segkit.model.build import build_network
from segkit.planning.config_text import Sections, sections_of, text_of, values_of
from segkit.planning.fingerprint import Fingerprint, fingerprint
from segkit.planning.plan import Plan, Steps, flat_axes, plan_for_memory, plan_for_time
from segkit.planning.speed import CPU, measured_once, multiply_adds_per_second, step_seconds
from segkit.system.progress import Track, untracked
from segkit.system.resources import choose_device, free_memory_of, num_cores, precision_of

logger = logging.getLogger(__name__)

Preset = Literal["auto", "nnunet"]

PLANNED_STEPS = Steps(for_batch=10_000, for_width=4000, for_patch=1200)
"""What a CPU's time goes to; docs/planning.md says what was measured."""
SHARE_OF_STEPS = 0.9
"""Of the time; the rest is for validation, augmentation and preparing the cases."""
GPU_STEPS = 20_000
"""For a card that this machine has not, whose speed is not known."""
DEFAULT_MEMORY = 8e9
SPEED = "speed.json"
"""The file in the cache with what was timed on this processor, so that a plan can be repeated."""
STEP_OF = ("channels", "labels", "regions", "network", "slices", "patch_size", "first_stage")
"""Parts of a description that decide how long a step takes, beside the size of its batch."""
NNUNET_STEPS = 250_000
CASES_PER_PROCESS = 300
"""Small cases that are measured in the time that another process takes to start."""


@dataclass(frozen=True)
class Planned:
    """A planned training: its config, and the reasons for it."""

    config: Config
    """For `segkit.train`."""
    text: str
    """The config as YAML, with a comment on each value."""
    fingerprint: Fingerprint
    """Sizes, spacings, classes and intensities of the dataset."""
    plan: Plan
    """Patch, batch and network, by nnU-Net's rules."""
    low: "Planned | None" = None
    """The stage to train before this one, at low resolution; only if images are large."""


@dataclass(frozen=True)
class _Task:
    """The dataset that is planned for, and the budget."""

    folder: Path
    files: FilesConfig | None
    dataset: Dataset
    fingerprint: Fingerprint
    device: torch.device
    accelerator: str | None
    """Of the training: 'cpu' or 'gpu', if it was asked for."""
    own_schedule: bool
    """Whether plan and schedule are nnU-Net's own."""
    timed: bool
    """Whether the budget is time, not memory."""
    spatial_dims: int
    gigabytes: float
    minutes: float
    """Of one stage; they count only if the budget is time."""
    figures: Path
    """The file with what was timed on this processor."""

    def plan(self) -> Plan:
        """The largest plan within the budget."""
        numbers = self.fingerprint.numbers()
        if not self.timed:
            return plan_for_memory(
                numbers, spatial_dims=self.spatial_dims, gigabytes=self.gigabytes
            )
        speed = measured_once(
            self.figures,
            {"what": "multiply-adds"},
            partial(multiply_adds_per_second, self.device),
            self.device,
        )
        return plan_for_time(
            numbers,
            spatial_dims=self.spatial_dims,
            minutes=self.minutes,
            steps=PLANNED_STEPS,
            multiply_adds_per_second=speed,
            gigabytes=self.gigabytes,
        )


def plan_dataset(
    folder: str | Path,
    files: FilesConfig | None = None,
    *,
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

        planned = segkit.plan_dataset("my_dataset", minutes=60)
        run = segkit.train(planned.config)

    Args:
        folder: the dataset's, with a dataset.json in it unless there are `files`.
        files: patterns or a table that name the files of each case.
        cache: the folder that keeps measurements of cases; `.cache` in `runs` by default.
        device: 'auto', 'cpu' or 'cuda'. If this machine has no such card, the plan is for
            `gigabytes` by nnU-Net's rules, and not for a time.
        spatial_dims: 3 for volumes, 2 for slices; by default 2 only if every case is one slice.
        gigabytes: 10⁹ bytes of the device's memory; by default what a GPU has free, or 8.
        minutes: of training on this machine; two stages share them.
        preset: 'nnunet' gives nnU-Net's own plan and schedule on every device.
        runs: the folder in which a second stage will find the first.
        track: shows progress.

    Returns:
        The config, its text and its reasons. If there are two stages it is the second, and `low`
        holds the first.

    Raises:
        DatasetError: the dataset's files do not fit together, or its cases have fewer axes than
            the plan.
        VolumeError: a file cannot be read.
        WorkerError: a process that measured cases was killed.
    """
    folder, runs = Path(folder), Path(runs)
    cache = runs / ".cache" if cache is None else Path(cache)
    dataset = read_dataset(folder, files)
    workers = min(num_cores(), len(dataset.cases) // CASES_PER_PROCESS)
    chosen, own_schedule = choose_device(device), preset == "nnunet"
    on_cpu = chosen.type == "cpu"
    present = on_cpu or torch.cuda.is_available()
    if gigabytes is None:
        free = free_memory_of(chosen) if present and not on_cpu else DEFAULT_MEMORY
        gigabytes = round(free / 1e9, 1)
    measured = fingerprint(dataset, cache=cache, workers=workers, track=track)
    labelled = {number for case in measured.cases for number in case.classes}
    if word := unlabelled(dataset, labelled, f"the {len(dataset.cases)} cases"):
        logger.warning("%s", printable(word))
    task = _Task(
        folder,
        files,
        dataset,
        measured,
        device=chosen,
        accelerator=None if device == "auto" else "cpu" if on_cpu else "gpu",
        own_schedule=own_schedule,
        timed=present and not own_schedule,
        spatial_dims=spatial_dims or (2 if flat_axes(measured.numbers()) else 3),
        gigabytes=gigabytes,
        minutes=minutes,
        figures=cache / SPEED,
    )
    plan, share = task.plan(), f"{minutes:g}"
    if task.timed and plan.low_resolution is not None:
        task = replace(task, minutes=minutes / 2)
        plan, share = task.plan(), f"{minutes / 2:g} of {minutes:g}"
    budget = f"{gigabytes:g} GB of memory"
    if task.timed:
        where = "this machine's CPU" if on_cpu else torch.cuda.get_device_name(chosen)
        budget = f"{share} minutes of training on {where}"
    size = f"{len(dataset.cases)} cases, channels {', '.join(dataset.channels)}"
    heading = f"Planned for {folder} ({size}) and {budget}."
    name = _run_name(folder)
    if plan.low_resolution is None:
        return _planned(task, plan, name, heading)
    first = f"{name}_low"
    before = f"{heading} The first of two stages: train it before {name}."
    low = _planned(task, plan.low_resolution, first, before)
    after = f"{heading} The second of two stages: train {first} before."
    return replace(_planned(task, plan, name, after, runs / first), low=low)


def _planned(
    task: _Task, plan: Plan, name: str, heading: str, first: Path | None = None
) -> Planned:
    """One stage; `first` is the run of the stage before it."""

    steps, why_steps = GPU_STEPS, "An hour or so of a GPU's."
    if task.own_schedule:
        steps, why_steps = NNUNET_STEPS, "nnU-Net's 1000 epochs of 250."
    sections = partial(
        sections_of,
        plan,
        task.folder,
        task.files,
        own_schedule=task.own_schedule,
        labels=list(task.dataset.labels),
        accelerator=task.accelerator,
        first_stage=first,
    )

    def checked(written: Sections) -> Config:
        return validated(Config, values_of(name, written), f"plan of {task.folder}")

    written = sections(steps=steps, why_steps=why_steps)
    if task.timed:
        seconds = _measured_step(task, checked(written), with_labels=first is not None)
        steps, why_steps = _steps_within(task.minutes, seconds, task.device)
        written = sections(steps=steps, why_steps=why_steps)
    return Planned(checked(written), text_of(name, written, heading), task.fingerprint, plan)


def _measured_step(task: _Task, config: Config, *, with_labels: bool) -> float:
    """Seconds of a step on this CPU; `with_labels` if a first stage's come beside the image."""
    dataset, spacing = task.dataset, config.data.spacing
    assert spacing is not None, "a plan has one"
    classes = list(dataset.labelling.value_names[1:])
    description = description_of(
        config,
        channels=dataset.channels,
        labelling=dataset.labelling,
        codes=dataset.codes,
        spacing=spacing,
        normalisation=[],
        first_stage=FirstStageConfig(models=1, classes=classes) if with_labels else None,
    )
    step = {
        "what": "step",
        "batch_size": config.data.batch_size,
        **description.model_dump(mode="json", include=set(STEP_OF)),
    }
    measure = partial(seconds_of_step, config, description, task.device)
    return measured_once(task.figures, step, measure, task.device)


def _steps_within(minutes: float, seconds: float, device: torch.device) -> tuple[int, str]:
    """What is left of the time goes into more steps: how many, and the sentence that says so."""
    affordable = minutes * 60 * SHARE_OF_STEPS / seconds
    half = precision_of(device)
    precision = "single precision" if half == torch.float32 else str(half).removeprefix("torch.")
    return max(int(affordable) // 50 * 50, 50), (
        f"A step takes {seconds:.3g} s here, in {precision}; {minutes:g} minutes hold "
        f"{affordable:.0f}, with {1 - SHARE_OF_STEPS:.0%} left for validation and the rest."
    )


def seconds_of_step(
    config: Config, description: ModelDescription, device: torch.device = CPU
) -> float:
    """Seconds of a training step of a config's network on a device of this machine."""
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


def _run_name(folder: Path) -> str:
    """The folder's name, in the letters that a run's may have."""
    name = folder.resolve().name
    return "".join(c if c.isalnum() or c in "_.-" else "_" for c in name).lstrip("_.-") or "run"
