"""A plan as the config of a training, with the reason beside each value."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from segkit.config.data import DataConfig
from segkit.config.dataset_files import DatasetConfig
from segkit.planning.plan import Plan

Sections = Mapping[str, Mapping[str, tuple[Any, str]]]
"""By section and key, a value and the reason for it; a value of None is left out."""

AVERAGING = 0.999
WIDTH = 98


class Schedule(NamedTuple):
    """How long a training takes and how often it is validated."""

    steps: int
    why_steps: str
    validate_every: int
    validation_cases: int | None = None
    """None looks at all that are held out."""
    minutes: float | None = None
    """None if the steps are fixed."""


def sections_of(
    plan: Plan,
    source: DatasetConfig,
    *,
    schedule: Schedule,
    own_schedule: bool,
    labels: Sequence[str],
    accelerator: str | None,
    first_stage: Path | None,
) -> Sections:
    """The sections of the config.

    Args:
        plan: of the dataset.
        source: what is said of the dataset.
        schedule: steps, validations and minutes.
        own_schedule: whether the schedule is nnU-Net's own, without attention.
        labels: names of the dataset's classes or regions.
        accelerator: 'cpu' or 'gpu'; None leaves it to the training.
        first_stage: the run whose labels go beside the image, if there are two stages.
    """
    why = plan.reasons
    told = source.model_dump(mode="json", exclude_unset=True, exclude={"folder"})
    nonzero = {channel.kind for channel in plan.normalisation} == {"zscore nonzero"}
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
            "interpolation": ("cubic", f"As nnU-Net. {why['separate_z']}"),
            "patch_size": (list(plan.patch_size), why["patch_size"]),
            "batch_size": (plan.batch_size, why["batch_size"]),
            **{name: (value, "") for name, value in told.items()},
            "slices": (plan.slices if plan.spatial_dims == 2 else None, why["slices"]),
            "normalisation": (
                {"kind": "zscore", "nonzero": True} if nonzero else None,
                why["normalisation"],
            ),
            "mirror": (mirroring.mirrored(labels), mirroring.mirrored_because(labels)),
            "first_stage": (
                first_stage and [str(first_stage)],
                f"{why['low_resolution']} The labels that it finds there go beside the image; "
                "without this line there is one stage. They are better on cases that the first "
                "stage was trained on than on new ones: five runs of it, with data.fold=0 to 4, "
                "all named here, give each case labels of a model that never saw it.",
            ),
        },
        "network": {
            "spatial_dims": (plan.spatial_dims, ""),
            "channels": (list(plan.channels), why["channels"]),
            "strides": ([list(step) for step in plan.strides], why["strides"]),
            "kernels": ([list(size) for size in plan.kernels], why["kernels"]),
            "attention": ({}, "As nnU-Net, without any.")
            if own_schedule
            else (gates, "Gates at the skips; see docs/attention.md for the others, or none."),
        },
        "train": {
            "steps": (schedule.steps, schedule.why_steps),
            "minutes": (
                schedule.minutes,
                "Wall time from preparing the cases to the final scores. The learning rate follows "
                "the time, so that it is down when that is over; null trains exactly the steps.",
            ),
            "batch_dice": (plan.batch_dice, why["batch_dice"]),
            "optimiser": ("sgd" if own_schedule else "adamw", ""),
            "averaging": (
                None if own_schedule else AVERAGING,
                "A running average of the weights scores better than the last of them.",
            ),
            "validate_every": (
                schedule.validate_every,
                "Steps between validations, with a checkpoint to resume from.",
            ),
            "validation_cases": (
                schedule.validation_cases,
                "Validations take a tenth of the time at most, so that they look at so many of the "
                "held-out cases; the final scores are those of all.",
            ),
        },
        "trainer": {"accelerator": (accelerator, "")},
    }


def values_of(name: str, sections: Sections) -> dict[str, Any]:
    """The config's tree, without the reasons."""
    told = {
        section: {key: value for key, (value, _) in rows.items() if value is not None}
        for section, rows in sections.items()
    }
    return {"name": name, **{section: values for section, values in told.items() if values}}


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
    """One setting on one line."""
    flow = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return f"{key}: {flow.removesuffix(chr(10)).removesuffix('...').strip()}"
