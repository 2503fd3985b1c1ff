"""`segkit plan`: from a dataset to a config that says why each value was chosen."""

import os
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from segkit.config import Config, ModelDescription
from segkit.config_file import validated
from segkit.data.cases import read_dataset
from segkit.data.fingerprint import Fingerprint, fingerprint
from segkit.data.plan import Plan, plan_for_memory, plan_for_time
from segkit.data.rules import multiply_adds
from segkit.errors import ConfigError
from segkit.estimates import memory_of_step
from segkit.inference.engines import choose_device
from segkit.losses import deep_dice_cross_entropy
from segkit.nn.unet import UNet

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
Preset = Literal["auto", "nnunet"]

STEPS = {"cpu": 1200, "cuda": 20_000}
NNUNET_STEPS = 250_000
CASES_PER_PROCESS = 300
"""So many small cases are measured in the time that another process takes to start."""


@dataclass(frozen=True)
class Planned:
    """A config, the same as YAML with its reasons, and what both were made of."""

    config: Config
    text: str
    fingerprint: Fingerprint
    plan: Plan


def plan_dataset(
    folder: Path,
    *,
    cache: Path,
    device: str = "auto",
    spatial_dims: int = 3,
    gigabytes: float = 8.0,
    minutes: float = 20.0,
    preset: Preset = "auto",
    track: Track = lambda items, what, count: items,
) -> Planned:
    """Measure a dataset and plan its training on this machine.

    Args:
        folder: with a dataset.json.
        cache: where measurements of cases are kept.
        device: 'auto', 'cpu' or 'cuda'. On a CPU the budget is `minutes` of training, on a GPU
            `gigabytes` of its memory.
        preset: `nnunet` gives nnU-Net's own plan and schedule wherever it runs.

    Raises DatasetError where the dataset does not fit together.
    """
    dataset = read_dataset(folder)
    workers = min(os.cpu_count() or 1, len(dataset.cases) // CASES_PER_PROCESS)
    measured = fingerprint(dataset, cache=cache, workers=workers, track=track)
    numbers, kind = measured.numbers(), choose_device(device).type
    own_schedule = preset == "nnunet"
    steps = NNUNET_STEPS if own_schedule else STEPS.get(kind, STEPS["cuda"])
    if kind == "cpu" and not own_schedule:
        speed = measured_speed()
        plan = plan_for_time(
            numbers,
            spatial_dims=spatial_dims,
            minutes=minutes,
            steps=steps,
            multiply_adds_per_second=speed,
            gigabytes=gigabytes,
        )
        # What is left of the time goes into more steps.
        per_step = (
            3
            * plan.batch_size
            * multiply_adds(
                channels=plan.channels,
                strides=plan.strides,
                kernels=plan.kernels,
                patch_size=plan.patch_size,
                in_channels=len(dataset.channels),
                num_classes=len(dataset.labels),
            )
        )
        affordable = minutes * 60 * speed / per_step
        steps = max(int(affordable) // 100 * 100, 100)
        why_steps = (
            f"{minutes:g} minutes hold {affordable:.0f} steps of {per_step / 1e9:.3g} billion "
            f"multiply-adds, at the {speed / 1e9:.3g} billion a second measured here."
        )
        budget = f"{minutes:g} minutes of training on this machine's CPU"
    else:
        plan = plan_for_memory(numbers, spatial_dims=spatial_dims, gigabytes=gigabytes)
        why_steps = "nnU-Net's 1000 epochs of 250." if own_schedule else "An hour or so of a GPU's."
        budget = f"{gigabytes:g} GB of memory"
    tree, reasons = _settings(folder, plan, steps, own_schedule)
    if device != "auto":
        tree["trainer"] = {"accelerator": "cpu" if kind == "cpu" else "gpu"}
    reasons["train.steps"] = why_steps
    config = validated(Config, tree, f"plan of {folder}")
    size = f"{len(dataset.cases)} cases, channels {', '.join(dataset.channels)}"
    description = ModelDescription(
        segkit=version("segkit"),
        run=config.name,
        channels=list(dataset.channels),
        labels=dataset.labels,
        network=config.network,
        spacing=plan.spacing,
        normalisation=[],
        slices=config.data.slices,
        patch_size=config.data.patch_size,
    )
    half = kind == "cuda"
    memory = memory_of_step(config, description, half=half)
    headings = [
        f"Planned for {folder} ({size}) and {budget}.",
        f"A training step is estimated to take, in {'half' if half else 'single'} precision and "
        f"without what libraries take for themselves, {memory}.",
    ]
    text = _commented(tree, reasons, headings)
    return Planned(config, text, measured, plan)


def measured_speed() -> float:
    """Multiply-adds per second of training on this CPU: the median of a few steps, in a second."""
    channels, strides = (16, 32, 64), ((2, 2, 2),) * 2
    network = UNet(3, 1, out_channels=3, channels=channels, strides=strides)
    image = torch.randn(2, 1, 32, 32, 32)
    label = torch.zeros(2, 32, 32, 32, dtype=torch.long)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        levels = network.supervised(image).levels
        deep_dice_cross_entropy(levels, label, pool_batch=False).backward()
        seconds.append(time.perf_counter() - started)
    per_step = (
        2
        * 3
        * multiply_adds(
            channels=channels,
            strides=strides,
            kernels=((3, 3, 3),) * 3,
            patch_size=(32, 32, 32),
            in_channels=1,
            num_classes=3,
        )
    )
    return per_step / sorted(seconds[1:])[2]


def _settings(
    folder: Path, plan: Plan, steps: int, own_schedule: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """The config's sections, and by dotted key why a value is what it is."""
    kinds = {normalisation.kind for normalisation in plan.normalisation}
    data: dict[str, Any] = {
        "folder": str(folder),
        "spacing": list(plan.spacing),
        "patch_size": list(plan.patch_size),
        "batch_size": plan.batch_size,
    }
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
    train["validate_every"] = max(min(200, steps), steps // 50 // 50 * 50)
    reasons = {
        "data.spacing": plan.reasons["spacing"],
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
        "train.validate_every": "Steps between validations, with a checkpoint to resume from.",
        "train.batch_dice": plan.reasons["batch_dice"],
    }
    name = folder.resolve().name
    tree = {
        "name": "".join(c if c.isalnum() or c in "_.-" else "_" for c in name).lstrip("_.-")
        or "run",
        "data": data,
        "network": network,
        "train": train,
    }
    return tree, reasons


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


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise ConfigError where a plan would be written over."""
    if path.exists() and not overwrite:
        raise ConfigError(f"{path}: exists already; pass --overwrite or name another --out")
