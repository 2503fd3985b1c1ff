"""The config of a planned training as text, with the reason for each value as a comment."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from segkit.config.data import DataConfig
from segkit.config.dataset_files import DatasetConfig
from segkit.config.training import OptimiserName
from segkit.planning.nnunet_rules import ChannelNormalisation
from segkit.planning.plan import Plan
from segkit.planning.schedule import Schedule

Sections = Mapping[str, Mapping[str, tuple[Any, str]]]
"""For each section and key, the value and its reason. Values of None are not written."""

AVERAGING = 0.999
WIDTH = 98


def sections_of(
    plan: Plan,
    source: DatasetConfig,
    *,
    schedule: Schedule,
    augmenting: tuple[float, str] | None,
    own_schedule: bool,
    labels: Sequence[str],
    accelerator: str | None,
    gpu: int | None,
    optimiser: tuple[OptimiserName, str],
    first_stage: Path | None,
) -> Sections:
    """The sections of the config.

    Args:
        plan: the plan of the dataset.
        source: settings of the dataset.
        schedule: steps, validations and minutes.
        augmenting: how often patches are augmented, as a share, and why; None leaves it to the
            default.
        own_schedule: whether plan and schedule are nnU-Net's own, without attention.
        labels: names of the dataset's classes or regions.
        accelerator: 'cpu' or 'gpu'; None leaves the choice to the training.
        gpu: the number of the GPU, if the plan is for a certain one.
        optimiser: the optimiser, and why.
        first_stage: the run of the first stage, if there are two stages.
    """
    why = plan.reasons
    given = source.model_dump(mode="json", exclude_unset=True, exclude={"folder"})
    shallow: Any = {"kind": "additive_grid", "levels": [0]}
    mirroring = DataConfig(
        folder=source.folder,
        patch_size=list(plan.patch_size),
        mirror=["x", "y", "z"] if own_schedule else None,
    )
    gates = {"skip": shallow if len(plan.channels) == 2 else "additive_grid"}
    return {
        "data": {
            "folder": (str(source.folder), ""),
            "spacing": (list(plan.spacing), why["spacing"]),
            "interpolation": ("cubic", f"As in nnU-Net. {why['separate_z']}"),
            "patch_size": (list(plan.patch_size), why["patch_size"]),
            "batch_size": (plan.batch_size, why["batch_size"]),
            **{name: (value, "") for name, value in given.items()},
            "slices": (plan.slices if plan.spatial_dims == 2 else None, why["slices"]),
            "normalisation": (_normalisation(plan.normalisation), why["normalisation"]),
            "augment_share": augmenting or (None, ""),
            "mirror": (mirroring.mirrored(labels), mirroring.mirrored_because(labels)),
            "first_stage": (
                first_stage and [str(first_stage)],
                f"{why['low_resolution']} The network receives the labels of the first stage "
                "beside the image; without this line there is only one stage. These labels are "
                "better on cases that the first stage was trained on than on new cases. Five runs "
                "of the first stage, with data.fold=0 to 4 and all named here, give each case "
                "labels of a model that was not trained on it.",
            ),
        },
        "network": {
            "spatial_dims": (plan.spatial_dims, ""),
            "channels": (list(plan.channels), why["channels"]),
            "strides": ([list(step) for step in plan.strides], why["strides"]),
            "kernels": ([list(size) for size in plan.kernels], why["kernels"]),
            "attention": ({}, "None, as in nnU-Net.")
            if own_schedule
            else (gates, "Gates at the skips; docs/attention.md describes other kinds."),
        },
        "train": {
            "steps": (schedule.steps, schedule.why_steps),
            "minutes": (
                schedule.minutes,
                "Wall time from preparing the cases to the final scores. The learning rate follows "
                "this time. With null, training takes exactly the given steps.",
            ),
            "batch_dice": (plan.batch_dice, why["batch_dice"]),
            "optimiser": optimiser,
            "averaging": (
                None if own_schedule else AVERAGING,
                "A running average of the weights scores better than the last weights.",
            ),
            "validate_every": (
                schedule.validate_every,
                "Steps between validations. Each also writes a checkpoint to resume from.",
            ),
            "validation_cases": (
                schedule.validation_cases,
                "Validations take at most a tenth of the time, so each uses only this number of "
                "held-out cases. The final scores use all for which there is time.",
            ),
        },
        "trainer": {
            "accelerator": (accelerator, ""),
            "devices": (None if gpu is None else [gpu], "The GPU for which this plan was made."),
        },
    }


def _normalisation(
    channels: Sequence[ChannelNormalisation],
) -> dict[str, Any] | list[dict[str, Any]] | None:
    """The setting for channels whose zeros are left out; None if the default says the same.

    A CT window is measured in the training cases, so it gets no values here.
    """
    kinds = [channel.kind for channel in channels]
    if "zscore nonzero" not in kinds:
        return None
    each: list[dict[str, Any]] = [
        {"kind": "ct"} if kind == "ct" else {"kind": "zscore", "nonzero": kind == "zscore nonzero"}
        for kind in kinds
    ]
    return each if len(set(kinds)) > 1 else each[0]


def values_of(name: str, sections: Sections) -> dict[str, Any]:
    """The values of the config, without the reasons."""
    tree = {
        section: {key: value for key, (value, _) in rows.items() if value is not None}
        for section, rows in sections.items()
    }
    return {"name": name, **{section: values for section, values in tree.items() if values}}


def text_of(name: str, sections: Sections, heading: str) -> str:
    """The config as YAML under a heading, with each reason as a comment above its value."""
    lines = [*_comment(heading, ""), _yaml("name", name)]
    for section, values in values_of(name, sections).items():
        if section == "name":
            continue
        lines.append(f"{section}:")
        for key, value in values.items():
            lines += [*_comment(sections[section][key][1], "  "), f"  {_yaml(key, value)}"]
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=mark, subsequent_indent=mark)


def _yaml(key: str, value: Any) -> str:
    """One setting as a line of YAML."""
    flow = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return f"{key}: {flow.removesuffix(chr(10)).removesuffix('...').strip()}"
