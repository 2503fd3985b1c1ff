"""Which cases train and which are held out: a share, named cases, or a fold."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from segkit.config.data import DataConfig
from segkit.config.training import Config
from segkit.data.case_groups import groups_of, proposal, strata_of, torn
from segkit.data.dataset import CaseFiles, Dataset
from segkit.errors import DatasetError
from segkit.training.deal import deal
from segkit.training.folds import SPLITS_FILE, Folds, folds_of

logger = logging.getLogger(__name__)


class Split(NamedTuple):
    """The cases of a dataset, each in one of two parts."""

    train: tuple[CaseFiles, ...]
    held_out: tuple[CaseFiles, ...]


def split_of(dataset: Dataset, config: Config) -> Split:
    """The split that a config asks for: its fold, or else its held-out share or names.

    Of folds of its own, the first if it names none. Raises DatasetError.
    """
    data = config.data
    if data.fold is not None or data.splits is not None:
        return nth_of(dataset, folds_of(dataset, data), data.fold or 0)
    if (data.folder / SPLITS_FILE).is_file():
        logger.warning(
            "%s: is not used; data.fold and --folds hold out its folds, data.validation does not",
            data.folder / SPLITS_FILE,
        )
    elif told := proposal(dataset, data):
        logger.warning("%s", told)
    drawn_here = data.group_by is not None or data.stratify_by is not None
    if isinstance(data.validation, list):
        found = split(dataset, data.validation, config.train.seed)
        _tell_torn(dataset, data, found)
        return found
    if not drawn_here or not data.validation:
        return split(dataset, data.validation, config.train.seed)
    return _share_of_groups(dataset, data, data.validation, config.train.seed)


def nth_of(dataset: Dataset, folds: Folds, fold: int) -> Split:
    """The split of one of several folds. Raises DatasetError if there is no such fold."""
    if fold >= len(folds):
        raise DatasetError(
            f"data.fold is {fold}, and there are {len(folds)}, numbered from 0 ({folds.source}); "
            f"name one of these"
        )
    logger.info("fold %d of %s", fold, folds.source)
    train, held_out = set(folds.train[fold]), set(folds.held_out[fold])
    return Split(
        tuple(case for case in dataset.cases if case.name in train),
        tuple(case for case in dataset.cases if case.name in held_out),
    )


def _share_of_groups(dataset: Dataset, data: DataConfig, share: float, seed: int) -> Split:
    """A share of the cases held out by whole groups, with its part of each stratum."""
    groups = groups_of(dataset, data) or {
        case.name: [number] for number, case in enumerate(dataset.cases)
    }
    if len(groups) < 2 or share == 1:
        raise DatasetError(
            f"{dataset.folder}: no group is left to train on; data.group_by makes {len(groups)}, "
            f"and data.validation is {share:g}"
        )
    random = np.random.RandomState(seed % 2**32)
    _, chosen = deal(groups, strata_of(dataset, data), [1 - share, share], random)
    held_out = {dataset.cases[number].name for number in chosen}
    return split(dataset, sorted(held_out), seed)


def _tell_torn(dataset: Dataset, data: DataConfig, found: Split) -> None:
    groups = groups_of(dataset, data)
    names = [case.name for case in dataset.cases]
    parts = [[case.name for case in part] for part in found]
    if groups and (apart := torn(groups, names, *parts)):
        logger.warning("data.validation tears groups of data.group_by apart: %s", apart)


def split(dataset: Dataset, validation: float | Sequence[str], seed: int) -> Split:
    """A split that holds out a share of the cases, drawn by the seed, or the named ones.

    A share above 0 holds out at least one case, but an only case is trained on. Raises DatasetError
    if no case is left to train on or a name is unknown.
    """
    names = [case.name for case in dataset.cases]
    if isinstance(validation, float | int):
        shared = validation and len(names) > 1
        count = min(max(round(validation * len(names)), 1), len(names)) if shared else 0
        held_out = set(np.random.default_rng(seed).permutation(names)[:count].tolist())
    else:
        held_out = set(validation)
        if kept := sorted(held_out & set(dataset.test)):
            raise DatasetError(
                f"data.validation names {kept[0]}, which data.test keeps; name it in one of the two"
            )
        if unknown := sorted(held_out - set(names)):
            raise DatasetError(
                f"data.validation names {unknown[0]}, which is no case of {dataset.folder}"
            )
    train = tuple(case for case in dataset.cases if case.name not in held_out)
    if not train:
        raise DatasetError(
            f"{dataset.folder}: no case is left to train on; hold out fewer of {len(names)}"
        )
    return Split(train, tuple(case for case in dataset.cases if case.name in held_out))
