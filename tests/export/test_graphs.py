"""ONNX and OpenVINO: named outputs, a free batch, and what a deployer must know."""

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from segkit.errors import ModelError
from segkit.export.agreement import compare_outputs, noise_for
from segkit.export.deployment import deployment
from segkit.export.export import EXPORT_SUFFIXES, export_model
from segkit.export.graphs import export_onnx, export_openvino, export_pt2
from segkit.inference.engines.converted import Traced
from segkit.inference.engines.openvino import OpenVino
from segkit.inference.engines.torch_eager import LOGITS, PRESENCE
from tests.models import FAST, SLOW, model_of

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

GRAPHS = {"onnx": export_onnx, "openvino": export_openvino, "pt2": export_pt2}
NAMES = {"onnx": "network.onnx", "openvino": "network.xml", "pt2": "network.pt2"}


def agrees(form: str, spatial_dims: int, attention: dict[str, Any], folder: Path) -> None:
    model = model_of(attention, spatial_dims)
    run = GRAPHS[form](model, folder / NAMES[form])
    for batch_size in (1, 3):
        assert compare_outputs(model, run, noise_for(model), batch_size=batch_size).holds


@pytest.mark.parametrize("family", ["self-attention", "planes with presence"])
@pytest.mark.parametrize("form", ["onnx", "pt2", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_batch_may_have_any_length(form: str, family: str, tmp_path: Path) -> None:
    agrees(form, *FAST[family], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAST, *SLOW])
@pytest.mark.parametrize("form", [*GRAPHS])
def test_every_family_takes_batches_of_any_length(form: str, family: str, tmp_path: Path) -> None:
    agrees(form, *{**FAST, **SLOW}[family], tmp_path)


def test_onnx_has_named_outputs_any_batch_size_and_its_preprocessing(tmp_path: Path) -> None:
    model = model_of(*reversed(FAST["planes with presence"]))
    export_onnx(model, tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(
        (tmp_path / "a.onnx").read_bytes(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    assert names == [LOGITS, *sorted(model.network.maps()), PRESENCE]
    (image,) = session.get_inputs()
    assert image.name == "image" and image.shape == ["batch", 2, 16, 12, 8]
    assert all(output.shape[0] == "batch" for output in session.get_outputs())
    (told,) = [entry.value for entry in onnx.load(tmp_path / "a.onnx").metadata_props]
    assert json.loads(told) == deployment(model)
    assert session.get_modelmeta().custom_metadata_map == {"segkit": told}


@pytest.mark.parametrize("family", ["gated"])
def test_onnx_takes_windows_of_any_size_if_it_was_asked_to(family: str, tmp_path: Path) -> None:
    model = model_of(*reversed(FAST[family]))
    run = export_onnx(model, tmp_path / "a.onnx", any_size=True)
    names = tuple(Traced(model.network).names)
    for size in ((8, 24, 16), (32, 8, 8)):
        windows = torch.randn(2, 2, *size)
        with torch.inference_mode():
            expected = Traced(model.network).eval()(windows)
        for ours, theirs in zip(expected, run(windows, names), strict=True):
            torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    (told,) = [entry.value for entry in onnx.load(tmp_path / "a.onnx").metadata_props]
    assert json.loads(told) == deployment(model, any_size=True)
    assert json.loads(told)["windows"]["any_size"] is True


def test_a_network_for_one_size_is_refused_for_any_size_and_leaves_no_file(tmp_path: Path) -> None:
    model = model_of(*reversed(FAST["self-attention"]))
    with pytest.raises(ModelError, match=r"takes only windows of its patch; export without any"):
        export_onnx(model, tmp_path / "a.onnx", any_size=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["openvino", "pt2", "monai-bundle"])
def test_only_onnx_takes_windows_of_any_size(form: Any, tmp_path: Path) -> None:
    model = model_of(*reversed(FAST["plain"]))
    out = tmp_path / f"a{EXPORT_SUFFIXES[form]}"
    with pytest.raises(ModelError, match="windows of any size need ONNX, found"):
        export_model(model, form, out, any_size=True)


def test_a_program_has_named_outputs_any_batch_size_and_its_preprocessing(
    tmp_path: Path,
) -> None:
    model = model_of(*reversed(FAST["planes with presence"]))
    export_pt2(model, tmp_path / "a.pt2")
    told = {"segkit": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=told)
    assert json.loads(told["segkit"]) == deployment(model)
    network = program.module()
    for count in (1, 3):
        outputs = network(torch.zeros(count, 2, 16, 12, 8))
        assert set(outputs) == {LOGITS, *model.network.maps(), PRESENCE}
        assert outputs[LOGITS].shape == (count, 3, 16, 12, 8)


def test_openvino_has_named_outputs_any_batch_size_and_its_preprocessing(
    tmp_path: Path,
) -> None:
    model = model_of({"skip": "additive_grid"}, 3)
    export_openvino(model, tmp_path / "a.xml")
    graph = OpenVino().core.read_model(tmp_path / "a.xml")
    names = [output.get_any_name() for output in graph.outputs]
    assert names == [LOGITS, *sorted(model.network.maps())]
    assert graph.inputs[0].get_any_name() == "image"
    assert str(graph.inputs[0].partial_shape) == "[?,2,16,8,8]"
    assert json.loads(graph.get_rt_info(["segkit"]).astype(str)) == deployment(model)
