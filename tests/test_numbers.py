"""Numbers that run away, and classes that are not there."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.cli.main import main
from segkit.config.load import dump_yaml
from segkit.data.dataset import read_dataset
from segkit.data.split import split
from segkit.errors import ModelError, TrainingError
from segkit.inference.predictor import Predictor
from segkit.io.volume import read_volume, write_volume
from segkit.model.folder import load_model
from segkit.training import final_scores
from segkit.training import fit as training
from tests.small import small_config, small_dataset, trained_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on small made-up volumes."""
    return trained_run(tmp_path_factory.mktemp("finished"))


def emptied(data: Path, *numbers: int) -> Path:
    """The dataset, some of whose cases hold no voxel of a class."""
    for number in numbers:
        path = data / "labelsTr" / f"case_{number}.nii.gz"
        label = read_volume(path)
        write_volume(path, label.like(np.zeros_like(label.data)))
    return data


def with_another_class(data: Path) -> Path:
    """The dataset, which declares one more class, that no case holds."""
    file = data / "dataset.json"
    content = json.loads(file.read_text())
    content["labels"]["2"] = "absent"
    file.write_text(json.dumps(content))
    return data


def scores_of(folder: Path) -> list[str]:
    """Every figure of a run's metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return [figure for row in csv.DictReader(file) for figure in row.values() if figure]


def test_weights_that_ran_away_stop_training_at_the_step_and_name_its_cases(
    tmp_path: Path,
) -> None:
    config = small_config(
        small_dataset(tmp_path / "data"),
        train={"steps": 50, "optimiser": "sgd", "learning_rate": 1e30},
    )
    with pytest.raises(
        TrainingError,
        match=r"^the loss of step \d+ is (nan|inf), with patches of case_\d, case_\d; check these",
    ):
        training.train(config, runs=tmp_path / "runs")


def test_windows_that_overflow_float16_are_predicted_in_float32_with_a_warning(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(finished / "model")
    with torch.no_grad():
        for head in model.network.modules():
            if isinstance(head, torch.nn.Conv3d) and head.out_channels == 2:
                head.weight.mul_(1e6)
    scan = read_volume(finished.parents[1] / "data" / "imagesTr" / "case_0.nii.gz")
    exact = Predictor(model, engine="torch", device="cpu")(scan).labels.data
    assert "overflow" not in caplog.text
    half = Predictor(model, engine="torch", device="cpu", precision=torch.float16)
    assert np.array_equal(half(scan, maps=True).labels.data, exact)
    assert "overflow float16; it is computed in float32 from now on" in caplog.text


def test_a_network_whose_output_is_nan_gives_no_labels(finished: Path) -> None:
    model = load_model(finished / "model")
    with torch.no_grad():
        next(model.network.parameters()).fill_(float("nan"))
    scan = read_volume(finished.parents[1] / "data" / "imagesTr" / "case_0.nii.gz")
    for precision in (torch.float32, torch.float16):
        predictor = Predictor(model, engine="torch", device="cpu", precision=precision)
        with pytest.raises(ModelError, match="small: the network's output contains NaN"):
            predictor(scan)


def test_an_only_case_is_trained_on_and_none_is_held_out(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data", num_cases=1)
    dataset = read_dataset(data)
    assert split(dataset, 0.2, seed=0) == (dataset.cases, ())
    run = training.train(small_config(data), runs=tmp_path / "runs")
    assert run.summary["steps"] == 4
    assert run.summary["training_cases"] == 1 and run.summary["validation"]["cases"] == 0


@pytest.mark.parametrize("patience", [None, 1])
def test_held_out_cases_without_any_class_score_no_nan(
    tmp_path: Path, patience: int | None
) -> None:
    data = emptied(small_dataset(tmp_path / "data"), 3)
    config = small_config(
        data,
        data={"validation": ["case_3"]},
        train={"steps": 4, "validate_every": 1, "patience": patience},
    )
    run = training.train(config, runs=tmp_path / "runs")
    assert all(math.isfinite(float(figure)) for figure in scores_of(run.folder))
    best = run.summary["validation"]["best_mean_dice_during_training"]
    assert best in (0, 1)
    text = (run.folder / "summary.json").read_text()
    assert "NaN" not in text and "Infinity" not in text


def test_a_class_that_no_case_holds_is_left_out_of_every_mean(tmp_path: Path) -> None:
    data = with_another_class(emptied(small_dataset(tmp_path / "data"), 1))
    run = training.train(small_config(data), runs=tmp_path / "runs")
    assert all(math.isfinite(float(figure)) for figure in scores_of(run.folder))
    assert math.isfinite(run.summary["validation"]["mean_dice"])
    assert run.summary["steps"] == 4


def test_an_undefined_dice_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing_found(*arguments: object, **settings: object) -> dict[str, object]:
        nan = float("nan")
        return {"cases": 1, "dice": {"ball": nan}, "mean_dice": nan, "dice_of_cases": {}}

    monkeypatch.setattr(final_scores, "score", nothing_found)
    data = small_dataset(tmp_path / "data")
    (tmp_path / "c.yaml").write_text(dump_yaml(small_config(data)))
    monkeypatch.setattr(sys, "argv", ["segkit", "train", str(tmp_path / "c.yaml")])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main()
    assert (
        "mean Dice of 1 held-out case, on the grids of their scans: undefined (ball undefined)"
        in capsys.readouterr().out
    )


def test_evaluating_one_case_of_empty_classes_leaves_no_nan_in_the_totals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_another_class(small_dataset(tmp_path / "data", num_cases=1))
    labels, out = data / "labelsTr", tmp_path / "scores.json"
    monkeypatch.setattr(
        sys, "argv", ["segkit", "evaluate", str(labels), str(labels), "--out", str(out)]
    )
    with pytest.raises(SystemExit, match="0"):
        main()
    scores = json.loads(out.read_text())
    dice = scores["overall"]["dice"]
    assert (dice["mean"], dice["low"], dice["high"]) == (1, 1, 1)
    assert (dice["num_scored"], dice["num_undefined"]) == (1, 1)
    assert "nan" not in capsys.readouterr().out.lower()
    emptied(data, 0)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--overwrite"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert json.loads(out.read_text())["overall"]["dice"]["mean"] is None
    assert "nan" not in capsys.readouterr().out.lower()
