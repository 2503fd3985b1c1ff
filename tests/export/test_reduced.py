"""Exports in lower precision: smaller files that predict nearly the same labels."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from segkit.config.model import ModelDescription
from segkit.errors import ModelError
from segkit.export.export import export_model
from segkit.export.graphs import export_onnx
from segkit.export.reduced import (
    MOST_WINDOWS,
    ExportPrecision,
    GraphEngine,
    ReducedCheck,
    check_reduced,
    windows_of,
)
from segkit.geometry.grid import Grid
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume, read_labels, read_volume
from segkit.model.build import build_network
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
        pytest.param("openvino", "float16", "a.xml", marks=pytest.mark.slow),
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
    with pytest.raises(ModelError, match=r"a reference is only for float16 and int8, found float3"):
        export_model(model, "onnx", out, reference=labels)
    with pytest.raises(ModelError, match=r"calibration is only for int8, found float16; choose in"):
        export_model(model, "onnx", out, precision="float16", calibration=[scan])
    with pytest.raises(ModelError, match=r"a reference is only for the check, which is not asked"):
        export_model(model, "onnx", out, precision="float16", reference=labels)
    for precision in ("float32", "float16"):
        with pytest.raises(ModelError, match=r"a scan is only for the check, .*or leave the scan"):
            export_model(model, "onnx", out, precision=precision, scan=scan)
    assert not list(tmp_path.iterdir())


def test_a_check_fails_if_too_few_labels_equal_those_of_float32() -> None:
    found = ReducedCheck(
        "int8", 0.97, {"ball": 0.95}, (2.0, 1.0), {"ball": (0.9, 0.75)}, {"ball": 100}
    )
    assert found.faults() == [
        "only 97.0000% of the voxels have the same label in int8 as in float32 (expected 98.0%)"
    ]
    assert not found.holds and ReducedCheck("int8", 0.985, {}, (1.0, 1.0), {}, {}).holds
    assert found.lines() == [
        "same label as float32: 97.0000% of the scan's voxels; Dice between both: ball 0.9500",
        "prediction: 2.00 s in float32, 1.00 s in int8",
        "Dice of ball: 0.9000 in float32, 0.7500 in int8",
    ]


@pytest.mark.parametrize(("precision", "least"), [("float16", 0.99), ("int8", 0.9)])
def test_a_check_fails_if_one_class_differs_in_more_than_a_few_voxels(
    precision: ExportPrecision, least: float
) -> None:
    def check(dice: float, apart: int) -> ReducedCheck:
        between = {"organ": 1.0, "tumour": dice, "cyst": float("nan")}
        voxels = {"organ": 0, "tumour": apart, "cyst": 0}
        return ReducedCheck(precision, 1.0, between, (1.0, 1.0), {}, voxels)

    assert check(least, 11).holds and check(0.0, 10).holds
    assert check(least - 0.01, 11).faults() == [
        f"the Dice of tumour between both is {least - 0.01:.4f} (expected {least})"
    ]


@pytest.fixture(scope="module")
def flat() -> Model:
    """A 2D model, untrained."""
    torch.manual_seed(0)
    description = ModelDescription.model_validate(
        {
            "segkit": "0",
            "run": "flat",
            "channels": ["MR"],
            "labels": {"background": 0, "cell": 1},
            "network": {"channels": [4, 8], "spatial_dims": 2},
            "spacing": (1.0, 1.0, 1.0),
            "normalisation": ["zscore"],
            "slices": "axial",
            "patch_size": [16, 16],
        }
    )
    return Model(description, build_network(description).eval())


def test_a_network_that_finds_nothing_does_not_hold(flat: Model) -> None:
    def bright(windows: Tensor, names: tuple[str, ...]) -> list[Tensor]:
        return [torch.cat([torch.zeros_like(windows), windows - 2], dim=1)]

    def nothing(windows: Tensor, names: tuple[str, ...]) -> list[Tensor]:
        return [torch.cat([torch.zeros_like(windows), -torch.ones_like(windows)], dim=1)]

    image = np.random.default_rng(0).normal(0, 0.1, (16, 16, 8)).astype(np.float32)
    image[4:7, 4:7, 4:7] += 5
    scan = Volume(image, Grid((16, 16, 8), np.eye(4)))
    found = check_reduced(flat, bright, nothing, "int8", scan)
    # 27 of 2048 voxels are bright.
    assert found.same_labels == 1 - 27 / 2048 and found.voxels_apart == {"cell": 27}
    assert found.faults() == ["the Dice of cell between both is 0.0000 (expected 0.9)"]
    assert check_reduced(flat, bright, bright, "int8", scan).holds


@pytest.mark.parametrize("slices", [1, 6])
@pytest.mark.parametrize(
    ("form", "precision", "name"),
    [
        ("onnx", "float16", "a.onnx"),
        ("onnx", "int8", "a.onnx"),
        pytest.param("openvino", "float16", "a.xml", marks=pytest.mark.slow),
    ],
)
def test_a_2d_network_is_checked_on_a_scan_of_few_slices(
    form: str, precision: str, name: str, slices: int, flat: Model, tmp_path: Path
) -> None:
    image = np.random.default_rng(0).normal(size=(20, 16, slices)).astype(np.float32)
    scan = Volume(image, Grid((20, 16, slices), np.eye(4)))
    found = export_model(
        flat,
        form,  # type: ignore[arg-type]
        tmp_path / name,
        precision=precision,  # type: ignore[arg-type]
        calibration=[scan] if precision == "int8" else (),
        check=True,
        scan=scan,
    ).reduced
    assert found is not None and found.same_labels > 0.9


def test_logits_of_padded_windows_are_those_of_their_slices(flat: Model, tmp_path: Path) -> None:
    engine = GraphEngine(export_onnx(flat, tmp_path / "a.onnx"), (16, 16, 8))
    windows = torch.randn(1, 1, 16, 16, 3)
    with torch.inference_mode():
        expected = flat.network(windows)
    torch.testing.assert_close(engine(windows, ())["logits"], expected, atol=1e-4, rtol=1e-4)


def test_an_export_that_the_runtime_cannot_run_is_told_in_a_sentence(
    flat: Model, tmp_path: Path
) -> None:
    engine = GraphEngine(export_onnx(flat, tmp_path / "a.onnx"), (16, 16, 4))
    with pytest.raises(ModelError, match=r"the exported network cannot be run: .*; do not use the"):
        engine(torch.zeros(1, 1, 16, 16, 3), ())
