"""Seconds of a step and of a window of a planned network, measured on this machine."""

from functools import partial
from typing import Any

import torch

from segkit.config.model import ModelDescription
from segkit.config.training import Config
from segkit.data.variation import build_variation
from segkit.inference.window_seconds import seconds_of_window
from segkit.model.build import build_network
from segkit.nn.normalisation import order_for
from segkit.planning.planning_task import PlanningTask
from segkit.planning.speed import CPU, step_seconds
from segkit.system.core_share import CoreShare

STEP_OF = ("channels", "labels", "regions", "network", "slices", "patch_size", "first_stage")
"""Parts of a description that, with the batch size, decide how long a step takes."""
AUGMENTATION = ("augment", "augment_share", "elastic", "mirror")
"""Settings of the data that also decide it."""


def measured_step(task: PlanningTask, config: Config, description: ModelDescription) -> float:
    """Seconds of a training step, measured on the task's device.

    Raises:
        TrainingError: the GPU's memory is too small for it.
    """
    about = {
        "what": "training step",
        "augmentation": config.data.model_dump(mode="json", include=set(AUGMENTATION)),
        **_about(config, description),
    }
    return task.measured(about, partial(seconds_of_step, config, description, task.device))


def measured_window(
    task: PlanningTask, config: Config, description: ModelDescription, precision: torch.dtype
) -> float:
    """Seconds of a window in a precision, measured on the task's device.

    Raises:
        TrainingError: the GPU's memory is too small for it.
    """
    about = {"what": "window", "in": str(precision), **_about(config, description)}
    return task.measured(about, partial(seconds_of_windows, description, task.device, precision))


def _about(config: Config, description: ModelDescription) -> dict[str, Any]:
    """The values on which the time of a step and that of a window depend."""
    return {
        "batch_size": config.data.batch_size,
        "optimiser": config.train.optimiser,
        **description.model_dump(mode="json", include=set(STEP_OF)),
    }


def seconds_of_windows(
    description: ModelDescription, device: torch.device, precision: torch.dtype
) -> float:
    """Seconds of a window in a precision; on a CPU, on free cores."""
    network = build_network(description).to(device)
    order_for(network, device)
    watch = CoreShare()
    seconds = seconds_of_window(network, description, precision)
    return seconds * watch.share() if device.type == "cpu" else seconds


def seconds_of_step(
    config: Config, description: ModelDescription, device: torch.device = CPU
) -> float:
    """Seconds of a training step with a config's network on a device of this machine."""
    batch, patch = config.data.batch_size, description.volume_patch
    network = build_network(description).to(device)
    vary, margin = build_variation(
        config.data,
        patch,
        spacing=description.spacing,
        labels=description.labelling.value_names,
        first_classes=len(description.first_stage.classes) if description.first_stage else 0,
    )
    cut = [size + 2 * beyond for size, beyond in zip(patch, margin, strict=True)]
    channels = len(description.channels) + (description.first_stage is not None)
    image = torch.zeros(batch, channels, *cut, device=device)
    label = torch.zeros(batch, *cut, dtype=torch.uint8)
    muon = config.train.optimiser == "muon"
    return step_seconds(network, image, label.to(device), vary=vary, muon=muon, repeats=3)
