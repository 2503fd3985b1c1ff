"""A MONAI bundle runs under MONAI's own command, needs nothing of segkit, and says the same."""

import json
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from segkit.config.model import ModelDescription
from segkit.errors import ModelError, VolumeError
from segkit.export import bundle_check
from segkit.export.bundle_check import as_in_nifti, run_bundle, same_labels, scan_for
from segkit.export.deployment import deployment
from segkit.export.export import SAME_IN_BUNDLE, export_model
from segkit.export.graphs import example_windows
from segkit.export.monai_bundle import NETWORK, export_bundle
from segkit.export.torchscript import METADATA, export_torchscript, read_torchscript
from segkit.geometry.grid import Orientation
from segkit.inference.engines.torch_eager import LOGITS
from segkit.inference.predictor import Predictor
from segkit.model.build import build_network
from segkit.model.folder import Model, load_model
from segkit.nn.network import weights_of
from tests.models import FAST, SLOW, model_of

REGIONS: dict[str, Any] = {
    "channels": ["T1", "T2"],
    "labels": {"background": 0, "whole": 2, "core": 1},
    "regions": {"whole": [1, 2], "core": [1]},
    "normalisation": [
        {"kind": "ct", "lower": -90, "upper": 80, "mean": 5, "std": 40},
        {"kind": "zscore", "nonzero": True},
    ],
    "postprocessing": {"largest_foreground": True, "largest_of": [1]},
    "interpolation": "cubic",
    "spacing": (1.0, 1.0, 3.5),
}


def model_for(seed: int = 1, **changes: Any) -> Model:
    torch.manual_seed(seed)
    told = ModelDescription.model_validate(
        {
            "segkit": "0",
            "run": "brains",
            "channels": ["T1"],
            "labels": {"background": 0, "grey": 1, "white": 2},
            "network": {"channels": [4, 8, 8], "attention": {"skip": "additive_grid"}},
            "spacing": (1.0, 1.2, 1.5),
            "interpolation": "cubic",
            "normalisation": ["zscore"],
            "slices": "axial",
            "patch_size": [16, 16, 8],
            **changes,
        }
    )
    return Model(told, build_network(told).eval())


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("kind", ["classes", "regions"])
def test_monai_runs_a_bundle_to_the_labels_of_segkit_on_an_oblique_scan(
    kind: str, tmp_path: Path
) -> None:
    # Of this seed both regions and the background are a good share of the scan.
    model = model_for(seed=3, **REGIONS) if kind == "regions" else model_for()
    scan = as_in_nifti(scan_for(model))
    assert Orientation.of(scan.grid.affine).code == "LPS"
    assert np.abs(scan.grid.affine[:3, :3]).min() > 0.01
    assert max(scan.grid.spacing) > 1.5 * min(scan.grid.spacing)
    export_bundle(model, tmp_path / "bundle")
    found = run_bundle(tmp_path / "bundle", scan)
    expected = Predictor(model, engine="torch")(scan).labels
    assert found.grid.agrees_with(expected.grid)
    assert found.data.dtype == np.uint8
    assert len(np.unique(expected.data)) == 3
    assert (found.data == expected.data).mean() >= SAME_IN_BUNDLE


def test_a_bundle_has_what_monai_asks_for_and_weights_that_run_nothing(tmp_path: Path) -> None:
    model = model_for()
    export_bundle(model, tmp_path / "bundle")
    folder = tmp_path / "bundle"
    assert set(content_of(folder)) == {
        "LICENSE",
        "configs/inference.json",
        "configs/metadata.json",
        "docs/README.md",
        "models/model.ts",
        "models/segkit/model.json",
        "models/segkit/weights.safetensors",
        "scripts/__init__.py",
        "scripts/whole_volume.py",
    }
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    required = ("version", "changelog", "monai_version", "pytorch_version", "numpy_version")
    required += ("required_packages_version", "task", "description", "authors", "copyright")
    assert all(metadata[name] for name in required)
    formats = metadata["network_data_format"]
    assert formats["inputs"]["image"]["channel_def"] == {"0": "T1"}
    assert formats["outputs"]["pred"]["channel_def"] == {
        "0": "background",
        "1": "grey",
        "2": "white",
    }
    assert metadata["segkit"] == json.loads(json.dumps(deployment(model)))
    kept: dict[str, Tensor] = load_file(folder / "models" / "segkit" / "weights.safetensors")
    for key, value in weights_of(model.network).state_dict().items():
        assert torch.equal(kept[key], value)
    assert load_model(folder / "models" / "segkit").description == model.description
    text = (folder / "docs" / "README.md").read_text()
    assert "Run it only if you trust who made it" in text and "- 2: white" in text
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert "segkit." not in (folder / "configs" / "inference.json").read_text()


