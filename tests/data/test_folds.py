"""Folds of a file, of a column, or drawn; groups stay together; nothing is ignored in silence."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segkit.checking.check import check
from segkit.config.load import validated
from segkit.config.training import Config
from segkit.data.case_groups import grouping_advice, likely_grouping, strata_of
from segkit.data.dataset import CaseFiles, Dataset, dataset_of
from segkit.data.distribute import distribute
from segkit.data.folds import folds_of
from segkit.data.split import split_of
from segkit.data.split_settings import unused_split_settings
from segkit.errors import ConfigError, DatasetError
from tests.small import small_dataset
from tests.training.drawn_folds import fold_of

PATIENTS = [f"p{patient}_{visit}" for patient in range(5) for visit in "ab"]


def dataset_with(folder: Path, names: list[str], test: tuple[str, ...] = ()) -> Dataset:
    cases, kept = (
        tuple(CaseFiles(name, (), folder / f"{name}.nii") for name in sorted(part))
        for part in (names, test)
    )
    return Dataset(folder, cases, ("MR",), {"background": 0, "organ": 1}, test=kept)


def config_with(folder: Path, **data: Any) -> Config:
    tree = {"name": "x", "data": {"folder": str(folder), "patch_size": [8, 8, 8], **data}}
    return validated(Config, {**tree, "network": {"channels": [2, 2]}}, "x")


def names(part: tuple[CaseFiles, ...]) -> list[str]:
    return [case.name for case in part]


def splits_final() -> list[dict[str, list[str]]]:
    """Patients stay together: fold n holds out patient n."""
    return [
        {
            "train": [name for name in PATIENTS if name[1] != str(fold)],
            "val": [name for name in PATIENTS if name[1] == str(fold)],
        }
        for fold in range(5)
    ]


def test_folds_come_from_nnunets_file_beside_the_dataset(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "splits_final.json").write_text(json.dumps(splits_final()))
    dataset = dataset_with(tmp_path, PATIENTS)
    caplog.set_level(logging.INFO, "segkit")
    train, held_out = split_of(dataset, config_with(tmp_path, fold=3))
    assert names(held_out) == ["p3_a", "p3_b"] and len(train) == 8
    assert f"fold 3 of {tmp_path / 'splits_final.json'}" in caplog.text
    split_of(dataset, config_with(tmp_path))
    assert "is not used, because only data.fold and --folds use its folds" in caplog.text


def test_without_a_file_folds_are_nnunets(tmp_path: Path) -> None:
    dataset = dataset_with(tmp_path, [f"case {number}" for number in range(12)])
    for fold in range(5):
        assert split_of(dataset, config_with(tmp_path, fold=fold)) == fold_of(dataset, fold)
    folds = folds_of(dataset, config_with(tmp_path, num_folds=7).data)
    assert sorted(name for part in folds.held_out for name in part) == names(dataset.cases)
    assert [len(part) for part in folds.held_out] == [2, 2, 2, 2, 2, 1, 1]


def test_own_folds_stand_in_a_file_or_in_the_config(tmp_path: Path) -> None:
    dataset = dataset_with(tmp_path, list("abcd"))
    own = [{"train": ["a", "b"], "val": ["c", "d"]}, {"train": ["c"], "val": ["a", "b", "d"]}]
    (tmp_path / "own.json").write_text(json.dumps(own))
    (tmp_path / "own.yaml").write_text(json.dumps(own))
    for splits in (own, "own.json", "own.yaml"):
        found = split_of(dataset, config_with(tmp_path, splits=splits, fold=1))
        assert [names(part) for part in found] == [["c"], ["a", "b", "d"]]
        assert names(split_of(dataset, config_with(tmp_path, splits=splits)).train) == ["a", "b"]
    with pytest.raises(DatasetError, match=r"data\.fold is 2, but there are only 2 folds, numb"):
        split_of(dataset, config_with(tmp_path, splits=own, fold=2))


@pytest.mark.parametrize(
    ("fold", "reason"),
    [
        ({"train": ["a", "b"], "val": ["b"]}, "fold 0 has b in both train and val; list each"),
        ({"train": ["a"], "val": ["z", "y"]}, "fold 0 contains y, z, which is not in"),
        ({"train": ["a", "t"], "val": ["b"]}, "fold 0 contains t, but data.test keeps them"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(tmp_path: Path, fold: Any, reason: str) -> None:
    dataset = dataset_with(tmp_path, list("abcd"), test=("t",))
    with pytest.raises(DatasetError, match=reason):
        split_of(dataset, config_with(tmp_path, splits=[fold]))


@pytest.mark.parametrize("content", ["{}", "[]", '[{"train": []}]', "nothing ["])
def test_a_file_that_holds_no_folds_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "splits_final.json").write_text(content)
    with pytest.raises(DatasetError, match=r"splits_final\.json"):
        split_of(dataset_with(tmp_path, list("abcdef")), config_with(tmp_path, fold=0))


def test_cases_that_a_split_leaves_out_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = [{"train": ["a"], "val": ["c"]}]
    split_of(dataset_with(tmp_path, list("abcd")), config_with(tmp_path, splits=own))
    assert "fold 0 of data.splits neither trains on nor holds out b, d" in caplog.text


@pytest.mark.parametrize("end", ["", ".0"])  # a column with an empty cell, as pandas writes it
def test_a_column_says_which_fold_holds_a_case_out(tmp_path: Path, end: str) -> None:
    (tmp_path / "cases.csv").write_text(f"id,fold\na,0{end}\nb,1{end}\nc,1{end}\nd,\n")
    dataset = dataset_with(tmp_path, list("abcd"))
    settings = {"case_table": "cases.csv", "splits": {"column": "fold"}}
    found = split_of(dataset, config_with(tmp_path, fold=1, **settings))
    assert [names(part) for part in found] == [["a", "d"], ["b", "c"]]
    (tmp_path / "cases.csv").write_text("id,fold\na,0\nb,2\n")
    with pytest.raises(DatasetError, match=r"expected folds without gaps, found \[0, 2\]"):
        split_of(dataset, config_with(tmp_path, **settings))
    (tmp_path / "cases.csv").write_text("id,fold\na,0\nb,0.5\n")
    with pytest.raises(DatasetError, match=r"for b the number of the fold .* found '0.5'"):
        split_of(dataset, config_with(tmp_path, **settings))
    (tmp_path / "cases.csv").write_text("id,fold\na,0\nz,1\n")
    with pytest.raises(DatasetError, match="found rows for z; correct"):
        split_of(dataset, config_with(tmp_path, **settings))


GROUPINGS = [{"pattern": "(p[0-9])_"}, {"column": "patient"}]


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_no_patient_is_on_both_sides(tmp_path: Path, grouping: Any) -> None:
    rows = "".join(f"{name},{name[:2]}\n" for name in PATIENTS)
    (tmp_path / "cases.csv").write_text(f"id,patient\n{rows}")
    dataset = dataset_with(tmp_path, PATIENTS)
    settings = {"group_by": grouping, "case_table": "cases.csv"}
    folds = folds_of(dataset, config_with(tmp_path, **settings).data)
    assert sorted(folds.held_out) == [(f"p{n}_a", f"p{n}_b") for n in range(5)]
    for share, count in ((0.2, 2), (0.4, 4), (0.6, 6)):
        found = split_of(dataset, config_with(tmp_path, validation=share, **settings))
        assert len(found.held_out) == count
        patients = [{name[:2] for name in names(part)} for part in found]
        assert not patients[0] & patients[1]


def test_subjects_of_bids_are_found_in_names_and_in_paths(tmp_path: Path) -> None:
    labels = [f"sub-{subject}/ses-{session}/label.nii" for subject in "123" for session in "12"]
    cases = tuple(CaseFiles(f"{n}", (), tmp_path / label) for n, label in enumerate(labels))
    dataset = Dataset(tmp_path, cases, ("MR",), {"background": 0, "organ": 1})
    folds = folds_of(dataset, config_with(tmp_path, group_by="subject", num_folds=3).data)
    assert sorted(folds.held_out) == [("0", "1"), ("2", "3"), ("4", "5")]
    with pytest.raises(DatasetError, match="gives no group for a, b"):
        folds_of(dataset_with(tmp_path, list("ab")), config_with(tmp_path, group_by="subject").data)


def test_groups_that_your_own_split_divides_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = [{"train": ["p0_a", "p1_a", "p1_b"], "val": ["p0_b"]}]
    dataset = dataset_with(tmp_path, ["p0_a", "p0_b", "p1_a", "p1_b"])
    split_of(dataset, config_with(tmp_path, splits=own, group_by={"pattern": "(p[0-9])"}))
    assert "splits groups of data.group_by: 1 group, p0 (p0_a, p0_b)" in caplog.text


def test_each_fold_has_its_share_of_every_stratum() -> None:
    random = np.random.RandomState(0)
    strata = np.zeros((60, 2))
    strata[:10, 0] = 1  # one case in six is of a rare kind
    strata[10:, 1] = 1
    groups = {str(number): [number] for number in range(60)}
    parts = distribute(groups, strata, [0.2] * 5, random)
    assert [len(part) for part in parts] == [12] * 5
    assert [sum(number < 10 for number in part) for part in parts] == [2] * 5


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=15),
    st.integers(1, 4),
    st.sampled_from([[0.8, 0.2], [0.5, 0.5], [1 / 3] * 3, [0.2] * 5]),
    st.integers(0, 2**31),
)
def test_strata_do_not_change_the_share_of_a_part(
    of_stratum: list[int], most: int, shares: list[float], seed: int
) -> None:
    """Groups of 1 to `most` cases, in strata of 1 to 5 cases: parts are as large as asked for."""
    kinds = np.repeat(np.arange(len(of_stratum)), of_stratum)
    random = np.random.RandomState(seed)
    cut = np.cumsum(random.randint(1, most + 1, len(kinds)))
    numbers = np.split(np.arange(len(kinds)), cut[cut < len(kinds)])
    groups = {str(number): cases.tolist() for number, cases in enumerate(numbers)}
    if len(groups) < len(shares):
        return
    strata = (kinds[:, None] == np.arange(len(of_stratum))).astype(float)
    parts = distribute(groups, strata, shares, random)
    assert sorted(case for part in parts for case in part) == list(range(len(kinds)))
    largest = max(map(len, groups.values()))
    sizes = [len(part) for part in parts]
    for size, share in zip(sizes, shares, strict=True):
        assert abs(size - share * len(kinds)) <= largest
    if len(set(shares)) == 1:
        assert max(sizes) - min(sizes) <= largest
    if largest == 1:  # each part has its share of each stratum, but for one case
        for part, share in zip(parts, shares, strict=True):
            assert (np.abs(strata[part].sum(axis=0) - share * strata.sum(axis=0)) < 1).all()


@pytest.mark.parametrize(
    "of_stratum", [[2] * 30, [3] * 20, [4] * 15, [20, *[2] * 20], [20, 10, *[1] * 30]]
)
def test_a_fifth_of_many_small_strata_is_a_fifth(of_stratum: list[int]) -> None:
    strata = np.repeat(np.eye(len(of_stratum)), of_stratum, axis=0)
    groups = {str(number): [number] for number in range(60)}
    for seed in range(5):
        random = np.random.RandomState(seed)
        assert [len(part) for part in distribute(groups, strata, [0.8, 0.2], random)] == [48, 12]


def test_without_strata_groups_go_where_they_went_in_earlier_versions() -> None:
    groups = {"a": [0, 1, 2], "b": [3], "c": [4, 5], "d": [6], "e": [7, 8], "f": [9]}
    nothing = np.zeros((10, 0))
    folds = distribute(groups, nothing, [1 / 3] * 3, np.random.RandomState(12345))
    assert folds == [[0, 1, 2, 3], [7, 8, 9], [4, 5, 6]]
    held_out = distribute(groups, nothing, [0.8, 0.2], np.random.RandomState(0))[1]
    assert held_out == [4, 5]


def test_a_column_or_the_classes_of_a_case_are_strata(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path / "data")
    (folder / "cases.csv").write_text("id,site\ncase_0,A\ncase_1,B\ncase_2,A\ncase_3,B\n")
    site = {"case_table": "cases.csv", "stratify_by": {"column": "site"}}
    data = config_with(folder, num_folds=2, **site).data
    dataset = dataset_of(data)
    assert strata_of(dataset, data).tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    for part in folds_of(dataset, data).held_out:
        assert {int(name[-1]) % 2 for name in part} == {0, 1}
    data = config_with(folder, stratify_by="classes").data
    assert strata_of(dataset, data).tolist() == [[1], [1], [1], [1]]


def test_cases_for_the_test_are_in_no_part(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path / "data")
    (folder / "cases.csv").write_text("id,use\ncase_0,\ncase_1,test\ncase_2,\ncase_3,\n")
    for test in (["case_1"], {"column": "use"}):
        config = config_with(folder, test=test, case_table="cases.csv")
        dataset = dataset_of(config.data)
        assert names(dataset.test) == ["case_1"]
        train, held_out = split_of(dataset, config)
        assert sorted(names((*train, *held_out))) == ["case_0", "case_2", "case_3"]
    with pytest.raises(DatasetError, match=r"data\.test: expected only .*, found nobody"):
        dataset_of(config_with(folder, test=["nobody"]).data)
    with pytest.raises(DatasetError, match=r"data\.validation contains case_1, which is also in"):
        split_of(dataset, config_with(folder, validation=["case_1"]))
    assert "1 more kept for a test" in str(check(folder, ["data.test=[case_1]"]))


@pytest.mark.parametrize("grouping", [{"pattern": "(p[0-9])_"}, {"column": "patient"}])
def test_a_group_with_only_some_cases_in_the_test_is_reported(
    tmp_path: Path, grouping: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "".join(f"{name},{name[:2]}\n" for name in PATIENTS)
    (tmp_path / "cases.csv").write_text(f"id,patient\n{rows}")
    config = config_with(tmp_path, group_by=grouping, case_table="cases.csv", validation=0.25)
    whole = dataset_with(tmp_path, PATIENTS[2:], test=("p0_a", "p0_b"))
    split_of(whole, config)
    assert "data.test keeps some" not in caplog.text
    split_of(dataset_with(tmp_path, PATIENTS[1:], test=("p0_a",)), config)
    assert "leaves others for training: p0; keep all or none of a group" in caplog.text


def test_a_subject_in_the_path_of_a_test_case_is_reported_if_others_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cases = [
        CaseFiles(f"0{subject}_{session}", (), tmp_path / f"sub-0{subject}/ses-{session}/label.png")
        for subject in range(1, 6)
        for session in "ab"
    ]
    config = config_with(tmp_path, group_by="subject")
    classes = {"background": 0, "organ": 1}
    split_of(Dataset(tmp_path, tuple(cases[2:]), ("MR",), classes, test=tuple(cases[:2])), config)
    assert "data.test keeps some" not in caplog.text
    split_of(Dataset(tmp_path, tuple(cases[1:]), ("MR",), classes, test=(cases[0],)), config)
    assert "leaves others for training: 01; keep all or none of a group" in caplog.text


def test_a_pattern_whose_group_matches_nothing_gives_no_group(tmp_path: Path) -> None:
    config = config_with(tmp_path, group_by={"pattern": "^(?:(p[0-2])|p[34])_"})
    for kept in ((), ("p0_a", "p3_a", "p4_a")):
        left = [name for name in PATIENTS if name not in kept]
        with pytest.raises(DatasetError, match=r"gives no group for p3_\w.*; give each case one"):
            split_of(dataset_with(tmp_path, left, test=kept), config)


@pytest.mark.parametrize(
    ("cases", "setting"),
    [
        (PATIENTS, "pattern"),
        (["sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1"], "subject"),
        (["STS_025_t1", "STS_025_t2", "STS_031_t1"], "pattern"),
        ([f"hippocampus_{number:03d}" for number in range(40)], None),
        ([f"case_{number}" for number in range(4)], None),
        (["sub-01", "sub-02"], None),
        (["anna", "ben"], None),
    ],
)
def test_grouping_is_proposed_if_names_look_alike(
    tmp_path: Path, cases: list[str], setting: str | None
) -> None:
    dataset = dataset_with(tmp_path, cases)
    assert (likely_grouping(dataset) is not None) == (setting is not None)
    told = grouping_advice(dataset, None)
    assert told is None if setting is None else told is not None and setting in told
    if setting is not None:
        given = {"pattern": "(x)"}
        assert grouping_advice(dataset, config_with(tmp_path, group_by=given).data) is None


@pytest.mark.parametrize(
    ("settings", "unused"),
    [
        ({"validation": ["a"], "stratify_by": {"column": "site"}}, ["stratify_by"]),
        ({"validation": 0, "stratify_by": "classes"}, ["stratify_by"]),
        ({"num_folds": 7}, ["num_folds"]),
        ({"fold": 0, "validation": ["a"], "num_folds": 3}, ["validation"]),
        (
            {
                "splits": {"column": "fold"},
                "num_folds": 7,
                "validation": ["a"],
                "stratify_by": {"column": "site"},
            },
            ["validation", "num_folds", "stratify_by"],
        ),
        ({"fold": 0, "num_folds": 3, "stratify_by": {"column": "site"}}, []),
        ({"validation": 0.3, "stratify_by": {"column": "site"}}, []),
        ({"splits": {"column": "fold"}, "fold": 1}, []),
    ],
)
def test_settings_of_a_split_that_others_turn_off_are_told(
    tmp_path: Path, settings: dict[str, Any], unused: list[str]
) -> None:
    """They are the same in the config that a run writes, which holds every setting."""
    config = config_with(tmp_path, case_table="cases.csv", **settings)
    whole = validated(Config, config.model_dump(mode="json"), "config.yaml")
    for data in (config.data, whole.data):
        told = unused_split_settings(data)
        assert [sentence.split()[0] for sentence in told] == [f"data.{name}" for name in unused]


def test_folds_of_a_file_turn_off_the_number_of_folds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "splits_final.json").write_text(json.dumps(splits_final()[:2]))
    split_of(dataset_with(tmp_path, PATIENTS), config_with(tmp_path, fold=1, num_folds=3))
    beside = tmp_path / "splits_final.json"
    assert f"data.num_folds is not used, because {beside} has folds" in caplog.text
    assert unused_split_settings(config_with(tmp_path, fold=1).data) == []


def test_check_of_a_dataset_draws_the_split(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path / "data")
    (folder / "cases.csv").write_text("id,site\ncase_0,A\ncase_1,B\ncase_2,A\ncase_3,B\n")
    (folder / "strange.csv").write_text("name,site\ncase_0,A\n")
    table, site = "data.case_table=cases.csv", "data.stratify_by={column: site}"
    for words, reason in (
        ([table, "data.stratify_by={column: nonexistent}"], "expected a column nonexistent"),
        (["data.case_table=strange.csv", site], "expected a column id"),
        (["data.validation=[nope]"], "data.validation names nope, which is not a case"),
    ):
        with pytest.raises(DatasetError, match=reason):
            check(folder, words)
    text = str(check(folder, [table, site, "data.validation=0.5"]))
    assert "2 cases to train on, 2 held out" in text and "not used" not in text
    text = str(check(folder, [table, site, "data.validation=[case_1]"]))
    assert "3 cases to train on, 1 held out" in text
    assert "data.stratify_by is not used, because data.validation names the cases" in text
    text = str(check(folder, [table]))
    assert "cases.csv is not used, because no setting names one of its columns" in text


def test_a_pattern_without_one_group_is_refused(tmp_path: Path) -> None:
    for pattern in ("p[0-9]", "(a)(b)", "("):
        with pytest.raises(ConfigError, match="pattern"):
            config_with(tmp_path, group_by={"pattern": pattern})
