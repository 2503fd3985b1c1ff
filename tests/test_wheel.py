"""The wheel holds the package and nothing else, and works where there is no checkout.

Needs an index that pip can install from.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(pip, check=True, capture_output=True)
    (built,) = folder.glob("segkit-*-py3-none-any.whl")
    return built


def test_it_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "segkit"
    wanted = {
        str(path.relative_to(ROOT))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted
    viewer = sorted((package / "explain" / "page" / "viewer").iterdir())
    assert viewer and {f"segkit/explain/page/viewer/{path.name}" for path in viewer} <= held
    assert "segkit/py.typed" in held


def test_the_demo_runs_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    binaries = environment / "bin"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    for wanted in ("torch", f"{wheel}[demo]"):
        pip = [str(binaries / "python"), "-m", "pip", "install", wanted, *constraints]
        subprocess.run(pip, check=True, capture_output=True)
    where = tmp_path / "where"
    where.mkdir()
    located = subprocess.run(
        [str(binaries / "python"), "-c", "import segkit; print(segkit.__file__)"],
        cwd=where,
        capture_output=True,
        text=True,
        env={},
        check=True,
    )
    assert located.stdout.startswith(str(environment))
    done = subprocess.run(
        [str(binaries / "segkit"), "demo"], cwd=where, capture_output=True, text=True, env={}
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((where / "segkit_demo" / "summary.json").read_text())
    assert summary["mean_dice"] >= 0.82
    assert (where / "segkit_demo" / "montage.png").is_file()
