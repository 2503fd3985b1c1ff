"""Weights of a run's checkpoints, also while it is training, and which run is the newest."""

from pathlib import Path

import pytest
import torch

from segkit.errors import ModelError
from segkit.inference.predictor import Predictor
from segkit.model.folder import load_model, newest_model
from segkit.training.fit import train
from tests.small import small_config, small_dataset
from tests.training.test_resume import StopAfter, StoppedError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with patience that is finished, and a later one that was stopped."""
    folder = tmp_path_factory.mktemp("checkpoints")
    data = small_dataset(folder / "data")
    schedule = {"steps": 12, "validate_every": 1, "patience": 1, "learning_rate": 0.05}
    config = small_config(data, train=schedule)
    train(config.model_copy(update={"name": "done"}), runs=folder / "runs")
    for step in (1, 3):
        with pytest.raises(StoppedError):
            train(
                config.model_copy(update={"name": f"stopped_{step}"}),
                runs=folder / "runs",
                callbacks=[StopAfter(step)],
            )
    return folder / "runs"


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix("network."): value for name, value in state.items()}


@pytest.mark.parametrize("run", ["done", "stopped_3"])
def test_a_model_has_the_weights_of_the_checkpoint_that_is_asked_for(run: str, runs: Path) -> None:
    for checkpoint in ("best", "last"):
        found = load_model(runs / run, checkpoint=checkpoint).network.state_dict()
        expected = weights_in(runs / run / f"{checkpoint}.ckpt")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert Predictor.load(runs / run, checkpoint="best", device="cpu").model.folder is None


def test_with_patience_the_model_has_the_best_weights(runs: Path) -> None:
    found = load_model(runs / "done").network.state_dict()
    expected = weights_in(runs / "done" / "best.ckpt")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_run_that_is_not_finished_is_never_the_newest_and_says_so(runs: Path) -> None:
    assert newest_model(runs) == runs / "done" / "model"
    with pytest.raises(ModelError, match=r"stopped_3: is not finished; wait for its end, or take"):
        load_model(runs / "stopped_3")
    with pytest.raises(ModelError, match="stopped_1: is not finished and has no checkpoint yet"):
        load_model(runs / "stopped_1")
    with pytest.raises(ModelError, match=r"stopped_1: expected a run with best\.ckpt, found none"):
        load_model(runs / "stopped_1", checkpoint="best")
