"""The folds of a cross-validation, from a file, from a column of a table, or drawn."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from segkit.config.base import Section
from segkit.config.data import FoldConfig, SplitDatasetConfig
from segkit.config.dataset_files import ColumnConfig
from segkit.config.load import validated
from segkit.data.case_groups import divided_groups, groups_of, strata_of
from segkit.data.case_table import NAMES_SHOWN, YES_WORDS, column_of, table_of
from segkit.data.dataset import Dataset
from segkit.data.distribute import distribute
from segkit.data.split_settings import SPLITS_FILE
from segkit.errors import ConfigError, DatasetError, first_few
from segkit.io.safe_text import parse_yaml, read_json, read_text

logger = logging.getLogger(__name__)

FIRST_SEED = 12345
"""The seed that nnU-Net draws folds with."""


class FoldListConfig(Section):
    """The content of a file of folds."""

    folds: Annotated[list[FoldConfig], Field(min_length=1)]


@dataclass(frozen=True)
class Folds:
    """Names of the cases that each fold trains on and holds out."""

    train: tuple[tuple[str, ...], ...]
    held_out: tuple[tuple[str, ...], ...]
    source: str
    """The origin of the folds, for messages."""

    def __len__(self) -> int:
        """Number of folds."""
        return len(self.train)


def folds_of(dataset: Dataset, data: SplitDatasetConfig) -> Folds:
    """The folds that a config asks for.

    They come from `data.splits` if it is given. If not, they come from a splits_final.json beside
    the dataset.json, unless `data.group_by` or `data.stratify_by` is given. Otherwise
    `data.num_folds` folds are drawn; without groups and strata, as nnU-Net draws its five.

    Raises:
        DatasetError: a file or a column does not fit the dataset.
        ConfigError: a setting does not fit the dataset.
    """
    names = [case.name for case in dataset.cases]
    beside = data.folder / SPLITS_FILE
    if isinstance(data.splits, ColumnConfig):
        folds = _of_column(dataset, data, data.splits.column)
    elif isinstance(data.splits, list):
        folds = _checked(dataset, data.splits, "data.splits")
    elif data.splits is not None:
        folds = _checked(dataset, _read(data.folder / data.splits), str(data.folder / data.splits))
    elif are_given(data):
        folds = _checked(dataset, _read(beside), str(beside))
    else:
        return drawn(dataset, data)
    for number, (train, held_out) in enumerate(zip(folds.train, folds.held_out, strict=True)):
        name = f"fold {number} of {folds.source}"
        if left := sorted(set(names) - {*train, *held_out}):
            logger.warning(
                "%s neither trains on nor holds out %s", name, first_few(left, NAMES_SHOWN)
            )
        groups = groups_of(dataset, data)
        if groups and (apart := divided_groups(groups, names, train, held_out)):
            logger.warning("%s splits groups of data.group_by: %s", name, apart)
    counts = Counter(name for held_out in folds.held_out for name in held_out)
    if several := sorted(name for name, count in counts.items() if count > 1):
        logger.warning(
            "%s: several folds hold out %s", folds.source, first_few(several, NAMES_SHOWN)
        )
    if never := sorted(set(names) - counts.keys()):
        logger.info("%s: no fold holds out %s", folds.source, first_few(never, NAMES_SHOWN))
    return folds


def are_given(data: SplitDatasetConfig) -> bool:
    """Whether folds come from a file, a column or a list, instead of being drawn.

    Given folds may have different cases, and may hold out the same case.
    """
    drawn_here = data.group_by is not None or data.stratify_by is not None
    return data.splits is not None or ((data.folder / SPLITS_FILE).is_file() and not drawn_here)


def drawn(dataset: Dataset, data: SplitDatasetConfig) -> Folds:
    """Drawn folds, which hold out about equally many cases.

    Without groups and strata they are the same as nnU-Net's: cases in the order of their names are
    shuffled by NumPy's legacy generator and cut into folds, of which the first ones may be larger
    by one (scikit-learn's KFold). With groups, no group is split.

    Raises:
        DatasetError: there are fewer cases or groups than folds.
    """
    count, names = data.num_folds, [case.name for case in dataset.cases]
    groups = groups_of(dataset, data)
    if groups is None and data.stratify_by is None:
        if len(names) < count:
            raise DatasetError(
                f"{dataset.folder}: {count} folds need {count} cases or more, found "
                f"{len(names)}; set data.validation instead of data.fold, or lower data.num_folds"
            )
        order = np.arange(len(names))
        np.random.RandomState(FIRST_SEED).shuffle(order)
        parts = [sorted(part.tolist()) for part in np.array_split(order, count)]
        source = f"{count} folds, drawn as nnU-Net draws them"
    else:
        groups = groups or {name: [number] for number, name in enumerate(names)}
        if len(groups) < count:
            raise DatasetError(
                f"{dataset.folder}: {count} folds need {count} groups or more, found "
                f"{len(groups)}; lower data.num_folds"
            )
        random = np.random.RandomState(FIRST_SEED)
        parts = distribute(groups, strata_of(dataset, data), [1 / count] * count, random)
        source = f"{count} folds, drawn from {len(groups)} groups"
    held_out = [tuple(names[number] for number in part) for part in parts]
    return _held_out_in_turn(names, held_out, source)


def _held_out_in_turn(
    names: Sequence[str], held_out: Sequence[tuple[str, ...]], source: str
) -> Folds:
    """Folds that train on all cases except those that they hold out."""
    parts = map(set, held_out)
    train = tuple(tuple(name for name in names if name not in part) for part in parts)
    return Folds(train, tuple(held_out), source)


def _read(path: Path) -> list[FoldConfig]:
    try:
        content: Any = (
            parse_yaml(read_text(path))
            if path.suffix.lower() in (".yaml", ".yml")
            else read_json(path)
        )
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; check data.splits") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(
            f"{path}: cannot be read as a list of folds: {reason}; correct the file"
        ) from None
    if not isinstance(content, list):
        raise DatasetError(
            f"{path}: expected a list of folds such as {{train: [a, b], val: [c]}}, found "
            f"{type(content).__name__}; correct the file"
        )
    try:
        return validated(FoldListConfig, {"folds": content}, str(path)).folds
    except ConfigError as error:
        raise DatasetError(str(error)) from None


def _checked(dataset: Dataset, folds: Sequence[FoldConfig], source: str) -> Folds:
    names = {case.name for case in dataset.cases}
    for number, fold in enumerate(folds):
        both = sorted(set(fold.train) & set(fold.val))
        if both:
            raise DatasetError(
                f"{source}: fold {number} has {first_few(both, NAMES_SHOWN)} in both train and "
                "val; list each case in only one of them"
            )
        given = {*fold.train, *fold.val}
        if kept := sorted(given & {case.name for case in dataset.test}):
            raise DatasetError(
                f"{source}: fold {number} contains {first_few(kept, NAMES_SHOWN)}, but data.test "
                "keeps them for the test; remove them from one of the two"
            )
        if unknown := sorted(given - names):
            raise DatasetError(
                f"{source}: fold {number} contains {first_few(unknown, NAMES_SHOWN)}, which is not "
                f"in {dataset.folder}; use its names, such as {first_few(sorted(names), 3)}"
            )
    return Folds(
        tuple(tuple(sorted(set(fold.train))) for fold in folds),
        tuple(tuple(sorted(set(fold.val))) for fold in folds),
        source,
    )


def _of_column(dataset: Dataset, data: SplitDatasetConfig, column: str) -> Folds:
    """Folds from a column, which holds the number of the fold that holds a case out, or nothing."""
    names = [case.name for case in dataset.cases]
    found = column_of(data, column, dataset.names_with_test, "data.splits")
    source = f"{table_of(data)}: column {column}"
    numbers: dict[str, int] = {}
    for name in names:
        value = found.get(name, "")
        if value.lower() in ("", "train"):
            continue
        if value.lower() in ("val", "validation"):
            numbers[name] = 0
        elif number := re.fullmatch(r"([0-9]{1,6})(\.0*)?", value):  # pandas writes 0.0
            numbers[name] = int(number[1])
        else:
            hint = "; name test cases in data.test" if value.lower() in YES_WORDS else ""
            raise DatasetError(
                f"{source}: expected for {name} the number of the fold that holds it out, 'val', "
                f"'train' or an empty cell, found {value!r}{hint}; correct the table"
            )
    present = sorted(set(numbers.values()))
    if not present or present[0] not in (0, 1):
        raise DatasetError(
            f"{source}: expected folds 0, 1, 2, …, found {present or 'none'}; correct the numbers"
        )
    if present != list(range(present[0], present[0] + len(present))):
        raise DatasetError(
            f"{source}: expected folds without gaps, found {present}; correct the numbers"
        )
    if present[0] == 1:
        logger.info("%s: folds 1 to %d become folds 0 to %d", source, present[-1], present[-1] - 1)
    held_out = [tuple(name for name in names if numbers.get(name) == fold) for fold in present]
    return _held_out_in_turn(names, held_out, source)
