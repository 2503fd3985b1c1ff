"""Which engine runs a model."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.errors import ModelError
from segkit.geometry.grid import Grid
from segkit.inference.engines.choose import ConversionFallbackEngine, EngineName, choose_engine
from segkit.inference.engines.converted import (
    ConversionError,
    ConvertedEngine,
)
from segkit.inference.engines.openvino import OpenVino
from segkit.inference.engines.torch_compile import CompiledEngine
from segkit.inference.engines.torch_eager import LOGITS, TorchEngine
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.model.folder import load_model
from tests.engines import CPU, assert_agree, windows_of
from tests.models import model_of, saved


def test_auto_is_openvino_converted_once_for_a_model_with_a_folder(
    tmp_path: Path, conversions: list[str]
) -> None:
    model, batch = saved(tmp_path), windows_of(3)
    first = choose_engine("auto", model, device="cpu")
    assert isinstance(first, ConversionFallbackEngine) and isinstance(first.chosen, ConvertedEngine)
    assert_agree(first, model, batch)
    # The next time it is there, and gives the same to the last bit.
    again = choose_engine("auto", load_model(tmp_path), device="cpu")
    assert torch.equal(again(batch, ())[LOGITS], first(batch, ())[LOGITS])
    assert len(conversions) == 1


def test_auto_uses_pytorch_with_one_warning_if_a_conversion_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(OpenVino, "convert", fail)
    model, batch = saved(tmp_path), windows_of(3)
    with pytest.raises(ConversionError, match="openvino cannot run this network: no such operat"):
        choose_engine("openvino", model)(batch, ())
    engine = choose_engine("auto", model, device="cpu")
    eager = TorchEngine(model.network, device=CPU)(batch, ())[LOGITS]
    for _ in range(3):
        assert torch.equal(engine(batch, ())[LOGITS], eager)
    assert caplog.text.count("cannot run this network") == 1


def test_auto_is_pytorch_without_a_folder_or_in_a_precision_that_openvino_lacks(
    tmp_path: Path,
) -> None:
    assert type(choose_engine("auto", model_of({}, 3), device="cpu")) is TorchEngine
    double = choose_engine("auto", saved(tmp_path), device="cpu", precision=torch.float64)
    assert type(double) is TorchEngine
    assert isinstance(choose_engine("compile", model_of({}, 3), device="cpu"), CompiledEngine)


@pytest.mark.parametrize(("name", "package"), [("openvino", "openvino"), ("onnx", "onnxruntime")])
def test_an_engine_that_is_not_installed_is_one_sentence(
    name: EngineName, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    sentence = rf"{name} is not installed; run pip install 'segkit\[{name}\]'"
    with pytest.raises(ModelError, match=sentence):
        choose_engine(name, model_of({}, 3))
    if name == "openvino":
        assert type(choose_engine("auto", saved(tmp_path), device="cpu")) is TorchEngine


def test_an_engine_refuses_devices_and_precisions_that_it_does_not_support() -> None:
    model = model_of({}, 3)
    with pytest.raises(ModelError, match="openvino runs only on the CPU, found --device cuda"):
        choose_engine("openvino", model, device="cuda")
    for name in ("openvino", "onnx"):
        with pytest.raises(ModelError, match=r"float32.*found torch\.float16"):
            choose_engine(name, model, precision=torch.float16)


@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_a_volume_has_the_same_labels_in_every_engine(name: EngineName, tmp_path: Path) -> None:
    model = saved(tmp_path)
    values = np.random.default_rng(0).standard_normal((18, 11, 9, 2)).astype(np.float32)
    volume = Volume(values, Grid((18, 11, 9), np.eye(4)))
    expected = Predictor(model, engine="torch")(volume, maps=True, probabilities=True)
    found = Predictor.load(tmp_path, engine=name)(volume, maps=True, probabilities=True)
    assert (found.labels.data == expected.labels.data).mean() >= 0.9999
    assert found.probabilities is not None and expected.probabilities is not None
    np.testing.assert_allclose(found.probabilities.data, expected.probabilities.data, atol=1e-3)
    for key, attention_map in expected.maps.items():
        there, here = attention_map.volume, found.maps[key].volume
        assert there is not None and here is not None
        np.testing.assert_allclose(here.data, there.data, atol=1e-4)
