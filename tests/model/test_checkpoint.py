"""The weights of a run's checkpoints: those that scored best, and the last."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from segkit import (
    Grid,
    ModelError,
    Predictor,
    Run,
    Volume,
    fit,
    load_model,
    prepare,
    read_labels,
    read_volume,
)
from segkit.model.folder import model_folders, newest_model
from segkit.nn.network import weights_of
from tests.cli.command import run as run_command
from tests.small import small_config, small_dataset
from tests.training.test_resume import StopAfter, StoppedError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"))


def weights(path: Path, **settings: Any) -> torch.Tensor:
    state = weights_of(load_model(path, **settings).network).state_dict()
    return torch.cat([value.flatten().float() for value in state.values()])


class Scripted:
    """Gives the validations these scores, one after another, whatever the network does."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def __call__(self, prediction: Tensor, label: Tensor) -> Tensor:
        return torch.tensor([self.scores.pop(0)])


def trained(
    dataset: Path, runs: Path, scores: Scripted, callbacks: Sequence[Callback] = (), **train: object
) -> Run:
    settings = {"validate_every": 1, "learning_rate": 0.1, **train}
    parts = prepare(small_config(dataset, train=settings), runs=runs)
    validation = replace(parts.validation, score=scores)
    return fit(replace(parts, validation=validation), runs=runs, callbacks=callbacks)


def steps_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


@pytest.mark.parametrize("averaging", [None, 0.5])
def test_a_run_that_ends_by_patience_keeps_its_best_weights(
    dataset: Path, tmp_path: Path, averaging: float | None
) -> None:
    scores = Scripted(0.2, 0.9, 0.3, 0.1)
    run = trained(dataset, tmp_path, scores, steps=40, patience=2, averaging=averaging)
    assert run.summary["steps"] == 4 and run.summary["weights"] == {"of": "best", "step": 2}
    own, best, last = (weights(run.folder, checkpoint=name) for name in (None, "best", "last"))
    assert torch.equal(own, best) and not torch.equal(own, last)
    assert steps_of(run.folder / "best.ckpt") == 2 and steps_of(run.folder / "last.ckpt") == 4
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        one, other = (each.network.eval()(image) for each in (run.model, load_model(run.folder)))
    assert torch.equal(one, other)


def test_a_run_without_patience_ends_with_its_last_weights(dataset: Path, tmp_path: Path) -> None:
    run = trained(dataset, tmp_path, Scripted(0.9, 0.1), steps=2)
    assert run.summary["weights"] == {"of": "last", "step": 2}
    own, best, last = (weights(run.folder, checkpoint=name) for name in (None, "best", "last"))
    assert torch.equal(own, last) and not torch.equal(own, best)


