"""Where the segkit command is, and how a Python environment of its own is made for it.

segkit and torch are not installed into Slicer's own Python, whose version and libraries they may
not fit. They live in a virtual environment, and Slicer starts the command as another process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from .errors import ExtensionError

OLDEST_PYTHON = (3, 11)
INSTALLED = "segkit-is-installed"
"""Name of the empty file that says that an environment is complete."""
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
OF_SLICER = ("PYTHONHOME", "PYTHONPATH", "PYTHONNOUSERSITE")
"""Variables that point an interpreter at Slicer's own libraries."""
PYTHONS = ("python3.13", "python3.12", "python3.11", "python3", "python")
VERSION = "import sys; print(*sys.version_info[:2])"


def clean_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables for a process outside Slicer, whose output is UTF-8.

    Args:
        variables: those that Slicer was started with, `slicer.util.startupEnvironment()`.
    """
    kept = {name: value for name, value in variables.items() if name not in OF_SLICER}
    return {**kept, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"}


def program_in(environment: Path, name: str) -> Path:
    """The path of a program of a virtual environment on this system."""
    if os.name == "nt":
        return environment / "Scripts" / f"{name}.exe"
    return environment / "bin" / name


def find_segkit(typed: str, own: Path, variables: Mapping[str, str]) -> Path:
    """The segkit command: the typed one, that of the own environment, or one on the PATH.

    Args:
        typed: the command, or the folder of its environment, as the user typed it; may be empty.
        own: the environment that `install_steps` makes.
        variables: environment variables, for the PATH.

    Raises:
        ExtensionError: there is none.
    """
    if typed.strip():
        path = Path(typed.strip()).expanduser()
        found = program_in(path, "segkit") if path.is_dir() else path
        if not os.access(found, os.X_OK) or found.is_dir():
            raise ExtensionError(
                f"expected the segkit command or the folder of its environment, found {path}; "
                f"choose another, or leave the field empty and press Install"
            )
        return found
    if (own / INSTALLED).is_file():
        return program_in(own, "segkit")
    on_path = shutil.which("segkit", path=variables.get("PATH"))
    if on_path is None:
        raise ExtensionError(
            "segkit was not found; press Install, or choose the segkit command of an environment "
            "that you made"
        )
    return Path(on_path)


def find_python(typed: str, variables: Mapping[str, str]) -> str:
    """A Python that can run segkit.

    Slicer's own Python is not used, because environments that are made from it depend on Slicer's
    launcher.

    Args:
        typed: the interpreter, as the user typed it; may be empty.
        variables: environment variables, for the PATH.

    Raises:
        ExtensionError: there is none that is new enough.
    """
    wanted = ".".join(map(str, OLDEST_PYTHON))
    found = []
    for name in [typed.strip()] if typed.strip() else PYTHONS:
        path = shutil.which(str(Path(name).expanduser()), path=variables.get("PATH"))
        version = None if path is None else _version_of(path, variables)
        if path is not None and version is not None and version >= OLDEST_PYTHON:
            return path
        if version is not None:
            found.append(f"{name} {'.'.join(map(str, version))}")
    told = ", ".join(found) or "none"
    raise ExtensionError(
        f"expected Python {wanted} or newer, found {told}; install it from python.org, or choose "
        f"the path of an interpreter"
    )


def _version_of(python: str, variables: Mapping[str, str]) -> tuple[int, ...] | None:
    """Major and minor version; None if it is no Python that runs, as the Windows store's alias."""
    try:
        asked = subprocess.run(
            [python, "-c", VERSION],
            env=dict(variables),
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return tuple(map(int, asked.stdout.split()))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def install_steps(
    python: str, environment: Path, requirement: str = "segkit", *, cpu_only: bool = False
) -> list[list[str]]:
    """The commands that make an environment and install segkit, to be run one after the other.

    Args:
        python: the interpreter that makes it.
        environment: its folder; `forget_environment` removes it if a command fails.
        requirement: what pip installs: `segkit`, `segkit[openvino]`, or the folder or the wheel of
            a version of your own.
        cpu_only: install the CPU build of torch, a smaller download.
    """
    inside = str(program_in(environment, "python"))
    pip = [inside, "-m", "pip", "install", "--disable-pip-version-check"]
    steps = [[python, "-m", "venv", "--clear", str(environment)]]
    if cpu_only:
        steps.append([*pip, "torch", "--index-url", CPU_TORCH])
    steps.append([*pip, requirement])
    mark = f"import pathlib; pathlib.Path({str(environment / INSTALLED)!r}).touch()"
    return [*steps, [inside, "-c", mark]]


def forget_environment(environment: Path) -> None:
    """Remove an environment that is not complete; another folder is left alone."""
    if (environment / "pyvenv.cfg").is_file() and not (environment / INSTALLED).exists():
        shutil.rmtree(environment)
