"""What a run keeps of its held-out cases: predictions, probabilities and a temperature."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image

from segkit.config.model import PostprocessingConfig
from segkit.evaluation.evaluate import evaluate
from segkit.export.deployment import deployment
from segkit.inference.predictor import Predictor
from segkit.io.volume import read_volume
from segkit.model.folder import Model, adopt, load_description, load_model
from segkit.training.fit import Run, train
from segkit.training.resume import resume
from tests.small import small_config, small_dataset
from tests.training.test_resume import StopAfter, StoppedError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings: dict[str, Any] = {"steps": 4, "validate_every": 4, "pictures": 0}
    settings |= {"calibrate": True, "keep_held_out": "probabilities"}
    return train(small_config(data, train=settings), runs=tmp_path_factory.mktemp("runs"))


def test_kept_predictions_are_those_that_were_scored(data: Path, run: Run) -> None:
    (case,) = run.summary["validation"]["dice_of_cases"]
    kept = run.folder / "held_out"
    assert {path.name for path in kept.iterdir()} == {f"{case}_seg.nii.gz", f"{case}_prob.nii.gz"}
    scores = evaluate(kept, data, missing="skip", probabilities=True)
    (row,) = scores.cases
    assert row.case == case
    dice = run.summary["validation"]["dice_of_cases"][case]["ball"]
    assert row.metrics["dice"] == pytest.approx(dice)
    bare = replace(
        run.model, description=run.model.description.model_copy(update={"temperature": None})
    )
    scan = read_volume(data / "imagesTr" / f"{case}.nii.gz")
    expected = Predictor(bare, device="cpu")(scan, probabilities=True)
    assert expected.probabilities is not None
    found = read_volume(kept / f"{case}_prob.nii.gz")
    assert_allclose(found.data, expected.probabilities.data, atol=1e-6)


def test_kept_predictions_of_all_folds_are_scored_together(
    data: Path, run: Run, tmp_path: Path
) -> None:
    (case,) = run.summary["validation"]["dice_of_cases"]
    other = next(f"case_{number}" for number in range(4) if f"case_{number}" != case)
    for fold, name in enumerate((case, other)):
        for path in (run.folder / "held_out").iterdir():
            kept = tmp_path / f"fold_{fold}" / "held_out" / path.name.replace(case, name)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, kept)
    (tmp_path / "fold_0" / "samples").mkdir()
    picture = np.zeros((4, 4), np.uint8)
    Image.fromarray(picture).save(tmp_path / "fold_0" / "samples" / "step_000004.png")
    scores = evaluate(tmp_path, data, missing="skip", probabilities=True)
    assert {row.case for row in scores.cases} == {case, other} and not scores.extra
    assert scores.calibration is not None and scores.calibration.voxels == 2 * 16**3


def test_the_temperature_is_kept_with_the_model_and_said_in_the_summary(run: Run) -> None:
    told = json.loads((run.folder / "summary.json").read_text())["temperature"]
    description = json.loads((run.folder / "model" / "model.json").read_text())
    assert description["temperature"] == told["value"] == run.model.description.temperature
    assert told["cases"] == 1 and told["voxels"] == 16**3
    assert told["log_loss"]["after"] <= told["log_loss"]["before"]
    assert set(told["ece_in_question"]) == {"before", "after"}
    model = load_model(run.folder)
    assert deployment(model)["temperature"] == told["value"]


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_weights_of_a_checkpoint_have_no_temperature(run: Run, checkpoint: str) -> None:
    assert load_model(run.folder).description.temperature is not None
    assert Predictor.load(run.folder, checkpoint=checkpoint).temperature is None


def test_prediction_is_at_the_models_temperature_and_its_labels_do_not_depend_on_it(
    data: Path, run: Run
) -> None:
    def predicted(*temperatures: float | None) -> Any:
        models = [
            Model(run.model.description.model_copy(update={"temperature": each}), run.model.network)
            for each in temperatures
        ]
        scan = read_volume(data / "imagesTr" / "case_0.nii.gz")
        return Predictor(models, device="cpu")(scan, probabilities=True, uncertainty=True)

    plain, warm = predicted(None), predicted(2.0)
    expected = np.sqrt(plain.probabilities.data)
    expected /= expected.sum(axis=-1, keepdims=True)
    assert_allclose(warm.probabilities.data, expected, atol=1e-5)
    assert (warm.entropy.data >= plain.entropy.data - 1e-6).all()
    # Two models of which one has none: sqrt(4 * 1) = 2.
    assert_allclose(predicted(4.0, None).probabilities.data, expected, atol=1e-5)
    for other in (warm, predicted(4.0, None)):
        assert np.array_equal(other.labels.data, plain.labels.data)
        assert_allclose(other.probabilities.data.sum(axis=-1), 1, atol=1e-6)
        assert np.array_equal(other.probabilities.data.argmax(axis=-1), plain.labels.data)


def test_former_weights_keep_their_temperature_while_a_run_is_made_longer(
    run: Run, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run.folder, tmp_path / "small"))
    adopt(folder / "model", PostprocessingConfig(largest_foreground=True))
    former = load_description(folder / "model")
    weights = (folder / "model" / "weights.safetensors").read_bytes()
    with pytest.raises(StoppedError):
        resume(folder, overrides=["train.steps=6"], callbacks=[StopAfter(5)])
    assert (folder / "model" / "weights.safetensors").read_bytes() == weights
    assert former.temperature is not None and load_description(folder / "model") == former


def test_nothing_is_kept_that_was_not_asked_for(data: Path, tmp_path: Path) -> None:
    settings = {"steps": 1, "validate_every": 1, "pictures": 0, "keep_held_out": "labels"}
    run = train(small_config(data, train=settings), runs=tmp_path)
    (kept,) = (run.folder / "held_out").iterdir()
    assert kept.name.endswith("_seg.nii.gz") and "temperature" not in run.summary
    assert load_model(run.folder).description.temperature is None