def test_the_checkpoints_of_a_run_that_still_trains_can_be_used(
    dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        trained(dataset, tmp_path, Scripted(0.2, 0.9), [StopAfter(3)], steps=40)
    folder = tmp_path / "small"
    assert not (folder / "summary.json").exists()
    assert len(weights(folder, checkpoint="best")) == len(weights(folder, checkpoint="last"))
    with pytest.raises(ModelError, match="has not ended, so ask for its checkpoint: best or last"):
        load_model(folder)
    with pytest.raises(ModelError, match="expected a finished run"):
        newest_model(tmp_path)
    scan = Volume(np.zeros((16, 16, 16), np.float32), Grid((16, 16, 16), np.eye(4)))
    assert Predictor.load(folder, checkpoint="last")(scan).labels.data.shape == (16, 16, 16)


def test_the_description_is_there_before_the_first_step(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        trained(dataset, tmp_path, Scripted(), [StopAfter(1)], steps=4, validate_every=4)
    assert (tmp_path / "small" / "model" / "model.json").is_file()
    run, yet = tmp_path / "small", "no weights yet, so wait for its first checkpoint, or resume it"
    with pytest.raises(ModelError, match=rf"expected best\.ckpt, found none; the run has {yet}"):
        load_model(run, checkpoint="best")
    with pytest.raises(ModelError, match=rf"weights\.safetensors in it, found none; .*{yet}"):
        load_model(run)
    (run / "model" / "model.json").unlink()
    for checkpoint in ("best", "last", None):
        with pytest.raises(ModelError, match=rf"small: expected a run or .*; the run has {yet}"):
            load_model(run, checkpoint=checkpoint)


def test_folds_that_are_not_finished_are_told_apart_from_none(tmp_path: Path) -> None:
    fold = tmp_path / "cv" / "fold_0"
    (fold / "model").mkdir(parents=True)
    (fold / "model" / "model.json").write_text("{}")
    (fold / "config.yaml").write_text("")
    with pytest.raises(ModelError, match=r"cv: .*no weights yet, so wait for its first checkpoint"):
        model_folders(tmp_path / "cv")
    (fold / "last.ckpt").write_text("")
    for checkpoint in (None, "best"):
        with pytest.raises(ModelError, match=r"cv: .*not ended, so ask for its checkpoint: last$"):
            model_folders(tmp_path / "cv", checkpoint)
    (fold / "model" / "weights.safetensors").write_text("")
    with pytest.raises(ModelError, match=r"cv: expected best\.ckpt in its folds, found none"):
        model_folders(tmp_path / "cv", "best")


def test_the_commands_take_a_checkpoint(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(dataset, tmp_path, Scripted(0.9, 0.1), steps=2).folder
    scan = dataset / "imagesTr" / "case_0.nii.gz"
    labels = {}
    for name in ("best", "last"):
        out = tmp_path / f"{name}.nii.gz"
        told = ("--model", folder, "--checkpoint", name)
        code, said, _ = run_command("predict", scan, *told, "--out", out, capsys=capsys)
        assert code == 0 and f"({name}.ckpt)" in said
        labels[name] = read_labels(out).data
        predictor = Predictor(load_model(folder, checkpoint=name))
        assert np.array_equal(labels[name], predictor(read_volume(scan)).labels.data)
        code, said, _ = run_command("explain", scan, *told, "--out", tmp_path / name, capsys=capsys)
        assert code == 0 and f"({name}.ckpt)" in said
    code, _, said = run_command(
        "predict", scan, "--model", folder / "model", "--checkpoint", "best", "--overwrite",
        "--out", tmp_path / "x.nii.gz", capsys=capsys,
    )  # fmt: skip
    assert code == 0
    (folder / "best.ckpt").write_bytes((folder / "best.ckpt").read_bytes()[:1000])
    code, _, said = run_command(
        "predict", scan, "--model", folder, "--checkpoint", "best", "--overwrite",
        "--out", tmp_path / "x.nii.gz", capsys=capsys,
    )  # fmt: skip
    assert code == 2 and "best.ckpt: cannot be read as a checkpoint" in said


def test_a_checkpoint_of_another_network_or_name_is_refused(dataset: Path, tmp_path: Path) -> None:
    folder = trained(dataset, tmp_path, Scripted(0.9, 0.1), steps=2).folder
    with pytest.raises(ModelError, match="expected 'best' or 'last', found 'middle'"):
        load_model(folder, checkpoint="middle")
    content = torch.load(folder / "best.ckpt", weights_only=True)
    name = next(name for name in content["state_dict"] if name.endswith("weight"))
    content["state_dict"][name] = content["state_dict"][name][:1]
    torch.save(content, folder / "best.ckpt")
    with pytest.raises(ModelError, match=r"best.ckpt: does not fit .*model.json"):
        load_model(folder, checkpoint="best")
    content["state_dict"] = {"other": torch.ones(2)}
    torch.save(content, folder / "best.ckpt")
    with pytest.raises(ModelError, match="does not fit"):
        load_model(folder, checkpoint="best")
