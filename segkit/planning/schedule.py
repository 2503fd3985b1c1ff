"""The schedule of a planned training: steps and validations that fit into its time."""

import math
from typing import NamedTuple

import torch

from segkit.config.training import LEAST_STEPS, SHARE_OF_PREPARING
from segkit.errors import counted
from segkit.inference.window_seconds import seconds_to_score

SHARE_OF_VALIDATION = 0.1
"""Validations take at most this share of the time."""
MOST_VALIDATIONS, FEWEST_VALIDATIONS = 10, 3
"""If there is no time for three validations, each uses fewer cases."""


class Schedule(NamedTuple):
    """The length of a training and its validations."""

    steps: int
    why_steps: str
    """The reason for the number of steps."""
    validate_every: int
    validation_cases: int | None = None
    """Number of cases in each validation; None means all held-out cases."""
    minutes: float | None = None
    """Wall time of the run; None if the number of steps is fixed."""


def schedule_within(
    minutes: float,
    *,
    seconds_per_step: float,
    seconds_per_case: float,
    seconds_per_score: float | None = None,
    held_out: int,
    spent: float = 0.0,
    preparing: float = 0.0,
    labelling: float = 0.0,
    precision: torch.dtype = torch.float32,
    place: str = "here",
) -> Schedule:
    """Validations and steps that fit into the time of a run.

    Args:
        minutes: time of the whole run.
        seconds_per_step: time of a training step.
        seconds_per_case: time of a case in validations.
        seconds_per_score: time of a case in the final scores; None if it is the same.
        held_out: number of held-out cases.
        spent: seconds that are over when the training begins.
        preparing: seconds in which the cases are prepared, if they are many or large. At least a
            twentieth of the time is for preparing.
        labelling: seconds in which a first stage labels all cases; 0 without a first stage.
        precision: precision of the training.
        place: the machine that trains, in words.
    """
    total = 60.0 * minutes
    count, cases = _validations(SHARE_OF_VALIDATION * total, seconds_per_case, held_out)
    validating = count * cases * seconds_per_case
    per_score = seconds_per_case if seconds_per_score is None else seconds_per_score
    scoring = seconds_to_score(total, held_out, per_score)
    preparing = max(SHARE_OF_PREPARING * total, preparing) + labelling
    rest = total - spent - preparing - validating - scoring
    steps = max(int(rest / seconds_per_step), LEAST_STEPS)
    name = "single precision" if precision == torch.float32 else str(precision).split(".")[-1]
    labels = " and the labels of the first stage" if labelling else ""
    reserved = [f"{spent:.0f} s are for planning"] if spent >= 0.5 else []
    reserved.append(f"{preparing:.0f} s are reserved for preparing{labels}")
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
    if held_out and per_score > scoring:
        why += (
            f" At least one case is scored, so the run takes about {per_score - scoring:.0f}"
            f" s longer than its time."
        )
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
