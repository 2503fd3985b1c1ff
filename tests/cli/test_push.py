"""`segkit push`: a run that was trained is shared and used, and its data stay where they are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from segkit.io.volume import read_volume
from tests.cli.command import run
from tests.hub import TOKEN, Hub


@pytest.fixture
def token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.mark.usefixtures("token")
def test_a_trained_run_is_pushed_and_used_and_no_byte_names_its_data(
    hub: Hub, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = finished.parents[1] / "data"
    split = json.loads((finished / "split.json").read_text())
    cases = [name for names in split.values() if isinstance(names, list) for name in names]
    assert len(cases) == 4
    words = ("push", finished, "hf:clinic/balls", "--licence", "cc-by-4.0")
    code, said, err = run(*words, "--json", capsys=capsys)
    assert (code, err) == (0, "")
    told = json.loads(said)
    assert told["place"] == f"{hub.url}/clinic/balls"
    assert told["commit"] == hub.branches["clinic/balls"]["main"]
    files = hub.files("clinic/balls")
    private = [*cases, str(data), str(finished.parents[1]), str(Path.home()), "imagesTr"]
    for content in (*files.values(), *hub.received):
        assert not [word for word in private if word.encode() in content]
    assert b"| ball | Dice | " in files["README.md"]
    scan = data / "imagesTr" / "case_0.nii.gz"
    for name, model in {"a": finished, "b": "hf:clinic/balls"}.items():
        out = tmp_path / f"{name}.nii.gz"
        words = ("predict", scan, "--out", out, "--engine", "torch", "--model", model)
        assert run(*words, capsys=capsys)[0] == 0
    a, b = (read_volume(tmp_path / f"{name}.nii.gz").data for name in "ab")
    assert np.array_equal(a, b)
    code, _, err = run("push", finished, "hf:clinic/balls", capsys=capsys)
    assert code == 2 and "pass --overwrite to add a new version" in err and err.count("\n") == 1


def test_a_folder_to_look_at_needs_no_hub(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = finished.parents[1] / "data" / "labelsTr"
    scores = tmp_path / "scores.json"
    # The names of cases in the file of scores are not shared either.
    shutil.copytree(labels, tmp_path / "labels")
    run("evaluate", labels, tmp_path / "labels", "--labels", finished, "--out", scores,
        capsys=capsys)  # fmt: skip
    code, said, _ = run("push", finished, tmp_path / "shared", "--scores", scores, capsys=capsys)
    assert code == 0 and "wrote README.md" in said and "no licence was given" in said
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "| ball | Dice | 1.000 | 1.000 to 1.000 | 4 |" in card
    assert "| ball | HD95 (mm) | 0.00 | 0.00 to 0.00 | 4 |" in card
    for path in (tmp_path / "shared").iterdir():
        assert not [n for n in range(4) if b"case_%d" % n in path.read_bytes()], path.name
    code, _, err = run("push", finished, tmp_path / "shared", capsys=capsys)
    assert code == 2 and "exists already; pass --overwrite" in err
