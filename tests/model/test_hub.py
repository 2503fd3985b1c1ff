"""Models on a hub: fetched once, compared with their checksums, and read as plain data."""

import sys
from pathlib import Path

import pytest
import torch

from segkit.errors import ModelError
from segkit.io.folder_cache import user_cache
from segkit.model.fetch_model import fetch_model
from segkit.model.folder import load_model, model_folders, save_model
from segkit.nn.network import weights_of
from tests.hub import Hub
from tests.models import model_of

GATED = {"skip": "additive_grid"}


def test_a_model_of_a_hub_is_the_model_that_was_put_there(hub: Hub, tmp_path: Path) -> None:
    model = model_of(GATED, 3)
    save_model(tmp_path, model)
    commit = hub.put_folder("clinic/brains", tmp_path)
    loaded = load_model("hf:clinic/brains")
    assert loaded.description == model.description
    own, other = weights_of(model.network).state_dict(), weights_of(loaded.network).state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)
    assert loaded.folder is not None and loaded.folder.name == commit
    assert load_model(Path("hf:clinic/brains")).description == model.description


def test_a_model_is_fetched_once_and_then_read_without_a_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, model_of(GATED, 3))
    hub.put_folder("clinic/brains", tmp_path)
    first = fetch_model("hf:clinic/brains")
    count = len(hub.asked)
    assert fetch_model("hf:clinic/brains") == first and len(hub.asked) == count
    hub.put_folder("clinic/brains", tmp_path / "first")  # the branch moves on
    assert fetch_model("hf:clinic/brains") == first and len(hub.asked) == count
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # nor is it imported
    assert fetch_model("hf:clinic/brains") == first


def test_a_newer_model_comes_only_if_it_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    save_model(tmp_path / "a", model_of(GATED, 3))
    save_model(tmp_path / "b", model_of({"encoder": "se"}, 3))
    before = hub.put_folder("clinic/brains", tmp_path / "a")
    hub.branches["clinic/brains"]["v1"] = before
    assert fetch_model("hf:clinic/brains").name == before
    after = hub.put_folder("clinic/brains", tmp_path / "b")
    assert fetch_model("hf:clinic/brains").name == before
    assert fetch_model("hf:clinic/brains", refresh=True).name == after
    assert fetch_model("hf:clinic/brains").name == after
    assert fetch_model("hf:clinic/brains@v1").name == before
    assert fetch_model(f"hf:clinic/brains@{before}").name == before


def test_a_model_that_is_damaged_in_the_cache_is_fetched_again(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tmp_path, model_of(GATED, 3))
    before = hub.put_folder("clinic/brains", tmp_path)
    folder = fetch_model("hf:clinic/brains")
    hub.put("clinic/brains", {"model.json": b"{}"})  # the same commit is fetched, not the newest
    content = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(content[:-1] + b"\0")
    assert fetch_model("hf:clinic/brains").name == before
    assert (folder / "weights.safetensors").read_bytes() == content
    assert "is damaged" in caplog.text


def test_only_files_of_a_model_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    save_model(tmp_path, model_of(GATED, 3))
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    files |= {"pytorch_model.bin": b"cos\nsystem\n", "setup.py": b"1/0", "a/model.json": b"{}"}
    hub.put("clinic/brains", files | {"README.md": b"# Brains"})
    folder = fetch_model("hf:clinic/brains")
    assert {path.name for path in folder.rglob("*")} == {
        "model.json",
        "weights.safetensors",
        "manifest.json",
    }


def test_the_folds_of_a_cross_validation_are_fetched_together(hub: Hub, tmp_path: Path) -> None:
    for fold in range(2):
        save_model(tmp_path / f"fold_{fold}" / "model", model_of(GATED, 3))
    hub.put_folder("clinic/brains", tmp_path)
    folders = model_folders("hf:clinic/brains")
    assert [folder.parent.name for folder in folders] == ["fold_0", "fold_1"]


@pytest.mark.parametrize("file", ["model.json", "weights.safetensors"])
def test_a_file_that_differs_from_its_checksum_is_refused(
    hub: Hub, tmp_path: Path, file: str
) -> None:
    save_model(tmp_path, model_of(GATED, 3))
    hub.put_folder("clinic/brains", tmp_path)
    content = (tmp_path / file).read_bytes()
    hub.falsified[file] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(ModelError, match=f"{file} differs from the published file: expected"):
        load_model("hf:clinic/brains")
    assert not list((user_cache() / "models").rglob("model.json"))


def test_an_unusable_address_is_refused_in_one_sentence(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("clinic/other", {"pytorch_model.bin": b"x", "README.md": b"x"})
    save_model(tmp_path, model_of(GATED, 3))
    hub.put_folder("clinic/secret", tmp_path)
    hub.put_folder("clinic/terms", tmp_path)
    hub.private.add("clinic/secret")
    hub.gated.add("clinic/terms")
    for address, sentence in {
        "hf:clinic/none": "has no such repository, or it is private; check the name, or log in",
        "hf:clinic/secret": "has no such repository, or it is private",
        "hf:clinic/terms": "requires you to accept its terms; accept them at http",
        "hf:clinic/other@v7": "has no revision v7; name a branch, a tag or a whole commit",
        "hf:clinic/other": "expected a segkit model with model.json, found README.md, pytorch",
        "hf:brains": "expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION",
        "hf:clinic/../brains": "expected hf:OWNER/NAME",
        f"{hub.url}/clinic/terms/tree/main": "found a page of a model hub; write hf:clinic/terms",
    }.items():
        with pytest.raises(ModelError, match=sentence):
            load_model(address)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"http://127\.0\.0\.1:9 cannot be reached: .*refused"):
        load_model("hf:clinic/terms")


def test_without_the_library_its_name_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"needs .* huggingface_hub; .*'segkit\[hub\]'"):
        load_model("hf:clinic/brains")
