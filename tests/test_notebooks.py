"""The notebooks run, with a training so short that only the road is tested and not its end."""

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
each_notebook_that_is_run = pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, id=path.stem, marks=[pytest.mark.slow] * path.stem.startswith(("1", "3"))
        )
        for path in NOTEBOOKS
    ],
)


@pytest.mark.notebook
@each_notebook_that_is_run
def test_a_notebook_runs_from_top_to_bottom_and_leaves_nothing_behind(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat", reason="install segkit[dev]")
    nbclient = pytest.importorskip("nbclient", reason="install segkit[dev]")
    pytest.importorskip("ipykernel", reason="install segkit[dev]")
    pytest.importorskip("nilearn", reason="the scan comes with nilearn: install segkit[demo]")
    pytest.importorskip("matplotlib", reason="the figures need matplotlib: install segkit[demo]")
    working, temporary, jupyter = (tmp_path / name for name in ("working", "temporary", "jupyter"))
    for folder in (working, temporary, jupyter):
        folder.mkdir()
    monkeypatch.setenv("SEGKIT_NOTEBOOK_STEPS", "4")
    monkeypatch.setenv("TMPDIR", str(temporary))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(jupyter))

    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=300,
        resources={"metadata": {"path": str(working)}},
    ).execute()

    assert list(working.iterdir()) == []
    assert list(temporary.glob("segkit*")) == []


@each_notebook
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
