"""`segkit train`: one stage or two, folds, and going on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from segkit.cli.train import dims_of, minutes_to_plan
from segkit.config.load import dump_yaml
from segkit.planning import nnunet_rules, planning_task
from tests.cli.command import run
from tests.small import magnified, small_config, small_dataset


def test_a_wrong_setting_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{folder: {tmp_path}, patch_size: [8, 8, 8]}}\n")
    code, out, err = run("train", config, "train.stepps=3", capsys=capsys)
    assert code == 2 and out == ""
    assert err == f"segkit: {config}: train.stepps is not a setting (did you mean steps?)\n"


def test_one_command_trains_folds_and_another_resumes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_dataset(tmp_path / "data", num_cases=5)
    config = small_config(data, train={"steps": 1})
    (tmp_path / "small.yaml").write_text(dump_yaml(config))
    monkeypatch.chdir(tmp_path)
    code, out, err = run("train", "small.yaml", "--folds", "0,3", capsys=capsys)
    assert (code, err) == (0, "")
    for line in ("fold 0, 1 of 2", "fold 3, 2 of 2", "2 steps in", "mean Dice of 2 held-out cases"):
        assert line in out, line
    assert "post-processing: " in out and "wrote runs/small\n" in out
    code, out, err = run("train", "--resume", "runs/small", capsys=capsys)
    assert code == 2 and "runs/small: the cross-validation is finished already" in err
    (tmp_path / "runs/small/fold_3/summary.json").unlink()
    code, out, _ = run("train", "--resume", "runs/small", capsys=capsys)
    assert code == 0 and "fold 3, 2 of 2" in out and "fold 0" not in out
    # All folds predict together.
    scan = data / "imagesTr" / "case_0.nii.gz"
    code, out, _ = run("predict", scan, "--out", tmp_path / "seg.nii.gz", capsys=capsys)
    assert code == 0 and out.startswith(
        "model: runs/small/fold_0/model\nmodel: runs/small/fold_3/model\nwrote "
    )


@pytest.mark.parametrize("folds", ["-1", "0,x", "", "every"])
def test_folds_that_are_not_numbers_are_refused(
    folds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("train", tmp_path / "c.yaml", "--folds", folds, capsys=capsys)
    assert code == 2
    assert err == (
        f"segkit: --folds: expected all, or numbers from 0 such as 0,2; found {folds!r}\n"
    )


def test_a_cross_validation_is_planned_without_a_race(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All cases score its folds, so none is left for a race."""

    def raced(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("segkit.racing.plan_by_race", raced)
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 1e9)
    data = small_dataset(tmp_path / "balls", num_cases=4)
    words = ("train", data, "--folds", "0", "--minutes", "0.1", "--runs", tmp_path / "runs")
    code, _, err = run(*words, "data.num_folds=2", "trainer.accelerator=cpu", capsys=capsys)
    assert code == 0, err
    with pytest.raises(AssertionError):
        run("train", data, "--minutes", "0.1", "--runs", tmp_path / "runs", capsys=capsys)


@pytest.mark.parametrize(
    ("words", "minutes", "others"),
    [
        ([], 20.0, []),
        (["train.minutes=7.5", "name=a"], 7.5, ["name=a"]),
        (["train.minutes=null", "train.minutes=.5"], 0.5, []),
        (["train.minutes=1e1"], 10.0, []),
        # With a number of steps, they only limit the training.
        (["train.steps=9", "train.minutes=5"], 20.0, ["train.steps=9", "train.minutes=5"]),
        # These are no numbers of minutes above 0, and are settings as before.
        (
            ["train.minutes=5", "train.minutes=null"],
            20.0,
            ["train.minutes=5", "train.minutes=null"],
        ),
        (["train.minutes=0"], 20.0, ["train.minutes=0"]),
        (["train.minutes=1.2.3"], 20.0, ["train.minutes=1.2.3"]),
    ],
)
def test_the_minutes_of_a_dataset_may_be_a_setting(
    words: list[str], minutes: float, others: list[str], tmp_path: Path
) -> None:
    dataset = small_dataset(tmp_path / "data", num_cases=1)
    assert minutes_to_plan(dataset, None, words) == (minutes, others)
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{folder: {dataset}, patch_size: [8, 8, 8]}}\n")
    assert minutes_to_plan(config, None, words) == (20.0, words)


def test_the_minutes_of_a_dataset_are_given_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = small_dataset(tmp_path / "data", num_cases=1)
    words = ("train", dataset, "--minutes", "5", "train.minutes=6", "--runs", tmp_path / "runs")
    code, _, err = run(*words, capsys=capsys)
    assert code == 2 and "found 5 and train.minutes=6; leave out one of them" in err
    assert not (tmp_path / "runs").exists()


