"""Laws of a cross-validation: folds are runs, their cases are pooled, and evidence decides."""

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from segkit.config.load import load_config
from segkit.config.model import PostprocessingConfig
from segkit.config.training import Config
from segkit.data.dataset import read_dataset
from segkit.errors import ConfigError, DatasetError, ModelError
from segkit.inference.postprocess import BOTH, CLASSES, LARGEST_FOREGROUND, candidates
from segkit.inference.predictor import Predictor
from segkit.io.volume import read_volume
from segkit.model.folder import load_description, load_model, model_folders, newest_model
from segkit.training import fit as training
from segkit.training.cross_validation import cross_validate, is_cross_validation, resume_folds
from segkit.training.pooled_scores import pool_folds
from segkit.training.resume import resume
from segkit.training.run_folder import lock_if_free
from tests.small import small_config, small_dataset
from tests.training.drawn_folds import fold_of

CASES = 6


class StoppedError(Exception):
    """What stops a run here."""


class CountRuns(Callback):
    """Counts the runs that are trained; stops the one of that number, as a crash would."""

    def __init__(self, stop_in_run: int | None = None) -> None:
        self.count = 0
        self.stop_in_run = stop_in_run

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.count += 1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *details: Any
    ) -> None:
        if self.count == self.stop_in_run:
            raise StoppedError


def quick_config(data: Path) -> Config:
    return small_config(data, train={"steps": 2, "validate_every": 2})


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("dataset"), num_cases=CASES)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished cross-validation; tests leave it as it is."""
    runs = tmp_path_factory.mktemp("runs")
    said: list[str] = []
    result = cross_validate(quick_config(data), range(5), runs=runs, say=said.append)
    assert said == [f"fold {fold}, {fold + 1} of 5" for fold in range(5)]
    return result.folder


# What it writes


def test_each_fold_is_a_whole_run_that_holds_out_its_cases(data: Path, finished: Path) -> None:
    assert finished.name == "small" and is_cross_validation(finished)
    for fold in range(5):
        run = finished / f"fold_{fold}"
        for name in ("config.yaml", "last.ckpt", "metrics.csv", "summary.json", "model"):
            assert (run / name).exists(), name
        assert load_config(run / "config.yaml").data.fold == fold
        _, held_out = fold_of(read_dataset(data), fold)
        scored = read(run / "summary.json")["validation"]["dice_of_cases"]
        assert sorted(scored) == [case.name for case in held_out]
    # Cases are prepared once, for all folds.
    assert not (finished / ".cache").exists() and (finished.parent / ".cache").is_dir()


def test_the_summary_pools_the_cases_of_all_folds(finished: Path) -> None:
    summary = read(finished / "summary.json")
    folds = [read(finished / f"fold_{fold}" / "summary.json") for fold in range(5)]
    cases: dict[str, dict[str, float]] = {}
    for fold in folds:
        cases |= fold["validation"]["dice_of_cases"]
    assert sorted(cases) == [f"case_{number}" for number in range(CASES)]
    validation = summary["validation"]
    assert validation["cases"] == CASES and validation["dice_of_cases"] == cases
    expected = np.mean([dice["ball"] for dice in cases.values()])
    assert validation["dice"]["ball"] == pytest.approx(expected, abs=1e-12)
    assert validation["mean_dice"] == pytest.approx(expected, abs=1e-12)
    assert summary["steps"] == 10
    seconds = sum(fold["seconds_of_training"] for fold in folds)
    assert summary["seconds_of_training"] == pytest.approx(seconds, abs=0.1)
    for number, fold in enumerate(folds):
        told = summary["folds"][str(number)]
        assert told["mean_dice"] == fold["validation"]["mean_dice"]
        assert told["cases"] == fold["validation"]["cases"]
    # The first fold holds out two of six cases, so that folds do not weigh the same.
    assert [fold["cases"] for fold in summary["folds"].values()] == [2, 1, 1, 1, 1]


def test_the_decision_is_in_every_folds_model(finished: Path) -> None:
    told = read(finished / "summary.json")["postprocessing"]
    expected = PostprocessingConfig(
        largest_foreground=told["largest_foreground"],
        largest_of=tuple({"ball": 1}[name] for name in told["largest_of"]),
    )
    for fold in range(5):
        assert load_description(finished / f"fold_{fold}" / "model").postprocessing == expected


def test_the_evidence_is_the_dice_of_the_predicted_labels_after_each_operation(
    data: Path, finished: Path
) -> None:
    told = read(finished / "fold_0" / "summary.json")["validation"]["dice_of_cases_after"]
    assert set(told) == {LARGEST_FOREGROUND, CLASSES, BOTH}
    model = load_model(finished / "fold_0")
    bare = model.description.model_copy(update={"postprocessing": PostprocessingConfig()})
    predictor = Predictor(training.Model(bare, model.network))
    for name in told[LARGEST_FOREGROUND]:
        label = read_volume(data / "labelsTr" / f"{name}.nii.gz").data
        labels = predictor(read_volume(data / "imagesTr" / f"{name}.nii.gz")).labels.data
        for operation, function in candidates([1]).items():
            kept = function(labels)
            dice = 2 * (kept * label).sum() / (kept.sum() + label.sum())
            assert told[operation][name]["ball"] == pytest.approx(dice, abs=1e-12)


def test_every_fold_adopts_post_processing_that_the_pooled_cases_favour(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(finished, folder)
    (folder / "summary.json").unlink()
    for fold in range(5):
        path = folder / f"fold_{fold}" / "summary.json"
        content = read(path)
        for name, dice in content["validation"]["dice_of_cases"].items():
            dice["ball"] = 0.5
            for operation in (LARGEST_FOREGROUND, CLASSES, BOTH):
                content["validation"]["dice_of_cases_after"][operation][name]["ball"] = 0.75
        path.write_text(json.dumps(content))
    result = resume_folds(folder)
    assert result.summary["validation"]["mean_dice"] == 0.5
    # Of one class, its largest component is the foreground's.
    told = result.summary["postprocessing"]
    assert told["largest_foreground"] and told["largest_of"] == []
    assert told["adopted"]["mean_dice"] == 0.75
    assert result.post_processing() == (
        "post-processing: largest component of the whole foreground; mean Dice 0.750"
    )
    for model in model_folders(folder):
        assert load_model(model).description.postprocessing == PostprocessingConfig(
            largest_foreground=True
        )


def validation(cases: dict[str, tuple[float | None, float | None]]) -> dict[str, Any]:
    """A fold's summary, of (small, large) Dice as predicted alone, that the largest raises."""
    rows = {name: dict(zip(("small", "large"), dice, strict=True)) for name, dice in cases.items()}
    better = {
        name: {"small": dice[0], "large": dice[1] and dice[1] + 0.1} for name, dice in cases.items()
    }
    return {
        "steps": 3,
        "seconds_of_training": 1.5,
        "validation": {
            "cases": len(cases),
            "dice": dict.fromkeys(("small", "large"), 0.0),
            "mean_dice": 0.0,
            "dice_of_cases": rows,
            "dice_of_cases_after": {LARGEST_FOREGROUND: rows, CLASSES: better, BOTH: better},
        },
    }


