"""Weights & Biases and MLflow are asked for by name, and never by anything else.

The trackers here record what Lightning's would be told; neither package need be installed.
"""

import json
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger

from segkit.config.load import changed
from segkit.errors import ConfigError
from segkit.training import trackers
from segkit.training.fit import train
from segkit.training.resume import resume
from tests.small import small_config, small_dataset
from tests.training.test_resume import StopAfter, StoppedError


class RefusedError(Exception):
    """What a server says."""


class Recorder(Logger):
    """A tracker that remembers what it was made with and told."""

    made: list["Recorder"]
    refuses = False

    def __init__(self, **made_with: Any) -> None:
        super().__init__()
        self.made_with = made_with
        self.settings: list[Any] = []
        self.metrics: list[tuple[int | None, Mapping[str, float]]] = []
        self.ended: list[str] = []
        type(self).made.append(self)

    @property
    def experiment(self) -> None:
        if self.refuses:
            raise RefusedError("no such\n server")

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return str(self.made_with.get("id") or self.made_with.get("run_id") or "given-by-server")

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.settings.append(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.metrics.append((step, dict(metrics)))

    def finalize(self, status: str) -> None:
        self.ended.append(status)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Every tracker that is made, wandb's and MLflow's packages looking as if installed."""
    for name, module, error in (("wandb", "errors", "Error"), ("mlflow", "exceptions", "")):
        package, part = ModuleType(name), ModuleType(f"{name}.{module}")
        package.__spec__ = ModuleSpec(name, None, origin="here")
        setattr(part, error or "MlflowException", RefusedError)
        monkeypatch.setitem(sys.modules, name, package)
        monkeypatch.setitem(sys.modules, f"{name}.{module}", part)
    for variable in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # and taken back in the end
    recorders: list[Recorder] = []
    monkeypatch.setattr(Recorder, "made", recorders, raising=False)
    monkeypatch.setattr(trackers, "FinishingWandbLogger", Recorder)
    monkeypatch.setattr(trackers, "MLFlowLogger", Recorder)
    return recorders


def test_by_default_a_run_is_followed_nowhere_else(made: list[Recorder], tmp_path: Path) -> None:
    train(small_config(small_dataset(tmp_path / "data"), train={"steps": 1}), runs=tmp_path)
    assert made == [] and not (tmp_path / "small" / trackers.RECORDS).exists()


def test_trackers_are_told_settings_once_and_every_metric(
    made: list[Recorder], tmp_path: Path
) -> None:
    config = small_config(
        small_dataset(tmp_path / "data"), trainer={"loggers": ["wandb", "mlflow", "wandb"]}
    )
    run = train(config, runs=tmp_path)
    wandb, mlflow = made
    assert wandb.made_with["name"] == mlflow.made_with["run_name"] == "small"
    assert wandb.made_with["save_dir"] == run.folder and wandb.made_with["project"] == "segkit"
    uri = (run.folder / "mlruns").resolve().as_uri()
    assert mlflow.made_with["tracking_uri"] == uri and uri.startswith("file:///")
    for recorder in made:
        (settings,) = recorder.settings
        assert settings["train"]["steps"] == 4 and settings["data"]["spacing"] == [1.0, 1.0, 1.0]
        assert recorder.ended == ["success"]
        told = {name for _, metrics in recorder.metrics for name in metrics}
        assert {"train/loss", "validation/dice", "validation/dice_ball"} <= told
        scored = [step for step, metrics in recorder.metrics if "validation/dice" in metrics]
        assert scored == [1, 3]  # by the last step's number, as metrics.csv has it


def test_a_resumed_run_goes_on_in_its_records(made: list[Recorder], tmp_path: Path) -> None:
    config = small_config(
        small_dataset(tmp_path / "data"), trainer={"loggers": ["wandb", "mlflow"]}
    )
    with pytest.raises(StoppedError):
        train(config, runs=tmp_path, callbacks=[StopAfter(3)])
    resume(tmp_path / "small")
    assert len(made) == 4 and made[2].settings == made[3].settings == []
    identity = made[0].made_with["id"]
    assert len(identity) == 12 and made[2].made_with["id"] == identity
    assert made[1].made_with["run_id"] is None and made[3].made_with["run_id"] == "given-by-server"
    kept = json.loads((tmp_path / "small" / trackers.RECORDS).read_text())
    assert kept == {"wandb": identity, "mlflow": "given-by-server"}


def test_the_environment_names_projects_and_servers(
    made: list[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "knees")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "menisci")
    trackers.trackers(tmp_path, ["wandb", "mlflow"], {})
    wandb, mlflow = made
    assert wandb.made_with["project"] == "knees"
    assert mlflow.made_with["tracking_uri"] == "https://mlflow.example"
    assert mlflow.made_with["experiment_name"] == "menisci"


@pytest.mark.parametrize(
    ("name", "remedy"), [("wandb", "WANDB_MODE=offline"), ("mlflow", "MLFLOW_TRACKING_URI")]
)
def test_a_server_that_refuses_is_one_sentence_and_leaves_no_run(
    name: str,
    remedy: str,
    made: list[Recorder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Recorder, "refuses", True)
    config = small_config(small_dataset(tmp_path / "data"), trainer={"loggers": [name]})
    with pytest.raises(
        ConfigError, match=rf"loggers: {name} reports an error: no such server; .*{remedy}"
    ):
        train(config, runs=tmp_path)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None)])
def test_a_missing_package_is_one_sentence_before_anything_is_read(
    found: ModuleSpec | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mere folder of that name, which has no origin, counts as missing."""
    monkeypatch.setattr(trackers, "find_spec", lambda name: found)
    config = small_config(tmp_path / "nowhere", trainer={"loggers": ["wandb"]})
    with pytest.raises(ConfigError, match=r"wandb is not installed; run pip install 'segkit\[log"):
        train(config, runs=tmp_path)


def test_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.loggers\.0 is 'neptune'"):
        changed(small_config(tmp_path), ["trainer.loggers=[neptune]"])


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_real_ones_work_without_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = small_config(small_dataset(tmp_path / "data"), trainer={"loggers": [name]})
    folders = [train(config, runs=tmp_path).folder for _ in range(2)]
    records = [json.loads((folder / trackers.RECORDS).read_text())[name] for folder in folders]
    assert records[0] != records[1]
    for folder, record in zip(folders, records, strict=True):
        if name == "wandb":
            assert list(folder.glob(f"wandb/offline-run-*-{record}/run-{record}.wandb"))
        else:
            (losses,) = folder.glob(f"mlruns/*/{record}/metrics/validation/dice")
            assert len(losses.read_text().splitlines()) == 2
            pictures = list(folder.glob(f"mlruns/*/{record}/artifacts/samples/*.png"))
            assert len(pictures) == 2
