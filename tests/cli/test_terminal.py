"""What a terminal, a pipe and a script each get to see."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segkit.cli import terminal
from segkit.cli.main import app, main
from tests.small import small_dataset, trained_run

COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|4[0-7]|9[0-7])[0-9;]*m")


def run(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a `segkit` command."""
    before, sys.argv = sys.argv, ["segkit", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    assert stop.value.code is None or isinstance(stop.value.code, int)
    return stop.value.code or 0, out, err


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    terminal.start()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("terminal"))


def on_a_terminal(words: list[str], **variables: str) -> str:
    """What a command prints where stdout and stderr are a terminal."""
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    with subprocess.Popen(
        [sys.executable, "-m", "segkit", *words],
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm-256color", **variables},
    ) as process:
        os.close(theirs)
        parts = []
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not part:
                break
            parts.append(part)
        assert process.wait() == 0
    os.close(ours)
    return b"".join(parts).decode()


def test_colours_are_for_a_terminal_that_wants_them() -> None:
    assert COLOUR.search(on_a_terminal(["--help"]))
    assert not COLOUR.search(on_a_terminal(["--help"], NO_COLOR="1"))
    piped = subprocess.run(
        [sys.executable, "-m", "segkit", "--help"], capture_output=True, text=True, check=True
    )
    assert "\x1b" not in piped.stdout


def test_completion_knows_commands_and_options_and_loads_no_torch() -> None:
    code = (
        "import sys; from segkit.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules), 'slow'"
    )
    for typed, offered in (("pre", "predict"), ("predict --unc", "--uncertainty")):
        line = f"segkit {typed}"
        variables = {
            "_SEGKIT_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - 1),
        }
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.argv = ['segkit']; {code}"],
            capture_output=True,
            text=True,
            env={**os.environ, **variables},
        )
        assert done.returncode == 0 and offered in done.stdout.split(), done.stdout + done.stderr


@pytest.mark.parametrize("place", ["before", "after"])
def test_quiet_leaves_errors_alone(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=2)
    labels = folder / "labelsTr"
    words = ["evaluate", labels, labels, "--out", tmp_path / "scores.json"]
    words = ["--quiet", *words] if place == "before" else [*words, "-q"]
    assert run(*words, capsys=capsys) == (0, "", "")
    assert json.loads((tmp_path / "scores.json").read_text())["overall"]["dice"]["mean"] == 1
    code, out, err = run(*words, capsys=capsys)
    assert (code, out) == (2, "") and "exists already" in err
    code, out, _ = run("check", folder, capsys=capsys)
    assert code == 0 and "2 cases" in out, "one command's options are not the next one's"


def test_verbose_says_where_a_refusal_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("check", tmp_path / "nothing.yaml")
    code, _, brief = run(*words, capsys=capsys)
    assert code == 2 and brief.count("\n") == 1
    code, _, err = run(*words, "--verbose", capsys=capsys)
    assert code == 2 and err.startswith("Traceback") and err.endswith(brief)


def test_verbose_shows_what_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_dataset(tmp_path / "data")
    config = tmp_path / "c.yaml"
    config.write_text(
        f"data: {{folder: {data}, patch_size: [8, 8, 8], validation: 0.25}}\n"
        "network: {channels: [2, 4]}\ntrain: {steps: 1}\n"
        "trainer: {accelerator: cpu, precision: 32-true}\n"
    )
    monkeypatch.chdir(tmp_path)
    code, _, err = run("train", config, capsys=capsys)
    assert (code, err) == (0, "")
    code, _, err = run("train", config, "-v", capsys=capsys)
    assert code == 0 and "segkit.training.fit: runs/run-2: 3 cases to train on, 1 held out\n" in err


def test_every_command_takes_the_options_that_all_share() -> None:
    from typer.main import get_command

    group = get_command(app)
    assert isinstance(group, terminal.Commands)
    for name in group.commands:
        command = group.get_command(None, name)
        names = [option.name for option in command.params]
        assert names.count("quiet") == names.count("verbose") == 1, name


def test_scores_as_json_are_those_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = small_dataset(tmp_path / "data", num_cases=2) / "labelsTr"
    out = tmp_path / "scores.json"
    code, printed, err = run("evaluate", labels, labels, "--out", out, "--json", capsys=capsys)
    assert (code, err) == (0, "") and printed == out.read_text()


def test_what_was_checked_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run_folder: Path
) -> None:
    folder = run_folder.parents[1] / "data"
    code, out, _ = run("check", folder, "--json", capsys=capsys)
    told = json.loads(out)
    assert code == 0 and told["kind"] == "dataset" and told["channels"] == ["MRI"]
    assert told["shapes"] == [[16, 16, 16]] * 4 and told["spacings_mm"] == [[1, 1, 1]] * 4
    labels = [np.asarray(nib.load(path).dataobj) for path in folder.glob("labelsTr/*")]
    voxels = sum(int(label.sum()) for label in labels)
    assert told["classes"][1] == {"name": "label 1 ball", "cases": 4, "voxels": voxels}
    code, out, _ = run("check", folder / "imagesTr" / "case_0.nii.gz", "--json", capsys=capsys)
    told = json.loads(out)
    assert told["kind"] == "volume" and told["shape"] == [16, 16, 16]
    assert told["affine"] == np.eye(4).tolist() and told["orientation"] == "RAS"
    code, out, _ = run(
        "check", run_folder / "config.yaml", "train.steps=7", "--json", capsys=capsys
    )
    told = json.loads(out)
    assert told["kind"] == "config" and told["config"]["train"]["steps"] == 7
    assert told["maps"] == ["skip.1/gate"]
    assert len(told["training_cases"]) == 3 and len(told["held_out_cases"]) == 1


def test_what_was_predicted_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run_folder: Path
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4)), scans / "a.nii.gz")
    (scans / "b.nii.gz").write_bytes(b"no volume")
    words = ("predict", scans, "--out", out, "--model", run_folder, "--json")
    for again in (False, True):
        code, printed, err = run(*words, capsys=capsys)
        assert code == 2 and "1 of 2 volumes failed" in err
        told = json.loads(printed)
        assert told["models"] == [str(run_folder / "model")]
        good, bad = told["volumes"]
        assert good["input"] == [str(scans / "a.nii.gz")] and good["error"] is None
        labels = str(out / "a.nii.gz")
        first = good["written"][:1]
        assert (first, good["kept"]) == (([], labels) if again else ([labels], None))
        assert bad["written"] == [] and "cannot be read" in bad["error"]


def test_what_was_planned_and_trained_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("segkit.planning.make_plan.multiply_adds_per_second", lambda: 1e11)
    small_dataset(tmp_path / "balls")
    words = ("plan", "balls", "--device", "cpu", "--minutes", "1", "--json")
    code, out, err = run(*words, capsys=capsys)
    (plan,) = json.loads(out)["plans"]
    assert (code, err, plan["file"]) == (0, "", "balls.yaml")
    assert plan["config"]["data"]["folder"] == "balls"
    words = ("train", "balls.yaml", "network.channels=[2,4]", "network.strides=null")
    words = (*words, "network.kernels=null", "network.attention.skip=null", "train.steps=1")
    code, _, err = run(*words, "--json", "--dry-run", capsys=capsys)
    assert code == 2 and "--json tells of a finished run, and --dry-run leaves none" in err
    code, out, err = run(*words, "--json", capsys=capsys)
    told = json.loads(out)
    assert (code, err) == (0, "") and told["folder"] == "runs/balls" and told["steps"] == 1
    assert (
        told["validation"] == json.loads(Path("runs/balls/summary.json").read_text())["validation"]
    )
