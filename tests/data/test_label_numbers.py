"""Numbers in label files may be any; within segkit they are 0, 1, 2, …."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from segkit.checking.check import check
from segkit.config.dataset_files import DatasetConfig
from segkit.config.labels import Labelling
from segkit.config.load import DatasetFileConfig, validated
from segkit.data.dataset import dataset_of, read_case, read_dataset
from segkit.data.dataset_json import labelling_of
from segkit.data.label_numbers import as_in_files, within
from segkit.errors import DatasetError
from segkit.io.volume import read_labels, read_volume, write_volume
from tests.small import small_dataset


def told_apart(labels: Any, order: list[int] | None = None) -> Labelling:
    tree = {"data": {"folder": "x", "labels": labels}}
    given = validated(DatasetFileConfig, tree, "x").data.labels
    assert given is not None
    return labelling_of("data.labels", given, order, {})


FREESURFER = told_apart({0: "background", 17: "hippocampus", 53: "hippocampus", 255: "ignore"})


def test_both_forms_say_the_same() -> None:
    names = {"background": 0, "hippocampus": [17, 53], "ignore": 255}
    assert told_apart(names) == FREESURFER
    assert told_apart({str(key): name for key, name in {0: "b", 1: "a"}.items()}) == Labelling(
        {"b": 0, "a": 1}
    )


def test_several_numbers_are_one_class_and_the_first_is_written() -> None:
    found = within(np.array([0, 17, 53, 255]), FREESURFER)
    assert found.tolist() == [0, 1, 1, 2] and found.dtype == np.uint8
    assert as_in_files(np.array([0, 1, 1], np.uint8), FREESURFER).tolist() == [0, 17, 17]
    turned = told_apart({"background": 0, "hippocampus": [53, 17]})
    assert as_in_files(np.array([0, 1]), turned).tolist() == [0, 53]


def test_a_mask_of_0_and_255_is_one_class() -> None:
    mask = told_apart({"background": 0, "cell": 255})
    assert within(np.array([0, 255], np.uint8), mask).tolist() == [0, 1]
    written = as_in_files(np.array([0, 1], np.uint8), mask)
    assert written.tolist() == [0, 255] and written.dtype == np.uint8


def test_regions_of_0_1_2_4_keep_their_numbers() -> None:
    brats = told_apart(
        {"background": 0, "whole": [1, 2, 4], "core": [1, 4], "enhancing": 4}, [2, 1, 4]
    )
    assert within(np.array([0, 1, 2, 4]), brats).tolist() == [0, 1, 2, 3]
    assert brats.members == {"whole": (1, 2, 3), "core": (1, 3), "enhancing": (3,)}
    assert brats.numbers_in_files == {"background": 0, "whole": 2, "core": 1, "enhancing": 4}


def test_negative_numbers_are_read_and_never_written() -> None:
    scribbles = told_apart({"background": [-5, 0], "organ": [-1, 7], "ignore": -1000})
    assert within(np.array([-5, 0, -1, 7, -1000]), scribbles).tolist() == [0, 0, 1, 1, 2]
    assert as_in_files(np.array([0, 1]), scribbles).tolist() == [0, 7]


def test_a_background_of_any_number_is_0_within() -> None:
    pets = told_apart({1: "pet", 2: "background", 3: "ignore"})
    assert within(np.array([1, 2, 3]), pets).tolist() == [1, 0, 2]
    assert as_in_files(np.array([0, 1]), pets).tolist() == [2, 1]


def test_others_are_background_or_ignored() -> None:
    values = np.array([0, 3, 9, -4, 70000])
    taken = told_apart({"background": [0, "others"], "organ": 3})
    assert within(values, taken).tolist() == [0, 1, 0, 0, 0]
    left_out = told_apart({0: "background", 3: "organ", "others": "ignore"})
    assert within(values, left_out).tolist() == [0, 1, 2, 2, 2]
    assert left_out.ignore == 2 and taken.ignore is None
    # No number is named as ignored, so the first free one stands for all of them.
    assert left_out.value_names == ("background", "organ", "ignore")
    assert left_out.in_file(2) == 1


def test_consecutive_numbers_cost_no_copy() -> None:
    plain = told_apart({0: "background", 1: "a", 2: "ignore"})
    assert plain == Labelling({"background": 0, "a": 1}, ignore=2)
    values = np.array([0, 1, 2])
    assert within(values, plain) is values and as_in_files(values, plain) is values


def test_a_number_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holds label 5, which .* \(it has 0, 17, 53, 255\)"):
        within(np.array([0, 5]), FREESURFER)


@given(
    st.lists(st.integers(0, 2**16 - 1), min_size=2, max_size=9, unique=True),
    st.sampled_from([np.uint16, np.int32, np.int64]),
)
def test_label_numbers_survive_reading_and_writing(numbers: list[int], kind: type) -> None:
    labels = {"background": numbers[0], **{f"class {n}": n for n in numbers[1:]}}
    labelling = told_apart(labels)
    values = np.asfortranarray(np.resize(np.array(numbers, kind), (3, 4, 2)))
    back = as_in_files(within(values, labelling), labelling)
    assert_array_equal(back, values)
    assert labelling.numbers_in_files == labels


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"background": 0, "a": 1, "b": [1, 2]}, "a and b overlap at 1; add regions_class_order"),
        (
            {"background": 0, "a": [1, "others"]},
            "others may belong only to background or ignore, found it",
        ),
        ({"background": 0, "a": 70000}, "a is written to files as a number from 0 to 65535"),
        ({"a": 1, "b": 2}, "expected a label with number 0 or name background, found a, b"),
        ({"background": 0, "ignore": 255}, "must have a class in addition to the background"),
    ],
)
def test_what_does_not_fit_together_is_refused(labels: Any, reason: str) -> None:
    with pytest.raises(DatasetError, match=reason):
        told_apart(labels)


@pytest.fixture
def renumbered(tmp_path: Path) -> Path:
    """Balls that are 53 in half of the cases and 17 in the others, with one voxel of 9."""
    folder = small_dataset(tmp_path / "data", num_cases=2)
    for number, path in zip((17, 53), sorted((folder / "labelsTr").iterdir()), strict=True):
        label = read_volume(path)
        values = label.data.astype(np.int16) * number
        values[0, 0, 0] = 9 * (number == 17)
        write_volume(path, label.like(values))
    return folder


def test_labels_of_the_config_win_over_the_dataset_and_it_is_said(
    renumbered: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = {"background": [0, "others"], "ball": [17, 53]}
    dataset = dataset_of(DatasetConfig(folder=renumbered, labels=labels))
    assert "labels come from data.labels instead of dataset.json" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    for case in dataset.cases:
        raw = read_labels(case.label).data
        assert_array_equal(read_case(case, dataset)[1].data, np.isin(raw, (17, 53)))
    with pytest.raises(DatasetError, match="holds label 9, 17, which the dataset does not declare"):
        plain = read_dataset(renumbered)
        read_case(plain.cases[0], plain)


def test_check_counts_the_numbers_that_nobody_names(renumbered: Path) -> None:
    with pytest.raises(DatasetError, match=r"9 \(1 voxel in 1 case\), 17 \([0-9]+ voxels in 1 c"):
        check(renumbered)
    labels = ["data.labels={background: [0, others], ball: [17, 53]}"]
    told = check(renumbered, labels)
    assert "label 17, 53 ball: in 2 cases" in str(told)
    assert "other numbers, read as background: 9 (1 voxel in 1 case)" in str(told)
    assert told.facts["other_numbers"] == [{"number": 9, "cases": 1, "voxels": 1}]


def test_all_numbers_without_a_name_can_be_ignored(renumbered: Path) -> None:
    labels = {"background": 0, "ball": [17, 53], "ignore": "others"}
    dataset = dataset_of(DatasetConfig(folder=renumbered, labels=labels))
    for case in dataset.cases:
        raw = read_labels(case.label).data
        expected = np.select([raw == 0, np.isin(raw, (17, 53))], [0, 1], 2)
        assert_array_equal(read_case(case, dataset)[1].data, expected)
    told = check(renumbered, ["data.labels={background: 0, ball: [17, 53], ignore: others}"])
    assert "other numbers, read as ignore: 9 (1 voxel in 1 case)" in str(told)
