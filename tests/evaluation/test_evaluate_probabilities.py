import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segkit import (
    ConfigError,
    Grid,
    Predictor,
    Volume,
    VolumeError,
    evaluate,
    read_volume,
    write_volume,
)
from segkit.config.network import NetworkConfig
from segkit.evaluation.calibration import Calibration
from segkit.evaluation.evaluate_probabilities import find_probabilities
from tests.cli.command import run
from tests.evaluation.test_calibration import drawn
from tests.models import noise_volume, random_model

SHAPE = (6, 5, 4)


def cohort(folder: Path, cases: int = 3) -> tuple[Path, Path]:
    """Predictions with their probabilities, and references that are drawn by these."""
    predictions, references = folder / "predictions", folder / "data" / "labelsTr"
    predictions.mkdir(parents=True)
    references.mkdir(parents=True)
    labels = {"background": 0, "liver": 1, "tumour": 2}
    (references.parent / "dataset.json").write_text(json.dumps({"labels": labels}))
    grid = Grid(SHAPE, np.diag([1.0, 2.0, 3.0, 1.0]))
    for case in range(cases):
        found, label = drawn(SHAPE, seed=case)
        name = f"case_{case}"
        write_volume(
            predictions / f"{name}_seg.nii.gz", Volume(found.argmax(-1).astype(np.uint8), grid)
        )
        write_volume(predictions / f"{name}_prob.nii.gz", Volume(found.astype(np.float32), grid))
        write_volume(references / f"{name}.nii.gz", Volume(label.astype(np.uint8), grid))
    return predictions, references


def test_probabilities_beside_predictions_are_compared_with_references(tmp_path: Path) -> None:
    predictions, references = cohort(tmp_path)
    scores = evaluate(predictions, references, probabilities=True)
    members = {"background": (0,), "liver": (1,), "tumour": (2,)}
    expected = Calibration(members, are_regions=False)
    for case in range(3):
        found, label = drawn(SHAPE, seed=case)
        expected.add(f"case_{case}", found.astype(np.float32), label)
    assert scores.calibration is not None
    assert scores.calibration.to_json({}) == expected.to_json({})
    told = scores.to_json()["calibration"]["spearman_of_entropy_and_error"]
    assert told == expected.correlation(scores.dice_of_cases)
    assert evaluate(predictions, references).calibration is None


def test_the_command_writes_the_figures_and_a_diagram(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions, references = cohort(tmp_path)
    out, diagram = tmp_path / "scores.json", tmp_path / "reliability.svg"
    told = ("--out", out, "--diagram", diagram)
    code, printed, err = run(
        "evaluate", predictions, references, "--probabilities", *told, capsys=capsys
    )
    assert (
        (code, err) == (0, "")
        and "ECE" in printed
        and "correlation of entropy and error" in printed
    )
    assert set(json.loads(out.read_text())["calibration"]["outputs"]) == {"liver", "tumour"}
    assert diagram.read_text().startswith("<svg")
    code, _, err = run("evaluate", predictions, references, "--diagram", diagram, capsys=capsys)
    assert code == 2 and "--diagram needs --probabilities" in err


def test_missing_probabilities_and_those_of_other_classes_are_refused(tmp_path: Path) -> None:
    predictions, references = cohort(tmp_path)
    (predictions / "case_1_prob.nii.gz").unlink()
    with pytest.raises(
        VolumeError, match="expected a file case_1_prob beside it, found none; predict"
    ):
        evaluate(predictions, references, probabilities=True)
    two = Volume(np.zeros((*SHAPE, 2), np.float32), Grid(SHAPE, np.diag([1.0, 2.0, 3.0, 1.0])))
    write_volume(predictions / "case_1_prob.nii.gz", two)
    with pytest.raises(
        VolumeError, match=r"case_1_prob.nii.gz: expected a probability for each of"
    ):
        evaluate(predictions, references, probabilities=True)
    (references.parent / "dataset.json").unlink()
    with pytest.raises(ConfigError, match="probabilities need the names of the labels"):
        evaluate(predictions, references, probabilities=True)


@pytest.mark.parametrize(
    ("labels", "probabilities"),
    [
        ("a_seg.nii.gz", "a_prob.nii.gz"),
        ("a.nii.gz", "a_prob.mha"),
        ("A.NII.GZ", "A_prob.NII.GZ"),
        ("a_seg.PNG", "a_prob.tif"),
        ("sub-01_desc-segkit_dseg.nii.gz", "sub-01_desc-segkit_probseg.nii.gz"),
    ],
)
def test_probabilities_are_found_by_the_names_that_segkit_gives_them(
    tmp_path: Path, labels: str, probabilities: str
) -> None:
    (tmp_path / probabilities).write_bytes(b"")
    assert find_probabilities(tmp_path / labels) == tmp_path / probabilities


def test_probabilities_that_a_model_writes_can_be_evaluated(tmp_path: Path) -> None:
    model = random_model(NetworkConfig(channels=[2, 4]))
    scan = noise_volume((12, 10, 8))
    prediction = Predictor(model)(scan, probabilities=True)
    assert prediction.probabilities is not None
    predictions, references = tmp_path / "predictions", tmp_path / "data" / "labelsTr"
    for folder in (predictions, references):
        folder.mkdir(parents=True)
        write_volume(folder / "a.nii.gz", prediction.labels)
    write_volume(predictions / "a_prob.nii.gz", prediction.probabilities)
    (references.parent / "dataset.json").write_text(
        json.dumps({"labels": dict(model.description.labels)})
    )
    scores = evaluate(predictions, references, probabilities=True)
    assert scores.calibration is not None
    largest = scores.calibration.largest
    assert largest.voxels == 12 * 10 * 8 and largest.right.sum() >= 0.99 * largest.voxels


@pytest.mark.parametrize("sized", ["predictions", "references"])
def test_only_one_of_two_pictures_needs_a_pixel_size(tmp_path: Path, sized: str) -> None:
    probability = np.linspace(0.05, 0.95, 30, dtype=np.float32).reshape(5, 6)
    label = (probability > 0.5).astype(np.uint8)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "cell": 1}}))
    for folder in ("predictions", "references"):
        (tmp_path / folder).mkdir()
        dpi = {"dpi": (25400, 25400)} if folder == sized else {}
        Image.fromarray(label).save(tmp_path / folder / "a.png", **dpi)
    image = read_volume(tmp_path / "predictions" / "a.png")
    both = np.stack([1 - probability, probability], axis=-1).transpose(1, 0, 2)[:, :, None]
    write_volume(tmp_path / "predictions" / "a_prob.tif", image.like(both))
    scores = evaluate(tmp_path / "predictions", tmp_path / "references", probabilities=True)
    assert scores.calibration is not None
    expected = Calibration({"background": (0,), "cell": (1,)}, are_regions=False)
    expected.add("a", both, label.T[..., None])
    assert scores.calibration.to_json({}) == expected.to_json({})
    assert scores.cases[0].metrics["dice"] == 1
