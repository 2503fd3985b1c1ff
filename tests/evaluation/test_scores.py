import io
import itertools
import json
import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from rich.console import Console

from segkit.evaluation.score_table import to_table
from segkit.evaluation.scores import METRICS, CaseScores, score_case, summarise, to_json

NAN = float("nan")
LABELS = {0: "background", 1: "liver", 7: "tumour"}


def row(case: str, dice: float, label: int = 1, name: str = "liver") -> CaseScores:
    return CaseScores(
        case=case,
        label=label,
        name=name,
        metrics={
            "dice": dice,
            "iou": dice / (2 - dice),
            "hd95_mm": 10 * (1 - dice),
            "assd_mm": 3 * (1 - dice),
            "nsd": dice**2,
        },
        tolerance_mm=1.0,
        prediction_ml=2.0,
        reference_ml=2.5,
        tp=1,
        fp=2,
        fn=3,
    )


def rows_of(by_class: dict[str, list[float]]) -> list[CaseScores]:
    return [
        row(f"case{number}", dice, label, name)
        for label, (name, values) in enumerate(by_class.items(), start=1)
        for number, dice in enumerate(values)
    ]


def summary_json(rows: list[CaseScores], **options: int) -> dict[str, Any]:
    """The summary as compared here: as JSON, where undefined equals undefined."""
    output = to_json(rows, summarise(rows, **options))
    del output["cases"]
    return output


