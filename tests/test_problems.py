"""Each command reports all problems of a dataset together, as text or as JSON."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segkit.config.load import load_config
from segkit.data.dataset import read_dataset
from segkit.errors import ConfigError, DatasetError, Problems, SegkitError, VolumeError, counted
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, read_volume, write_volume
from tests.cli.command import run
from tests.small import small_dataset

COMMANDS = ("check", "plan", "train")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(data: Path) -> Path:
    path = data.parent / "config.yaml"
    path.write_text(
        f"data: {{folder: {data}, patch_size: [16, 16, 16]}}\n"
        "network: {channels: [4, 8]}\ntrain: {steps: 1, pictures: 0}\n"
        "trainer: {accelerator: cpu}\n"
    )
    return path


def words_of(command: str, data: Path) -> tuple[object, ...]:
    subject = config_of(data) if command == "train" else data
    return (command, subject, *(("--device", "cpu", "--no-race") if command == "plan" else ()))


def changed_label(data: Path, number: int, **changes: Any) -> None:
    path = data / "labelsTr" / f"case_{number}.nii.gz"
    label = read_volume(path)
    grid = Grid(
        label.grid.shape, label.grid.affine * np.array([[changes.get("times", 1)], [1], [1], [1]])
    )
    values = label.data.astype(np.int16) + changes.get("plus", 0)
    write_volume(path, Volume(values.astype(np.uint8), grid))


@pytest.mark.parametrize("command", COMMANDS)
def test_forty_bad_cases_are_reported_in_one_run(
    here: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    data = small_dataset(here / "data", num_cases=42, size=16)
    for number in range(20):
        changed_label(data, number, times=2)  # on another grid
    for number in range(20, 39):
        (data / "imagesTr" / f"case_{number}.nii.gz").write_bytes(b"nothing")
    (data / "labelsTr" / "case_39.nii.gz").write_bytes(b"nothing")
    code, _, err = run(*words_of(command, data), capsys=capsys)
    assert code == 2
    lines = err.splitlines()
    assert lines[-1] == "segkit: 40 problems, listed above; correct them and run again"
    told = [line for line in lines if "case_" in line]
    for number in range(40):
        assert any(f"case_{number}.nii.gz" in line for line in told), number
    assert sum("lies on another grid" in line for line in told) == 20
    assert not list(here.glob("runs/*/config.yaml"))


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_files_are_reported_together(
    here: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    data = small_dataset(here / "data", num_cases=5)
    for number in (0, 2, 3):
        (data / "imagesTr" / f"case_{number}.nii.gz").unlink()
    code, _, err = run(*words_of(command, data), capsys=capsys)
    assert code == 2 and err.count("which does not exist") == 3
    assert "segkit: 3 problems, listed above" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_values_are_reported_together(
    here: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    data = small_dataset(here / "data", num_cases=5)
    for number in (0, 1, 2, 3, 4):
        changed_label(data, number, plus=3)
    code, _, err = run(*words_of(command, data), capsys=capsys)
    assert code == 2 and err.count("which the dataset does not declare (it has 0 to 1)") == 5
    over_all = int(command == "check")  # that names the numbers once for all cases
    assert err.count("expected only numbers that data.labels declares, found 3") == over_all
    assert f"segkit: {5 + over_all} problems, listed above" in err
    # What was right is kept: the next round only has to do what was wrong.
    changed_label(data, 0, plus=-3)
    code, _, err = run(*words_of(command, data), capsys=capsys)
    assert code == 2 and f"segkit: {4 + over_all} problems, listed above" in err


def test_a_failure_is_json_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small_dataset(here / "data", num_cases=5)
    code, out, _ = run("check", data, "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["problems"] == []
    for number in (1, 4):
        changed_label(data, number, times=2)
    code, out, err = run("check", data, "--json", capsys=capsys)
    told = json.loads(out)
    assert code == 2 and len(told["problems"]) == 2
    assert "case_1.nii.gz: lies on another grid" in told["problems"][0]
    assert "; " in told["error"] and err.count("\n") == 3
    for words in (
        ("check", here / "nowhere.nii.gz"),
        ("train", here / "nowhere.yaml"),
        ("evaluate", here / "nowhere", data),
        ("predict", here / "nowhere.nii.gz", "--model", here / "nothing"),
    ):
        code, out, err = run(*words, "--json", capsys=capsys)
        told = json.loads(out)
        assert code == 2 and told["problems"] == [told["error"]], words
        assert err == f"segkit: {told['error']}\n"


def emptied(data: Path, labels: dict[str, str]) -> None:
    for path in (data / "labelsTr").iterdir():
        label = read_volume(path)
        write_volume(path, label.like(np.zeros_like(label.data)))
    content = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**content, "labels": labels}))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_data_set_without_any_label_is_refused_before_anything_starts(
    here: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    data = small_dataset(here / "data")
    emptied(data, {"0": "background", "1": "ball", "2": "cube"})
    code, _, err = run(*words_of(command, data), capsys=capsys)
    assert code == 2
    assert "cases is labelled ball, cube" in err or "train on is labelled ball, cube" in err
    assert "so there is nothing to learn" in err
    assert not list(here.glob("runs/*/config.yaml"))


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unlabelled_class_is_reported(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    data = small_dataset(here / "data")
    content = json.loads((data / "dataset.json").read_text())
    content["labels"]["2"] = "cube"
    (data / "dataset.json").write_text(json.dumps(content))
    words = words_of(command, data)
    code, out, err = run(*words, *(("--dry-run",) if command == "train" else ()), capsys=capsys)
    assert code == 0, err
    assert "is labelled cube, so the network cannot learn it" in out + err + caplog.text


def test_several_problems_are_raised_together_and_one_as_it_is() -> None:
    problems = Problems()
    problems.refuse()
    with problems.noted():
        raise VolumeError("a: is none")
    with pytest.raises(VolumeError, match=r"^a: is none$"):
        problems.refuse()
    inner = Problems()
    for name in "bcdefgh":
        with inner.noted():
            raise DatasetError(f"{name}: is none")
    with problems.noted():
        inner.refuse()
    with pytest.raises(SegkitError, match=r"^a: is none; b: .*; e: is none and 3 more$") as raised:
        problems.refuse()
    assert raised.value.problems == tuple(f"{name}: is none" for name in "abcdefgh")


def test_a_dataset_of_many_labels_is_refused_in_a_short_sentence(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data", num_cases=1)
    content = json.loads((data / "dataset.json").read_text())
    for labels in (
        {f"label {number}": [number, number + 1] for number in range(30_000)},
        {str(number): number + 1 for number in range(30_000)},
        {str(number): "" for number in range(30_000)},
    ):
        (data / "dataset.json").write_text(json.dumps({**content, "labels": labels}))
        with pytest.raises(DatasetError) as refusal:
            read_dataset(data)
        assert len(str(refusal.value)) < 1500


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ('{"background": 0, "": 1}', r"labels\.: .* visible character, found ''; give another"),
        ('{"background": 0, " \\t": 1}', r"a name must have a visible character, found ' \\t'"),
        ('{"0": "background", "1": ""}', r"labels\.1: .* visible character, found ''; give"),
        ('{"background": 0, "kidney": 1, "kidney": 2}', "'kidney' occurs twice in one object"),
        ('{"background": 0, "a\\u001b[2J": 1}', r"a name must have only printable characters"),
    ],
)
def test_names_of_labels_that_cannot_be_used_are_refused(
    tmp_path: Path, labels: str, reason: str
) -> None:
    data = small_dataset(tmp_path / "data", num_cases=1)
    text = (data / "dataset.json").read_text()
    (data / "dataset.json").write_text(text.replace('{"0": "background", "1": "ball"}', labels))
    with pytest.raises(DatasetError, match=reason) as refusal:
        read_dataset(data)
    assert str(refusal.value).isprintable()


def test_a_repeated_section_is_refused(tmp_path: Path) -> None:
    path = config_of(small_dataset(tmp_path / "data", num_cases=1))
    path.write_text(path.read_text() + "train: {steps: 9}\n")
    with pytest.raises(ConfigError, match="'train' occurs twice in the section that begins at"):
        load_config(path)


NAMES = (r"$\alpha_{1}$", r"\frac{a}{b}", "a_b^c", "[bold]x[/bold]", "a/b", "<b>&", "%s {0}", "肝")


@pytest.mark.slow
def test_names_of_labels_may_be_any_text_that_can_be_shown(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_dataset(here / "data", size=16)
    content = json.loads((data / "dataset.json").read_text())
    content["labels"] = {"background": 0, "ball": 1} | {
        name: number for number, name in enumerate(NAMES, 2)
    }
    (data / "dataset.json").write_text(json.dumps(content))
    for path in (data / "labelsTr").iterdir():
        label = read_volume(path)
        values = label.data.copy()
        values[0, 0, : len(NAMES)] = np.arange(2, 2 + len(NAMES))
        write_volume(path, label.like(values))
    scan = data / "imagesTr" / "case_0.nii.gz"
    for words in (
        ("check", data),
        ("train", config_of(data), "train.pictures=2", "name=run", "train.steps=2"),
        ("predict", scan, "--out", here / "found", "--maps", here / "maps", "--statistics",
         "--preview", "--probabilities"),
        ("evaluate", here / "found" / "case_0.nii.gz", data),
        ("explain", scan, "--out", here / "explained"),
    ):  # fmt: skip
        code, _, err = run(*words, capsys=capsys)
        assert code == 0, (words, err)
    scores = json.loads((here / "runs" / "run" / "summary.json").read_text())
    assert NAMES[0] in json.dumps(scores, ensure_ascii=False).replace("\\\\", "\\")


@pytest.mark.parametrize(
    ("number", "noun", "told"),
    [
        (0, "case", "0 cases"),
        (1, "more class", "1 more class"),
        (2, "more class", "2 more classes"),
        (3, "patch", "3 patches"),
        (1.0, "minute", "1 minute"),
        (0.5, "minute", "0.5 minutes"),
    ],
)
def test_numbers_agree_with_their_nouns(number: float, noun: str, told: str) -> None:
    assert counted(number, noun) == told


def test_a_number_that_is_shown_as_1_has_a_noun_in_the_singular() -> None:
    assert counted(1.0004, "degree", form=".3g") == "1 degree"
    assert counted(12000, "voxel", form=",") == "12,000 voxels"
