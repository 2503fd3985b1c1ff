"""Lightning's settings that a config has: gradients of several batches, and determinism."""

import csv
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.testing import assert_close

from segkit.config.load import validated
from segkit.config.training import Config, TrainerConfig
from segkit.errors import ConfigError, Stopped, TrainingError
from segkit.training.dry_run import dry_run
from segkit.training.fit import fit, train
from segkit.training.parts import prepare
from segkit.training.resume import resume
from tests.documents import ROOT
from tests.small import small_config, small_dataset
from tests.training.test_resume import StopAfter, StoppedError, weights


def config_of(
    data: Path, *, batch_size: int, accumulate: int, steps: int = 3, **train: Any
) -> Config:
    return small_config(
        data,
        data={"batch_size": batch_size, "augment": False},
        train={"steps": steps, "validate_every": 2, "pictures": 0, **train},
        trainer={"accumulate_grad_batches": accumulate},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"))


def losses(run: Path) -> list[float]:
    table = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    return [float(row["train/loss"]) for row in table if row["train/loss"]]


def test_two_batches_of_one_patch_make_the_step_of_one_batch_of_two(
    data: Path, tmp_path: Path
) -> None:
    """Instance normalisation and a loss that is a mean over samples know nothing of the batch."""
    settings: dict[str, Any] = {"optimiser": "sgd", "learning_rate": 0.1}
    one = train(config_of(data, batch_size=2, accumulate=1, **settings), runs=tmp_path / "one")
    two = train(config_of(data, batch_size=1, accumulate=2, **settings), runs=tmp_path / "two")
    assert one.summary["steps"] == two.summary["steps"] == 3
    for key, value in weights(one.folder).items():
        assert_close(weights(two.folder)[key], value, rtol=1e-3, atol=1e-5)
    assert_close(losses(two.folder), losses(one.folder), rtol=1e-3, atol=1e-4)


class Rates(Callback):
    """The learning rate at each batch."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *details: Any) -> None:
        self.found.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_schedule_advances_by_steps_and_not_by_batches(data: Path, tmp_path: Path) -> None:
    rates = Rates()
    settings: dict[str, Any] = {"optimiser": "sgd", "schedule": "polynomial", "learning_rate": 0.1}
    config = config_of(data, batch_size=1, accumulate=3, steps=2, **settings)
    run = train(config, runs=tmp_path, callbacks=[rates])
    assert rates.found == pytest.approx([0.1] * 3 + [0.1 * 0.5**0.9] * 3)
    assert len(losses(run.folder)) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_of_several_batches_a_step_goes_on_as_if_never_stopped(
    stop: int, data: Path, tmp_path: Path
) -> None:
    config = small_config(
        data,
        train={"steps": 5, "validate_every": 2, "pictures": 0},
        trainer={"accumulate_grad_batches": 2},
    )
    whole = train(config, runs=tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(config, runs=tmp_path / "stopped", callbacks=[StopAfter(stop)])
    done = resume(tmp_path / "stopped" / "small")
    for key, value in weights(whole.folder).items():
        assert torch.equal(weights(done.folder)[key], value), key


class AskedInTheMiddle(Callback):
    """Is asked to stop by SIGTERM after the first batch of a step of two."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *details: Any
    ) -> None:
        if trainer.global_step == 3 and details[-1] % 2 == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_during_a_step_lets_the_step_finish(data: Path, tmp_path: Path) -> None:
    config = small_config(
        data,
        train={"steps": 5, "validate_every": 5, "pictures": 0},
        trainer={"accumulate_grad_batches": 2},
    )
    whole = train(config, runs=tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config, runs=tmp_path / "stopped", callbacks=[AskedInTheMiddle()])
    run = tmp_path / "stopped" / "small"
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 4
    resume(run)
    for key, value in weights(whole.folder).items():
        assert torch.equal(weights(run)[key], value), key


def test_other_batches_a_step_count_from_the_next_step_on(data: Path, tmp_path: Path) -> None:
    config = config_of(data, batch_size=1, accumulate=2, steps=4)
    with pytest.raises(StoppedError):
        train(config, runs=tmp_path, callbacks=[StopAfter(3)])
    rates = Rates()
    done = resume(
        tmp_path / "small", overrides=["trainer.accumulate_grad_batches=3"], callbacks=[rates]
    )
    assert done.summary["steps"] == 4 and len(rates.found) == 2 * 3
    (changed,) = done.summary["changed_settings"]
    assert changed["setting"] == "trainer.accumulate_grad_batches" and changed["step"] == 2


def test_a_dry_run_times_whole_steps(data: Path) -> None:
    told = dry_run(config_of(data, batch_size=1, accumulate=2))
    assert told.seconds > 0 and 0.1 < told.loss < 10


@pytest.mark.slow
def test_several_batches_a_step_keep_to_the_minutes(data: Path, tmp_path: Path) -> None:
    config = config_of(data, batch_size=1, accumulate=2, steps=4, minutes=0.02)
    run = train(config, runs=tmp_path)
    assert run.summary["steps"] >= 20  # by the clock, so many at least
    group = torch.load(run.folder / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert group["param_groups"][0]["lr"] < 1e-6


class Determinism(Callback):
    """What PyTorch is told while it trains."""

    def on_train_batch_start(self, *details: Any) -> None:
        self.found = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )


@pytest.mark.parametrize(
    ("asked", "expected"), [(True, (True, False)), ("warn", (True, True)), (False, (False, False))]
)
def test_determinism_is_asked_for_while_a_run_trains_and_not_after_it(
    asked: bool | str, expected: tuple[bool, bool], data: Path, tmp_path: Path
) -> None:
    watch = Determinism()
    config = small_config(data, train={"steps": 1}, trainer={"deterministic": asked})
    train(config, runs=tmp_path, callbacks=[watch])
    assert watch.found == expected
    assert not torch.are_deterministic_algorithms_enabled()


def scattered(levels: Any, label: Tensor) -> Tensor:
    """A loss that puts values in no order that is told."""
    target = torch.zeros(4)
    target.put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    loss: Tensor = levels[0].square().mean() + target.sum()
    return loss


@pytest.mark.slow
def test_an_operation_without_a_deterministic_form_is_told_in_a_sentence(
    data: Path, tmp_path: Path
) -> None:
    config = small_config(data, train={"steps": 1}, trainer={"deterministic": True})
    parts = replace(prepare(config, runs=tmp_path), loss=scattered)
    with pytest.raises(
        TrainingError, match=r"trainer\.deterministic is true, but put_ .*; set .* to warn or"
    ):
        fit(parts, runs=tmp_path)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"accumulate_grad_batches": 0}, r"accumulate_grad_batches is 0: it should be greater"),
        ({"deterministic": "yes please"}, r"deterministic is 'yes please': it should be"),
        ({"max_steps": 3}, r"max_steps is not a setting"),
    ],
)
def test_invalid_trainer_settings_are_refused(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        validated(TrainerConfig, tree, "c")


def test_the_documentation_lists_the_settings_of_the_trainer() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    assert set(re.findall(r"^\| `trainer\.(\w+)` \|", text, re.MULTILINE)) == set(
        TrainerConfig.model_fields
    )
