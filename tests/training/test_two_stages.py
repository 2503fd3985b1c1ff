"""Two stages are trained by one command, and gone on with by one, wherever they were stopped."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from segkit.config.load import dump_yaml
from segkit.config.training import Config
from segkit.errors import ConfigError, Stopped
from segkit.io.atomic import write_text
from segkit.model.file_names import SUMMARY
from segkit.model.folder import Model
from segkit.training import fit as training
from segkit.training import two_stages
from segkit.training.fit import Run
from segkit.training.run_folder import SECOND_STAGE
from tests.small import small_config, small_dataset
from tests.training.test_cascade import low_config
from tests.training.test_resume import weights
from tests.training.test_stop_and_save import Ask


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a second stage that nothing stopped."""
    runs = tmp_path_factory.mktemp("whole")
    return weights(two_stages.train_two_stages(*stages(dataset), runs=runs).folder)


def stages(dataset: Path) -> tuple[Config, Config]:
    return low_config(dataset), small_config(dataset, data={"first_stage": ["runs/small_low"]})


class AskSecond(Ask):
    """Asks in the second training that it sees."""

    fits = 0

    def on_train_start(self, *_: object) -> None:
        self.fits += 1

    def _send(self, trainer: object, due: bool) -> None:
        super()._send(trainer, due and self.fits == 2)  # type: ignore[arg-type]


def test_stopped_in_its_first_stage_the_second_follows(
    dataset: Path, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(Stopped, match=r"train --resume .*small_low continues"):
        two_stages.train_two_stages(*stages(dataset), runs=tmp_path, callbacks=[Ask(1)])
    told: list[Run] = []
    second = two_stages.resume_two_stages(tmp_path / "small_low", tell=told.append)
    assert [run.folder.name for run in told] == ["small_low"]
    assert second.folder == tmp_path / "small" and weights(second.folder).keys() == whole.keys()
    for key, value in weights(second.folder).items():
        assert torch.equal(value, whole[key]), key
    with pytest.raises(ConfigError, match="small: the run is finished already"):
        two_stages.resume_two_stages(tmp_path / "small_low")


@pytest.mark.slow
def test_stopped_in_its_second_stage_either_run_goes_on_with_it(
    dataset: Path, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    for number, name in enumerate(("small_low", "small")):
        runs = tmp_path / str(number)
        with pytest.raises(Stopped, match=r"train --resume .*small continues"):
            two_stages.train_two_stages(*stages(dataset), runs=runs, callbacks=[AskSecond(1)])
        second = two_stages.resume_two_stages(runs / name)
        assert second.folder == runs / "small"
        assert sorted(path.name for path in runs.glob("s*")) == ["small", "small_low"]
        for key, value in weights(second.folder).items():
            assert torch.equal(value, whole[key]), key


def test_between_the_stages_the_second_is_begun(dataset: Path, tmp_path: Path) -> None:
    low, full = stages(dataset)
    two_stages.train_first(low, full, runs=tmp_path)
    assert two_stages.resume_two_stages(tmp_path / "small_low").folder == tmp_path / "small"


@pytest.mark.parametrize(("taken", "over"), [(1.25, 15.0), (0.9, 0.0), (None, 0.0)])
def test_the_second_stage_has_less_time_if_the_first_took_more_than_its_minutes(
    taken: float | None,
    over: float,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    low, full = stages(dataset)
    folder = tmp_path / "small_low"
    summary = {} if taken is None else {"minutes": {"given": 1.0, "taken": taken}}
    first = Run(folder, summary, cast(Model, None))
    spent: list[float] = []

    def begun(config: Config, **settings: Any) -> Run:
        assert config.data.first_stage == [folder]
        spent.append(settings["spent"])
        return first

    monkeypatch.setattr(two_stages, "train", begun)
    monkeypatch.setattr(two_stages, "train_first", lambda *_, **__: first)
    two_stages.train_two_stages(low, full, runs=tmp_path)
    write_text(folder / SECOND_STAGE, dump_yaml(full))
    write_text(folder / SUMMARY, json.dumps(summary))
    two_stages.resume_two_stages(folder)
    assert spent == pytest.approx([over, over])


@pytest.mark.parametrize("minutes", [None, 5.0])
def test_two_stages_share_the_time_that_planning_took(
    minutes: float | None, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, full = stages(dataset)
    full = full.model_copy(update={"train": full.train.model_copy(update={"minutes": minutes})})
    spent: list[float] = []

    def begun(config: Config, *others: Config, **settings: Any) -> Run:
        spent.append(settings["spent"])
        assert others or config.train.minutes == second
        return Run(tmp_path / "small_low", {}, cast(Model, None))

    second = None if minutes is None else 3.0
    monkeypatch.setattr(two_stages, "train", begun)
    monkeypatch.setattr(two_stages, "train_first", begun)
    two_stages.train_two_stages(low, full, runs=tmp_path, spent=240.0)
    assert spent == [120.0, 0.0]


@pytest.mark.slow
def test_a_run_of_one_stage_resumes_as_before(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        training.train(small_config(dataset), runs=tmp_path, callbacks=[Ask(1)])
    assert two_stages.resume_two_stages(tmp_path / "small").summary["steps"] == 4