def test_the_summary_says_what_is_adopted_and_what_it_gives() -> None:
    folds = {
        0: validation({"a": (0.5, 0.4), "b": (None, 0.6)}),
        3: validation({"c": (0.7, None)}),
    }
    summary = pool_folds("x", folds)
    assert summary["steps"] == 6 and summary["seconds_of_training"] == 3.0
    assert summary["validation"]["dice"] == pytest.approx({"small": 0.6, "large": 0.5})
    assert summary["validation"]["mean_dice"] == pytest.approx(0.55)
    told = summary["postprocessing"]
    assert told["largest_foreground"] is False and told["largest_of"] == ["large"]
    assert told["adopted"]["dice"] == pytest.approx({"small": 0.6, "large": 0.6})
    assert told["after"][LARGEST_FOREGROUND]["mean_dice"] == pytest.approx(0.55)


# What it goes on with


def test_a_fold_whose_summary_is_gone_is_the_only_one_trained_again(
    data: Path, tmp_path: Path
) -> None:
    folder = cross_validate(quick_config(data), [0, 2], runs=tmp_path).folder
    before = (folder / "summary.json").read_text()
    (folder / "fold_2" / "summary.json").unlink()
    kept = (folder / "fold_0" / "last.ckpt").stat().st_mtime_ns
    said: list[str] = []
    resume_folds(folder, say=said.append)
    assert said == ["fold 2, 2 of 2"]
    assert (folder / "fold_0" / "last.ckpt").stat().st_mtime_ns == kept
    after = (folder / "summary.json").read_text()
    assert json.loads(after)["validation"] == json.loads(before)["validation"]
    assert sorted(path.name for path in folder.glob("fold_*")) == ["fold_0", "fold_2"]
    with pytest.raises(
        ConfigError,
        match=r"small: the cross-validation is finished already; add folds with --folds",
    ):
        resume_folds(folder)
    counter = CountRuns()
    wider = resume_folds(folder, [1], callbacks=[counter])
    assert counter.count == 1 and list(wider.summary["folds"]) == ["0", "1", "2"]
    assert wider.summary["validation"]["cases"] == 4


