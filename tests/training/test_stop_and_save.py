"""A training that is asked to stop, at whatever moment, goes on as if it never had been."""

import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from segkit.errors import ConfigError, Stopped
from segkit.training import stop_and_save
from segkit.training.cross_validation import cross_validate
from segkit.training.cross_validation import resume_folds as resume_folds
from segkit.training.fit import train
from segkit.training.resume import resume
from segkit.training.run_folder import locked_folder
from tests.small import small_config, small_dataset
from tests.training.test_resume import VARIANTS, StopAfter, StoppedError, rows, weights


class Ask(Callback):
    """Sends a signal to this process, once: after a step, or with a case of the look after it."""

    def __init__(self, step: int, *, look: bool = False, signum: int = signal.SIGINT) -> None:
        self.step, self.look, self.signum, self.sent = step, look, signum, False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *details: Any
    ) -> None:
        self._send(trainer, not self.look)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._send(trainer, self.look and batch_idx == 1)

    def _send(self, trainer: L.Trainer, due: bool) -> None:
        if due and trainer.global_step == self.step and not self.sent:
            self.sent = True
            signal.raise_signal(self.signum)


def global_step(folder: Path) -> int:
    return int(torch.load(folder / "last.ckpt", weights_only=True)["global_step"])


MOMENTS = [(1, False), (3, False), (3, True), (4, False), (6, False), (6, True), (8, False)]


@pytest.mark.parametrize(
    "variant", [pytest.param("averaging", marks=pytest.mark.slow), "nothing held out"]
)
def test_a_training_that_was_stopped_and_resumed_ends_like_one_that_was_not(
    variant: str, tmp_path: Path
) -> None:
    sections = {name: dict(section) for name, section in VARIANTS[variant].items()}
    sections["train"] = {"steps": 8, "validate_every": 3, **sections.get("train", {})}
    sections["data"] = {"validation": 0.5, **sections.get("data", {})}
    config = small_config(small_dataset(tmp_path / "data"), **sections)
    whole = train(config, runs=tmp_path / "whole")
    for number, (step, look) in enumerate(MOMENTS):
        if look and variant == "nothing held out":
            continue
        runs = tmp_path / f"runs {number}"
        with pytest.raises(
            Stopped, match=r"^stopped by Ctrl-C; segkit train --resume .*small cont"
        ):
            train(config, runs=runs, callbacks=[Ask(step, look=look)])
        folder = runs / "small"
        assert global_step(folder) == step
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        gone_on = resume(folder)
        assert str(gone_on.summary["validation"]) == str(whole.summary["validation"]), (step, look)
        expected = weights(whole.folder)
        for key, value in weights(folder).items():
            assert torch.equal(value, expected[key]), (step, look, key)
        assert rows(folder) == rows(whole.folder), (step, look)


@pytest.mark.parametrize("averaging", [None, pytest.param(0.9, marks=pytest.mark.slow)])
def test_a_checkpoint_that_is_old_is_written_again_between_two_steps(
    averaging: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = {"steps": 6, "validate_every": 6, "averaging": averaging}
    config = small_config(small_dataset(tmp_path / "data"), train=schedule)
    whole = train(config, runs=tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(stop_and_save, "MOST_SECONDS", 0.0)
        with pytest.raises(StoppedError):
            train(config, runs=tmp_path / "killed", callbacks=[StopAfter(4)])
    folder = tmp_path / "killed" / "small"
    assert global_step(folder) == 3  # the fourth step was not over
    assert resume(folder).summary["validation"] == whole.summary["validation"]
    for key, value in weights(whole.folder).items():
        assert torch.equal(weights(folder)[key], value), key
    assert rows(folder) == rows(whole.folder)


@pytest.mark.slow
def test_a_training_can_be_stopped_repeatedly_by_either_signal(tmp_path: Path) -> None:
    config = small_config(
        small_dataset(tmp_path / "data"),
        data={"validation": 0.5},
        train={"steps": 8, "validate_every": 4, "averaging": 0.9, "patience": 1},
    )
    whole = train(config, runs=tmp_path / "whole")
    folder = tmp_path / "stopped" / "small"
    asked = [Ask(1), Ask(4, look=True, signum=signal.SIGTERM), Ask(5), Ask(7), Ask(8, look=True)]
    with pytest.raises(Stopped, match="stopped by Ctrl-C"):
        train(config, runs=tmp_path / "stopped", callbacks=[asked[0]])
    for ask in asked[1:]:
        with pytest.raises(Stopped, match="SIGTERM" if ask.signum == signal.SIGTERM else "Ctrl-C"):
            resume(folder, callbacks=[ask])
        assert global_step(folder) == ask.step
    assert resume(folder).summary["validation"] == whole.summary["validation"]
    for key, value in weights(whole.folder).items():
        assert torch.equal(weights(folder)[key], value), key
    assert rows(folder) == rows(whole.folder)


def test_handlers_of_signals_are_put_back(tmp_path: Path) -> None:
    config = small_config(small_dataset(tmp_path / "data"))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(config, runs=tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config, runs=tmp_path / "stopped", callbacks=[Ask(1)])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_ends_a_training_at_once_without_saving(tmp_path: Path) -> None:
    class AskTwice(Ask):
        def _send(self, trainer: L.Trainer, due: bool) -> None:
            if due and trainer.global_step == self.step:
                signal.raise_signal(self.signum)
                signal.raise_signal(self.signum)

    config = small_config(small_dataset(tmp_path / "data"))
    with pytest.raises(Stopped):
        train(config, runs=tmp_path, callbacks=[AskTwice(3)])
    assert global_step(tmp_path / "small") == 2


def test_a_cross_validation_says_how_to_go_on_with_all_of_it(tmp_path: Path) -> None:
    config = small_config(small_dataset(tmp_path / "data", num_cases=5), train={"steps": 2})
    with pytest.raises(
        Stopped, match=r"; segkit train --resume \S*runs/small continues from there$"
    ):
        cross_validate(config, [0, 1], runs=tmp_path / "runs", callbacks=[Ask(1)])
    assert resume_folds(tmp_path / "runs" / "small").summary["validation"]["cases"] == 2


def test_a_run_is_gone_on_with_by_one_process_at_a_time(tmp_path: Path) -> None:
    config = small_config(small_dataset(tmp_path / "data"))
    with pytest.raises(Stopped):
        train(config, runs=tmp_path, callbacks=[Ask(1)])
    with (
        locked_folder(tmp_path / "small"),
        pytest.raises(ConfigError, match="small: another process is training this run; wait until"),
    ):
        resume(tmp_path / "small")
    assert resume(tmp_path / "small").summary["steps"] == 4
