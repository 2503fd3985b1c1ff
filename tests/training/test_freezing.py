"""Weights that are frozen stay as they are, bit for bit, until their step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from segkit.config.load import validated
from segkit.config.training import TrainConfig
from segkit.errors import ConfigError
from segkit.training.dry_run import dry_run
from segkit.training.fit import train
from segkit.training.freezing import Freezing
from segkit.training.parts import prepare
from segkit.training.resume import resume
from tests.small import small_config, small_dataset
from tests.training.test_resume import StopAfter, StoppedError, weights


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"))


def layers() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "encoder": nn.Linear(2, 3),
            "decoder": nn.Linear(3, 2),
            "head": nn.Linear(2, 2, bias=False),
        }
    )


def trained(freezing: Freezing, network: nn.Module) -> set[str]:
    return {name for name, weight in network.named_parameters() if weight.requires_grad}


def test_weights_are_frozen_by_their_names_until_their_step() -> None:
    network = layers()
    freezing = Freezing(network, {"encoder.*": None, "*.bias": 3, "decoder.weight": 5})
    trainable = {"head.weight"}
    assert trained(freezing, network) == trainable and freezing.unfreezes
    assert not freezing.set_step(2)
    trainable |= {"encoder.bias", "decoder.bias"}
    assert freezing.set_step(3) and trained(freezing, network) == trainable
    assert freezing.set_step(5) and trained(freezing, network) == {*trainable, "decoder.weight"}
    assert freezing.told == (
        "4 of 5 weights (17 of 21 numbers) are frozen: encoder.* to the end, *.bias until step 3, "
        "decoder.weight until step 5"
    )


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        (
            {"encoder": None},
            r"train\.freeze: 'encoder' matches no weight of the network, .*encoder\.wei",
        ),
        ({"*": None}, r"train\.freeze: '\*' matches all weights, so no weight is left to train"),
    ],
)
def test_patterns_that_say_nothing_are_refused(patterns: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Freezing(layers(), patterns)


def test_a_list_of_patterns_is_frozen_to_the_end() -> None:
    assert TrainConfig.model_validate({"freeze": ["a.*", "b"]}).freeze == {"a.*": None, "b": None}
    with pytest.raises(ConfigError, match=r"c: freeze\.a is 0: it should be greater than 0"):
        validated(TrainConfig, {"freeze": {"a": 0}}, "c")
    with pytest.raises(ConfigError, match=r"c: freeze\.a is true: it should be a whole number"):
        validated(TrainConfig, {"freeze": {"a": True}}, "c")
    with pytest.raises(ConfigError, match=r"c: freeze is 'encoder\.\*': it should be"):
        validated(TrainConfig, {"freeze": "encoder.*"}, "c")


def config_of(data: Path, freeze: Any, **train: Any) -> Any:
    settings = {"steps": 4, "validate_every": 2, "pictures": 0, "freeze": freeze, **train}
    return small_config(data, train=settings, network={"normalisation": "batch"})


def first_weights(data: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Those that a run of these settings begins with."""
    state: dict[str, torch.Tensor] = prepare(config_of(data, {}), runs=folder).network.state_dict()
    return state


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_frozen_weights_stay_the_same_bit_for_bit_and_the_others_train(
    optimiser: str, data: Path, tmp_path: Path
) -> None:
    """Weight decay and the means of batch normalisation do not move it either."""
    run = train(config_of(data, ["encoder.*"], optimiser=optimiser), runs=tmp_path)
    begun, ended = first_weights(data, tmp_path), weights(run.folder)
    for name, value in begun.items():
        assert torch.equal(ended[name], value) == name.startswith("encoder."), name
    told = run.summary["freeze"]
    assert told["patterns"] == {"encoder.*": None} and 0 < told["weights"] < told["of"]
    assert json.loads((run.folder / "summary.json").read_text())["freeze"] == told


def test_weights_unfrozen_at_a_step_train_from_that_step(data: Path, tmp_path: Path) -> None:
    config = config_of(data, {"encoder.*": 3}, steps=6)
    begun = first_weights(data, tmp_path)
    with pytest.raises(StoppedError):
        train(config, runs=tmp_path / "stopped", callbacks=[StopAfter(3)])
    run = tmp_path / "stopped" / "small"
    state = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in begun.items():
        if name.startswith("encoder."):
            assert torch.equal(state[f"network.{name}"], value), name
    done, whole = resume(run), train(config, runs=tmp_path / "whole")
    for name, value in weights(whole.folder).items():
        assert torch.equal(weights(done.folder)[name], value), name
    name = "encoder.0.1.layers.0.weight"
    assert not torch.equal(weights(done.folder)[name], begun[name])


def test_the_frozen_weights_may_be_changed_when_a_run_is_resumed(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        train(config_of(data, {}), runs=tmp_path, callbacks=[StopAfter(3)])
    run = tmp_path / "small"
    state = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    done = resume(run, overrides=["train.freeze=[decoder.*]"])
    for name, value in weights(done.folder).items():
        assert torch.equal(state[f"network.{name}"], value) == name.startswith("decoder."), name
    assert [each["setting"] for each in done.summary["changed_settings"]] == ["train.freeze"]


def test_the_summary_names_the_weights_taken_from_another_model_even_after_a_stop(
    data: Path, tmp_path: Path
) -> None:
    first = train(config_of(data, {}, steps=1), runs=tmp_path / "first")
    config = config_of(data, ["encoder.*"], start_from=str(first.folder), seed=3)
    with pytest.raises(StoppedError):
        train(config, runs=tmp_path, callbacks=[StopAfter(3)])
    run = resume(tmp_path / "small")
    told = run.summary["start_from"]
    assert told["copied"] == told["of"] and told["model"] == str(first.folder)
    assert told["told"] == f"{told['of']} of {told['of']} weights were copied from {first.folder}"
    for name, value in weights(first.folder).items():
        if name.startswith("encoder."):
            assert torch.equal(weights(run.folder)[name], value)
    lines = dry_run(config).lines()
    assert any(line.startswith(told["told"]) for line in lines)
    assert any("encoder.* to the end" in line for line in lines)
