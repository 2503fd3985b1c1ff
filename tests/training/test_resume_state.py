"""A run that goes on keeps its split; settings that were changed are applied or refused by name."""

import csv
import gzip
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from segkit.config.base import Section
from segkit.config.data import DataConfig
from segkit.config.dataset_files import FilesConfig
from segkit.config.load import load_config
from segkit.config.training import Config, TrainConfig
from segkit.data.dataset import read_dataset
from segkit.errors import ConfigError, DatasetError
from segkit.io.volume import read_volume, write_volume
from segkit.training.changed_files import states_of, warn_of_changed_files
from segkit.training.changed_settings import APPLIED, REFUSED, is_one_of
from segkit.training.fit import train
from segkit.training.parts import prepare
from segkit.training.resolve import check_precision
from segkit.training.resume import resume
from segkit.training.resume_state import ResumeState
from tests.small import small_config, small_dataset
from tests.training.test_resume import StopAfter, StoppedError, weights


def stopped(folder: Path, after: int = 5, **sections: Any) -> Path:
    sections = {"train": {"steps": 6, "validate_every": 2}, **sections}
    config = small_config(small_dataset(folder / "data"), **sections)
    with pytest.raises(StoppedError):
        train(config, runs=folder / "runs", callbacks=[StopAfter(after)])
    return folder / "runs" / "small"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped(tmp_path_factory.mktemp("kept"))


def test_the_optimiser_of_a_resumed_run_is_made_on_its_device() -> None:
    """On a GPU, one kernel updates all weights; Lightning moves the weights there only later."""
    found: list[torch.device] = []

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

        def configure_optimizers(self) -> Any:
            found.append(self.weight.device)
            raise StoppedError

    trainer: Any = SimpleNamespace(
        callbacks=[],
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(root_device=torch.device("meta")),
    )
    state = ResumeState({}, every=1, anew=False, patience=None, finished=False)
    with (
        mock.patch("segkit.training.resume_state.begin_epoch_at"),
        pytest.raises(StoppedError),
    ):
        state.on_load_checkpoint(trainer, Module(), {})
    assert found == [torch.device("meta")]


