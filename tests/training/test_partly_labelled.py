"""Partly labelled cases from the table to the scores: what nobody labelled counts nowhere."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segkit
from segkit.checking.check import check
from segkit.config.training import Config
from segkit.data.dataset import dataset_of
from segkit.errors import ConfigError, DatasetError
from segkit.evaluation.evaluate import evaluate
from segkit.io.volume import read_volume, write_volume
from segkit.training.parts import prepare
from tests.small import small_config, small_dataset


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Balls whose upper half is a class of its own; case 1 has no labels of it."""
    folder = small_dataset(tmp_path / "data")
    for path in (folder / "labelsTr").iterdir():
        label = read_volume(path)
        values = label.data.copy()
        if path.name != "case_1.nii.gz":
            values[..., 8:] *= 2
        else:
            values[..., 8:] = 0
        write_volume(path, label.like(values))
    content = json.loads((folder / "dataset.json").read_text())
    content["labels"] = {"0": "background", "1": "lower", "2": "upper"}
    (folder / "dataset.json").write_text(json.dumps(content))
    (folder / "cases.csv").write_text("id,has\ncase_0,all\ncase_1,lower\ncase_2,lower; upper\n")
    return folder


def config_of(data: Path, **more: Any) -> Config:
    settings = {"labelled": {"case_1": ["lower"]}, "validation": ["case_1", "case_3"], **more}
    return small_config(data, data=settings)


def test_a_table_or_the_config_says_what_is_labelled(data: Path) -> None:
    column = {"labelled": {"column": "has"}, "case_table": "cases.csv"}
    for settings in ({}, column):
        dataset = dataset_of(config_of(data, **settings).data)
        assert dataset.unlabelled == {"case_1": ("upper",)}
        assert dataset.unlabelled_sets == ((), ("upper",))


@pytest.mark.parametrize(
    ("labelled", "reason"),
    [
        ({"case_9": ["lower"]}, "data.labelled: expected only cases of .*, found case_9"),
        (
            {"case_1": ["liver"]},
            "expected for case_1 some of the classes lower",
        ),
        ({"case_1": []}, "expected for case_1 the classes that are labelled"),
    ],
)
def test_what_does_not_fit_is_refused(data: Path, labelled: Any, reason: str) -> None:
    with pytest.raises(DatasetError, match=reason):
        dataset_of(config_of(data, labelled=labelled).data)


def test_synthesis_needs_whole_label_maps(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs complete label maps"):
        prepare(config_of(data, synthesis={}), runs=tmp_path / "runs")


def test_parts_know_the_labelled_classes_of_each_case(data: Path, tmp_path: Path) -> None:
    parts = prepare(config_of(data, validation=["case_3"]), runs=tmp_path / "runs")
    assert parts.partly is not None and parts.partly.unlabelled == ((), (2,))
    labels = {case.name: np.array(case.label) for case in parts.cases}
    assert {name: label.min() // 3 for name, label in labels.items()} == {
        "case_0": 0,
        "case_1": 1,
        "case_2": 0,
    }
    assert len({label.dtype for label in labels.values()}) == 1
    assert all(set(case.positions) <= {1, 2} for case in parts.cases)
    whole = prepare(config_of(data, labelled=None, validation=["case_3"]), runs=tmp_path / "runs")
    assert whole.partly is None
    plain = {case.name: np.array(case.label) for case in whole.cases}
    for name, label in labels.items():
        np.testing.assert_array_equal(label % 3, plain[name])


def test_validation_scores_only_labelled_classes(data: Path, tmp_path: Path) -> None:
    parts = prepare(config_of(data), runs=tmp_path / "runs")
    scores = {}
    for case in parts.validation.cases:
        label = torch.from_numpy(np.array(case.label))
        scores[case.name] = parts.validation.score(label % 3, label).tolist()
    assert scores["case_3"] == [1, 1]
    assert scores["case_1"][0] == 1 and math.isnan(scores["case_1"][1])


def test_evaluation_scores_only_labelled_classes(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{folder: {data}, labelled: {{case_1: [lower]}}}}")
    found = evaluate(data / "labelsTr", config)
    dice = {(row.case, row.name): row.metrics["dice"] for row in found.cases}
    assert math.isnan(dice["case_1", "upper"]) and dice["case_1", "lower"] == 1
    assert dice["case_0", "upper"] == 1
    assert "case_1 has no labels of upper" in str(check(config))


@pytest.mark.slow
def test_a_run_learns_from_partly_labelled_cases(data: Path, tmp_path: Path) -> None:
    run = segkit.train(config_of(data), runs=tmp_path / "runs")
    dice = run.summary["validation"]["dice_of_cases"]
    assert math.isnan(dice["case_1"]["upper"]) and not math.isnan(dice["case_3"]["upper"])
    assert not math.isnan(run.summary["validation"]["dice"]["upper"])
