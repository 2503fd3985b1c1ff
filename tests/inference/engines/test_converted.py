"""Laws of engines: each gives what PyTorch gives, and what was converted is kept and trusted only
as long as nothing it depends on has changed."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from segkit.inference.engines.choose import EngineName, choose_engine
from segkit.inference.engines.converted import (
    ENGINES_FOLDER,
    ConvertedEngine,
    digest,
)
from segkit.inference.engines.onnx import OnnxRuntime
from segkit.inference.engines.openvino import OpenVino
from segkit.inference.engines.torch_eager import LOGITS, TorchEngine
from segkit.io.folder_cache import MANIFEST, find_cached, user_cache
from segkit.model.folder import load_model
from segkit.nn.map_tap import editing
from tests.engines import CPU, agrees, assert_agree, windows_of
from tests.models import FAST, SLOW, model_of, saved

ROOT = Path(__file__).parents[3]


def is_kept(engine: ConvertedEngine, windows: torch.Tensor) -> bool:
    """Whether a conversion for windows of this shape is stored and may be used."""
    return find_cached(engine._name(tuple(windows.shape[1:])), engine._folders()) is not None


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_an_engine_gives_the_logits_and_maps_that_pytorch_gives(
    name: EngineName, family: str
) -> None:
    agrees(name, *FAST[family])


@pytest.mark.slow
@pytest.mark.parametrize("family", SLOW)
@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_every_family_runs_in_every_engine(name: EngineName, family: str) -> None:
    agrees(name, *SLOW[family])


def test_a_model_is_converted_once_and_anew_for_other_weights_windows_and_versions(
    tmp_path: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = saved(tmp_path), windows_of(3)
    assert_agree(ConvertedEngine(model, OpenVino()), model, batch)
    assert len(conversions) == 1
    again = load_model(tmp_path)
    assert_agree(ConvertedEngine(again, OpenVino()), again, batch)
    assert len(conversions) == 1
    assert not again.network.training

    with torch.no_grad():
        next(again.network.parameters()).add_(0.1)
    assert_agree(ConvertedEngine(again, OpenVino()), again, batch)
    assert len(conversions) == 2
    assert len(list((user_cache() / ENGINES_FOLDER).iterdir())) == 2
    assert len({digest(model, (2, size, 4, 4), f"2026.{size}") for size in (4, 8)}) == 2
    assert digest(model, (2, 4, 4, 4), "1") != digest(model, (2, 4, 4, 4), "2")
    assert digest(model, (2, 4, 4, 4), "1") == digest(load_model(tmp_path), (2, 4, 4, 4), "1")


def test_a_model_without_a_folder_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = model_of({}, 3)
    engine = ConvertedEngine(model, OnnxRuntime())
    engine(windows_of(3), ())
    assert len(list(tmp_path.iterdir())) == 1
    del engine
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_cannot_be_kept_is_made_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").write_text("a file where the folder should be")
    model = saved(tmp_path / "model")
    with caplog.at_level(logging.INFO):
        assert_agree(ConvertedEngine(model, OnnxRuntime()), model, windows_of(3))
    assert "cannot be written" in caplog.text
    assert not is_kept(ConvertedEngine(model, OnnxRuntime()), windows_of(3))


def test_nothing_beside_a_model_is_taken_for_its_conversion(
    tmp_path: Path, conversions: list[str]
) -> None:
    """A model comes with engines of another's weights, named and summed as its own would be."""
    model, batch = saved(tmp_path / "model"), windows_of(3)
    other = saved(tmp_path / "other", {"encoder": "se"})
    ConvertedEngine(other, OpenVino())(batch, ())
    (foreign,) = (user_cache() / ENGINES_FOLDER).iterdir()
    name = f"openvino-{digest(model, tuple(batch.shape[1:]), OpenVino().version)[:32]}"
    for place in (tmp_path / "model" / ENGINES_FOLDER, user_cache() / ENGINES_FOLDER):
        shutil.copytree(foreign, place / name)
    engine = ConvertedEngine(model, OpenVino())
    assert not is_kept(engine, batch)
    assert_agree(engine, model, batch)
    assert len(conversions) == 2


def test_edited_maps_are_edited_in_every_engine() -> None:
    model, batch = model_of({"skip": "additive_grid"}, 3), windows_of(3)
    engine = choose_engine("onnx", model)
    bare = engine(batch, ())[LOGITS]
    (key,) = model.network.maps()
    with editing(model.network, {key: torch.zeros_like}):
        shut = engine(batch, (key,))
        expected = TorchEngine(model.network, device=CPU)(batch, ())[LOGITS]
    assert torch.equal(shut[LOGITS], expected)
    assert not shut[key].any()
    assert not torch.allclose(expected, bare, atol=1e-3)
    assert torch.equal(engine(batch, ())[LOGITS], bare)


@pytest.mark.parametrize("name", ["torch", "openvino", "onnx"])
def test_an_engine_leaves_the_callers_arithmetic_as_it_was(name: EngineName) -> None:
    choose_engine(name, model_of({}, 3), device="cpu")(windows_of(3), ())
    assert (torch.full((4,), 1e-40) * 1.0).all()


def test_a_damaged_conversion_is_made_again(
    tmp_path: Path, conversions: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = saved(tmp_path), windows_of(3)
    assert_agree(ConvertedEngine(model, OpenVino()), model, batch)
    (folder,) = (user_cache() / ENGINES_FOLDER).iterdir()
    numbers = bytearray((folder / "network.bin").read_bytes())
    numbers[len(numbers) // 2] ^= 0xFF
    (folder / "network.bin").write_bytes(numbers)
    assert_agree(ConvertedEngine(model, OpenVino()), model, batch)
    assert len(conversions) == 2
    assert "is damaged and is made again" in caplog.text
    (folder / MANIFEST).write_text("{}")
    assert not is_kept(ConvertedEngine(model, OpenVino()), batch[:, :, :4])
    assert not is_kept(ConvertedEngine(model, OpenVino()), batch)
