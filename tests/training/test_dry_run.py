"""`segkit train --dry-run` says what a training will be, by steps of it, and leaves nothing."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from segkit.cli.main import main
from segkit.config.load import changed, load_config
from segkit.data.dataset import read_dataset
from segkit.data.resident import fits
from segkit.data.split import split_of
from segkit.errors import ConfigError, TrainingError
from segkit.io.volume import read_volume, write_volume
from segkit.training import dry_run as module
from segkit.training.dry_run import MEASURED, DryRun, Stopwatch, dry_run, shortened
from segkit.training.fit import train
from segkit.training.module import SegmentationModule
from tests.small import small_config, small_dataset

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
FAST = ("unet_3d", "attention_unet_2d")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("dataset"), num_cases=5)


@pytest.fixture(scope="module")
def told(dataset: Path) -> DryRun:
    config = small_config(
        dataset,
        train={"steps": 100, "patience": 3, "averaging": 0.9},
        trainer={"max_time": "00:00:00:01"},
    )
    return dry_run(config)


def test_a_dry_run_describes_the_training(told: DryRun, dataset: Path) -> None:
    assert (told.training_cases, told.held_out) == (4, 1)
    assert told.description.spacing == (1.0, 1.0, 1.0) and told.cut_size == (20, 20, 20)
    assert told.device == "cpu" and told.precision == "32-true"
    assert 0 < told.loss < 10 and 0 < told.seconds < 60
    assert told.measured_steps == MEASURED and 0 < told.per_case < 60
    assert told.per_score == told.per_case  # in single precision both are the same


def test_the_peak_memory_of_the_process_is_measured(told: DryRun) -> None:
    if told.peak is None:
        pytest.skip("this system does not tell a process's peak")
    assert 50e6 < told.before <= told.peak < 1e12


def test_its_loss_is_that_of_the_same_steps_of_training(
    told: DryRun, dataset: Path, tmp_path: Path
) -> None:
    """So it is the training itself that was tried, with nothing left out on the way."""
    short = shortened(told.config, (1.0, 1.0, 1.0), tmp_path / "cache")
    seen: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, *details: object) -> None:
            seen.append(float(details[2]["loss"]))  # type: ignore[index]

    cases = read_dataset(dataset)
    few = [c for c in cases.cases if c in split_of(cases, told.config)[0]][:2]
    train(short, runs=tmp_path, callbacks=[Losses()], dataset=replace(cases, cases=tuple(few)))
    assert seen[-1] == told.loss


def test_steps_that_do_not_fit_into_the_time_are_told(told: DryRun) -> None:
    slow = replace(told, seconds=0.25, per_case=0.1, per_score=0.1)
    assert slow.fitting == 4
    assert slow.lines()[-1].endswith("set train.steps=4")
    # 50 validations and the final scores, each of one case of 0.1 s.
    assert (
        "100 steps would take 0:00:25, 50 validations of 1 case and the final scores about "
        "0:00:05; 0:00:30 in all, without preparing"
    ) in "\n".join(slow.lines())
    assert "one step: 250 ms (mean of 10), loss" in "\n".join(slow.lines())
    limited = replace(slow, config=changed(told.config, ["train.minutes=0.25"]))
    # Of 15 s, 0.75 s for preparing and 1.1 s for scoring the one case; a validation of 0.1 s after
    # each two steps of 0.25 s. So 13.15 s hold 21.9 validations and 43.8 steps.
    assert "train.minutes=0.25 limits it, in which about 44 steps fit" in "\n".join(limited.lines())
    fast = replace(told, seconds=0.001)
    assert fast.fitting == 1000 and "max_time" not in "\n".join(fast.lines())
    unhurried = replace(slow, config=changed(told.config, ["trainer.max_time=null"]))
    assert unhurried.fitting is None and "max_time" not in "\n".join(unhurried.lines())


def test_steps_are_measured_after_warming_up_and_not_for_longer_than_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, last = 0.0, []
    monkeypatch.setattr(module, "set_last_step", lambda _, step: last.append(step))

    def steps(*seconds: float) -> Stopwatch:
        nonlocal now
        watch = Stopwatch()
        trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0)
        for number, taken in enumerate(seconds, 1):
            now += taken
            trainer.global_step = number
            batch = {"label": torch.zeros(1, 4, 4, 4)}
            watch.on_train_batch_end(trainer, None, None, batch, number - 1)  # type: ignore[arg-type]
        trained = SegmentationModule.__new__(SegmentationModule)
        trained.__dict__["losses_of_step"] = [torch.tensor(2.0), torch.tensor(4.0)]
        watch.on_train_end(trainer, trained)  # type: ignore[arg-type]
        assert watch.loss == 3.0  # also if Lightning has not logged it, as on a GPU
        return watch

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    fast = steps(9.0, 3.0, 2.0, 1.0, 1.0, *[0.5] * MEASURED)
    assert (fast.measured_steps, fast.seconds, last) == (MEASURED, 0.5, [])
    slow = steps(50.0, 40.0, 30.0)  # 70 s after the end of the first
    assert (slow.measured_steps, slow.seconds, last) == (2, 35.0, [3])


def test_patches_are_loaded_as_for_the_whole_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases would fit into the memory of a card into which two hundred do not."""
    monkeypatch.setattr("segkit.data.resident.free_memory_of", lambda _: 1000)
    monkeypatch.setattr("segkit.data.resident.bytes_of", lambda cases: 300)
    assert not fits([], torch.device("cuda"))  # 300 of 250 bytes
    monkeypatch.setattr("segkit.data.resident.bytes_of", lambda cases: 200)
    assert fits([], torch.device("cuda"))
    assert not fits([], torch.device("cuda"), times=2.0)


