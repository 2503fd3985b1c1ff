"""Laws of the split: each case trains or is held out, by seed, by name, or by nnU-Net's folds."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segkit.data.dataset import CaseFiles, Dataset
from segkit.data.split import split
from segkit.errors import DatasetError
from tests.training.drawn_folds import fold_of


def dataset_of(count: int) -> Dataset:
    cases = tuple(CaseFiles(f"case {number:03d}", (), Path("label.nii")) for number in range(count))
    return Dataset(Path("folder"), cases, ("MR",), {"background": 0, "organ": 1})


@given(st.integers(2, 60), st.floats(0, 0.9), st.integers(0, 2**31))
def test_a_share_holds_out_that_share_and_every_case_once(
    count: int, share: float, seed: int
) -> None:
    dataset = dataset_of(count)
    expected = max(round(share * count), 1) if share else 0
    if expected == count:
        return
    train, validation = split(dataset, share, seed)
    assert len(validation) == expected
    assert sorted((*train, *validation), key=lambda case: case.name) == list(dataset.cases)
    assert split(dataset, share, seed) == (train, validation)


def test_another_seed_holds_out_other_cases() -> None:
    dataset = dataset_of(40)
    held_out = {tuple(case.name for case in split(dataset, 0.5, seed)[1]) for seed in range(20)}
    assert len(held_out) == 20


def test_every_case_is_as_likely_to_be_held_out() -> None:
    counts = dict.fromkeys((case.name for case in dataset_of(10).cases), 0)
    for seed in range(400):
        for case in split(dataset_of(10), 0.3, seed)[1]:
            counts[case.name] += 1
    # 120 of 400 each, with a standard deviation of 9.
    assert all(80 < count < 160 for count in counts.values())


def test_both_parts_keep_the_order_of_the_names() -> None:
    for part in split(dataset_of(30), 0.4, seed=3):
        assert list(part) == sorted(part, key=lambda case: case.name)


def test_named_cases_are_held_out_whatever_the_seed() -> None:
    dataset = dataset_of(5)
    for seed in range(3):
        train, validation = split(dataset, ["case 003", "case 001"], seed)
        assert [case.name for case in validation] == ["case 001", "case 003"]
        assert [case.name for case in train] == ["case 000", "case 002", "case 004"]


@pytest.mark.parametrize("nothing", [0.0, []])
def test_nothing_is_held_out_if_nothing_is_asked_for(nothing: float | list[str]) -> None:
    assert split(dataset_of(3), nothing, seed=0) == (dataset_of(3).cases, ())


def test_a_name_that_is_no_case_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"data\.validation names dora, which is not a case of"):
        split(dataset_of(3), ["case 001", "dora"], seed=0)


@pytest.mark.parametrize("everything", [1.0, 0.9, ["case 000", "case 001"]])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(everything: float | list[str]) -> None:
    with pytest.raises(
        DatasetError, match="no case is left to train on; hold out fewer of its 2 cases"
    ):
        split(dataset_of(2), everything, seed=0)


# Folds


@pytest.mark.parametrize("count", [5, 12, 260])
def test_five_folds_hold_out_every_case_once(count: int) -> None:
    dataset = dataset_of(count)
    held_out = []
    for fold in range(5):
        train_cases, held = fold_of(dataset, fold)
        assert set(train_cases) | set(held) == set(dataset.cases)
        assert not set(train_cases) & set(held)
        held_out += held
    assert sorted(case.name for case in held_out) == [case.name for case in dataset.cases]


@pytest.mark.parity
@pytest.mark.parametrize("count", [5, 23, 260])
def test_folds_are_those_of_scikit_learn(count: int) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    folds = selection.KFold(5, shuffle=True, random_state=12345).split(np.arange(count))
    for fold, (_, expected) in enumerate(folds):
        _, held = fold_of(dataset_of(count), fold)
        assert [int(case.name[5:]) for case in held] == expected.tolist()


def test_fewer_cases_than_folds_are_refused() -> None:
    with pytest.raises(
        DatasetError, match=r"5 folds need 5 cases or more, found 4; set data\.valid"
    ):
        fold_of(dataset_of(4), 0)
