"""From files with any label numbers to results in the same: a network never sees the difference."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import segkit
from segkit.config.network import NetworkConfig
from segkit.data.label_numbers import within
from segkit.evaluation.evaluate import evaluate
from segkit.export.deployment import deployment
from segkit.inference.dicom_seg import segments
from segkit.inference.label_statistics import label_statistics
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume, read_labels, read_volume, write_volume
from segkit.model.folder import Model, load_model, save_model
from tests.models import random_model
from tests.small import small_config, small_dataset

IN_FILES = [[2], [205, 206], [420]]


@pytest.fixture
def plain() -> Model:
    return random_model(NetworkConfig(channels=[2, 2], deep_supervision=False))


@pytest.fixture
def numbered(plain: Model) -> Model:
    told = plain.description.model_copy(update={"in_files": IN_FILES})
    return replace(plain, description=told)


def scan_of(model: Model) -> Volume:
    random = np.random.default_rng(0)
    grid = segkit.Grid((12, 11, 10), np.diag([*model.description.spacing, 1.0]))
    return Volume(random.normal(size=grid.shape).astype(np.float32), grid)


def test_predictions_hold_the_numbers_of_files(plain: Model, numbered: Model) -> None:
    scan = scan_of(plain)
    usual = Predictor(plain, device="cpu", engine="torch")(scan).labels.data
    assert len(np.unique(usual)) > 1
    predictor = Predictor(numbered, device="cpu", engine="torch")
    found = predictor(scan).labels
    table = np.array([group[0] for group in IN_FILES])
    assert_array_equal(found.data, table[usual])
    assert_array_equal(predictor.numbers_of(scan).data, usual)


def test_statistics_segments_and_exports_speak_of_the_same_classes(
    plain: Model, numbered: Model
) -> None:
    scan = scan_of(plain)
    usual = Predictor(plain, device="cpu", engine="torch")(scan).labels
    found = Predictor(numbered, device="cpu", engine="torch")(scan).labels
    told = [
        label_statistics(labels, scan, model.description.labelling, ["MR"])
        for labels, model in ((usual, plain), (found, numbered))
    ]
    assert json.dumps(told[0]) == json.dumps(told[1])  # in which NaN equals itself
    assert_array_equal(
        segments(usual.data, plain.description.labelling),
        segments(found.data, numbered.description.labelling),
    )
    labels = deployment(numbered)["labels"]
    assert list(labels.values()) == [2, 205, 420]


def test_a_model_folder_keeps_the_numbers_and_old_ones_load_unchanged(
    tmp_path: Path, plain: Model, numbered: Model
) -> None:
    save_model(tmp_path / "numbered", numbered)
    assert load_model(tmp_path / "numbered").description.labelling == numbered.description.labelling
    save_model(tmp_path / "plain", plain)
    path = tmp_path / "plain" / "model.json"
    content = json.loads(path.read_text())
    del content["in_files"], content["others"]  # as models from before there were any
    path.write_text(json.dumps(content))
    assert load_model(tmp_path / "plain").description == plain.description


def test_scores_are_those_of_the_classes_by_a_config_or_a_model(
    tmp_path: Path, numbered: Model
) -> None:
    grid = segkit.Grid((4, 4, 4), np.eye(4))
    reference = np.full(grid.shape, 2, np.int16)
    reference[:2] = 206
    prediction = np.full(grid.shape, 2, np.int16)
    prediction[:1] = 205
    for folder, data in (("references", reference), ("predictions", prediction)):
        write_volume(tmp_path / folder / "a.nii.gz", Volume(data, grid))
    name = list(numbered.description.labels)[1]
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {{folder: x, labels: {{background: 2, {name}: [205, 206], other: 420}}}}"
    )
    save_model(tmp_path / "model", numbered)
    for labels in (config, tmp_path / "model"):
        found = evaluate(tmp_path / "predictions", tmp_path / "references", labels=labels)
        row = found.cases[0]
        assert (row.label, row.name) == (205, name)
        # 16 voxels of 32 found: 2 * 16 / (16 + 32)
        assert row.metrics["dice"] == pytest.approx(2 / 3)


@pytest.mark.slow
def test_a_renumbered_dataset_trains_the_same_network(tmp_path: Path) -> None:
    runs = []
    for name, numbers in (("plain", (0, 1)), ("renumbered", (0, 205))):
        data = small_dataset(tmp_path / name)
        for path in (data / "labelsTr").iterdir():
            label = read_volume(path)
            write_volume(path, label.like(np.array(numbers, np.uint16)[label.data]))
        content = json.loads((data / "dataset.json").read_text())
        content["labels"] = {str(numbers[0]): "background", str(numbers[1]): "ball"}
        (data / "dataset.json").write_text(json.dumps(content))
        runs.append(segkit.train(small_config(data), runs=tmp_path / f"runs_{name}"))
    plain, renumbered = runs
    assert plain.summary["validation"] == renumbered.summary["validation"]
    scan = read_volume(tmp_path / "plain" / "imagesTr" / "case_0.nii.gz")
    found = [Predictor.load(run.folder, device="cpu")(scan).labels.data for run in runs]
    assert_array_equal(found[0].astype(int) * 205, found[1])
    labels = read_labels(tmp_path / "renumbered" / "labelsTr" / "case_0.nii.gz")
    model = load_model(renumbered.folder / "model")
    assert set(np.unique(within(labels.data, model.description.labelling))) == {0, 1}
