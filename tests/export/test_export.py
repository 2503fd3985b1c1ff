"""Laws of exports: other runtimes say of every window what PyTorch says, and know what to do."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from monai.networks.nets import UNet as MonaiUNet
from torch import Tensor
from typer.testing import CliRunner

from segkit.cli import terminal
from segkit.cli.main import app
from segkit.config.model import ModelDescription
from segkit.errors import ModelError, SegkitError, VolumeError
from segkit.export.agreement import Agreement, compare_outputs, noise_for
from segkit.export.export import Export, Form, export_model
from segkit.export.graphs import export_onnx
from segkit.export.whole_volume import WholeVolume
from segkit.geometry.grid import Grid
from segkit.inference.engines.torch_eager import LOGITS
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume, read_volume
from segkit.model.build import build_network
from segkit.model.folder import Model, described_model, load_model
from tests.models import model_of, saved

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

NAMES = {"onnx": "network.onnx", "openvino": "network.xml", "pt2": "network.pt2"}


def scan_of(seed: int = 0) -> Volume:
    values = np.random.default_rng(seed).standard_normal((22, 15, 13, 2)).astype(np.float32)
    return Volume(values, Grid((22, 15, 13), np.eye(4)))


@pytest.mark.parametrize("form", ["onnx", "openvino", "pt2"])
def test_an_exported_model_agrees_on_a_volume_through_windows(form: Form, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", {"skip": "additive_grid", "encoder": "cbam"})
    found = export_model(model, form, tmp_path / NAMES[form], check=True, scan=scan_of()).agreement
    assert found is not None and found.holds
    assert found.same_labels >= 0.9999
    maps = {name: value for name, value in found.differences.items() if name != LOGITS}
    assert set(maps) == set(model.network.maps())
    assert max(maps.values()) <= 1e-3
    assert any(info.kind == "channel" for info in model.network.maps().values())


def test_an_onnx_session_and_the_files_metadata_are_enough_to_predict(tmp_path: Path) -> None:
    model, scan = saved(tmp_path / "model"), scan_of()
    export_onnx(model, tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(
        (tmp_path / "a.onnx").read_bytes(), providers=["CPUExecutionProvider"]
    )
    told = json.loads(session.get_modelmeta().custom_metadata_map["segkit"])

    def ask(windows: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"image": windows.numpy()})[0])

    inferer = WholeVolume(
        spacing=told["spacing"],
        normalisation=told["normalisation"],
        interpolation=told["interpolation"],
        patch_size=told["windows"]["patch"],
        overlap=told["windows"]["overlap"],
        multiple=told["windows"]["multiple"],
        regions=bool(told["regions"]),
    )
    box = torch.from_numpy(np.moveaxis(scan.data, 3, 0).copy())
    labels = inferer.logits(box, (1.0, 1.0, 1.0), ask).argmax(dim=0).numpy()
    expected = Predictor(model, device="cpu", engine="torch")(scan).labels.data
    assert (labels == expected).mean() >= 0.9999


def test_a_module_that_python_gave_is_exported_as_any_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = MonaiUNet(
        spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), norm="batch"
    )
    description = ModelDescription.model_validate(
        {
            "segkit": "0",
            "run": "elsewhere",
            "channels": ["T1"],
            "labels": {"background": 0, "ball": 1},
            "network": {"given": {"multiple": [2, 2, 2]}},
            "spacing": (1.0, 1.0, 1.0),
            "normalisation": ["zscore"],
            "slices": "axial",
            "patch_size": [8, 8, 8],
        }
    )
    model = described_model(description, module)
    exported = export_model(model, "onnx", tmp_path / "a.onnx", check=True)
    assert exported.holds and exported.agreement is not None
    assert set(exported.agreement.differences) == {LOGITS}


@pytest.mark.parametrize("form", ["onnx", "openvino", "pt2"])
def test_nothing_is_overwritten_unasked_and_nothing_left_half_written(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of({}, 3)
    out = tmp_path / NAMES[form]
    with pytest.raises(ModelError, match=rf"expected a name that ends in \{out.suffix}"):
        export_model(model, form, tmp_path / "network.pt")
    out.with_suffix(".bin" if form == "openvino" else out.suffix).write_text("mine")
    with pytest.raises(VolumeError, match="exists already; pass --overwrite"):
        export_model(model, form, out)
    assert len(list(tmp_path.iterdir())) == 1
    export_model(model, form, out, overwrite=True)
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(self: object, windows: Tensor) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("segkit.export.graphs.Traced.forward", fail)
    with pytest.raises(ModelError, match=r"cannot hold this network: no such operator"):
        export_model(model, form, out, overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == written


def test_the_command_writes_checks_and_prints_the_differences(tmp_path: Path) -> None:
    saved(tmp_path / "run" / "model")
    out = tmp_path / "network.onnx"
    arguments = ["export", str(tmp_path / "run"), "--format", "onnx", "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--check"], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"wrote {out}" in done.output
    assert "largest difference of logits: " in done.output
    assert "largest difference of 1 map: " in done.output
    assert "same label: 100.0000% of voxels" in done.output
    again = CliRunner().invoke(app, [*arguments, "--check", "--overwrite", "--json"])
    terminal.start()
    told = json.loads(again.output)
    assert told["written"] == [str(out)] and told["holds"] is True
    assert set(told["differences"]) == {LOGITS, "skip.1/gate"}


def test_the_command_refuses_an_export_that_is_off_and_a_choice_of_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fold in (0, 1):
        saved(tmp_path / "five" / f"fold_{fold}" / "model")
    arguments = ["--format", "onnx", "--out", str(tmp_path / "a.onnx")]
    many = CliRunner().invoke(app, ["export", str(tmp_path / "five"), *arguments])
    assert isinstance(many.exception, SegkitError)
    assert "expected one model, found 2; choose one, such as" in str(many.exception)
    off = Export((tmp_path / "a.onnx",), Agreement({LOGITS: 0.2}, 3.0, 0.98))
    monkeypatch.setattr("segkit.export.export.export_model", lambda *given, **options: off)
    told = CliRunner().invoke(app, ["export", str(tmp_path / "five" / "fold_0"), *arguments])
    assert "same label: 98.0000% of voxels" in told.output
    assert isinstance(told.exception, SegkitError)
    assert "differs from PyTorch by more than rounding" in str(told.exception)


def test_a_model_that_was_loaded_is_the_one_that_is_exported(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    run = export_onnx(model, tmp_path / "a.onnx")
    assert compare_outputs(load_model(tmp_path / "model"), run, noise_for(model)).holds


@pytest.mark.data
@pytest.mark.parametrize("form", ["onnx", "openvino", "pt2", "monai-bundle"])
def test_an_exported_model_agrees_on_a_real_scan(
    form: Form, tmp_path: Path, data_folder: Path
) -> None:
    scan = read_volume(data_folder / "hippocampus" / "imagesTr" / "hippocampus_001.nii.gz")
    model = model_of({"skip": "additive_grid"}, 3)
    described = model.description.model_copy(update={"channels": ["MRI"]}).model_dump()
    described["normalisation"] = ["zscore"]
    described["patch_size"] = [32, 32, 32]
    description = ModelDescription.model_validate(described)
    torch.manual_seed(0)
    exported = export_model(
        Model(description, build_network(description).eval()),
        form,
        tmp_path / NAMES.get(form, "bundle"),
        check=True,
        scan=scan,
    )
    assert exported.holds, exported.lines()
