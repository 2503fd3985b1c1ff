"""Settings that a training does not use are told."""

from pathlib import Path

import pytest

from segkit.config.load import changed
from segkit.training.unused_settings import told_of_unused
from tests.cli.command import run
from tests.small import small_config, small_dataset


def test_a_setting_that_another_one_turns_off_is_told_once_with_the_reason(tmp_path: Path) -> None:
    words = [
        *("train.optimiser=muon", "train.adamw.lowest_momentum=0.8", "train.sgd.momentum=0.9"),
        *("train.adamw.square_decay=0.99", "train.steps=3", "train.adamw.lowest_momentum=0.7"),
    ]
    config = changed(small_config(small_dataset(tmp_path)), words)
    assert told_of_unused(words, config) == [
        "train.adamw.lowest_momentum has no effect, because train.optimiser is muon, and only "
        "adamw changes its momentum",
        "train.sgd.momentum has no effect, because train.optimiser is muon",
    ]
    assert told_of_unused(words, changed(config, ["train.optimiser=sgd"])) == [
        "train.adamw.lowest_momentum has no effect, because train.optimiser is sgd",
        "train.adamw.square_decay has no effect, because train.optimiser is sgd",
    ]


def test_a_setting_of_an_optimiser_that_the_plan_did_not_choose_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    small_dataset(tmp_path / "balls")
    words = ("train", "balls", "trainer.accelerator=cpu", "train.steps=1", "--no-race", "--dry-run")
    word = "train.adamw.lowest_momentum=0.8"
    assert run(*words, word, capsys=capsys)[0] == 0
    assert "train.adamw.lowest_momentum has no effect, because train.opti" in caplog.text
    caplog.clear()
    assert run(*words, word, "train.optimiser=adamw", capsys=capsys)[0] == 0
    assert "no effect" not in caplog.text


def test_a_share_of_augmentation_is_told_if_nothing_is_augmented(tmp_path: Path) -> None:
    words = ["data.augment_share=0.5"]
    config = changed(small_config(small_dataset(tmp_path)), words)
    assert told_of_unused(words, config) == []
    assert told_of_unused(words, changed(config, ["data.augment=false"])) == [
        "data.augment_share has no effect, because data.augment is false"
    ]
    assert told_of_unused(words, changed(config, ["data.synthesis={}"])) == [
        "data.augment_share has no effect, because data.synthesis draws the images"
    ]
