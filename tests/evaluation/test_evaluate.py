"""Files are paired by name and scored on one grid, with the names that a dataset.json gives."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import segkit
from segkit.errors import VolumeError
from segkit.evaluation.evaluate import evaluate, labels_file
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, write_volume
from segkit.io.whole_numbers import rounded_in_words


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two cases: one predicted as it is, and one of which half is missed."""
    reference = np.zeros((4, 4, 4), np.uint8)
    reference[:2] = 1
    half = reference.copy()
    half[1] = 0
    grid = Grid((4, 4, 4), np.diag([1.0, 1.0, 2.0, 1.0]))
    for name, predicted in (("a", reference), ("b", half)):
        write_volume(tmp_path / "found" / f"{name}_seg.nii.gz", Volume(predicted, grid))
        write_volume(tmp_path / "labels" / f"{name}.nii.gz", Volume(reference, grid))
    return tmp_path / "found", tmp_path / "labels"


def test_paths_may_be_text_and_scores_are_those_worked_out_by_hand(
    folders: tuple[Path, Path],
) -> None:
    found, references = folders
    content = {"labels": {"background": 0, "ball": 1}}
    (references.parent / "dataset.json").write_text(json.dumps(content))
    evaluation = segkit.evaluate(str(found), str(references))
    assert [(row.case, row.name) for row in evaluation.cases] == [("a", "ball"), ("b", "ball")]
    # b: 16 voxels of 32 found, so Dice is 32 / 48; a voxel has 2 mm³.
    assert [row.metrics["dice"] for row in evaluation.cases] == [1, pytest.approx(2 / 3)]
    assert evaluation.cases[1].reference_ml == pytest.approx(0.064)
    assert evaluation.summary.overall.metrics["dice"].mean == pytest.approx(5 / 6)
    told = evaluation.to_json()["provenance"]
    assert [each["case"] for each in told["inputs"]] == ["a", "b"]
    assert told["labels"][0]["file"] == "dataset.json"


def test_without_names_every_number_is_a_label(folders: tuple[Path, Path]) -> None:
    assert [row.name for row in segkit.evaluate(*folders).cases] == ["label 1"] * 2


def test_numbers_that_a_dataset_ignores_are_told_of_as_they_are_in_the_prediction(
    folders: tuple[Path, Path],
) -> None:
    found, references = folders
    data = {"folder": str(references), "files": {"images": {"x": "*.nii.gz"}, "label": "*.nii.gz"}}
    labels = {"background": 0, "ball": 1, "ignore": "others"}
    config = references.parent / "data.yaml"
    config.write_text(json.dumps({"data": {**data, "labels": labels}}))
    grid = Grid((4, 4, 4), np.diag([1.0, 1.0, 2.0, 1.0]))
    values = np.zeros((4, 4, 4), np.uint8)
    values[:2], values[3] = 1, 9
    write_volume(references / "b.nii.gz", Volume(values, grid))  # 9 is not counted
    assert [row.metrics["dice"] for row in evaluate(found, config).cases] == [1, 2 / 3]
    write_volume(found / "b_seg.nii.gz", Volume(values, grid))
    assert "found 9, which is ignored; replace it" in evaluate(found, config).failures["b"]


def test_a_reference_without_a_prediction_is_refused(folders: tuple[Path, Path]) -> None:
    found, references = folders
    (found / "b_seg.nii.gz").unlink()
    with pytest.raises(segkit.VolumeError, match=r"1 of 2 references in .*labels: b; predict"):
        segkit.evaluate(found, references)


def test_a_prediction_on_another_grid_is_reported_and_does_not_stop_the_others(
    folders: tuple[Path, Path],
) -> None:
    found, references = folders
    moved = np.zeros((4, 4, 4), np.uint8)
    write_volume(found / "b_seg.nii.gz", Volume(moved, Grid((4, 4, 4), np.eye(4))))
    evaluation = segkit.evaluate(found, references)
    assert [row.case for row in evaluation.cases] == ["a"]
    assert "lies on another grid than" in evaluation.failures["b"]


def test_a_missing_file_of_label_names_is_refused(tmp_path: Path) -> None:
    assert labels_file(tmp_path, None) is None
    with pytest.raises(
        segkit.VolumeError, match=r"other.json: no such file or folder; check the path"
    ):
        labels_file(tmp_path, tmp_path / "other.json")


def test_labels_that_were_rounded_are_told(tmp_path: Path) -> None:
    labels = np.zeros((4, 4, 4))
    labels[1:3] = 3
    for side, values in (("p", labels), ("r", labels * (1 - 1e-4))):
        for case in ("a", "b"):
            (tmp_path / side).mkdir(exist_ok=True)
            nib.save(
                nib.Nifti1Image(values if case == "a" else labels, np.eye(4)),
                tmp_path / side / f"{case}.nii",
            )
    scores = evaluate(tmp_path / "p", tmp_path / "r")
    file = str(tmp_path / "r" / "a.nii")
    assert scores.rounded == {file: pytest.approx(3e-4)} and scores.to_json()["rounded"]
    assert scores.summary.overall.metrics["dice"].mean == 1
    told = rounded_in_words(scores.rounded)
    assert told == (
        f"rounded the labels of 1 file to whole numbers; the largest difference was 0.0003, in "
        f"{file}"
    )
    assert "rounded" not in evaluate(tmp_path / "p", tmp_path / "p").to_json()


def test_pictures_with_and_without_a_pixel_size_are_refused_together(tmp_path: Path) -> None:
    for case, dots_per_inch in (("a", (50800, 50800)), ("b", None)):
        picture = Image.fromarray(np.eye(8, dtype=np.uint8))
        picture.save(tmp_path / f"{case}.png", **({"dpi": dots_per_inch} if dots_per_inch else {}))
    with pytest.raises(VolumeError, match=r"but a has one and b has none; set one for all by --pi"):
        evaluate(tmp_path, tmp_path)
    assert evaluate(tmp_path, tmp_path, pixel_size="0.5 um").summary.unit == "µm"
