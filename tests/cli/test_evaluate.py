"""`segkit evaluate`: scores of folders that pair."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from segkit.config.labels import Labelling
from segkit.evaluation import scores
from segkit.evaluation.evaluate import evaluate
from segkit.inference.label_statistics import label_statistics
from segkit.io.volume import read_volume, write_volume
from tests.cli.command import run
from tests.small import small_dataset


def test_evaluating_a_folder_against_itself_scores_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=3)
    labels, out_file = folder / "labelsTr", tmp_path / "scores.json"
    code, out, _ = run("evaluate", labels, labels, "--out", out_file, capsys=capsys)
    assert code == 0 and "ball" in out
    content = json.loads(out_file.read_text())
    assert content["overall"]["dice"]["mean"] == 1.0
    assert content["overall"]["hd95_mm"]["mean"] == 0.0
    assert len(content["cases"]) == 3


def test_evaluating_refuses_files_that_do_not_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=2)
    empty = tmp_path / "empty"
    empty.mkdir()
    code, _, err = run("evaluate", empty, folder / "labelsTr", capsys=capsys)
    assert code == 2 and "expected volumes named like those in" in err
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


def label_file(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def disc(radius: float, shape: tuple[int, ...] = (64, 64)) -> np.ndarray:
    return (np.hypot(*(np.indices(shape) - 32)) <= radius).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_an_image_a_slice_and_trailing_axes_are_scored_by_their_outline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    prediction, reference = disc(20), disc(24)
    affine = np.diag([0.5, 0.5, 9.0, 1.0])
    shapes = {"flat": (64, 64), "slice": (64, 64, 1), "yz": (1, 64, 64), "xz": (64, 1, 64)}
    if suffix == ".nii.gz":
        shapes |= {"four": (64, 64, 1, 1), "five": (64, 64, 1, 1, 1)}
    for name, shape in shapes.items():
        steps = affine.copy()
        if name in ("yz", "xz"):
            steps = np.diag([*np.insert([0.5, 0.5], shape.index(1), 9.0), 1.0])
        # The prediction never has the axes of size 1 that a reference has beyond the third.
        for folder, values in (("p", prediction), ("r", reference)):
            path = tmp_path / folder / f"{name}.nii.gz"
            label_file(path, values.reshape(shape[:3] if folder == "p" else shape), steps)
            if suffix != ".nii.gz":
                write_volume(path.with_name(f"{name}{suffix}"), read_volume(path))
                path.unlink()
    out = tmp_path / "scores.json"
    code, _, err = run("evaluate", tmp_path / "p", tmp_path / "r", "--out", out, capsys=capsys)
    assert (code, err) == (0, "")
    cases = json.loads(out.read_text())["cases"]
    assert len(cases) == len(shapes)
    for case in cases:
        # Radii of 10 and 12 mm, and pixels of half a mm.
        assert case["hd95_mm"] == cases[0]["hd95_mm"] and 2 <= case["hd95_mm"] < 2.4
        assert case["assd_mm"] == cases[0]["assd_mm"] and abs(case["assd_mm"] - 2) < 0.15
        assert case["nsd"] == 0
        assert case["reference_ml"] == pytest.approx(int(reference.sum()) * 0.25 * 9 / 1000)


def test_a_sheared_grid_is_scored_in_the_world(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Slices 3 mm apart that lean 4 mm aside; a pixel is 2 mm wide. A column of voxels moved by 2
    # pixels is 4 mm away along its slice, and sqrt(3^2 + (4 - 4)^2) = 3 mm across to the next one.
    affine = np.array([[2.0, 0, 4, 0], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    prediction, reference = np.zeros((2, 8, 3, 4), np.uint8)
    prediction[2, 1, :2] = 1
    reference[4, 1, :2] = 1
    first = label_file(tmp_path / "p.nii.gz", prediction, affine)
    second = label_file(tmp_path / "r.nii.gz", reference, affine)
    out = tmp_path / "scores.json"
    code, _, err = run("evaluate", first, second, "--out", out, capsys=capsys)
    assert (code, err) == (0, "")
    (case,) = json.loads(out.read_text())["cases"]
    # World: the prediction at x = 4 and 8, z = 0 and 3; the reference at x = 8 and 12.
    nearest = [4.0, 3.0, 3.0, 4.0]
    assert case["assd_mm"] == pytest.approx(np.mean([4, 3, 3, 4]))
    assert case["hd95_mm"] == pytest.approx(np.percentile(sorted(nearest)[::3], 95))
    assert case["reference_ml"] == pytest.approx(2 * 2 * 2 * 3 / 1000)
    labels = read_volume(second)
    told = label_statistics(
        labels.like(labels.data.astype(np.uint8)), labels, Labelling({"b": 0, "x": 1}), ["CT"]
    )
    assert told["structures"]["x"]["ml"] == case["reference_ml"]


def test_a_case_that_fails_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcdef":
        for folder in "pr":
            label_file(tmp_path / folder / f"{name}.nii.gz", disc(9).reshape(64, 64, 1))
    label_file(tmp_path / "p" / "b.nii.gz", disc(9).reshape(32, 128, 1))
    (tmp_path / "p" / "c.nii.gz").write_bytes(b"nothing")
    label_file(tmp_path / "r" / "d.nii.gz", np.full((64, 64, 1), 0.5, np.float32))
    label_file(tmp_path / "r" / "e.nii.gz", np.arange(4096, dtype=np.int16).reshape(64, 64, 1))
    out = tmp_path / "scores.json"
    words = ("evaluate", tmp_path / "p", tmp_path / "r", "--out", out)
    code, printed, err = run(*words, capsys=capsys)
    assert code == 2 and "2 cases" in printed
    content = json.loads(out.read_text())
    assert [case["case"] for case in content["cases"]] == ["a", "f"]
    assert content["overall"]["dice"]["mean"] == 1.0
    assert [entry["case"] for entry in content["provenance"]["inputs"]] == ["a", "f"]
    assert list(content["failures"]) == ["b", "c", "d", "e"]
    lines = err.splitlines()
    assert "b.nii.gz: lies on another grid" in lines[0]
    assert "c.nii.gz: cannot be read as .nii.gz" in lines[1]
    assert "d.nii.gz: expected whole numbers, one per voxel" in lines[2]
    assert "e.nii.gz: expected at most 1000 labels, found 4096" in lines[3]
    assert lines[4:] == ["segkit: 4 of 6 volumes failed; see the messages above"]

    def broken(*masks: object) -> None:
        raise IndexError("of our own")

    monkeypatch.setattr(scores, "surface_distances", broken)
    code, _, err = run(*words, "--overwrite", capsys=capsys)
    assert code == 2 and "cannot be scored (IndexError: of our own)" not in err
    assert "b.nii.gz: lies on another grid" in err, "with no case scored, the first reason is told"


def test_a_bug_in_one_case_leaves_the_scores_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, radius in (("a", 9), ("b", 5)):
        for folder in "pr":
            label_file(tmp_path / folder / f"{name}.nii.gz", disc(radius).reshape(64, 64, 1))
    right = scores.surface_distances

    def broken(prediction: np.ndarray, *more: Any) -> Any:
        if prediction.sum() == disc(9).sum():
            raise IndexError("of our own")
        return right(prediction, *more)

    monkeypatch.setattr(scores, "surface_distances", broken)
    code, printed, err = run("evaluate", tmp_path / "p", tmp_path / "r", capsys=capsys)
    assert code == 2 and "1 case" in printed
    assert "a.nii.gz: cannot be scored (IndexError: of our own)" in err
    found = evaluate(tmp_path / "p", tmp_path / "r")
    assert [row.case for row in found.cases] == ["b"] and list(found.failures) == ["a"]


@pytest.mark.parametrize("folder", ["p", "r"])
def test_two_files_of_one_case_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    for each in "pr":
        label_file(tmp_path / each / "a.nii.gz", disc(9))
    label_file(tmp_path / folder / "a.nii", disc(9))
    code, _, err = run("evaluate", tmp_path / "p", tmp_path / "r", capsys=capsys)
    assert code == 2 and "a.nii.gz: is the same case as a.nii; remove or rename one" in err


def test_files_without_a_partner_are_reported_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, names in (("p", "ac"), ("r", "ab")):
        for name in names:
            label_file(tmp_path / folder / f"{name}.nii.gz", disc(9))
    code, _, err = run("evaluate", tmp_path / "p", tmp_path / "r", capsys=capsys)
    assert code == 2 and "1 of 2 references" in err and "--missing skip" in err
    words = ("evaluate", tmp_path / "p", tmp_path / "r", "--missing")
    code, out, err = run(*words, "skip", capsys=capsys)
    assert (code, err) == (0, "") and "1 case" in out
    assert "left out, because there is no prediction: b\n" in out
    assert out.endswith("p/c.nii.gz\n") and "left out, because there is no reference: " in out
    code, out, err = run(*words, "empty", "--json", capsys=capsys)
    told = json.loads(out)
    assert (code, err) == (0, "") and told["missing"] == ["b"]
    assert [case["dice"] for case in told["cases"]] == [1, 0]
    assert told["overall"]["dice"]["mean"] == 0.5


def test_progress_is_shown_while_cases_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in "pr":
        for name in "abc":
            label_file(tmp_path / folder / f"{name}.nii.gz", disc(9))
    done: list[str] = []
    scored: list[int] = []
    right = scores.surface_distances

    def counted(*given: Any) -> Any:
        scored.append(len(done))
        return right(*given)

    def track(items: Any, what: str, count: int) -> Any:
        for item in items:
            yield item
            done.append(what)

    monkeypatch.setattr(scores, "surface_distances", counted)
    evaluate(tmp_path / "p", tmp_path / "r", track=track)
    assert done == ["looking for labels"] * 3 + ["scoring"] * 3
    assert scored == [3, 4, 5], "a case counts once it is scored"
