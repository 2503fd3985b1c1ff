"""The split that a run keeps: its cases by name, whatever becomes of the dataset meanwhile.

Nothing that was trained on is ever held out, and nothing that was held out is ever trained on. So a
case that is new in the dataset is left out of a run that goes on.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from segkit.data.dataset import CaseFiles, Dataset
from segkit.errors import ConfigError, DatasetError
from segkit.io.safe_text import read_json_object
from segkit.training.parts import TrainingParts
from segkit.training.split import Split

logger = logging.getLogger(__name__)

MOST_CASES_TOLD = 5
"""Names of cases in a sentence; the others are counted."""
SplitNames = Mapping[str, Sequence[str]]
"""The names of cases under `train` and under `held_out`."""


def read_split(path: Path) -> SplitNames | None:
    """What a split.json says; None if it is not there. Raises ConfigError if it is damaged."""
    try:
        content = read_json_object(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}; restore it") from None
    found: dict[str, list[str]] = {}
    for part in ("train", "held_out"):
        names = content.get(part)
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found[part] = names
    named = [name for names in found.values() for name in names]
    if len(found) < 2 or len(set(named)) != len(named):
        raise ConfigError(
            f"{path}: expected two lists of names, train and held_out, without a name twice; "
            f"restore the file"
        )
    return found


def check_not_moved(path: Path, now: SplitNames, begun: SplitNames) -> None:
    """Raise ConfigError if split.json moves a case that the run has trained on, or held out."""
    for part, other, done in (
        ("held_out", "train", "trained on"),
        ("train", "held_out", "held out"),
    ):
        if moved := sorted(set(now[part]) & set(begun[other])):
            raise ConfigError(
                f"{path}: puts {told(moved)} under {part}, which the run has {done} until now; "
                f"put it back, or begin a new run"
            )


def kept_split(dataset: Dataset, names: SplitNames, source: Path) -> Split:
    """The cases of a dataset as a run splits them, with a warning of those that are new or gone.

    Raises DatasetError if no case is left to train on, or none of those that were held out.
    """
    here = {case.name: case for case in dataset.cases}
    known = {*names["train"], *names["held_out"]}
    if new := [name for name in here if name not in known]:
        logger.warning(
            "%s: has new cases, %s; the run keeps its split and leaves them out", source, told(new)
        )
    for part, what in (("train", "to train on"), ("held_out", "held out")):
        gone = [name for name in names[part] if name not in here]
        if gone and len(gone) == len(names[part]):
            raise DatasetError(
                f"{dataset.folder}: none of the {len(gone)} cases {what} of {source} is there; "
                f"check data.folder, or begin a new run"
            )
        if gone:
            logger.warning(
                "%s: %s, %s, no longer in %s; the run goes on without",
                source,
                told(gone),
                what,
                dataset.folder,
            )

    def chosen(part: str) -> tuple[CaseFiles, ...]:
        return tuple(case for case in dataset.cases if case.name in set(names[part]))

    return Split(chosen("train"), chosen("held_out"))


def with_kept_split(parts: TrainingParts, names: SplitNames, source: Path) -> TrainingParts:
    """The parts with the cases where the run has them, also those that were replaced.

    Raises ConfigError if cases were replaced and one of them is held out.
    """
    split = kept_split(parts.dataset, names, source)
    if "cases" in parts.replaced:
        wrong = sorted({case.name for case in parts.cases} & set(names["held_out"]))
        if wrong:
            raise ConfigError(
                f"{source}: holds out {told(wrong)}, which parts.cases would train on; leave it out"
            )
        cases = tuple(parts.cases)
        stored = {case.name: case for case in parts.validation.cases}
    else:
        stored = {case.name: case for case in (*parts.cases, *parts.validation.cases)}
        cases = tuple(stored[case.name] for case in split.train if case.name in stored)
    held_out = tuple(stored[case.name] for case in split.held_out if case.name in stored)
    validation = replace(parts.validation, cases=held_out)
    changes: dict[str, Any] = {"split": split, "cases": cases, "validation": validation}
    unchanged = {name: value for name, value in changes.items() if name not in parts.replaced}
    made = {**parts._made, **unchanged}
    return replace(parts, **changes, _made=made)


def told(names: Sequence[str]) -> str:
    """The names of cases, the first few of them."""
    more = len(names) - MOST_CASES_TOLD
    return ", ".join(names[:MOST_CASES_TOLD]) + (f" and {more} more" if more > 0 else "")