@pytest.fixture
def unchecked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """While torch traces, sizes are tensors, not the integers that signatures tell of."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


def takes_any_batch_on_any_device(
    spatial_dims: int, attention: dict[str, Any], folder: Path
) -> None:
    model = model_of(attention, spatial_dims)
    export_torchscript(model, folder / "model.ts", {"name": "brains"})
    run = read_torchscript(folder / "model.ts")
    for count in (1, 3):
        batch = example_windows(model)[:1].repeat(count, 1, 1, 1, 1)
        batch *= torch.arange(1, count + 1)[:, None, None, None, None]
        with torch.no_grad():
            expected = model.network(batch)
        (found,) = run(batch, (LOGITS,))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    told = {METADATA: ""}
    with warnings.catch_warnings(action="ignore"):
        kept = torch.jit.load(folder / "model.ts", _extra_files=told)
    assert json.loads(told[METADATA]) == {"name": "brains"}
    # What a trace fixed of the device that it was made on would fail on another.
    assert "Device = prim::Constant" not in str(kept.inlined_graph)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("family", ["self-attention", "planes with presence"])
def test_the_network_of_a_bundle_takes_any_batch_on_any_device(family: str, tmp_path: Path) -> None:
    takes_any_batch_on_any_device(*FAST[family], tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("family", [*FAST, *SLOW])
def test_the_network_of_every_family_takes_any_batch_on_any_device(
    family: str, tmp_path: Path
) -> None:
    takes_any_batch_on_any_device(*{**FAST, **SLOW}[family], tmp_path)


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    model = model_for()
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "mine.txt").write_text("irreplaceable")
    with pytest.raises(VolumeError, match="exists already; pass --overwrite"):
        export_model(model, "monai-bundle", tmp_path / "scans")
    with pytest.raises(ModelError, match="is no bundle, and is left alone"):
        export_model(model, "monai-bundle", tmp_path / "scans", overwrite=True)
    assert content_of(tmp_path) == {"scans/mine.txt": b"irreplaceable"}


def test_a_bundle_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    export_model(model_for(), "monai-bundle", folder)
    (folder / "notes.txt").write_text("of the old one")
    before = content_of(tmp_path)

    def fail(*arguments: object) -> str:
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("segkit.export.monai_bundle.readme_of", fail)
        with pytest.raises(OSError, match="the disk is full"):
            export_model(model_for(), "monai-bundle", folder, overwrite=True)
    assert content_of(tmp_path) == before
    export_model(model_for(run="others"), "monai-bundle", folder, overwrite=True)
    assert not (folder / "notes.txt").exists()
    assert json.loads((folder / "configs" / "metadata.json").read_text())["name"] == "others"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_check_of_a_bundle_compares_its_network_and_what_monai_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_for()
    asked: list[Path] = []

    def ran(model: Model, folder: Path, scan: object) -> float:
        asked.append(folder)
        return 0.9

    monkeypatch.setattr("segkit.export.export.same_labels", ran)
    exported = export_model(model, "monai-bundle", tmp_path / "bundle", check=True)
    assert asked == [tmp_path / "bundle"]
    assert exported.agreement is not None and exported.agreement.holds
    assert not exported.holds
    assert "same label as segkit's: 90.0000% of voxels" in exported.lines()[-1]


def test_a_bundle_that_monai_cannot_run_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback …\nOSError: no model.ts")
    monkeypatch.setattr(bundle_check.subprocess, "run", lambda *given, **options: failed)
    with pytest.raises(ModelError, match=r"MONAI cannot run .*bundle: .*OSError: no model\.ts"):
        same_labels(model_for(), tmp_path / "bundle", scan_for(model_for()))
    monkeypatch.setattr(bundle_check, "BUNDLE_LIBRARIES", ("monai_of_the_future",))
    with pytest.raises(ModelError, match="monai_of_the_future is not installed; pip install monai"):
        run_bundle(tmp_path / "bundle", scan_for(model_for()))


def test_a_second_stage_is_refused(tmp_path: Path) -> None:
    model = model_for()
    second = Model(model.description, model.network, (model,))
    with pytest.raises(ModelError, match="takes the labels of a first stage; export it as onnx"):
        export_bundle(second, tmp_path / "bundle")
    assert not (tmp_path / NETWORK).exists()