def test_a_single_run_cannot_be_resumed_with_folds(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("train", "--resume", finished, "--folds", "all", capsys=capsys)
    assert code == 2
    assert err == (
        f"segkit: {finished}: --folds needs a cross-validation, found a single run; leave --folds "
        "out\n"
    )


def test_a_large_dataset_is_planned_and_trained_in_two_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 3e8)
    # As if 8 GB held a patch of under a quarter of these volumes.
    monkeypatch.setattr(nnunet_rules, "REFERENCE_ACTIVATIONS", {2: 85e6, 3: 3e5})
    magnified(small_dataset(tmp_path / "balls", num_cases=2), 2)
    code, out, err = run("plan", "balls", "--device", "cpu", "--no-race", capsys=capsys)
    assert code == 0, err
    assert out.endswith("next: segkit train balls_low.yaml, then segkit train balls.yaml\n")
    code, _, err = run("check", "balls.yaml", capsys=capsys)
    assert code == 2 and err.startswith("segkit: runs/balls_low: expected a run or a model folder")
    (tmp_path / "balls.yaml").unlink()
    code, _, err = run("plan", "balls", "--device", "cpu", "--no-race", capsys=capsys)
    assert code == 2 and "balls_low.yaml: exists already" in err
    assert not (tmp_path / "balls.yaml").exists()

    words = ["train", "balls", "trainer.accelerator=cpu", "train.steps=2", "name=two"]
    code, out, err = run(*words, capsys=capsys)
    assert code == 0, err
    low, full = Path("runs/two_low"), Path("runs/two")
    assert out.index(f"wrote {low}\n") < out.index(f"wrote {full}\n")
    assert (full / "model" / "first" / "0" / "weights.safetensors").read_bytes() == (
        low / "model" / "weights.safetensors"
    ).read_bytes()
    code, _, err = run(*words, "data.spacing=[1,1,1]", capsys=capsys)
    assert code == 2 and "expected a different data.spacing for each" in err
    code, out, err = run(*words, "data.first_stage=null", "name=one", capsys=capsys)
    assert code == 0 and not Path("runs/one_low").exists(), err
    assert not (Path("runs/one/model/first")).exists()


def test_a_plan_does_not_take_the_name_of_the_file_that_describes_the_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 1e11)
    (small_dataset(tmp_path / "balls") / "dataset.json").unlink()
    files = "images: {T1: imagesTr/*.nii.gz}, label: labelsTr/*.nii.gz"
    labels = "labels: {background: 0, ball: 1}"
    text = f"data: {{folder: balls, files: {{{files}, {labels}}}}}\n"
    for described, written in (("balls.yaml", "balls_plan.yaml"), ("other.yaml", "balls.yaml")):
        Path(described).write_text(text)
        words = ("plan", described, "--device", "cpu", "--no-race", "--overwrite")
        code, out, err = run(*words, capsys=capsys)
        assert (code, err) == (0, "") and f"wrote {written}\n" in out
        assert Path(described).read_text() == text


def test_plan_and_train_print_their_results_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("segkit.planning.planning_task.multiply_adds_per_second", lambda *_: 1e11)
    small_dataset(tmp_path / "balls")
    words = ("plan", "balls", "--device", "cpu", "--minutes", "1", "--json")
    code, out, err = run(*words, capsys=capsys)
    (plan,) = json.loads(out)["plans"]
    assert (code, err, plan["file"]) == (0, "", "balls.yaml")
    assert plan["config"]["data"]["folder"] == "balls"
    words = ("train", "balls.yaml", "network.channels=[2,4]", "network.strides=null")
    words = (*words, "network.kernels=null", "network.attention.skip=null", "train.steps=1")
    code, _, err = run(*words, "--json", "--dry-run", capsys=capsys)
    assert code == 2 and "--json needs a finished run, but --dry-run makes none" in err
    code, out, err = run(*words, "--json", capsys=capsys)
    told = json.loads(out)
    assert (code, err) == (0, "") and told["folder"] == "runs/balls" and told["steps"] == 1
    assert (
        told["validation"] == json.loads(Path("runs/balls/summary.json").read_text())["validation"]
    )


def test_lightning_says_nothing_of_its_own(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(small_config(small_dataset(tmp_path / "data"))))
    words = [sys.executable, "-m", "segkit", "train", str(config), "--runs", str(tmp_path / "runs")]
    done = subprocess.run([*words, "--quiet"], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


@pytest.mark.parametrize(
    ("overrides", "dims"),
    [
        ([], None),
        (["data.patch_size=[16, 16, 8]"], 3),
        (["data.patch_size=[64,64]", "train.steps=5"], 2),
        (["network.spatial_dims=3"], 3),
        (["data.patch_size=16"], None),  # refused later, in words of its own
    ],
)
def test_a_dataset_is_planned_in_the_dimensions_of_its_overrides(
    overrides: list[str], dims: int | None
) -> None:
    assert dims_of(overrides) == dims
