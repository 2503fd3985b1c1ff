"""A MONAI bundle runs under MONAI's own command, needs nothing of segkit, and says the same."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from segkit.errors import ModelError, VolumeError
from segkit.export.bundle_check import as_in_nifti, run_bundle, scan_for
from segkit.export.deployment import deployment
from segkit.export.export import SAME_IN_BUNDLE, export_model
from segkit.export.monai_bundle import NETWORK, export_bundle
from segkit.geometry.grid import Orientation
from segkit.inference.predictor import Predictor
from segkit.model.folder import Model, load_model
from segkit.nn.network import weights_of
from tests.bundles import REGIONS, model_for


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("kind", ["classes", pytest.param("regions", marks=pytest.mark.slow)])
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
    assert found.grid.agrees_with(expected.grid, tolerance=1e-3)
    assert found.data.dtype == np.uint8
    assert len(np.unique(expected.data)) == 3
    assert (found.data == expected.data).mean() >= SAME_IN_BUNDLE


def test_a_bundle_has_the_keys_of_monai_and_weights_that_run_no_code(tmp_path: Path) -> None:
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
    assert "Run it only if you trust its author" in text and "- 2: white" in text
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert "segkit." not in (folder / "configs" / "inference.json").read_text()


@pytest.mark.slow
def test_a_bundle_takes_nan_as_the_background_if_its_model_does(tmp_path: Path) -> None:
    model = model_for()
    told = model.description.model_copy(update={"nan": "background"})
    model = replace(model, description=told)
    scan = as_in_nifti(scan_for(model))
    scan.data[:4], scan.data[4:6] = np.nan, np.inf
    export_bundle(model, tmp_path / "bundle")
    found = run_bundle(tmp_path / "bundle", scan).data
    expected = Predictor(model, engine="torch")(scan).labels.data
    assert (found == expected).mean() >= SAME_IN_BUNDLE
    assert len(np.unique(expected)) > 1


def test_a_folder_other_than_a_bundle_is_never_replaced(tmp_path: Path) -> None:
    model = model_for()
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "mine.txt").write_text("irreplaceable")
    with pytest.raises(VolumeError, match="exists already; pass --overwrite"):
        export_model(model, "monai-bundle", tmp_path / "scans")
    with pytest.raises(ModelError, match="expected a bundle to overwrite, found something else"):
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


def test_a_second_stage_is_refused(tmp_path: Path) -> None:
    model = model_for()
    second = Model(model.description, model.network, (model,))
    with pytest.raises(ModelError, match="also needs a first stage; export it as onnx"):
        export_bundle(second, tmp_path / "bundle")
    assert not (tmp_path / NETWORK).exists()
