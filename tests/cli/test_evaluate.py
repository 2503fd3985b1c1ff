"""`segkit evaluate`: scores of folders that pair."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.cli.command import run
from tests.small import small_dataset


def test_evaluating_a_folder_against_itself_scores_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=3)
    labels, scores = folder / "labelsTr", tmp_path / "scores.json"
    code, out, _ = run("evaluate", labels, labels, "--out", scores, capsys=capsys)
    assert code == 0 and "ball" in out
    content = json.loads(scores.read_text())
    assert content["overall"]["dice"]["mean"] == 1.0
    assert content["overall"]["hd95_mm"]["mean"] == 0.0
    assert len(content["cases"]) == 3


def test_evaluating_refuses_what_does_not_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=2)
    empty = tmp_path / "empty"
    empty.mkdir()
    code, _, err = run("evaluate", empty, folder / "labelsTr", capsys=capsys)
    assert code == 2 and "holds no volume named as one in" in err
    one = nib.load(folder / "labelsTr" / "case_0.nii.gz")
    moved = one.affine.copy()
    moved[0, 3] += 5
    nib.save(nib.Nifti1Image(np.asarray(one.dataobj), moved), empty / "case_0.nii.gz")
    nib.save(one, empty / "case_1.nii.gz")
    code, _, err = run("evaluate", empty, folder / "labelsTr", capsys=capsys)
    assert code == 2 and "lies on another grid" in err


def test_scores_as_json_are_those_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = small_dataset(tmp_path / "data", num_cases=2) / "labelsTr"
    out = tmp_path / "scores.json"
    code, printed, err = run("evaluate", labels, labels, "--out", out, "--json", capsys=capsys)
    assert (code, err) == (0, "") and printed == out.read_text()
