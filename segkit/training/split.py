"""Which cases train and which are held out: a share, named cases, or a fold of nnU-Net's five."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from segkit.config.training import Config
from segkit.data.dataset import CaseFiles, Dataset
from segkit.errors import DatasetError


class Split(NamedTuple):
    """The cases of a dataset, each in one of two parts."""

    train: tuple[CaseFiles, ...]
    held_out: tuple[CaseFiles, ...]


def split_of(dataset: Dataset, config: Config) -> Split:
    """The split that a config asks for: its fold, or else its held-out share or names."""
    if config.data.fold is not None:
        return fold_of(dataset, config.data.fold)
    return split(dataset, config.data.validation, config.train.seed)


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


def fold_of(dataset: Dataset, fold: int, *, count: int = 5) -> Split:
    """The split that holds out a fold of nnU-Net's cross-validation.

    Cases in the order of their names are shuffled by NumPy's first generator from seed 12345 and
    cut into folds, the first ones larger by one (scikit-learn's KFold, as nnU-Net calls it). Raises
    DatasetError for fewer cases than folds.
    """
    if len(dataset.cases) < count:
        raise DatasetError(
            f"{dataset.folder}: {count} folds need {count} cases or more, found "
            f"{len(dataset.cases)}; give data.validation instead of data.fold"
        )
    order = np.arange(len(dataset.cases))
    np.random.RandomState(12345).shuffle(order)
    held_out = set(np.array_split(order, count)[fold].tolist())
    numbered = list(enumerate(dataset.cases))
    return Split(
        tuple(case for number, case in numbered if number not in held_out),
        tuple(case for number, case in numbered if number in held_out),
    )
