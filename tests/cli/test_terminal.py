"""What a terminal, a pipe and a script each get to see."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from segkit.cli import terminal
from segkit.cli.main import app
from tests.cli.command import run
from tests.small import small_dataset

COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|4[0-7]|9[0-7])[0-9;]*m")


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
def test_quiet_prints_only_errors(
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


def test_verbose_shows_the_traceback_of_an_error(
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
    assert code == 0 and "segkit.training.fit: runs/run-2: 3 training cases, 1 held out\n" in err
    assert "fit: Patches are mirrored along x; no label's name tells left from right.\n" in err


def test_every_command_takes_the_options_that_all_share() -> None:
    from typer.main import get_command

    group = get_command(app)
    assert isinstance(group, terminal.Commands)
    for name in group.commands:
        command = group.get_command(None, name)
        names = [option.name for option in command.params]
        assert names.count("quiet") == names.count("verbose") == 1, name
