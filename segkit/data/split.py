"""The split into training and held-out cases: by a share, by names, or by a fold."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from segkit.config.data import SplitDatasetConfig
from segkit.config.training import Config
from segkit.data.case_groups import divided_groups, groups_of, strata_of, told_of_split
from segkit.data.dataset import CaseFiles, Dataset
from segkit.data.distribute import distribute
from segkit.data.folds import Folds, folds_of
from segkit.errors import DatasetError

logger = logging.getLogger(__name__)

ALL_TRAIN: dict[str, Any] = {
    "validation": [],
    "fold": None,
    "splits": None,
    "group_by": None,
    "stratify_by": None,
}
"""Settings of `data` for a short training on some cases of a dataset, none of them held out. The
settings of the run's split name other cases, which this training does not have."""


class Split(NamedTuple):
    """The training cases and the held-out cases of a dataset."""

    train: tuple[CaseFiles, ...]
    held_out: tuple[CaseFiles, ...]


def split_of(dataset: Dataset, config: Config) -> Split:
    """The split that a config asks for: by its fold, or else by its held-out share or names.

    If the config has `data.splits` but no `data.fold`, fold 0 is used.

    Raises:
        DatasetError: the split does not fit the dataset.
        ConfigError: a setting of the split does not fit the dataset.
    """
    for sentence in told_of_split(dataset, config.data):
        logger.warning("%s", sentence)
    return split_with(dataset, config.data, config.train.seed)


def split_with(dataset: Dataset, data: SplitDatasetConfig, seed: int) -> Split:
    """The split that settings of a dataset ask for, without hints on these settings.

    Args:
        dataset: the dataset.
        data: settings of the dataset and of its split.
        seed: seed of the drawing, if a share is held out.

    Raises:
        DatasetError: the split does not fit the dataset.
        ConfigError: a setting of the split does not fit the dataset.
    """
    if data.fold is not None or data.splits is not None:
        return nth_of(dataset, folds_of(dataset, data), data.fold or 0)
    drawn_here = data.group_by is not None or data.stratify_by is not None
    if isinstance(data.validation, list):
        found = split(dataset, data.validation, seed)
        _warn_of_divided_groups(dataset, data, found)
        return found
    if not drawn_here or not data.validation:
        return split(dataset, data.validation, seed)
    return _share_of_groups(dataset, data, data.validation, seed)


def nth_of(dataset: Dataset, folds: Folds, fold: int) -> Split:
    """The split of one fold, by its number. Raises DatasetError if there is no such fold."""
    if fold >= len(folds):
        raise DatasetError(
            f"data.fold is {fold}, but there are only {len(folds)} folds, numbered from 0 "
            f"({folds.source}); choose one of them"
        )
    logger.info("fold %d of %s", fold, folds.source)
    train, held_out = set(folds.train[fold]), set(folds.held_out[fold])
    return Split(
        tuple(case for case in dataset.cases if case.name in train),
        tuple(case for case in dataset.cases if case.name in held_out),
    )


def _share_of_groups(dataset: Dataset, data: SplitDatasetConfig, share: float, seed: int) -> Split:
    """A split that holds out a share of the cases, in whole groups and from each stratum."""
    groups = groups_of(dataset, data) or {
        case.name: [number] for number, case in enumerate(dataset.cases)
    }
    if len(groups) < 2 or share == 1:
        raise DatasetError(
            f"{dataset.folder}: no group is left to train on, because data.group_by makes "
            f"{len(groups)} and data.validation is {share:g}; lower data.validation"
        )
    random = np.random.RandomState(seed % 2**32)
    _, chosen = distribute(groups, strata_of(dataset, data), [1 - share, share], random)
    held_out = {dataset.cases[number].name for number in chosen}
    return split(dataset, sorted(held_out), seed)


def _warn_of_divided_groups(dataset: Dataset, data: SplitDatasetConfig, found: Split) -> None:
    groups = groups_of(dataset, data)
    names = [case.name for case in dataset.cases]
    parts = [[case.name for case in part] for part in found]
    if groups and (apart := divided_groups(groups, names, *parts)):
        logger.warning("data.validation splits groups of data.group_by: %s", apart)


def split(dataset: Dataset, validation: float | Sequence[str], seed: int) -> Split:
    """A split that holds out a share of the cases, drawn by the seed, or the named cases.

    A share above 0 holds out at least one case. If the dataset has only one case, it is trained on.

    Args:
        dataset: the dataset.
        validation: a share from 0 to 1, or names of cases.
        seed: seed of the drawing.

    Raises:
        DatasetError: no case is left to train on, or a name is unknown.
    """
    names = [case.name for case in dataset.cases]
    if isinstance(validation, float | int):
        shared = validation and len(names) > 1
        count = min(max(round(validation * len(names)), 1), len(names)) if shared else 0
        held_out = set(np.random.default_rng(seed).permutation(names)[:count].tolist())
    else:
        held_out = set(validation)
        if kept := sorted(held_out & {case.name for case in dataset.test}):
            raise DatasetError(
                f"data.validation contains {kept[0]}, which is also in data.test; list it in only "
                "one of them"
            )
        if unknown := sorted(held_out - set(names)):
            raise DatasetError(
                f"data.validation names {unknown[0]}, which is not a case of {dataset.folder}; "
                f"correct the name"
            )
    train = tuple(case for case in dataset.cases if case.name not in held_out)
    if not train:
        raise DatasetError(
            f"{dataset.folder}: no case is left to train on; hold out fewer of its {len(names)} "
            "cases"
        )
    return Split(train, tuple(case for case in dataset.cases if case.name in held_out))
