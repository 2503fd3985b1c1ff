"""What a run can be told beside its network: folds, averages, other weights, when to end."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import Tensor, nn

from segkit.checking.check import check
from segkit.config.load import dump_yaml
from segkit.data.dataset import read_dataset
from segkit.errors import DatasetError, ModelError, TrainingError
from segkit.io.volume import read_volume, write_volume
from segkit.model.folder import load_model
from segkit.model.start_from import start_from
from segkit.training import resolve
from segkit.training.fit import train
from segkit.training.resolve import first_gpu, precision
from segkit.training.weight_average import Averaging
from tests.small import small_config, small_dataset
from tests.training.drawn_folds import fold_of


@pytest.mark.parametrize("fold", [0, 3])
def test_what_a_check_says_is_held_out_is_the_fold_that_training_holds_out(
    fold: int, tmp_path: Path
) -> None:
    data = small_dataset(tmp_path / "data", num_cases=5)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(small_config(data, data={"fold": fold})))
    _, held = fold_of(read_dataset(data), fold)
    told = check(path)
    assert told.facts["held_out_cases"] == [case.name for case in held]


def test_a_config_may_name_a_fold(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data", num_cases=5)
    run = train(small_config(data, data={"fold": 3}, train={"steps": 1}), runs=tmp_path)
    assert run.summary["training_cases"] == 4 and run.summary["validation"]["cases"] == 1


# A running average of the weights


def averages(decay: float, weights: list[float]) -> float:
    averaged = torch.tensor(weights[0])
    for count, weight in enumerate(weights[1:], start=1):
        share = min(decay, (1 + count) / (10 + count))
        averaged = share * averaged + (1 - share) * weight
    return float(averaged)


def test_the_average_of_weights_is_exponential_with_a_fast_start() -> None:
    weights = np.random.default_rng(0).normal(size=40).tolist()
    module = nn.Linear(1, 1, bias=False)
    averaging, trainer = Averaging(0.5), SimpleNamespace(global_step=0)
    averaging._average_model = torch.optim.swa_utils.AveragedModel(module, **averaging._kwargs)
    for number, weight in enumerate(weights):
        nn.init.constant_(module.weight, weight)
        trainer.global_step = number + 1
        averaging.on_train_batch_end(trainer, module, None, None, number)
    found = averaging._average_model.module.weight.item()
    assert found == pytest.approx(averages(0.5, weights), abs=1e-6)


def test_the_saved_model_is_the_average_and_what_was_scored(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data")
    plain = train(small_config(data), runs=tmp_path / "plain")
    averaged = train(small_config(data, train={"averaging": 0.99}), runs=tmp_path / "averaged")
    weights = [load_file(run.folder / "model" / "weights.safetensors") for run in (plain, averaged)]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    kept = torch.load(averaged.folder / "last.ckpt", weights_only=True)
    for key, value in weights[1].items():
        assert torch.equal(kept["state_dict"][f"network.{key}"], value)
    # The average is of weights that were trained as without it.
    for key, value in weights[0].items():
        assert torch.equal(kept["current_model_state"][f"network.{key}"], value)


# Other weights to begin with


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def test_a_run_may_start_from_a_model_of_other_classes(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data")
    first = train(small_config(data), runs=tmp_path)
    lent = load_file(first.folder / "model" / "weights.safetensors")
    described, other = first.model.description, load_model(first.folder).network
    torch.manual_seed(1)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    head = other.heads[0]
    other.heads[0] = nn.Conv3d(head.in_channels, 5, kernel_size=1)
    own = {key: value.clone() for key, value in other.heads.state_dict().items()}
    labels = {"background": 0, "a": 1, "b": 2, "c": 3, "d": 4}
    told = described.model_copy(update={"labels": labels})
    taken = start_from(other, first.folder, description=told)
    assert taken.told == (
        f"{len(lent) - 2} of {len(lent)} weights were copied from {first.folder}; "
        "these begin anew: heads.0.weight, heads.0.bias"
    )
    for key, value in other.state_dict().items():
        if key.startswith("heads.0"):
            assert torch.equal(value, own[key.removeprefix("heads.")])
        else:
            assert torch.equal(value, lent[key])


def test_training_starts_from_the_weights_that_were_named(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data")
    first = train(small_config(data, train={"steps": 40, "validate_every": 40}), runs=tmp_path)
    # So small a step leaves them as they are, but for the last digits.
    settings = {"steps": 1, "learning_rate": 1e-9, "start_from": str(first.folder), "seed": 5}
    second = train(small_config(data, train=settings), runs=tmp_path)
    weights = [load_file(run.folder / "model" / "weights.safetensors") for run in (first, second)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-6, rtol=0)


class Decay(Callback):
    """Keeps the weight decay that a training works with."""

    found: float

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (group,) = trainer.optimizers[0].param_groups
        self.found = group["weight_decay"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"optimiser": "adamw"}, 0.05),
        ({"optimiser": "sgd"}, 3e-5),
        ({"optimiser": "adamw", "weight_decay": 0.0}, 0.0),
    ],
)
def test_weight_decay_has_the_default_of_the_optimiser_unless_it_is_set(
    settings: dict[str, Any], expected: float, tmp_path: Path
) -> None:
    decay = Decay()
    config = small_config(small_dataset(tmp_path / "data"), train={"steps": 1, **settings})
    train(config, runs=tmp_path, callbacks=[decay])
    assert decay.found == expected


def with_two_channels_and_three_labels(folder: Path, target: Path) -> Path:
    """The balls of a small dataset, each in two channels and cut into two labels."""
    content = json.loads((folder / "dataset.json").read_text())
    for entry in content["training"]:
        label = read_volume(folder / entry["label"])
        halves = label.data.copy()
        halves[:8] *= 2
        write_volume(target / entry["label"], label.like(halves))
        entry["image"] = [str((folder / entry["image"]).resolve())] * 2
    content["modality"] = {"0": "T1", "1": "T2"}
    content["labels"] = {"0": "background", "1": "right", "2": "left"}
    (target / "dataset.json").write_text(json.dumps(content))
    return target


def test_training_starts_from_a_model_of_other_classes_and_channels(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data")
    first = train(small_config(data, train={"steps": 1}), runs=tmp_path)
    other = with_two_channels_and_three_labels(data, tmp_path / "other")
    settings = {"steps": 1, "learning_rate": 1e-9, "start_from": str(first.folder), "seed": 5}
    second = train(small_config(other, train=settings), runs=tmp_path)
    lent, own = (load_file(run.folder / "model" / "weights.safetensors") for run in (first, second))
    assert lent.keys() == own.keys()
    differ = {key for key in lent if lent[key].shape != own[key].shape}
    # The first convolution sees two channels, the last makes three classes.
    assert {key.split(".")[0] for key in differ} == {"encoder", "heads"}
    assert {key for key in differ if key.startswith("encoder")} == {
        key for key in own if own[key].ndim == 5 and own[key].shape[1] == 2
    }
    for key in lent.keys() - differ:
        torch.testing.assert_close(own[key], lent[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "sections",
    [
        {"network": {"channels": [6, 12, 12]}},
        {"network": {"spatial_dims": 2}, "data": {"patch_size": [16, 16]}},
        {"network": {"kernels": [[1, 1, 1]] * 3, "strides": [[1, 2, 2]] * 2}},
    ],
    ids=["width", "dimensions", "kernels"],
)
def test_a_model_of_which_only_biases_fit_is_refused_and_leaves_no_run(
    sections: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    data = small_dataset(tmp_path / "data")
    first = train(small_config(data, train={"steps": 1}), runs=tmp_path / "first")
    sections = {"train": {"steps": 1, "start_from": str(first.folder)}, **sections}
    message = r"small: none of its weights fits the network; give the network the same network\.sp"
    with pytest.raises(ModelError, match=message):
        train(small_config(data, **sections), runs=tmp_path / "second")
    assert not (tmp_path / "second" / "small").exists()


def test_a_folder_without_a_model_to_start_from_leaves_no_run(tmp_path: Path) -> None:
    config = small_config(small_dataset(tmp_path / "data"), train={"start_from": "nowhere"})
    with pytest.raises(ModelError, match="nowhere: expected a run or a model folder"):
        train(config, runs=tmp_path)
    assert not (tmp_path / "small").exists()


def test_a_model_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data")
    first = train(small_config(data, train={"steps": 1}), runs=tmp_path)
    other = load_model(first.folder).network
    strange = nn.Sequential(*[nn.Linear(3, 3)])
    other.state_dict = strange.state_dict  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="none of its weights fits the network"):
        start_from(other, first.folder, description=first.model.description)


# When to end


def test_training_ends_if_dice_no_longer_rises(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data")
    settings = {"steps": 40, "validate_every": 1, "patience": 2, "learning_rate": 1e-12}
    run = train(small_config(data, train=settings), runs=tmp_path)
    # The first score is the best; two more are waited for.
    assert run.summary["steps"] == 3


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_loss_that_is_nan_stops_training_and_names_step_and_cases(
    steps_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segkit.training import make_loss

    data, real = small_dataset(tmp_path / "data"), make_loss.deep_dice_cross_entropy
    calls = []

    def astray(*inputs: object, **settings: object) -> Tensor:
        calls.append(None)
        loss = real(*inputs, **settings)  # type: ignore[arg-type]
        return loss * float("nan") if len(calls) > steps_before else loss

    monkeypatch.setattr(make_loss, "deep_dice_cross_entropy", astray)
    message = (
        rf"^the loss of step {steps_before} is nan, with patches of case_\d, case_\d; check these"
    )
    with pytest.raises(TrainingError, match=message):
        train(small_config(data), runs=tmp_path)
    assert len(calls) == steps_before + 1


def test_an_image_with_nan_never_reaches_training(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data")
    path = data / "imagesTr" / "case_1.nii.gz"
    image = read_volume(path)
    image.data[3, 3, 3] = np.inf
    write_volume(path, image)
    with pytest.raises(DatasetError, match=r"case_1\.nii\.gz: holds .* NaN or infinite values"):
        train(small_config(data), runs=tmp_path)


# How numbers are kept


@pytest.mark.parametrize(
    ("accelerator", "gpu", "bf16", "fast_bf16", "expected"),
    [
        ("auto", False, False, False, "32-true"),
        ("auto", False, False, True, "bf16-mixed"),
        ("cpu", True, True, False, "32-true"),
        ("cpu", True, True, True, "bf16-mixed"),
        ("auto", True, True, False, "bf16-mixed"),
        ("gpu", True, False, True, "16-mixed"),
    ],
)
def test_half_precision_is_for_devices_that_are_faster_in_it(
    accelerator: str,
    gpu: bool,
    bf16: bool,
    fast_bf16: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(resolve, "bfloat16_is_fast", lambda: fast_bf16)
    config = small_config(Path("data"), trainer={"accelerator": accelerator, "precision": "auto"})
    assert precision(config) == expected
    asked = small_config(Path("data"), trainer={"accelerator": "cpu", "precision": "bf16-mixed"})
    assert precision(asked) == "bf16-mixed"


@pytest.mark.parametrize(
    ("devices", "expected"),
    [(1, "cuda"), ("2", "cuda"), ("auto", "cuda"), ([1], "cuda:1"), ("3,", "cuda:3"), ([], "cuda")],
)
def test_the_first_gpu_that_trains_is_the_first_of_the_numbered_ones(
    devices: Any, expected: str
) -> None:
    config = small_config(Path("data"), trainer={"devices": devices, "accelerator": "gpu"})
    assert first_gpu(config) == torch.device(expected)