class NamesOfCases(Callback):
    """Collects the names of the cases of each batch."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.names += batch["name"]


def copied(case: str, name: str, data: Path) -> None:
    for room in ("imagesTr", "labelsTr"):
        shutil.copy(data / room / f"{case}.nii.gz", data / room / f"{name}.nii.gz")
    path = data / "dataset.json"
    content = json.loads(path.read_text())
    content["training"].append(
        {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
    )
    path.write_text(json.dumps(content))


def without(case: str, data: Path) -> None:
    path = data / "dataset.json"
    content = json.loads(path.read_text())
    content["training"] = [each for each in content["training"] if case not in each["image"]]
    path.write_text(json.dumps(content))


def split_in(run: Path) -> dict[str, list[str]]:
    return dict(json.loads((run / "split.json").read_text()))


def checkpoint(run: Path) -> dict[str, Any]:
    return dict(torch.load(run / "last.ckpt", weights_only=True))


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 5])  # before the first checkpoint, and after it
@pytest.mark.parametrize("section", [{}, {"data": {"fold": 2}}])
def test_a_case_that_is_new_is_left_out_of_a_run_that_goes_on(
    after: int, section: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = small_dataset(tmp_path / "data", num_cases=5)
    config = small_config(data, train={"steps": 6, "validate_every": 2}, **section)
    with pytest.raises(StoppedError):
        train(config, runs=tmp_path / "runs", callbacks=[StopAfter(after)])
    run = tmp_path / "runs" / "small"
    before = split_in(run)
    copied("case_0", "a_case", data)
    done = resume(run)
    assert split_in(run) == before and done.summary["training_cases"] == len(before["train"])
    assert sorted(done.summary["validation"]["dice_of_cases"]) == before["held_out"]
    assert "small: the run keeps its split and leaves out new cases: a_case" in caplog.text


@pytest.mark.slow
def test_a_case_that_is_gone_is_told_and_the_others_stay_where_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = stopped(tmp_path)
    before = split_in(run)
    gone = before["train"][0]
    without(gone, tmp_path / "data")
    done = resume(run)
    assert done.summary["training_cases"] == len(before["train"]) - 1
    assert f"without the training cases {gone}, which are no longer in" in caplog.text
    assert sorted(done.summary["validation"]["dice_of_cases"]) == before["held_out"]


@pytest.mark.slow
def test_files_that_changed_under_their_names_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = stopped(tmp_path)
    changed = split_in(run)["train"][0]
    label = tmp_path / "data" / "labelsTr" / f"{changed}.nii.gz"
    content = gzip.decompress(label.read_bytes())
    label.write_bytes(gzip.compress(content, 1))  # as a viewer saves it
    resume(run)
    told = [line for line in caplog.messages if "changed since" in line]
    assert told == [
        f"{run}: the files of 1 of 4 cases changed since the run's last checkpoint ({changed}); "
        f"the run continues with the new files, but was also trained on the old ones"
    ]


def test_files_are_compared_by_name_size_and_time_wherever_the_dataset_lies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = read_dataset(small_dataset(tmp_path / "data"))
    before = states_of(dataset.cases)
    moved = shutil.copytree(tmp_path / "data", tmp_path / "moved")  # with the times of change
    warn_of_changed_files(Path("run"), before, states_of(read_dataset(moved).cases))
    warn_of_changed_files(Path("run"), {}, before)  # a checkpoint of an older version
    assert not caplog.messages
    image = read_dataset(moved).cases[0].images[0]
    os.utime(image, ns=(0, 0))
    warn_of_changed_files(Path("run"), before, states_of(read_dataset(moved).cases))
    assert f"1 of {len(before)} cases changed" in caplog.text and "(case_0)" in caplog.text


def test_without_the_cases_that_were_held_out_a_run_does_not_go_on(tmp_path: Path) -> None:
    run = stopped(tmp_path)
    without(split_in(run)["held_out"][0], tmp_path / "data")
    with pytest.raises(
        DatasetError, match=r"expected the held-out cases of .*small \(case_\d\), found none"
    ):
        resume(run)
    assert not (run / "summary.json").exists()


def test_a_split_that_was_edited_is_refused(tmp_path: Path) -> None:
    run = stopped(tmp_path)
    split = split_in(run)
    moved = split["train"].pop()
    (run / "split.json").write_text(json.dumps({**split, "held_out": [*split["held_out"], moved]}))
    with pytest.raises(
        ConfigError, match=rf"held_out now has {moved}, which the run has trained on"
    ):
        resume(run)


def test_parts_from_python_follow_the_split_of_the_run(tmp_path: Path) -> None:
    run = stopped(tmp_path)
    before = split_in(run)
    copied("case_0", "a_case", tmp_path / "data")
    parts = prepare(load_config(run / "config.yaml"), runs=run.parent)
    assert "a_case" in {case.name for case in parts.cases}
    done = resume(run, parts)
    assert done.summary["training_cases"] == len(before["train"])


@pytest.mark.slow
def test_a_finished_run_given_more_steps_goes_on_by_the_longer_schedule(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data")
    config = small_config(data, train={"steps": 3, "validate_every": 10})
    short = train(config, runs=tmp_path / "short")
    longer = config.train.model_copy(update={"steps": 8})
    whole = train(config.model_copy(update={"train": longer}), runs=tmp_path / "whole")
    done = resume(short.folder, overrides=["train.steps=8"])
    assert done.summary["steps"] == 8
    assert load_config(done.folder / "config.yaml").train.steps == 8
    assert done.summary["changed_settings"] == [
        {"step": 3, "setting": "train.steps", "before": 3, "after": 8}
    ]
    found, expected = (
        checkpoint(run.folder)["optimizer_states"][0]["param_groups"][0] for run in (done, whole)
    )
    for key in ("lr", "max_lr", "initial_lr", "betas"):
        assert found[key] == pytest.approx(expected[key]), key
    assert checkpoint(done.folder)["lr_schedulers"][0]["total_steps"] == 9
    table = list(csv.DictReader((done.folder / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in table if row["validation/dice"]] == ["2", "7"]
    with pytest.raises(ConfigError, match=r"is finished already.* to train more than its 8 steps"):
        resume(done.folder)


@pytest.mark.slow
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_another_learning_rate_counts_from_the_next_step(optimiser: str, tmp_path: Path) -> None:
    run = stopped(tmp_path, train={"steps": 6, "validate_every": 2, "optimiser": optimiser})
    config = load_config(run / "config.yaml", ["train.learning_rate=0.05"])
    whole = train(config, runs=tmp_path / "whole")
    done = resume(run, overrides=["train.learning_rate=0.05"])
    rates = [
        checkpoint(folder)["optimizer_states"][0]["param_groups"][0]["lr"]
        for folder in (done.folder, whole.folder)
    ]
    assert rates[0] == pytest.approx(rates[1])


def test_another_schedule_counts_from_the_next_step(kept: Path, tmp_path: Path) -> None:
    """Cosine with 0.2 of 6 steps to rise (1): step 6, the end, has the lowest share, 0.5."""
    run = Path(shutil.copytree(kept, tmp_path / "small"))
    words = ["train.schedule=cosine", "train.cosine={warm_up: 0.2, lowest: 0.5}"]
    done = resume(run, overrides=words)
    (group,) = checkpoint(done.folder)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(0.5 * 3e-3) and group["betas"][0] == 0.95
    changed = [each["setting"] for each in done.summary["changed_settings"]]
    assert changed == ["train.schedule", "train.cosine.warm_up", "train.cosine.lowest"]


def test_a_run_from_before_schedules_had_sections_goes_on_with_nothing_changed(
    kept: Path, tmp_path: Path
) -> None:
    def as_before(tree: dict[str, Any]) -> None:
        train = tree["train"]
        train["adamw"] |= train.pop("one_cycle")
        train["sgd"] |= train.pop("polynomial")
        for name in ("muon", "schedule", "cosine"):
            del train[name]

    run = Path(shutil.copytree(kept, tmp_path / "small"))
    tree = yaml.safe_load((run / "config.yaml").read_text())
    as_before(tree)
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    content = checkpoint(run)
    as_before(content["segkit"]["config"])
    torch.save(content, run / "last.ckpt")
    assert "changed_settings" not in resume(run).summary


@pytest.mark.parametrize(
    "word",
    [
        "train.optimiser=sgd",
        "train.seed=1",
        "train.averaging=0.9",
        "network.channels=[4,8,16]",
        "data.spacing=[2,2,2]",
        "data.validation=0.5",
        "name=other",
        "train.steps=4",
    ],
)
def test_a_setting_that_a_run_keeps_is_refused_by_its_name(word: str, kept: Path) -> None:
    run = kept
    before = (run / "config.yaml").read_text()
    key, _, _ = word.partition("=")
    with pytest.raises(ConfigError, match=rf"config\.yaml: .*{key}"):
        if key == "data.validation":
            resume(run, overrides=[f"data.validation=[{split_in(run)['train'][0]}]"])
        else:
            resume(run, overrides=[word])
    assert (run / "config.yaml").read_text() == before


@pytest.mark.slow
def test_settings_edited_in_the_file_are_applied(tmp_path: Path) -> None:
    run = stopped(tmp_path)
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["data"]["batch_size"] = 1
    tree["train"]["validate_every"] = 5
    tree["train"]["steps"] = 10
    tree["data"]["workers"] = 0
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    done = resume(run)
    table = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in table if row["validation/dice"]] == ["1", "3", "4", "9"]
    changed = {each["setting"] for each in done.summary["changed_settings"]}
    assert {"data.batch_size", "train.validate_every", "train.steps"} <= changed


@pytest.mark.slow
def test_a_run_that_was_moved_keeps_its_best_score(tmp_path: Path) -> None:
    run = stopped(tmp_path)
    score = checkpoint(run)["callbacks"]
    best = next(state["best_model_score"] for key, state in score.items() if "validation" in key)
    moved = tmp_path / "elsewhere" / "small"
    shutil.copytree(run, moved)
    shutil.rmtree(run)
    done = resume(moved)
    key = "best_mean_dice_during_training"
    assert done.summary["validation"][key] >= float(best)


def test_moments_in_the_order_of_a_gpu_go_on_to_the_same_weights(tmp_path: Path) -> None:
    """On a CPU, weights and moments are stored channels last; on a GPU they may not be."""
    run = stopped(tmp_path)
    other = tmp_path / "other" / "small"
    shutil.copytree(run, other)
    content = checkpoint(other)
    moved = 0
    for kept in content["optimizer_states"][0]["state"].values():
        for name, value in kept.items():
            kept[name] = value.contiguous()
            moved += kept[name].stride() != value.stride()
    assert moved > 5
    torch.save(content, other / "last.ckpt")
    resume(run)
    resume(other)
    expected, found = weights(run), weights(other)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_run_of_a_gpu_goes_on_without_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    run = stopped(tmp_path)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("accelerator: cpu", "accelerator: gpu"))
    assert resume(run).summary["steps"] == 6
    assert "trainer.accelerator is gpu, but this machine has none" in caplog.text


def test_each_setting_is_applied_or_refused() -> None:
    """Of sections, `data` and `train` are told setting by setting, and so is `data.files`."""
    told: dict[str, type[Section]] = {
        "data": DataConfig,
        "train": TrainConfig,
        "data.files": FilesConfig,
    }
    known = {f"{section}.{name}" for section in told for name in told[section].model_fields}
    known |= set(Config.model_fields) - {"data", "train"}
    assert {*APPLIED, *REFUSED} <= known
    assert not APPLIED & set(REFUSED)
    undecided = {key for key in known if not is_one_of(key, {*APPLIED, *REFUSED})}
    assert not undecided


@pytest.mark.slow
@pytest.mark.parametrize(
    "word",
    [
        "data.draw_cases={CASE: 3.0}",
        "data.draw_classes={ball: 2.0}",
        "data.foreground_share=1.0",
        "data.nan=background",
        "data.labelled={CASE: [ball]}",
        "train.calibrate=true",
    ],
)
def test_a_setting_that_may_change_is_applied_and_noted(
    word: str, kept: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(kept, tmp_path / "small"))
    word = word.replace("CASE", split_in(run)["train"][0])
    key, _, value = word.partition("=")
    done = resume(run, overrides=[word])
    (changed,) = done.summary["changed_settings"]
    assert changed["setting"].startswith(key) and changed["step"] == 4
    section, name = key.split(".")
    written = load_config(run / "config.yaml").model_dump(mode="json")
    assert written[section][name] == yaml.safe_load(value)


def test_weights_of_drawing_apply_from_the_next_step_on(kept: Path, tmp_path: Path) -> None:
    """Patches of a case with all the weight are the only ones that a resumed run trains on."""
    run = Path(shutil.copytree(kept, tmp_path / "small"))
    first, *others = split_in(run)["train"]
    words = f"data.draw_cases={{{', '.join(f'{name}: 0' for name in others)}}}"
    drawn: list[str] = []
    resume(run, overrides=[words], callbacks=[NamesOfCases(drawn)])
    assert drawn and set(drawn) == {first}


@pytest.mark.slow
def test_a_split_that_was_edited_before_the_first_checkpoint_is_drawn_again(
    tmp_path: Path,
) -> None:
    run = stopped(tmp_path, after=1)
    before = split_in(run)
    moved = before["train"][0]
    done = resume(run, overrides=[f"data.validation=[{moved}]"])
    assert split_in(run)["held_out"] == [moved]
    assert set(split_in(run)["train"]) == {*before["train"], *before["held_out"]} - {moved}
    assert list(done.summary["validation"]["dice_of_cases"]) == [moved]


@pytest.mark.slow
@pytest.mark.parametrize("word", ["name=other", "data.fold=1"])
def test_name_and_fold_are_kept_before_the_first_checkpoint_too(word: str, tmp_path: Path) -> None:
    run = stopped(tmp_path, after=1)
    with pytest.raises(ConfigError, match=rf"config\.yaml: {word.split('=')[0]} was changed from"):
        resume(run, overrides=[word])


def test_a_refused_setting_is_told_before_cases_are_prepared(kept: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(kept, tmp_path / "small"))
    with pytest.raises(
        ConfigError, match=r"data\.spacing was changed from .* to \[2.0, 2.0, 2.0\]"
    ):
        resume(run, overrides=["data.spacing=[2,2,2]", f"data.folder={tmp_path / 'none'}"])


@pytest.mark.parametrize(
    "change",
    [
        "swapped",
        pytest.param("renamed", marks=pytest.mark.slow),
        pytest.param("another channel", marks=pytest.mark.slow),
    ],
)
def test_labels_and_channels_that_mean_something_else_are_refused(
    change: str, tmp_path: Path
) -> None:
    """Swapped names keep the shape of all weights, so nothing else would notice them."""
    data = small_dataset(tmp_path / "data")
    for file in (data / "labelsTr").iterdir():
        label = read_volume(file)
        label.data[..., 8:] *= 2
        write_volume(file, label)
    content = json.loads((data / "dataset.json").read_text())
    content["labels"] = {"0": "background", "1": "lower", "2": "upper"}
    (data / "dataset.json").write_text(json.dumps(content))
    config = small_config(data, train={"steps": 6, "validate_every": 2})
    with pytest.raises(StoppedError):
        train(config, runs=tmp_path / "runs", callbacks=[StopAfter(3)])
    run = tmp_path / "runs" / "small"
    path = data / "dataset.json"
    content = json.loads(path.read_text())
    if change == "another channel":
        content["modality"] = {"0": "PET"}
    else:
        names = ("upper", "lower") if change == "swapped" else ("lower", "other")
        content["labels"] = {"0": "background", "1": names[0], "2": names[1]}
    path.write_text(json.dumps(content))
    told = "channels" if change == "another channel" else "labels"
    with pytest.raises(
        ConfigError, match=rf"small: the {told} of the dataset were .* when the run began, but are"
    ):
        resume(run)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "half"])
def test_a_precision_that_is_not_trained_in_is_refused_before_anything_starts(
    precision: str, tmp_path: Path
) -> None:
    config = small_config(tmp_path / "none", trainer={"precision": precision})
    with pytest.raises(ConfigError, match=f"trainer.precision is {precision}; choose auto, 32"):
        train(config, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_that_is_slow_in_bfloat16_is_told(
    fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that began on another machine may go on here."""
    monkeypatch.setattr("segkit.training.resolve.bfloat16_is_fast", lambda: fast)
    for asked in ("bf16-mixed", "32-true", "auto"):
        caplog.clear()
        section = {"accelerator": "cpu", "precision": asked}
        check_precision(small_config(Path("data"), trainer=section))
        told = "a step can take 40 times as long as with trainer.precision=32-true" in caplog.text
        assert told == (asked == "bf16-mixed" and not fast)


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_16_mixed_without_a_gpu_is_refused_before_anything_starts(
    accelerator: str, tmp_path: Path
) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has a GPU")
    asked = {"precision": "16-mixed", "accelerator": accelerator}
    config = small_config(tmp_path / "none", trainer=asked)
    with pytest.raises(
        ConfigError, match=r"16-mixed, with which PyTorch trains only on a GPU.*; ch"
    ):
        train(config, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_run_that_continues_in_16_mixed_on_a_cpu_is_refused_and_stays(
    kept: Path, tmp_path: Path
) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has a GPU")
    run = Path(shutil.copytree(kept, tmp_path / "small"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="16-mixed, with which PyTorch trains only on a GPU"):
        resume(run, overrides=["trainer.precision=16-mixed"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
