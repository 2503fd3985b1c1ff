"""The split that a run keeps by the names of its cases, even if the dataset changes.

A case that was trained on is never held out, and a case that was held out is never trained on. A
case that is new in the dataset is left out of a resumed run.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from segkit.config.data import SplitDatasetConfig
from segkit.data.dataset import CaseFiles, Dataset
from segkit.data.folds import are_given
from segkit.data.split import Split
from segkit.errors import ConfigError, DatasetError
from segkit.io.safe_text import read_json_object
from segkit.training.parts import TrainingParts

logger = logging.getLogger(__name__)

MOST_CASES_TOLD = 5
"""A sentence names at most so many cases and counts the others."""
GIVEN = "folds_given"
"""Key in split.json: whether folds come from a file, a column or a list."""
SplitNames = Mapping[str, Sequence[str]]
"""Names of cases, under the keys `train` and `held_out`."""


def names_of(parts: TrainingParts) -> dict[str, list[str]]:
    """The names of the cases in each part of a training's split."""
    return {part: [case.name for case in cases] for part, cases in parts.split._asdict().items()}


def split_content(parts: TrainingParts) -> dict[str, Any]:
    """The content of split.json: the names of the cases, and whether the folds were given."""
    return {**names_of(parts), GIVEN: are_given(parts.config.data)}


def has_given_folds(path: Path, data: SplitDatasetConfig) -> bool:
    """Whether the folds of a run were given in a file, a column or a list, by its split.json.

    Runs of earlier versions do not tell; for these the setting `data.splits` decides.
    """
    given = read_json_object(path).get(GIVEN)
    return given if isinstance(given, bool) else data.splits is not None


def read_split(path: Path) -> SplitNames | None:
    """The names in a split.json; None if the file does not exist.

    Raises:
        ConfigError: the file is damaged.
    """
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
            f"{path}: expected two lists of names, train and held_out, with each name only once; "
            f"restore the file"
        )
    return found


def check_not_moved(path: Path, now: SplitNames, begun: SplitNames) -> None:
    """Check that split.json moves no case from one part to the other.

    Args:
        path: the split.json.
        now: the names that it holds.
        begun: the names with which the run began.

    Raises:
        ConfigError: a case that was trained on is held out now, or the reverse.
    """
    for part, other, done in (
        ("held_out", "train", "trained on"),
        ("train", "held_out", "held out"),
    ):
        if moved := sorted(set(now[part]) & set(begun[other])):
            raise ConfigError(
                f"{path}: {part} now has {case_names(moved)}, which the run has {done} until now; "
                "move it back, or start a new run"
            )


def kept_split(dataset: Dataset, names: SplitNames, source: Path) -> Split:
    """The cases of a dataset in the split of a run, with a warning about new or missing cases.

    Args:
        dataset: the dataset as it is now.
        names: the names of the run's split.
        source: the run's folder, for messages.

    Raises:
        DatasetError: all training cases or all held-out cases are missing.
    """
    here = {case.name: case for case in dataset.cases}
    known = {*names["train"], *names["held_out"]}
    if new := [name for name in here if name not in known]:
        logger.warning(
            "%s: the run keeps its split and leaves out new cases: %s", source, case_names(new)
        )
    for part, kind in (("train", "training"), ("held_out", "held-out")):
        gone = [name for name in names[part] if name not in here]
        if gone and len(gone) == len(names[part]):
            raise DatasetError(
                f"{dataset.folder}: expected the {kind} cases of {source} ({case_names(gone)}), "
                f"found none of them; check data.folder, or start a new run"
            )
        if gone:
            logger.warning(
                "%s: the run continues without the %s cases %s, which are no longer in %s",
                source,
                kind,
                case_names(gone),
                dataset.folder,
            )

    def chosen(part: str) -> tuple[CaseFiles, ...]:
        return tuple(case for case in dataset.cases if case.name in set(names[part]))

    return Split(chosen("train"), chosen("held_out"))


def with_kept_split(parts: TrainingParts, names: SplitNames, source: Path) -> TrainingParts:
    """The parts, with training and held-out cases in the split of the run.

    Args:
        parts: the parts of the training.
        names: the names of the run's split.
        source: the run's folder, for messages.

    Raises:
        ConfigError: `parts.cases` was replaced, and the run holds one of these cases out.
    """
    split = kept_split(parts.dataset, names, source)
    if "cases" in parts.replaced:
        wrong = sorted({case.name for case in parts.cases} & set(names["held_out"]))
        if wrong:
            raise ConfigError(
                f"{source}: the run holds out {case_names(wrong)}, but parts.cases would train on "
                f"it; remove it from parts.cases"
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


def case_names(names: Sequence[str]) -> str:
    """The first few names of cases in words, with the number of the others."""
    more = len(names) - MOST_CASES_TOLD
    return ", ".join(names[:MOST_CASES_TOLD]) + (f" and {more} more" if more > 0 else "")
