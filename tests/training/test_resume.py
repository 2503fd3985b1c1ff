"""A run that is stopped and goes on ends with the weights of one that was never stopped."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import Tensor

from segkit.errors import ConfigError
from segkit.training.fit import train
from segkit.training.resume import resume
from segkit.training.run_folder import checkpoint_of
from tests.small import small_config, small_dataset


class StoppedError(Exception):
    """What stops a run here."""


class StopAfter(Callback):
    """Stops a run as soon as a step is done, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *details: Any
    ) -> None:
        if trainer.global_step == self.step:
            raise StoppedError


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "weights.safetensors")


def rows(folder: Path) -> list[dict[str, str]]:
    table = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [dict(sorted(row.items())) for row in table]


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {},
    "sgd": {"train": {"optimiser": "sgd"}},
    "muon, cosine": {"train": {"optimiser": "muon", "schedule": "cosine"}},
    "averaging": {"train": {"averaging": 0.9}},
    "hard gates": {
        "network": {"attention": {"skip": {"kind": "additive_grid", "coefficients": "hard"}}}
    },
    "batch normalisation": {"network": {"normalisation": "batch"}},
    "nothing held out": {"data": {"validation": 0.0}},
}


SLOW = ("muon, cosine", "sgd", "averaging")


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in VARIANTS],
)
@pytest.mark.parametrize("stop", [1, pytest.param(2, marks=pytest.mark.slow), 5])
def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    variant: str, stop: int, tmp_path: Path
) -> None:
    sections = {name: dict(section) for name, section in VARIANTS[variant].items()}
    sections["train"] = {"steps": 6, "validate_every": 2, **sections.get("train", {})}
    config = small_config(small_dataset(tmp_path / "data"), **sections)
    whole = train(config, runs=tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(config, runs=tmp_path / "stopped", callbacks=[StopAfter(stop)])
    folder = tmp_path / "stopped" / "small"
    assert (checkpoint_of(folder) is not None) == (stop > 2)
    gone_on = resume(folder)
    assert gone_on.folder == folder and gone_on.summary["steps"] == 6
    expected, found = weights(whole.folder), weights(folder)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    dice = [str(run.summary["validation"]["dice_of_cases"]) for run in (whole, gone_on)]
    assert dice[0] == dice[1]
    timeless = [[r for r in rows(f) if r["step"]] for f in (whole.folder, folder)]
    assert timeless[0] == timeless[1]


@pytest.mark.slow
def test_a_run_may_be_stopped_more_than_once(tmp_path: Path) -> None:
    config = small_config(small_dataset(tmp_path / "data"), train={"steps": 8, "validate_every": 2})
    whole = train(config, runs=tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(config, runs=tmp_path / "stopped", callbacks=[StopAfter(3)])
    folder = tmp_path / "stopped" / "small"
    for stop in (4, 7):
        with pytest.raises(StoppedError):
            resume(folder, callbacks=[StopAfter(stop)])
    resume(folder)
    for key, value in weights(whole.folder).items():
        assert torch.equal(weights(folder)[key], value), key


def test_a_run_that_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    run = train(small_config(small_dataset(tmp_path / "data")), runs=tmp_path)
    with pytest.raises(
        ConfigError, match=r"small: the run is finished already, and its model is .*small.model"
    ):
        resume(run.folder)
    with pytest.raises(ConfigError, match=r"nowhere: expected a run with config.yaml"):
        resume(tmp_path / "nowhere")
