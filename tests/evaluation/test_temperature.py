"""A temperature is found again where it is known, and by hand where it can be worked out."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.special import expit, softmax

from segkit.evaluation.temperature import MOST_VOXELS, HeldOutVoxels, fit_temperature, tempered
from segkit.inference.ensemble import at_temperature


def drawn(count: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits of three classes, and for each voxel a class drawn by their softmax."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 1.5, (count, 3))
    chances = softmax(logits, axis=1).cumsum(1)
    return logits, (random.random((count, 1)) > chances).sum(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_probabilities_were_spoilt_by_is_found(temperature: float) -> None:
    logits, truth = drawn()
    spoilt = softmax(logits * temperature, axis=1)
    within = truth[:, None] == np.arange(3)
    found = fit_temperature(spoilt, within, are_regions=False)
    assert found == pytest.approx(temperature, rel=0.03)


def test_the_temperature_of_regions_is_found() -> None:
    random = np.random.default_rng(1)
    logits = random.normal(0, 1.5, (30_000, 2))
    within = random.random(logits.shape) < expit(logits)
    found = fit_temperature(expit(2 * logits), within, are_regions=True)
    assert found == pytest.approx(2.0, rel=0.03)


@pytest.mark.parametrize(
    ("right", "limit", "told"),
    [
        (True, 0.05, "this is the lower limit, so probabilities are far too unsure"),
        (False, 20.0, "this is the upper limit, so probabilities are far too sure"),
        (None, None, ""),
    ],
)
def test_a_temperature_at_its_limit_is_told(
    right: bool | None, limit: float | None, told: str
) -> None:
    """All voxels right want certainty (T to 0); all wrong want none at all (T to infinity)."""
    probabilities = np.full((4, 1, 1, 2), (0.2, 0.8))
    truth = np.full((4, 1, 1), 1 if right else 0)
    if right is None:  # 0.8 become 3 of 4, as log(4) / T = log(3)
        truth = np.array([1, 1, 1, 0]).reshape(4, 1, 1)
    voxels = HeldOutVoxels({"background": (0,), "ball": (1,)}, False, 1)
    voxels.add(probabilities, truth)
    found = voxels.fit()
    assert found is not None
    assert found.at_limit == (limit is not None) == found.as_json()["at_limit"]
    assert found.value == pytest.approx(limit or np.log(4) / np.log(3), rel=0.01)
    assert told in found.told and ("limit" in found.told) == found.at_limit


def test_two_classes_are_worked_out_by_hand() -> None:
    """Three of four are right at 90 %: the likelihood is highest where 90 % become 75 %.

    log(9) / T = log(3), so that T = 2.
    """
    probabilities = np.full((4, 2), (0.1, 0.9))
    within = np.array([[False, True]] * 3 + [[True, False]])
    assert fit_temperature(probabilities, within, are_regions=False) == pytest.approx(2, rel=1e-3)
    voxels = HeldOutVoxels({"background": (0,), "ball": (1,)}, False, 1)
    voxels.add(probabilities.reshape(4, 1, 1, 2), within[:, 1].astype(int).reshape(4, 1, 1))
    found = voxels.fit()
    assert found is not None and (found.cases, found.voxels) == (1, 4)
    assert found.value == pytest.approx(2, rel=1e-3)
    assert found.ece == pytest.approx((0.15, 0.0), abs=1e-3)
    assert found.brier == pytest.approx((0.75 * 0.01 + 0.25 * 0.81, 0.1875), abs=1e-3)
    before = -(3 * np.log(0.9) + np.log(0.1)) / 4
    after = -(3 * np.log(0.75) + np.log(0.25)) / 4
    assert found.log_loss == pytest.approx((before, after), abs=1e-4)
    assert found.told == (
        "temperature 2.000, fitted on 1 held-out case: ECE of voxels in question 0.1500 -> "
        f"{found.ece[1]:.4f}, log loss {before:.4f} -> {after:.4f}"
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_probabilities_become_those_of_logits_that_were_divided(temperature: float) -> None:
    logits = np.random.default_rng(2).normal(0, 3, (50, 4))
    expected = softmax(logits / temperature, axis=1)
    shares = softmax(logits, axis=1)
    assert_allclose(tempered(shares, temperature, are_regions=False), expected, atol=1e-12)
    rows = torch.from_numpy(shares.T.reshape(4, 5, 5, 2))
    found = at_temperature(rows, temperature, regions=False)
    assert_allclose(found.numpy().reshape(4, 50).T, expected, atol=1e-12)
    expected, shares = expit(logits / temperature), expit(logits)
    assert_allclose(tempered(shares, temperature, are_regions=True), expected, atol=1e-6)
    rows = torch.from_numpy(shares.T.reshape(4, 5, 5, 2))
    found = at_temperature(rows, temperature, regions=True)
    assert_allclose(found.numpy().reshape(4, 50).T, expected, atol=1e-6)


def test_certain_probabilities_stay_numbers() -> None:
    certain = np.array([[0.0, 1.0], [1.0, 0.0]])
    for are_regions in (False, True):
        assert np.isfinite(tempered(certain, 3.0, are_regions=are_regions)).all()
        rows = torch.tensor(certain, dtype=torch.float32).reshape(2, 2, 1, 1)
        assert at_temperature(rows, 3.0, regions=are_regions).isfinite().all()
    within = np.array([[True, False], [True, False]])
    assert np.isfinite(fit_temperature(certain, within, are_regions=False))


def test_ignored_voxels_are_left_out_and_a_large_case_is_sampled() -> None:
    voxels = HeldOutVoxels({"background": (0,), "ball": (1,)}, False, 2, ignore=9)
    shares = np.full((2, 2, 1, 2), 0.5, np.float32)
    voxels.add(shares, np.array([[[0], [9]], [[1], [9]]]))
    assert voxels.probabilities[0].shape == (2, 2)
    assert voxels.within[0].tolist() == [[True, False], [False, True]]
    voxels.add(shares, np.full((2, 2, 1), 9))
    assert len(voxels.probabilities) == 1
    side = 70
    voxels.add(np.full((side, side, side, 2), 0.5, np.float32), np.zeros((side,) * 3, int))
    assert len(voxels.probabilities[1]) == MOST_VOXELS
    assert HeldOutVoxels({"a": (1,)}, True, 1).fit() is None
