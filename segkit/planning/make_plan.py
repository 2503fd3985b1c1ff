"""`segkit plan`: from a dataset to a config that says why each value was chosen."""

import textwrap
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from segkit.config.dataset_files import FilesConfig
from segkit.config.load import validated
from segkit.config.model import FirstStageConfig, ModelDescription
from segkit.config.training import Config
from segkit.data.dataset import Dataset, read_dataset
from segkit.inference.engines.torch_eager import choose_device
from segkit.model.build import build_network, channels_in, volume_patch
from segkit.planning.fingerprint import Fingerprint, fingerprint
from segkit.planning.plan import Plan, Steps, plan_for_memory, plan_for_time
from segkit.system.estimates import memory_of_step
from segkit.system.progress import Track, untracked
from segkit.system.resources import num_cores
from segkit.system.speed import (
    half_pays,
    measured_once,
    multiply_adds_per_second,
    step_seconds,
)

Preset = Literal["auto", "nnunet"]

PLANNED_STEPS = Steps(for_batch=10_000, for_width=4000, for_patch=1200)
"""What a CPU's time goes to; docs/planning.md says what was measured."""
SHARE_OF_STEPS = 0.9
"""Of the time; the rest is for validation, augmentation and preparing the cases."""
GPU_STEPS = 20_000
SPEED = "speed.json"
"""In the cache: what was timed of this processor, so that one dataset has one plan."""
STEP_OF = ("channels", "labels", "regions", "network", "slices", "patch_size", "first_stage")
"""What of a description decides how long a step takes, beside the size of its batch."""
NNUNET_STEPS = 250_000
VALIDATIONS = 10
AVERAGING = 0.999
CASES_PER_PROCESS = 300
"""So many small cases are measured in the time that another process takes to start."""


@dataclass(frozen=True)
class Planned:
    """A config, the same as YAML with its reasons, and what both were made of."""

    config: Config
    text: str
    fingerprint: Fingerprint
    plan: Plan
    low: "Planned | None" = None
    """The stage to train before, at low resolution, where a patch holds too little of an image."""