def test_lines_say_numbers_and_units(told: DryRun) -> None:
    gpu = replace(told, peak=1_250_000_000, before=0, device="cuda:0")
    text = "\n".join(gpu.lines())
    for words in (
        "4 training cases of",
        "1 held out; labels background, ball",
        "spacing 1 x 1 x 1 mm; patches of 16 x 16 x 16 voxels, cut as 20 x 20 x 20",
        "batches of 2",
        f"{told.parameters:,} parameters, channels 4, 8, 8",
        "100 steps of adamw, validated every 2; 32-true on cuda:0",
        "peak memory of the GPU 1.25 GB",
    ):
        assert words in text, words
    assert "peak memory of the process" in "\n".join(replace(gpu, before=10**9).lines())
    assert "not measured" in "\n".join(replace(gpu, peak=None).lines())


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem not in FAST))
        for path in CONFIGS
    ],
)
def test_every_config_has_a_dry_run(
    path: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"data.folder={dataset}", "data.batch_size=2", "trainer.accelerator=cpu"]
    narrow = ["network.channels=[4, 8, 16, 32]"]
    if path.stem == "self_attention_unet_3d":
        narrow += ["network.attention.bottleneck.head_channels=8"]
    found = dry_run(load_config(path, [*words, *narrow]))
    assert found.seconds > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["config", "dataset"])
def test_the_command_prints_it_and_leaves_no_run(
    kind: str,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{folder: {dataset}, patch_size: [16, 16, 16]}}\n")
    what = config if kind == "config" else dataset
    words = ["train", what, "--dry-run", "trainer.accelerator=cpu", "network.attention={}"]
    words += ["--no-race"] if kind == "dataset" else []
    monkeypatch.setattr(sys, "argv", ["segkit", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code in (None, 0), err
    assert "one step: " in out and "steps would take" in out
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert "config.yaml" not in left and "summary.json" not in left and "last.ckpt" not in left


def test_a_run_to_resume_has_begun_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["segkit", "train", "--resume", str(tmp_path), "--dry-run"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "--dry-run does not work with --resume" in capsys.readouterr().err


def test_a_dry_run_of_a_second_stage_uses_the_labels_of_its_first(
    dataset: Path, tmp_path: Path
) -> None:
    first = train(small_config(dataset, train={"steps": 1}), runs=tmp_path)
    changes = [f"data.first_stage=[{first.folder}]", "name=second"]
    alone, found = (
        dry_run(config)
        for config in (small_config(dataset), changed(small_config(dataset), changes))
    )
    assert found.description.first_stage is not None
    # Each of the first convolution's 4 features sees one more channel, of 27 voxels.
    assert found.parameters == alone.parameters + 4 * 27
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["small"]


def test_a_dry_run_of_several_folds_runs_the_first(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "c.yaml"
    config.write_text(
        f"data: {{folder: {dataset}, patch_size: [16, 16, 16], validation: 0.6}}\n"
        "network: {channels: [4, 8]}\ntrainer: {accelerator: cpu}\n"
    )
    monkeypatch.setattr(sys, "argv", ["segkit", "train", str(config), "--folds=all", "--dry-run"])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code in (None, 0), err
    assert "4 training cases of" in out and "1 held out" in out and "the same for every fold" in out


def test_too_little_memory_is_one_sentence(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    monkeypatch.setattr(SegmentationModule, "training_step", full)
    with pytest.raises(TrainingError, match="too small for a step of 2 patches of 16x16x16 voxels"):
        dry_run(small_config(dataset))


def test_a_malformed_time_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_time is '2 hours'"):
        small_config(Path("data"), trainer={"max_time": "2 hours"})


@pytest.mark.slow
def test_a_ct_whose_first_cases_have_no_foreground_is_tried_too(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=5)
    content = json.loads((folder / "dataset.json").read_text())
    content["modality"] = {"0": "CT"}
    (folder / "dataset.json").write_text(json.dumps(content))
    for number in range(4):
        path = folder / "labelsTr" / f"case_{number}.nii.gz"
        label = read_volume(path)
        write_volume(path, label.like(np.zeros(label.grid.shape, np.uint8)))
    config = small_config(folder, data={"validation": ["case_1"]})
    assert dry_run(config).seconds > 0
