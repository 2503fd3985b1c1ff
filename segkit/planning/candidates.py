"""Candidate plans for a race between them (`segkit.racing`)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from segkit.config.dataset_files import DatasetConfig, FilesConfig
from segkit.config.pictures import PicturesConfig
from segkit.planning.make_plan import Planned, planned_task
from segkit.planning.plan import Plan, flat_axis
from segkit.planning.planning_task import (
    PLANNED_STEPS,
    Preset,
    planning_task,
    source_of,
    warn_if_busy,
)
from segkit.system.progress import Track, untracked

MORE_STEPS = 3
"""The narrower candidate of a race must allow so many times the steps."""


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
    began: float | None = None,
    seconds_of_race: float = 0.0,
) -> dict[str, Planned]:
    """Candidate plans by name, for a race; the first is the plan of `plan_dataset`.

    The others are a 2D plan (3D if the first is 2D), a plan on a coarser grid, and a plan with more
    steps of a narrower network, if they differ from the first. If the budget is not time, there is
    only the first. Other arguments and errors are those of `plan_dataset`.

    Args:
        starters: chooses, from the names of all candidates, those that are planned in full, which
            takes seconds for each.
        seconds_of_race: seconds from `began` to the end of a race, if several may start.
    """
    task = planning_task(
        source_of(folder, files, pictures),
        cache=cache,
        device=device,
        spatial_dims=spatial_dims,
        gigabytes=gigabytes,
        minutes=minutes,
        preset=preset,
        runs=runs,
        track=track,
        began=began,
    )
    wanted = {f"{task.spatial_dims}D": task}
    if task.timed:
        volumes = flat_axis(task.fingerprint.numbers()) is None
        if spatial_dims is None and volumes:
            other = 5 - task.spatial_dims
            wanted[f"{other}D"] = replace(task, spatial_dims=other, why_slices="")
        if spatial_dims != 2 and volumes:
            wanted["3D, coarser"] = replace(task, spatial_dims=3, coarse=True, why_slices="")
        narrow = replace(PLANNED_STEPS, per_channel=MORE_STEPS * PLANNED_STEPS.per_channel)
        wanted[f"{task.spatial_dims}D, narrower"] = replace(task, steps=narrow)
    if began is not None and len(starters(list(wanted))) > 1:
        spent = max(task.spent, seconds_of_race)
        wanted = {name: replace(each, spent=spent) for name, each in wanted.items()}
    plans: dict[str, Plan] = {}
    for name, each in wanted.items():
        plan = each.plan()
        if all(_differ(plan, other) for other in plans.values()):
            plans[name] = plan
    names = starters(list(plans))
    if len(names) < 2:
        wanted = {name: replace(each, spent=task.spent) for name, each in wanted.items()}
    planned = {name: planned_task(wanted[name]) for name in names}
    warn_if_busy(task)
    return planned


def _differ(one: Plan, other: Plan) -> bool:
    parts = ("spatial_dims", "spacing", "patch_size", "channels", "batch_size")
    return any(getattr(one, part) != getattr(other, part) for part in parts)
