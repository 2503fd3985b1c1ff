import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

import segkit
from tests.small import small_config, small_dataset

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def warnings_of(
    scores: list[float], folder: Path, caplog: pytest.LogCaptureFixture, **train: object
) -> list[str]:
    """What is told after a training with one held-out case and these scores of validations."""
    config = small_config(
        small_dataset(folder / "data"),
        train={"steps": len(scores), "validate_every": 1, **train},
    )
    parts = segkit.prepare(config, runs=folder / "runs")
    assert len(parts.validation.cases) == 1
    left = iter(scores)

    def score(prediction: Tensor, label: Tensor) -> Tensor:
        return torch.tensor([next(left)])

    validation = dataclasses.replace(parts.validation, score=score)
    caplog.clear()
    segkit.fit(dataclasses.replace(parts, validation=validation), runs=folder / "runs")
    return [each.message for each in caplog.records if "by heart" in each.message]


def test_a_score_that_fell_is_told_with_both_values_and_the_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (told,) = warnings_of([0.3, 0.8, 0.7, 0.75], tmp_path, caplog)
    assert "best at step 2 (0.800) and is 0.750 at the end" in told
    assert "`--checkpoint best` uses the weights of step 2" in told


@pytest.mark.parametrize("scores", [[0.3, 0.8, 0.9], [0.3, 0.8, 0.797], [0.5]])
def test_a_score_that_did_not_fall_is_not_told(
    scores: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings_of(scores, tmp_path, caplog) == []


def test_with_patience_the_best_weights_are_kept_and_nothing_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings_of([0.3, 0.8, 0.7, 0.6, 0.5], tmp_path, caplog, patience=2) == []