def test_a_stopped_cross_validation_trains_only_missing_folds(
    data: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoppedError):
        cross_validate(quick_config(data), [0, 1, 4], runs=tmp_path, callbacks=[CountRuns(2)])
    folder = tmp_path / "small"
    assert not (folder / "summary.json").exists()
    assert (folder / "fold_0" / "summary.json").is_file()
    assert not (folder / "fold_1" / "summary.json").exists()
    assert newest_of(tmp_path) is None
    monkeypatch.chdir(tmp_path)  # what was recorded does not depend on the working directory
    counter = CountRuns()
    summary = resume_folds(folder, callbacks=[counter]).summary
    assert counter.count == 2 and list(summary["folds"]) == ["0", "1", "4"]
    whole = read(finished / "summary.json")["validation"]["dice_of_cases"]
    assert summary["validation"]["dice_of_cases"] == {
        name: dice for name, dice in whole.items() if name in summary["validation"]["dice_of_cases"]
    }
    assert summary["validation"]["cases"] == 4


@pytest.mark.slow
def test_new_settings_of_a_cross_validation_are_those_of_every_fold(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        cross_validate(quick_config(data), [0, 1], runs=tmp_path, callbacks=[CountRuns(2)])
    folder = tmp_path / "small"
    before = (folder / "cross_validation.json").read_bytes()
    for override, why in (
        (
            "train.seed=3",
            r"small: train\.seed was changed from 0 to 3, but the earlier steps used it",
        ),
        ("data.num_folds=3", "data.num_folds was changed from 5 to 3, but a run keeps its split"),
        ("data.fold=3", "data.fold was changed from null to 3, but a run keeps its split"),
        ("name=other", "name was changed from small to other, but a run keeps its name"),
        (
            "data.batch_size=1",
            r"small: data\.batch_size was changed, but fold 0 finished with the earlier value, and "
            r"folds of one cross-validation share",
        ),
        (
            "train.steps=1",
            r"train\.steps is 1, but the run has already done 2 steps; set it higher",
        ),
        ("trainer.devices=2", r"trainer\.devices is 2 and trainer\.num_nodes 1, but --folds"),
    ):
        with pytest.raises(ConfigError, match=why):
            resume_folds(folder, overrides=[override])
    assert (folder / "cross_validation.json").read_bytes() == before
    # Who cuts patches changes nothing, so fold 0 stays as it is.
    kept = (folder / "fold_0" / "last.ckpt").stat().st_mtime_ns
    resume_folds(folder, overrides=["data.workers=0"])
    assert (folder / "fold_0" / "last.ckpt").stat().st_mtime_ns == kept
    # With more steps all folds go on, with the other settings too; a new fold begins with them.
    wanted = ["train.steps=3", "data.batch_size=1"]
    summary = resume_folds(folder, [4], overrides=wanted).summary
    assert {fold: told["steps"] for fold, told in summary["folds"].items()} == {
        "0": 3,
        "1": 3,
        "4": 3,
    }
    for fold in (0, 1, 4):
        config = load_config(folder / f"fold_{fold}" / "config.yaml")
        assert (config.train.steps, config.data.batch_size, config.data.workers) == (3, 1, 0)
    changed = read(folder / "fold_0" / "summary.json")["changed_settings"]
    expected = {"train.steps", "data.batch_size", "data.workers"}
    assert {each["setting"] for each in changed} == expected
    with pytest.raises(
        ConfigError, match=r"finished already; add folds with --folds, set more train\.st"
    ):
        resume_folds(folder, overrides=wanted)


def test_settings_of_a_fold_that_is_trained_now_do_not_change(data: Path, tmp_path: Path) -> None:
    folder = cross_validate(quick_config(data), [0], runs=tmp_path).folder
    with (
        lock_if_free(folder / ".fold_0.lock"),
        pytest.raises(
            ConfigError, match=r"another process trains fold 0; stop it, and then resume"
        ),
    ):
        resume_folds(folder, overrides=["train.steps=9"])


@pytest.mark.slow
def test_a_fold_with_settings_of_its_own_is_told(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = cross_validate(quick_config(data), [0], runs=tmp_path).folder
    assert "differ" not in caplog.text
    resume(folder / "fold_0", overrides=["train.steps=3"])
    assert "small: its summary.json was removed, because fold_0 continues" in caplog.text
    assert not (folder / "summary.json").exists()
    pooled = resume_folds(folder).summary  # trains nothing
    own = read(folder / "fold_0" / "summary.json")
    assert pooled["steps"] == 3 and read(folder / "summary.json")["steps"] == 3
    assert pooled["validation"]["dice_of_cases"] == own["validation"]["dice_of_cases"]
    resume_folds(folder, [1])
    assert "small: the folds were not all trained in the same way, as they differ in train.ste" in (
        caplog.text
    )


def newest_of(runs: Path) -> Path | None:
    try:
        return newest_model(runs)
    except ModelError:
        return None


def test_a_second_of_the_same_name_gets_a_folder_of_its_own(data: Path, tmp_path: Path) -> None:
    config = quick_config(data)
    names = [cross_validate(config, [0], runs=tmp_path).folder.name for _ in range(2)]
    names.append(training.train(config, runs=tmp_path).folder.name)
    assert names == ["small", "small-2", "small-3"]


# What it refuses


def test_settings_that_exclude_cross_validation_are_refused_and_leave_no_folder(
    tmp_path: Path,
) -> None:
    data = small_dataset(tmp_path / "data")
    refusals: list[tuple[Config, type[Exception], str]] = [
        (quick_config(data), DatasetError, "5 folds need 5 cases or more, found 4"),
        (
            small_config(data, data={"fold": 1}),
            ConfigError,
            "data.fold is 1, but --folds also chooses the folds to train; give only one of the two",
        ),
        (
            small_config(data, trainer={"devices": 2}),
            ConfigError,
            "trainer.devices is 2 and trainer.num_nodes 1, but --folds trains in one",
        ),
    ]
    for config, kind, message in refusals:
        with pytest.raises(kind, match=message):
            cross_validate(config, [0], runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_an_invalid_setting_of_a_fold_leaves_no_folder(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.precision is 7-bit; choose auto"):
        cross_validate(small_config(data, trainer={"precision": "7-bit"}), [0], runs=tmp_path)
    assert not (tmp_path / "small").exists()


def test_a_cross_validation_cannot_be_resumed_as_a_run(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"small: expected a run with config\.yaml"):
        resume(finished)
    with pytest.raises(ConfigError, match=r"cross_validation\.json: cannot be read as JSON"):
        resume_folds(tmp_path)


# Its models


def test_a_cross_validation_stands_for_the_models_of_its_folds(
    finished: Path, tmp_path: Path
) -> None:
    expected = tuple(finished / f"fold_{fold}" / "model" for fold in range(5))
    assert model_folders(finished) == expected
    assert model_folders(finished / "fold_3") == (expected[3],)
    assert model_folders(expected[3]) == (expected[3],)
    assert newest_model(finished.parent) == finished
    with pytest.raises(ModelError, match="expected a run or a model folder"):
        model_folders(tmp_path)


def test_a_fold_lends_its_weights_and_a_cross_validation_does_not(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ModelError,
        match=r"expected one model, found the models of 5 folds; choose one, such as .*fold_0$",
    ):
        training.train(small_config(data, train={"start_from": str(finished)}), runs=tmp_path)
    assert not (tmp_path / "small").exists()
    settings = {"steps": 1, "learning_rate": 1e-9, "start_from": str(finished / "fold_1")}
    run = training.train(small_config(data, train=settings), runs=tmp_path)
    lent = load_model(finished / "fold_1").network.state_dict()
    for key, value in run.model.network.state_dict().items():
        torch.testing.assert_close(value, lent[key], atol=1e-6, rtol=0)
