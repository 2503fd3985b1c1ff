"""Exports in lower precision: smaller files that predict nearly the same labels."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from segkit.errors import ModelError
from segkit.export.export import export_model
from segkit.export.reduced import MOST_WINDOWS, ReducedCheck, windows_of
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume, read_labels, read_volume
from segkit.model.folder import Model
from segkit.training.fit import train
from tests.small import small_config, small_dataset

pytestmark = pytest.mark.usefixtures("unchecked_shapes")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    settings = {"steps": 40, "validate_every": 40, "pictures": 0}
    config = small_config(data, train=settings)
    return train(config, runs=tmp_path_factory.mktemp("runs")).model


def scan_and_labels(data: Path, number: int = 0) -> tuple[Volume, Volume]:

    name = f"case_{number}.nii.gz"
    return read_volume(data / "imagesTr" / name), read_labels(data / "labelsTr" / name)


@pytest.mark.parametrize(
    ("form", "precision", "name"),
    [
        ("onnx", "float16", "a.onnx"),
        ("onnx", "int8", "a.onnx"),
        ("openvino", "float16", "a.xml"),
    ],
)
def test_a_lower_precision_is_checked_on_a_scan_beside_float32(
    form: str, precision: str, name: str, data: Path, model: Model, tmp_path: Path
) -> None:
    scan, labels = scan_and_labels(data)
    calibration = [scan_and_labels(data, number)[0] for number in (1, 2)]
    exported = export_model(
        model,
        form,  # type: ignore[arg-type]
        tmp_path / name,
        precision=precision,  # type: ignore[arg-type]
        calibration=calibration if precision == "int8" else (),
        check=True,
        scan=scan,
        reference=labels,
    )
    found = exported.reduced
    assert found is not None and exported.holds and exported.agreement is None
    expected = Predictor(model, device="cpu", engine="torch")(scan).labels.data
    dice = 2 * (expected * labels.data).sum() / (expected.sum() + labels.data.sum())
    whole, reduced = found.dice["ball"]
    assert whole == pytest.approx(dice, abs=1e-3) and reduced == pytest.approx(whole, abs=0.05)
    assert found.dice_between["ball"] > 0.9 and min(found.seconds) > 0
    export_model(model, form, tmp_path / f"whole{Path(name).suffix}")  # type: ignore[arg-type]
    weights = ".bin" if form == "openvino" else ".onnx"
    sizes = [(tmp_path / each).with_suffix(weights).stat().st_size for each in (name, "whole")]
    assert sizes[0] < sizes[1] or form == "onnx"  # of a few thousand weights, the graph is most
    if form == "onnx":
        graph = onnx.load(tmp_path / name)
        told = json.loads({each.key: each.value for each in graph.metadata_props}["segkit"])
        assert told["precision"] == precision
        kinds = {each.data_type for each in graph.graph.initializer}
        wanted = onnx.TensorProto.FLOAT16 if precision == "float16" else onnx.TensorProto.INT8
        assert wanted in kinds
    assert exported.content()["same_labels"] == found.same_labels
    assert exported.lines()[-1].startswith("Dice of ball: ")


def test_ranges_are_measured_on_a_few_windows_that_are_not_empty(data: Path, model: Model) -> None:
    scan, _ = scan_and_labels(data)
    windows = windows_of(model, [scan] * 2)
    assert 0 < len(windows) <= MOST_WINDOWS
    assert all(tuple(window.shape) == (1, 16, 16, 16) for window in windows)
    empty = scan.like(np.zeros_like(scan.data))
    assert windows_of(model, [empty]) == []


def test_precisions_that_cannot_be_exported_are_refused(
    data: Path, model: Model, tmp_path: Path
) -> None:
    scan, labels = scan_and_labels(data)
    out = tmp_path / "a.onnx"
    with pytest.raises(
        ModelError, match=r"pt2 can only be written in float32, found float16; export"
    ):
        export_model(model, "pt2", tmp_path / "a.pt2", precision="float16")
    with pytest.raises(
        ModelError, match=r"int8 can only be written as onnx, because openvino would need the"
    ):
        export_model(model, "openvino", tmp_path / "a.xml", precision="int8", calibration=[scan])
    with pytest.raises(ModelError, match=r"int8 needs real scans .* as --calibration imagesTr"):
        export_model(model, "onnx", out, precision="int8")
    with pytest.raises(ModelError, match=r"the check of float16 .* needs a real scan .*pass one"):
        export_model(model, "onnx", out, precision="float16", check=True)
    with pytest.raises(
        ModelError, match=r"calibration and reference are only for float16 and int8"
    ):
        export_model(model, "onnx", out, reference=labels)
    assert not list(tmp_path.iterdir())


def test_a_check_fails_if_too_few_labels_equal_those_of_float32() -> None:
    found = ReducedCheck("int8", 0.97, {"ball": 0.8}, (2.0, 1.0), {"ball": (0.9, 0.75)})
    assert not found.holds and ReducedCheck("int8", 0.985, {}, (1.0, 1.0), {}).holds
    assert found.lines() == [
        "same label as float32: 97.0000% of the scan's voxels; Dice between both: ball 0.8000",
        "prediction: 2.00 s in float32, 1.00 s in int8",
        "Dice of ball: 0.9000 in float32, 0.7500 in int8",
    ]
