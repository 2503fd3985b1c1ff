"""What a user sees: files, one sentence, exit codes."""

import errno
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from segkit.cli.main import app, main
from tests.cli.command import run

COMMANDS = ("demo", "train", "predict", "evaluate", "check")


def test_help_loads_neither_torch_nor_lightning_nor_monai() -> None:
    code = (
        "import sys; sys.argv = ['segkit', '--help']\n"
        "from segkit.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'monai', 'lightning', 'nibabel', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip().endswith("[]"), result.stdout + result.stderr
    assert all(command in result.stdout for command in COMMANDS)


def test_module_and_command_are_one() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "segkit", "--version"], capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stdout.startswith("segkit 0.")
    script = subprocess.run(
        [sys.executable, "-m", "segkit", "--show-completion", "bash"],
        capture_output=True,
        text=True,
        # Otherwise typer looks for the shell that runs the tests, which may be `sh` under make.
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    ).stdout
    assert "_SEGKIT_COMPLETE=complete_bash" in script and script.rstrip().endswith(" segkit"), (
        script
    )
    lines = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert lines["torch"] == torch.__version__ and lines["CUDA"] and lines["cuDNN"]
    assert lines["openvino"] == version("openvino") and lines["onnxruntime"]


def test_help_names_the_program_and_no_types_of_python(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("", *(command.name or "" for command in app.registered_commands)):
        code, out, _ = run(*filter(None, [name, "--help"]), capsys=capsys)
        assert code == 0 and f"Usage: segkit {name}".strip() in out, out
        assert "<bool>" not in out and "list[Path]" not in out, out
    assert "{A} {B}" in run("compare", "--help", capsys=capsys)[1]
    assert "{INPUT}..." in run("predict", "--help", capsys=capsys)[1]


def test_the_version_warns_of_a_slow_cudnn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    code, out, _ = run("--version", capsys=capsys)
    assert code == 0
    assert "cuDNN 9.10.2\n" in out and "pip install 'nvidia-cudnn-cu12>=9.15'" in out


@pytest.mark.parametrize("words", [("check", "nowhere.nii.gz"), ("predict", "x.nii.gz")])
def test_a_missing_file_is_one_line_and_exit_code_2(
    words: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEGKIT_MODEL", str(finished))
    code, _, err = run(*words, capsys=capsys)
    assert code == 2
    assert err.startswith(f"segkit: {words[1]}: no such file") and err.count("\n") == 1


def test_our_own_bugs_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("segkit.checking.check.check", broken)
    monkeypatch.setattr(sys, "argv", ["segkit", "check", str(tmp_path)])
    with pytest.raises(ZeroDivisionError, match="ours"):
        main()


def test_an_error_of_the_system_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out.json")

    monkeypatch.setattr("segkit.checking.check.check", full)
    code, _, err = run("check", tmp_path, capsys=capsys)
    assert code == 2
    assert err == (
        "segkit: out.json: no space left on device; free some space there and run the same "
        "command again\n"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("predict scan --maps --tta", "--maps needs a value, found --tta"),
        (
            "predict scan --tta --out --maps x",
            "--out needs a value, found --maps",
        ),
        ("explain scan --out -q", "--out needs a value, found -q"),
    ],
)
def test_an_option_is_never_taken_as_the_value_of_another(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(*words.split(), capsys=capsys)
    assert (code, out, err) == (2, "", f"segkit: {sentence}; give it a value or leave it out\n")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_asked_to_stop_says_so_in_one_line(
    signum: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("segkit.checking.check.check", lambda *_, **__: signal.raise_signal(signum))
    name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
    sentence = f"segkit: stopped by {name}; run the same command again to go on\n"
    assert run("check", tmp_path, capsys=capsys) == (code, "", sentence)
