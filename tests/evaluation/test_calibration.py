import xml.etree.ElementTree as ET
from math import isnan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.text import Text
from scipy.stats import entropy, spearmanr

from segkit.evaluation.calibration import (
    NUM_BINS,
    Calibration,
    Reliability,
    reliability_diagram,
    to_calibration_table,
)

CLASSES = {"background": (0,), "liver": (1,), "tumour": (2,)}


def classes(**changes: object) -> Calibration:
    return Calibration(members=CLASSES, are_regions=False, **changes)  # type: ignore[arg-type]


def drawn(
    shape: tuple[int, ...], seed: int = 0, sharper: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and labels that are drawn by them; then made surer of themselves."""
    random = np.random.default_rng(seed)
    true = random.dirichlet([1.0, 1.0, 1.0], size=shape)
    label = (random.random(shape)[..., None] > true.cumsum(-1)[..., :-1]).sum(-1)
    told = true**sharper
    return told / told.sum(-1, keepdims=True), label


def test_labels_drawn_from_the_probabilities_are_calibrated() -> None:
    calibration = classes()
    calibration.add("a", *drawn((40, 40, 40)))
    assert calibration.largest.ece < 0.005
    assert all(each.ece < 0.01 for each in calibration.outputs.values())
    surer = classes()
    surer.add("a", *drawn((40, 40, 40), sharper=3.0))
    assert surer.largest.ece > 0.1 and surer.largest.brier > calibration.largest.brier
    assert surer.log_loss > calibration.log_loss


def test_four_voxels_have_the_values_worked_out_by_hand() -> None:
    found = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.2, 0.8, 0], [1.0, 0, 0]])
    calibration = classes()
    calibration.add("a", found.reshape(4, 1, 1, 3), np.array([0, 1, 0, 0]).reshape(4, 1, 1))
    # Bins: 0.9 right once; 0.8 right once of two; 1.0 right.
    assert calibration.largest.ece == pytest.approx((0.1 + 0.6 + 0) / 4)
    assert calibration.largest.brier == pytest.approx((0.01 + 0.04 + 0.64 + 0) / 4)
    # The last voxel is not in question.
    assert calibration.in_question.voxels == 3
    assert calibration.outputs["liver"].brier == pytest.approx((0.01 + 0.04 + 0.64) / 3)
    assert calibration.outputs["tumour"].ece == 0
    expected = -(np.log(0.9) + np.log(0.8) + np.log(0.2))
    assert calibration.log_loss == pytest.approx(expected)
    assert calibration.entropy_of_cases["a"] == pytest.approx(entropy(found[:3].T, base=3).mean())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
def test_the_error_is_that_of_its_definition(voxels: list[tuple[float, bool]]) -> None:
    probability = np.array([each for each, _ in voxels])
    right = np.array([each for _, each in voxels])
    reliability = Reliability()
    reliability.add(probability[:1], right[:1])
    reliability.add(probability[1:], right[1:])
    bins = np.minimum((probability * NUM_BINS).astype(int), NUM_BINS - 1)
    expected = sum(
        (bins == each).mean() * abs(right[bins == each].mean() - probability[bins == each].mean())
        for each in set(bins)
    )
    assert reliability.ece == pytest.approx(expected)
    assert reliability.brier == pytest.approx(((probability - right) ** 2).mean())


def test_ignored_voxels_do_not_count_and_no_voxels_give_nan() -> None:
    found, label = drawn((6, 5, 4))
    label[:, :, 0] = 9
    calibration, less = classes(ignore=9), classes()
    calibration.add("a", found, label)
    less.add("a", found[:, :, 1:], label[:, :, 1:])
    assert calibration.to_json({}) == less.to_json({})
    none = classes(ignore=9)
    none.add("a", found, np.full_like(label, 9))
    assert isnan(none.largest.ece) and isnan(none.largest.brier)
    assert none.to_json({})["entropy_of_cases"] == {"a": None}
    assert "no voxels" in reliability_diagram(none)


def test_calibration_of_a_partly_labelled_case_counts_only_labelled_classes() -> None:
    # Nobody labelled class 2: at the second voxel it may well be right.
    found = np.array([[0.25, 0.75, 0.0], [0.25, 0.0, 0.75]]).reshape(2, 1, 1, 3)
    calibration = classes()
    second = list(calibration.members)[2]
    calibration.add("a", found, np.array([1, 0]).reshape(2, 1, 1), unlabelled=[second])
    assert calibration.largest.voxels == 0 and second not in calibration.outputs
    first = calibration.outputs[list(calibration.members)[1]]
    assert first.voxels == 2 and first.brier == pytest.approx(0.25**2 / 2)
    assert calibration.log_loss == 0 and calibration.entropy_of_cases["a"] > 0


def test_each_region_is_calibrated_separately() -> None:
    calibration = Calibration({"whole": (1, 2), "core": (2,)}, are_regions=True)
    found = np.array([[0.75, 0.25], [0.75, 0.25], [0.0, 0.0]]).reshape(3, 1, 1, 2)
    calibration.add("a", found, np.array([2, 0, 0]).reshape(3, 1, 1))
    assert calibration.outputs["whole"].ece == pytest.approx(0.25)
    assert calibration.outputs["core"].ece == pytest.approx(0.25)
    assert calibration.outputs["core"].brier == pytest.approx((0.75**2 + 0.25**2) / 2)
    # The truth is inside both regions at the first voxel, and outside both at the others.
    mean = -(np.log(0.75 * 0.25) + np.log(0.25 * 0.75) + 0) / 2 / 3
    told = calibration.to_json({})["all_voxels"]
    assert told == {"voxels": 3, "log_loss": pytest.approx(mean)}
    table = to_calibration_table(calibration)
    assert table.columns[0]._cells[0] == Text("all regions, all voxels")
    assert table.columns[-1]._cells == [f"{mean:.4f}", "-", "-"]
    assert "some region has at least 1%." in str(table.caption)


def test_the_table_shows_the_log_loss_of_all_voxels() -> None:
    calibration = classes()
    calibration.add("a", np.full((2, 1, 1, 3), 1 / 3), np.array([0, 2]).reshape(2, 1, 1))
    table = to_calibration_table(calibration)
    assert [column.header for column in table.columns][-1] == "log loss"
    assert table.columns[-1]._cells == [f"{np.log(3):.4f}", "-", "-", "-"]
    assert calibration.to_json({})["all_voxels"]["log_loss"] == pytest.approx(np.log(3))
    assert "the background has at most 99%." in str(table.caption)


def test_entropy_and_error_are_correlated_as_by_scipy() -> None:
    calibration = classes()
    for case in range(5):
        calibration.add(f"c{case}", *drawn((6, 6, 6), seed=case, sharper=1 + case / 2))
    dice = {f"c{case}": value for case, value in enumerate([0.5, 0.9, 0.6, 0.8, float("nan")])}
    doubts = [calibration.entropy_of_cases[f"c{case}"] for case in range(4)]
    expected = spearmanr(doubts, [0.5, 0.1, 0.4, 0.2]).statistic
    assert calibration.correlation(dice) == pytest.approx(expected)
    assert isnan(calibration.correlation({"c0": 0.5, "c1": 0.4}))
    assert isnan(calibration.correlation({f"c{case}": 0.5 for case in range(5)}))


def test_the_number_of_probabilities_must_be_that_of_the_classes() -> None:
    with pytest.raises(
        ValueError, match=r"expected a probability for each of background, liver, tumour, got 2"
    ):
        classes().add("a", np.zeros((2, 2, 2, 2)), np.zeros((2, 2, 2), int))


@pytest.mark.parametrize("wrong", [float("nan"), 3.0, -0.5])
def test_numbers_that_are_no_probabilities_are_refused_unless_they_are_ignored(
    wrong: float,
) -> None:
    found, label = drawn((4, 3, 2))
    found[1, 1, 1, 0] = wrong
    with pytest.raises(
        ValueError, match=f"expected probabilities from 0 to 1, found {wrong:g}; ev"
    ):
        classes().add("a", found, label)
    label[1, 1, 1] = 9
    calibration = classes(ignore=9)
    calibration.add("a", found, label)
    assert calibration.largest.voxels == 23


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_picture_has_the_calibration_of_its_pixels_whatever_axis_has_one_voxel(axis: int) -> None:
    found, label = drawn((6, 5, 1))
    upright, turned = classes(), classes()
    upright.add("a", found, label)
    turned.add("a", np.moveaxis(found, 2, axis), np.moveaxis(label, 2, axis))
    assert turned.largest.ece == pytest.approx(upright.largest.ece)
    assert turned.in_question.brier == pytest.approx(upright.in_question.brier)
    assert turned.entropy_of_cases["a"] == pytest.approx(upright.entropy_of_cases["a"])


def test_the_curve_of_the_diagram_passes_through_the_bins() -> None:
    calibration = Calibration({"background": (0,), "<b>": (1,)}, are_regions=False)
    found = np.repeat([[0.25, 0.75]], 4, axis=0).reshape(4, 1, 1, 2)
    calibration.add("a", found, np.array([1, 1, 0, 0]).reshape(4, 1, 1))
    root = ET.fromstring(reliability_diagram(calibration))
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert [line.get("points") for line in lines] == ["284.0,204.0"] * 2
    assert "<b>: ECE 0.250" in [each.text for each in root.iter()]
