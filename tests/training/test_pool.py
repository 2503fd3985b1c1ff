"""Folds that were trained apart are pooled to what one cross-validation says."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import Callback

from segkit.errors import ConfigError
from segkit.model.folder import load_description
from segkit.training.cross_validation import (
    CrossValidation,
    cross_validate,
    is_cross_validation,
    resume_folds,
)
from segkit.training.fit import train
from segkit.training.pool import pool
from segkit.training.run_folder import lock_if_free
from tests.small import small_config, small_dataset


def config_of(folder: Path, **sections: Any) -> Any:
    return small_config(folder, train={"steps": 1, "validate_every": 1, "pictures": 0}, **sections)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"), num_cases=5)


@pytest.fixture(scope="module")
def apart(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two machines' folders of folds 0 and 1, and one of both."""
    folder = tmp_path_factory.mktemp("apart")
    config = config_of(data)
    here = cross_validate(config, [0], runs=folder / "here").folder
    there = cross_validate(config, [1], runs=folder / "there").folder
    both = cross_validate(config, [0, 1], runs=folder / "both").folder
    return here, there, both


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def test_pooled_folds_give_the_results_of_one_cross_validation(
    apart: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    here, there, both = apart
    result = pool([there, here], tmp_path / "all")
    found, expected = summary(result.folder), summary(both)
    assert found == result.summary
    for key in ("validation", "postprocessing", "steps"):
        assert found[key] == expected[key], key
    assert list(found["folds"]) == ["0", "1"] and found["run"] == "all"
    for fold in ("fold_0", "fold_1"):
        models = [load_description(folder / fold / "model") for folder in (result.folder, both)]
        assert models[0].postprocessing == models[1].postprocessing
        weights = [
            (folder / fold / "model" / "weights.safetensors").read_bytes()
            for folder in (result.folder, both)
        ]
        assert weights[0] == weights[1]
    assert is_cross_validation(result.folder)
    with pytest.raises(ConfigError, match=r"all: the cross-validation is finished already; add"):
        resume_folds(result.folder)


def test_a_pooled_cross_validation_continues_with_more_folds(
    apart: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    here, there, _ = apart
    folder = pool([here, there], tmp_path / "all").folder
    wider = resume_folds(folder, [2])
    assert list(wider.summary["folds"]) == ["0", "1", "2"]
    assert wider.summary["validation"]["cases"] == 3


def test_runs_of_a_fold_are_pooled_too(
    data: Path, apart: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    run = train(config_of(data, data={"fold": 1}), runs=tmp_path)
    found = pool([apart[0], run.folder], tmp_path / "all").summary
    assert found["validation"] == summary(apart[2])["validation"]


def test_folds_that_do_not_belong_together_are_refused(
    data: Path, apart: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    here, there, both = apart
    out = tmp_path / "all"
    with pytest.raises(ConfigError, match=r"fold_0 and .*fold_0 are both fold 0; give only one"):
        pool([here, both], out)
    with pytest.raises(
        ConfigError, match=r"data\d: expected a run or a cross-validation with a fin"
    ):
        pool([here, data], out)
    whole = train(config_of(data), runs=tmp_path)
    with pytest.raises(ConfigError, match=r"small: expected a run of one fold, but its data\.fold"):
        pool([here, whole.folder], out)
    with pytest.raises(ConfigError, match=r"both.small: exists already; choose another folder"):
        pool([here, there], both)
    other = Path(shutil.copytree(there, tmp_path / "other"))
    path = other / "fold_1" / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["train"]["seed"] = 7
    tree["data"]["folder"] = "/elsewhere"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(
        ConfigError, match=r"fold_1: expected the train\.seed of .*fold_0, 0, found 7;"
    ):
        pool([here, other], out)
    shutil.copy(there / "fold_1" / "config.yaml", path)
    split = other / "fold_1" / "split.json"
    names = json.loads((there / "fold_1" / "split.json").read_text())
    split.write_text(json.dumps({**names, "train": [*names["train"][1:], "strange"]}))
    with pytest.raises(ConfigError, match=r"fold_1: expected the same cases as in .*fold_0, but"):
        pool([here, other], out)
    held = json.loads((here / "fold_0" / "split.json").read_text())
    split.write_text(json.dumps(held))
    with pytest.raises(ConfigError, match=r"case_\d is held out by both .*fold_0 and .*fold_1"):
        pool([here, other], out)
    assert not out.exists() and not list(tmp_path.glob(".partial*"))


def test_given_folds_may_have_different_cases_and_are_pooled(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data", num_cases=5)
    folds = [
        {"train": ["case_1", "case_2"], "val": ["case_0"]},
        {"train": ["case_2", "case_0", "case_4"], "val": ["case_1"]},
        {"train": ["case_2"], "val": ["case_0", "case_3"]},
    ]
    (data / "splits_final.json").write_text(json.dumps(folds))
    result = cross_validate(config_of(data), "all", runs=tmp_path / "both")
    scored = ["case_0", "case_1", "case_3"]
    assert sorted(result.summary["validation"]["dice_of_cases"]) == scored
    split = json.loads((result.folder / "fold_1" / "split.json").read_text())
    assert split == {**split, "train": ["case_0", "case_2", "case_4"], "folds_given": True}
    # As on another machine, without the dataset.
    shutil.rmtree(data)
    runs = [result.folder / f"fold_{fold}" for fold in range(3)]
    pooled = pool(runs, tmp_path / "all")
    assert pooled.summary["validation"] == result.summary["validation"]
    path = runs[2] / "split.json"
    path.write_text(path.read_text().replace("true", "false"))
    with pytest.raises(ConfigError, match=r"fold_2: its folds were drawn, but those of .*fold_0 w"):
        pool(runs, tmp_path / "other")


def test_settings_that_decide_what_a_fold_learns_are_the_same_in_all_folds(
    apart: tuple[Path, Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here, there, _ = apart
    path = Path(shutil.copytree(there, tmp_path / "other")) / "fold_1" / "config.yaml"
    before = path.read_text()

    def pooled_with(section: str, key: str, value: Any) -> None:
        tree = yaml.safe_load(before)
        (tree[section] if section else tree)[key] = value
        path.write_text(yaml.safe_dump(tree))
        shutil.rmtree(tmp_path / "all", ignore_errors=True)
        caplog.clear()
        pool([here, tmp_path / "other"], tmp_path / "all")

    for section, key, value in (
        ("", "replaced", ["loss"]),
        ("trainer", "accumulate_grad_batches", 2),
        ("trainer", "max_time", "00:00:01:00"),
        ("train", "start_from", "/some/run"),
        ("train", "batch_dice", True),
        ("data", "normalisation", [{"kind": "zscore", "nonzero": True}]),
        ("data", "labelled", {"case_0": ["organ"]}),
    ):
        with pytest.raises(
            ConfigError, match=rf"fold_1: expected the {section}\.?{key} of .*found .*same settings"
        ):
            pooled_with(section, key, value)
    for section, key, value in (
        ("trainer", "precision", "bf16-mixed"),
        ("data", "spacing", [2.0, 1.0, 1.0]),
    ):
        pooled_with(section, key, value)
        assert (
            f"not all trained in the same way, as they differ in {section}.{key} (" in caplog.text
        )
    for section, key, value in (
        ("data", "cache", "/elsewhere"),
        ("train", "keep_held_out", "labels"),
    ):
        pooled_with(section, key, value)
        assert not caplog.text


class Resumed(Callback):
    """While a fold is trained, goes on with the folder as another process would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.others: list[CrossValidation] = []
        self.said: list[str] = []

    def on_train_start(self, *details: Any) -> None:
        if not self.others:
            self.others.append(resume_folds(self.folder, [1], say=self.said.append))


def test_two_processes_train_folds_of_one_folder_at_once_and_the_last_pools(
    data: Path, apart: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    second = Resumed(tmp_path / "small")
    said: list[str] = []
    result = cross_validate(
        config_of(data), [0], runs=tmp_path, callbacks=[second], say=said.append
    )
    (other,) = second.others
    assert other.summary == {} and second.said == [
        "fold 1, 2 of 2",
        f"{tmp_path / 'small'}: not finished yet: fold 0; the process that trains it pools all "
        f"folds when it ends, or segkit train --resume {tmp_path / 'small'} continues from there",
    ]
    assert said == ["fold 0, 1 of 1"]
    assert list(result.summary["folds"]) == ["0", "1"]
    assert result.summary["validation"]["dice_of_cases"].keys() == (
        summary(apart[2])["validation"]["dice_of_cases"].keys()
    )
    assert sorted(path.name for path in (tmp_path / "small").glob("fold_*")) == ["fold_0", "fold_1"]
    assert not list((tmp_path / "small").glob(".fold*"))


def test_a_name_is_one_processs_until_it_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock_if_free(path) as first:
        with lock_if_free(path) as second:
            assert first and not second
        assert path.exists()
    assert not path.exists()
    with lock_if_free(path) as third:
        assert third