def plan_dataset(
    folder: Path,
    files: FilesConfig | None = None,
    *,
    cache: Path | None = None,
    device: str = "auto",
    spatial_dims: int = 3,
    gigabytes: float = 8.0,
    minutes: float = 20.0,
    preset: Preset = "auto",
    runs: Path = Path("runs"),
    track: Track = untracked,
) -> Planned:
    """Measure a dataset and plan its training here, in two stages where images are large.

    Args:
        folder: with a dataset.json, or with `files`.
        cache: where measurements of cases are kept; `.cache` of `runs` where not given.
        device: 'auto', 'cpu' or 'cuda'. On a CPU the budget is `minutes` of training, which two
            stages share, and on a GPU `gigabytes` of its memory.
        preset: `nnunet` gives nnU-Net's own plan and schedule wherever it runs.
        runs: where a second stage will find the first.

    Raises DatasetError where the dataset does not fit together.
    """
    dataset = read_dataset(folder, files)
    workers = min(num_cores(), len(dataset.cases) // CASES_PER_PROCESS)
    cache = cache or runs / ".cache"
    measured = fingerprint(dataset, cache=cache, workers=workers, track=track)
    numbers, kind = measured.numbers(), choose_device(device).type
    own_schedule = preset == "nnunet"
    timed = kind == "cpu" and not own_schedule
    figures = cache / SPEED
    speed = None
    if timed:
        speed = measured_once(figures, {"what": "multiply-adds"}, multiply_adds_per_second)

    def within(minutes: float) -> Plan:
        if speed is None:
            return plan_for_memory(numbers, spatial_dims=spatial_dims, gigabytes=gigabytes)
        return plan_for_time(
            numbers,
            spatial_dims=spatial_dims,
            minutes=minutes,
            steps=PLANNED_STEPS,
            multiply_adds_per_second=speed,
            gigabytes=gigabytes,
        )

    plan = within(minutes)
    budget = f"{gigabytes:g} GB of memory"
    if timed:
        time = f"{minutes:g}"
        if plan.low_resolution is not None:
            # In half the time a patch holds no more of an image, so that two stages it stays.
            minutes /= 2
            plan, time = within(minutes), f"{minutes:g} of {time}"
        budget = f"{time} minutes of training on this machine's CPU"
    size = f"{len(dataset.cases)} cases, channels {', '.join(dataset.channels)}"

    def written(plan: Plan, name: str, stage: str, first: Path | None = None) -> Planned:
        steps = NNUNET_STEPS if own_schedule else GPU_STEPS
        why_steps = "nnU-Net's 1000 epochs of 250." if own_schedule else "An hour or so of a GPU's."
        first_classes = list(dataset.labelling.value_names[1:]) if first else []

        def settled(steps: int) -> tuple[Config, dict[str, Any], dict[str, str]]:
            tree, reasons = _settings(folder, files, name, plan, steps, own_schedule)
            if first is not None:
                tree["data"]["first_stage"] = [str(first)]
            if device != "auto":
                tree["trainer"] = {"accelerator": "cpu" if kind == "cpu" else "gpu"}
            return validated(Config, tree, f"plan of {folder}"), tree, reasons

        config, tree, reasons = settled(steps)
        description = _description(config, dataset, first_classes)
        if timed:
            step = {
                "what": "step",
                "batch_size": plan.batch_size,
                **description.model_dump(mode="json", include=set(STEP_OF)),
            }
            seconds = measured_once(figures, step, partial(seconds_of_step, config, description))
            steps, why_steps = _steps_within(minutes, seconds)
            config, tree, reasons = settled(steps)
        reasons["train.steps"] = why_steps
        half = kind != "cpu" or half_pays()
        memory = memory_of_step(config, description, half=half)
        headings = [
            f"Planned for {folder} ({size}) and {budget}.{stage}",
            f"A training step is estimated to take, in {'half' if half else 'single'} precision "
            f"and without what libraries take for themselves, {memory}.",
        ]
        return Planned(config, _commented(tree, reasons, headings), measured, plan)

    name = _run_name(folder)
    if plan.low_resolution is None:
        return written(plan, name, "")
    first = f"{name}_low"
    low = written(plan.low_resolution, first, f" The first of two stages: train it before {name}.")
    full = written(plan, name, f" The second of two stages: train {first} before.", runs / first)
    return replace(full, low=low)


def _description(config: Config, dataset: Dataset, first_classes: list[str]) -> ModelDescription:
    """What the model will be, but for how intensities are normalised."""
    assert config.data.spacing is not None, "a plan has one"
    return ModelDescription(
        segkit=version("segkit"),
        run=config.name,
        channels=list(dataset.channels),
        labels=dataset.labels,
        regions={name: list(numbers) for name, numbers in dataset.regions.items()},
        ignore=dataset.ignore,
        codes=dataset.codes,
        network=config.network,
        spacing=config.data.spacing,
        normalisation=[],
        slices=config.data.slices,
        patch_size=config.data.patch_size,
        first_stage=FirstStageConfig(models=1, classes=first_classes) if first_classes else None,
    )


def _steps_within(minutes: float, seconds: float) -> tuple[int, str]:
    """What is left of the time goes into more steps: how many, and the sentence that says so."""
    affordable = minutes * 60 * SHARE_OF_STEPS / seconds
    precision = "bfloat16" if half_pays() else "single precision"
    return max(int(affordable) // 50 * 50, 50), (
        f"A step takes {seconds:.3g} s here, in {precision}; {minutes:g} minutes hold "
        f"{affordable:.0f}, with {1 - SHARE_OF_STEPS:.0%} left for validation and the rest."
    )


def seconds_of_step(config: Config, description: ModelDescription) -> float:
    """What a training step of a config's network takes on this CPU, in a few tries."""
    batch, patch = config.data.batch_size, volume_patch(description)
    image = torch.zeros(batch, channels_in(description), *patch)
    label = torch.zeros(batch, *patch, dtype=torch.long)
    network = build_network(description)
    return step_seconds(network, image, label, half=half_pays(), repeats=3)


def _settings(
    folder: Path,
    files: FilesConfig | None,
    name: str,
    plan: Plan,
    steps: int,
    own_schedule: bool,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The config's sections, and by dotted key why a value is what it is."""
    kinds = {normalisation.kind for normalisation in plan.normalisation}
    data: dict[str, Any] = {
        "folder": str(folder),
        "spacing": list(plan.spacing),
        "interpolation": "cubic",
        "patch_size": list(plan.patch_size),
        "batch_size": plan.batch_size,
    }
    if files is not None:
        data["files"] = files.model_dump(mode="json", exclude_unset=True)
    if plan.spatial_dims == 2:
        data["slices"] = plan.slices
    if kinds == {"zscore nonzero"}:
        data["normalisation"] = {"kind": "zscore", "nonzero": True}
    if own_schedule:
        data["mirror"] = ["x", "y", "z"]
    network = {
        "spatial_dims": plan.spatial_dims,
        "channels": list(plan.channels),
        "strides": [list(step) for step in plan.strides],
        "kernels": [list(size) for size in plan.kernels],
        "attention": {} if own_schedule else {"skip": "additive_grid"},
    }
    if len(plan.channels) == 2 and not own_schedule:
        network["attention"] = {"skip": {"kind": "additive_grid", "levels": [0]}}
    train: dict[str, Any] = {"steps": steps, "batch_dice": plan.batch_dice}
    train["optimiser"] = "sgd" if own_schedule else "adamw"
    if not own_schedule:
        train["averaging"] = AVERAGING
    train["validate_every"] = max(min(50, steps), steps // VALIDATIONS // 50 * 50)
    reasons = {
        "data.spacing": plan.reasons["spacing"],
        "data.interpolation": f"As nnU-Net. {plan.reasons['separate_z']}",
        "data.patch_size": plan.reasons["patch_size"],
        "data.batch_size": plan.reasons["batch_size"],
        "data.slices": plan.reasons["slices"],
        "data.normalisation": plan.reasons["normalisation"],
        "network.channels": plan.reasons["channels"],
        "network.strides": plan.reasons["strides"],
        "network.kernels": plan.reasons["kernels"],
        "network.attention": (
            "As nnU-Net, without any."
            if own_schedule
            else "Gates at the skips; see docs/attention.md for the others, or none."
        ),
        "data.first_stage": f"{plan.reasons['low_resolution']} The labels that it finds there go "
        "beside the image; without this line there is one stage. They are better on cases that "
        "the first stage was trained on than on new ones: five runs of it, with data.fold=0 to 4, "
        "all named here, give each case labels of a model that never saw it.",
        "train.validate_every": "Steps between validations, with a checkpoint to resume from.",
        "train.averaging": "A running average of the weights scores better than the last of them.",
        "train.batch_dice": plan.reasons["batch_dice"],
    }
    tree = {
        "name": name,
        "data": data,
        "network": network,
        "train": train,
    }
    return tree, reasons


def _run_name(folder: Path) -> str:
    """The folder's name, in the letters that a run's may have."""
    name = folder.resolve().name
    return "".join(c if c.isalnum() or c in "_.-" else "_" for c in name).lstrip("_.-") or "run"


def _commented(tree: dict[str, Any], reasons: dict[str, str], headings: list[str]) -> str:
    lines = []
    for heading in headings:
        lines += textwrap.wrap(heading, 98, initial_indent="# ", subsequent_indent="# ")
    for section, values in tree.items():
        if not isinstance(values, dict):
            lines.append(_yaml({section: values}))
            continue
        lines.append(f"{section}:")
        for key, value in values.items():
            if reason := reasons.get(f"{section}.{key}"):
                lines += textwrap.wrap(reason, 98, initial_indent="  # ", subsequent_indent="  # ")
            lines.append(textwrap.indent(_yaml({key: value}), "  "))
    return "\n".join(lines) + "\n"


def _yaml(value: dict[str, Any]) -> str:
    """One setting on one line."""
    ((key, content),) = value.items()
    flow = yaml.safe_dump(content, default_flow_style=True, width=10_000, sort_keys=False)
    return f"{key}: {flow.removesuffix(chr(10)).removesuffix('...').strip()}"
