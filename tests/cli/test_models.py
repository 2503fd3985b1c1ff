"""Models on the command line: from a hub, from a zip, from a variable."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from segkit.cli.models import find_models
from segkit.errors import ModelError
from segkit.io.volume import read_volume
from tests.cli.command import run
from tests.hub import Hub, file_server


@pytest.fixture
def scan(finished: Path) -> Path:
    return finished.parents[1] / "data" / "imagesTr" / "case_0.nii.gz"


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(each for each in folder.rglob("*") if each.is_file()):
            archive.write(file, file.relative_to(folder))
    return path


def test_a_model_predicts_the_same_wherever_it_lies(
    hub: Hub, finished: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.put_folder("clinic/balls", finished / "model")
    archive = zipped(finished, tmp_path / "run.zip")
    with file_server({"/run.zip": archive.read_bytes()}) as (url, _):
        found = {}
        fetched = ("hf:clinic/balls", f"{url}/run.zip", str(archive))
        for number, model in enumerate((str(finished), *fetched)):
            out = tmp_path / f"{number}.nii.gz"
            words = ("--out", out, "--engine", "torch", "--model", model)
            code, said, err = run("predict", scan, *words, capsys=capsys)
            assert (code, err) == (0, "")
            found[model] = (read_volume(out).data, said.replace("\n", ""))
    first, _ = found[str(finished)]
    assert all(np.array_equal(labels, first) for labels, _ in found.values())
    assert f"hf:clinic/balls: version {commit}" in found["hf:clinic/balls"][1]
    for model in fetched:
        assert f"model: {model}" in found[model][1], "and not the path of its cache"


def test_the_variable_holds_addresses_too(
    hub: Hub,
    finished: Path,
    scan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commit = hub.put_folder("clinic/balls", finished / "model")
    monkeypatch.setenv("SEGKIT_MODEL", os.pathsep.join([str(finished), "hf:clinic/balls@main"]))
    out = tmp_path / "out.nii.gz"
    words = ("--out", out, "--engine", "torch", "--json")
    code, said, _ = run("predict", scan, *words, capsys=capsys)
    assert code == 0
    models = json.loads(said)["models"]
    assert models[0] == str(finished / "model") and Path(models[1]).name == commit


@pytest.mark.slow
def test_every_command_that_takes_a_model_takes_an_address(
    hub: Hub, finished: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.put_folder("clinic/balls", finished / "model")
    model = "hf:clinic/balls"
    labels = finished.parents[1] / "data" / "labelsTr" / scan.name
    for words in (
        ("explain", scan, "--model", model, "--out", tmp_path / "explained"),
        ("export", model, "--format", "pt2", "--out", tmp_path / "a.pt2"),
        ("evaluate", labels, labels, "--labels", model),
    ):
        assert run(*words, capsys=capsys)[0] == 0, words
    assert (tmp_path / "explained" / "index.html").is_file() and (tmp_path / "a.pt2").is_file()


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("hf:clinic/none", "no such repository"),
        ("hf:nonsense", "expected hf:OWNER/NAME"),
        ("hf:clinic/balls@v9", "has no revision v9"),
        ("hf:clinic/other", "expected a segkit model"),
        ("http://127.0.0.1:9/m.zip", "cannot be fetched"),
    ],
)
def test_an_address_without_a_model_is_one_line_and_exit_code_2(
    hub: Hub, finished: Path, scan: Path, model: str, sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hub.put_folder("clinic/balls", finished / "model")
    hub.put("clinic/other", {"README.md": b""})
    code, out, err = run("predict", scan, "--model", model, capsys=capsys)
    assert code == 2 and out == ""
    assert err.startswith("segkit: ") and sentence in err and err.count("\n") == 1


def test_a_fetched_model_can_be_carried_to_another_machine(
    hub: Hub, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.put_folder("clinic/balls", finished / "model")
    code, said, _ = run("fetch", "hf:clinic/balls", "--out", tmp_path, capsys=capsys)
    assert code == 0 and f"hf:clinic/balls: version {commit}" in said
    copied = {path.name: path.read_bytes() for path in (tmp_path / "balls").iterdir()}
    assert copied == hub.files("clinic/balls")
    code, _, err = run("fetch", "hf:clinic/balls", "--out", tmp_path, capsys=capsys)
    assert code == 2 and "balls: exists already" in err
    hub.put("clinic/balls", hub.files("clinic/balls") | {"SHA256SUMS": b""})
    assert run("fetch", "hf:clinic/balls", capsys=capsys)[0] == 0
    ((found,),) = find_models(["hf:clinic/balls"])
    assert found.root.name != commit, "fetch asks for the newest version"


def test_models_of_a_zip_are_told_by_its_name(finished: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "cv.zip", "w") as archive:
        for file in sorted((finished / "model").iterdir()):
            archive.write(file, f"cv/fold_0/model/{file.name}")
            archive.write(file, f"cv/fold_1/model/{file.name}")
    (folds,) = find_models([str(tmp_path / "cv.zip")])
    assert [str(each) for each in folds] == [f"{tmp_path}/cv.zip (fold_{n})" for n in (0, 1)]
    with pytest.raises(ModelError, match=rf"^{tmp_path}/cv\.zip: expected best\.ckpt in its folds"):
        find_models([str(tmp_path / "cv.zip")], "best")
    (folds[0].folder / "model.json").write_text("{}")
    with pytest.raises(ModelError, match=rf"^{tmp_path}/cv\.zip/fold_0/model/model\.json: "):
        folds[0].load()
