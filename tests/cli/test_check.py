"""`segkit check`: what is understood, and what is wrong."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.cli.command import run
from tests.small import small_dataset


def test_check_describes_a_dataset_and_a_volume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=4)
    code, out, _ = run("check", folder, capsys=capsys)
    assert code == 0 and "4 cases, all readable" in out and "label 1 ball: in 4 cases" in out
    code, out, _ = run("check", folder / "imagesTr" / "case_0.nii.gz", capsys=capsys)
    assert code == 0 and "16 x 16 x 16 voxels of 1 x 1 x 1 mm" in out and "RAS" in out
    config = tmp_path / "c.yaml"
    config.write_text(
        f"data: {{folder: {folder}, patch_size: [16, 16, 16]}}\n"
        "network: {channels: [4, 8, 8], attention: {skip: additive_grid}}\n"
    )
    code, out, _ = run("check", config, "data.validation=0.5", capsys=capsys)
    assert code == 0
    assert "# 2 cases to train on, 2 held out" in out and "attention maps: skip.1/gate" in out


def test_check_names_the_case_whose_label_is_on_another_grid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=2)
    path = folder / "labelsTr" / "case_1.nii.gz"
    label = nib.load(path)
    values = np.asarray(label.dataobj).copy()
    nib.save(nib.Nifti1Image(values, np.diag([2.0, 1, 1, 1])), path)
    code, _, err = run("check", folder, capsys=capsys)
    assert code == 2
    assert "labelsTr/case_1.nii.gz: lies on another grid than case_1.nii.gz: its spacing is" in err
    assert "2x1x1 mm, not 1x1x1 mm, so that voxels lie up to 15 voxels apart; resample" in err


def test_check_prints_its_result_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    folder = finished.parents[1] / "data"
    code, out, _ = run("check", folder, "--json", capsys=capsys)
    told = json.loads(out)
    assert code == 0 and told["kind"] == "dataset" and told["channels"] == ["MRI"]
    assert told["shapes"] == [[16, 16, 16]] * 4 and told["spacings_mm"] == [[1, 1, 1]] * 4
    labels = [np.asarray(nib.load(path).dataobj) for path in folder.glob("labelsTr/*")]
    voxels = sum(int(label.sum()) for label in labels)
    assert told["classes"][1] == {"name": "label 1 ball", "cases": 4, "voxels": voxels}
    code, out, _ = run("check", folder / "imagesTr" / "case_0.nii.gz", "--json", capsys=capsys)
    told = json.loads(out)
    assert told["kind"] == "volume" and told["shape"] == [16, 16, 16]
    assert told["affine"] == np.eye(4).tolist() and told["orientation"] == "RAS"
    code, out, _ = run("check", finished / "config.yaml", "train.steps=7", "--json", capsys=capsys)
    told = json.loads(out)
    assert told["kind"] == "config" and told["config"]["train"]["steps"] == 7
    assert told["maps"] == ["skip.1/gate"]
    assert len(told["training_cases"]) == 3 and len(told["held_out_cases"]) == 1