def shown(rows: list[CaseScores], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(to_table(summarise(rows)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def two_slabs() -> tuple[np.ndarray, np.ndarray]:
    """A reference slab of label 1, and a prediction one layer thinner; label 7 is nowhere."""
    prediction, reference = np.zeros((2, 10, 10, 10), dtype=np.uint8)
    reference[:, :, 2:6] = 1
    prediction[:, :, 2:5] = 1
    return prediction, reference


def test_the_caption_of_a_table_says_when_a_score_is_undefined_and_the_tolerance() -> None:
    told = " ".join(shown([replace(row("a", 0.5), tolerance_pixels=1.0, unit="pixel")]).split())
    assert "neither image, or not labelled in the case; left out. Overall" in told
    assert "NSD: within 1 pixel." in told


def test_a_case_scores_as_worked_out_by_hand() -> None:
    prediction, reference = two_slabs()
    liver, tumour = score_case(
        prediction, reference, LABELS, (2.0, 2.0, 2.5), case="a", tolerance_mm=2.0
    )
    # 300 voxels agree and 100 are missed; a voxel is 0.01 ml.
    assert (liver.case, liver.label, liver.name, liver.tolerance_mm) == ("a", 1, "liver", 2.0)
    assert (liver.tp, liver.fp, liver.fn) == (300, 0, 100)
    assert liver.metrics["dice"] == pytest.approx(600 / 700)
    assert liver.metrics["iou"] == pytest.approx(300 / 400)
    assert (liver.prediction_ml, liver.reference_ml) == (pytest.approx(3.0), pytest.approx(4.0))
    # The prediction's surface is 2 faces of 100 voxels and the rim of a layer, 36: 236 voxels. The
    # reference's is 2 faces and 2 rims: 272, of which a face of 100 is 2.5 mm from the
    # prediction's, and the rest on it. That face of the prediction has its inner 64 voxels inside
    # the reference: 2.5 mm from the reference's face, and 2 mm a step from its rim, so that the
    # outer 28 of them are 2 mm away and the 36 within those 2.5 mm.
    distances = [0.0] * (236 - 64) + [2.0] * 28 + [2.5] * 36 + [0.0] * 172 + [2.5] * 100
    assert liver.metrics["hd95_mm"] == 2.5
    assert liver.metrics["assd_mm"] == pytest.approx(np.mean(distances))
    assert liver.metrics["nsd"] == pytest.approx(1 - 136 / 508)
    assert all(math.isnan(tumour.metrics[key]) for key in METRICS)
    assert (tumour.tp, tumour.fp, tumour.fn, tumour.reference_ml) == (0, 0, 0, 0)


@pytest.mark.parametrize("missing_from", ["prediction", "reference"])
def test_a_class_in_one_image_only_gets_the_worst_scores(missing_from: str) -> None:
    prediction, reference = two_slabs()
    (reference if missing_from == "prediction" else prediction)[9, 9, 9] = 7
    tumour = score_case(prediction, reference, LABELS, (3.0, 4.0, 1.2), case="a")[1]
    diagonal = pytest.approx(math.hypot(30, 40, 12))
    assert (tumour.metrics["dice"], tumour.metrics["iou"], tumour.metrics["nsd"]) == (0, 0, 0)
    assert (tumour.metrics["hd95_mm"], tumour.metrics["assd_mm"]) == (diagonal, diagonal)


def test_a_2d_image_has_no_volume() -> None:
    image = np.eye(4, dtype=np.int16)
    (score,) = score_case(image, image, {1: "line"}, (1.0, 2.0), case="a")
    assert (score.metrics["dice"], score.metrics["hd95_mm"], score.metrics["nsd"], score.tp) == (
        1,
        0,
        1,
        4,
    )
    assert math.isnan(score.prediction_ml) and math.isnan(score.reference_ml)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">i2", np.int64, np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_type_and_memory_order_of_the_labels_change_nothing(dtype: Any, order: Any) -> None:
    prediction, reference = two_slabs()
    expected = score_case(prediction, reference, {1: "liver"}, (1.0, 1.0, 2.0), case="a")
    stored = [np.asarray(image, dtype=dtype, order=order) for image in (prediction, reference)]
    assert score_case(stored[0], stored[1], {1: "liver"}, (1.0, 1.0, 2.0), case="a") == expected


@pytest.mark.parametrize("stray", [2, -1, 255])
def test_a_label_without_a_name_is_refused(stray: int) -> None:
    prediction, reference = (image.astype(np.int16) for image in two_slabs())
    reference[0, 0, 0] = stray
    with pytest.raises(ValueError, match=rf"labels 0, 1, 7, got {stray} in the reference; add it"):
        score_case(prediction, reference, LABELS, (1.0, 1.0, 1.0), case="a")


def test_images_of_different_shapes_are_refused() -> None:
    image = np.zeros((2, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(3, 2\); resample"):
        score_case(image, image.T, LABELS, (1.0, 1.0), case="a")


def test_the_summary_is_that_worked_out_by_hand() -> None:
    summary = summarise(rows_of({"liver": [0.9, 0.6, 0.9], "tumour": [0.2, NAN, 0.4]}))
    liver, tumour = (of_class.metrics["dice"] for of_class in summary.classes)
    assert [of_class.name for of_class in summary.classes] == ["liver", "tumour"]
    assert (liver.mean, liver.median) == (pytest.approx(0.8), pytest.approx(0.9))
    assert (tumour.mean, tumour.median) == (pytest.approx(0.3), pytest.approx(0.3))
    assert (liver.num_scored, liver.num_undefined) == (3, 0)
    assert (tumour.num_scored, tumour.num_undefined) == (2, 1)
    overall = summary.overall.metrics["dice"]
    # Mean of class means .8 and .3: .55; not the mean of the five scores, which is .6.
    assert (overall.mean, overall.median) == (pytest.approx(0.55), pytest.approx(0.6))
    assert (overall.num_scored, overall.num_undefined) == (5, 1)
    assert summary.overall.metrics["hd95_mm"].mean == pytest.approx(10 * (1 - 0.55))


@pytest.mark.parametrize("values", [[0.9, 0.5], [0.9, 0.5, NAN, NAN, NAN]])
def test_the_interval_of_two_cases_spans_them(values: list[float]) -> None:
    # A resample is both twice (1 in 4), neither (1 in 4), or one of each: the ends are the scores.
    dice = summarise(rows_of({"liver": values})).classes[0].metrics["dice"]
    assert (dice.low, dice.high) == (pytest.approx(0.5), pytest.approx(0.9))


def test_the_interval_equals_the_exact_one_over_all_resamples() -> None:
    values = [0.11, 0.52, 0.63, 0.77, 0.94, 0.35]
    every_resample = np.array(list(itertools.product(values, repeat=6)))
    exact = np.percentile(every_resample.mean(axis=1), [2.5, 97.5])
    rows = rows_of({"liver": values})
    dice = summarise(rows, num_resamples=40_000).classes[0].metrics["dice"]
    np.testing.assert_allclose([dice.low, dice.high], exact, atol=0.01)


def test_the_overall_interval_draws_whole_cases() -> None:
    # In every case the two classes add to 1, so each resample's overall mean is .5 exactly; drawn
    # apart, they would not.
    liver = [0.1, 0.4, 0.8, 0.9]
    rows = rows_of({"liver": liver, "tumour": [1 - value for value in liver]})
    overall = summarise(rows).overall.metrics["dice"]
    assert (overall.low, overall.high) == (pytest.approx(0.5), pytest.approx(0.5))


def test_a_resample_without_a_class_averages_the_other_classes() -> None:
    # Of two cases, one has a tumour. Resamples: both (mean of .8 and .2), or one twice: .5 without
    # it (class means .6) or with it (1. and .2): {.6, (.8 + .2) / 2, (1. + .2) / 2}.
    rows = rows_of({"liver": [0.6, 1.0], "tumour": [NAN, 0.2]})
    overall = summarise(rows).overall.metrics["dice"]
    assert overall.mean == pytest.approx((0.8 + 0.2) / 2)
    assert (overall.low, overall.high) == (pytest.approx(0.5), pytest.approx(0.6))


def test_one_case_gives_its_own_score_as_mean_median_and_interval() -> None:
    summary = summarise(rows_of({"liver": [0.7], "tumour": [NAN], "vessel": [0.3]}))
    liver, tumour, _ = (of_class.metrics["dice"] for of_class in summary.classes)
    assert (liver.mean, liver.median, liver.low, liver.high) == (0.7, 0.7, 0.7, 0.7)
    assert (tumour.num_scored, tumour.num_undefined) == (0, 1)
    assert all(math.isnan(value) for value in (tumour.mean, tumour.median, tumour.low, tumour.high))
    overall = summary.overall.metrics["dice"]
    for value in (overall.mean, overall.median, overall.low, overall.high):
        assert value == pytest.approx(0.5)


scores_of_cases = st.lists(
    st.tuples(*[st.one_of(st.floats(0, 1), st.just(NAN))] * 2), min_size=1, max_size=6
)


@settings(deadline=None, max_examples=25)
@given(scores_of_cases, st.randoms(use_true_random=False))
def test_the_order_of_the_cases_changes_nothing(
    values: list[tuple[float, float]], random: Any
) -> None:
    liver, tumour = ([pair[i] for pair in values] for i in (0, 1))
    rows = rows_of({"liver": liver, "tumour": tumour})
    shuffled = random.sample(rows, len(rows))
    assert summary_json(shuffled, num_resamples=50) == summary_json(rows, num_resamples=50)


@settings(deadline=None, max_examples=25)
@given(scores_of_cases)
def test_intervals_lie_within_the_scores(values: list[tuple[float, float]]) -> None:
    rows = rows_of({"liver": [pair[0] for pair in values]})
    dice = summarise(rows, num_resamples=200).classes[0].metrics["dice"]
    defined = [pair[0] for pair in values if not math.isnan(pair[0])]
    assert dice.num_scored == len(defined)
    if defined:
        assert min(defined) - 1e-12 <= dice.low <= dice.high <= max(defined) + 1e-12


def test_a_seed_gives_one_interval_and_another_class_does_not_change_it() -> None:
    liver = np.random.default_rng(5).random(20).tolist()
    alone = summarise(rows_of({"liver": liver})).classes[0]
    assert summarise(rows_of({"liver": liver})).classes[0] == alone
    assert summarise(rows_of({"liver": liver, "tumour": liver[::-1]})).classes[0] == alone
    assert summarise(rows_of({"liver": liver}), seed=1).classes[0] != alone


def test_a_summary_of_scores_without_any_case_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0; score every case once"):
        summarise([])


def test_a_case_scored_twice_or_with_other_labels_is_refused() -> None:
    rows = rows_of({"liver": [0.5, 0.6], "tumour": [0.1, 0.2]})
    renamed = [*rows[:-1], replace(rows[-1], name="lesion")]
    for wrong in ([*rows, rows[0]], rows[:-1], renamed):
        with pytest.raises(ValueError, match=r"one row for each of . classes in each of 2 cases"):
            summarise(wrong)


def test_scores_at_different_tolerances_are_refused() -> None:
    rows = [row("a", 0.5), replace(row("b", 0.5), tolerance_mm=2.0)]
    with pytest.raises(ValueError, match=r"got \[1.0, 2.0\] mm; score all cases with the same"):
        summarise(rows)


def test_the_json_is_strict_and_holds_every_score() -> None:
    prediction, reference = two_slabs()
    rows = score_case(prediction, reference, LABELS, (1.0, 1.0, 1.0), case="a")
    text = json.dumps(to_json(rows, summarise(rows)), allow_nan=False)
    read = json.loads(text)
    assert read["num_cases"] == 1 and read["tolerance_mm"] == 1.0
    assert read["bootstrap"] == {"interval": 0.95, "num_resamples": 2000, "seed": 0}
    liver, tumour = read["cases"]
    assert liver["tp"] == 300 and liver["dice"] == 600 / 700 and liver["case"] == "a"
    assert tumour["dice"] is None and tumour["hd95_mm"] is None and tumour["tp"] == 0
    assert read["classes"][0]["name"] == "liver"
    assert read["classes"][0]["dice"] == {
        "mean": 600 / 700,
        "median": 600 / 700,
        "low": 600 / 700,
        "high": 600 / 700,
        "num_scored": 1,
        "num_undefined": 0,
    }
    assert read["classes"][1]["nsd"]["mean"] is None
    assert read["overall"]["label"] is None and read["overall"]["dice"]["mean"] == 600 / 700


def test_the_table_shows_each_class_and_the_overall_in_80_columns() -> None:
    text = shown(rows_of({"liver [left]": [0.9, 0.5], "tumour": [NAN, NAN]}))
    lines = text.splitlines()
    dice = [" ".join(line.split()) for line in lines if " Dice " in line]
    # A long name goes on in the next line; the other columns keep to theirs.
    assert dice == [
        "liver Dice 0.700 0.500 to 0.900 0.700 2 0",
        "tumour Dice - - - 0 2",
        "overall Dice 0.700 0.500 to 0.900 0.700 2 2",
    ]
    assert any("[left]" in line and " IoU " in line for line in lines)
    assert sum("HD95 (mm)" in line for line in lines) == 3
    assert "2 cases" in text and "within 1 mm" in text
    assert max(map(len, lines)) <= 80


def test_a_region_is_scored_as_its_mask_and_ignored_voxels_lie_in_neither_image() -> None:
    random = np.random.default_rng(0)
    prediction, reference = random.integers(0, 3, (6, 5, 4)), random.integers(0, 4, (6, 5, 4))
    names, regions = {1: "whole", 2: "core"}, {1: (1, 2)}
    spacing = (1.0, 1.0, 2.0)
    rows = score_case(prediction, reference, names, spacing, case="a", regions=regions, ignore=3)
    counted = reference != 3
    for scored, values in zip(rows, ((1, 2), (2,)), strict=True):
        masks = [
            (np.isin(image, values) & counted).astype(int) for image in (prediction, reference)
        ]
        (alone,) = score_case(*masks, {1: scored.name}, spacing, case="a")
        assert replace(alone, label=scored.label) == scored


def test_a_prediction_with_the_ignored_label_is_refused() -> None:
    image = np.array([[0, 1, 2]])
    with pytest.raises(ValueError, match="expected the labels 0, 1, got 2 in the prediction"):
        score_case(image, image, {1: "liver"}, (1.0, 1.0), case="a", ignore=2)
