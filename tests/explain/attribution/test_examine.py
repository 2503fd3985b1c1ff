"""Deletion and randomisation of attributions."""

import math

import numpy as np
import pytest
from torch import Tensor

from segkit.explain.attribution.attribute import AttributionSettings, Method, attribute
from segkit.explain.attribution.examine import (
    AT_RANDOM,
    LARGE_FIRST,
    AttributionTest,
    examination_curves,
    examination_tables,
    examine_attributions,
)
from segkit.explain.explain_scan import explain_volume
from segkit.explain.verdicts.deletion import FRACTIONS
from segkit.explain.verdicts.evidence import HIGH_FIRST
from tests.explain.attribution.test_attribute import Linear, scan, wrapped


class Sharp(Linear):
    """Logits so far apart that probabilities are nearly 0 or 1."""

    def forward(self, image: Tensor) -> Tensor:
        return 8 * super().forward(image)


@pytest.fixture(scope="module")
def examined() -> dict[str, AttributionTest]:
    """Of a network that looks at each voxel alone, at the difference of its two channels."""
    volume, predictor = scan(2, (8, 8, 8)), wrapped(Sharp(), 2)
    labels = predictor(volume).labels
    settings = AttributionSettings(cell_mm=1.0, draws=1)
    methods: tuple[Method, ...] = ("occlusion", "smoothgrad")
    found = {
        one.key: one
        for method in methods
        for one in attribute(
            predictor, volume, method, structure="label 1", region=labels, settings=settings
        ).values()
    }
    return examine_attributions(predictor, volume, labels, found)


def test_the_prediction_changes_sooner_where_the_attribution_is_high(
    examined: dict[str, AttributionTest],
) -> None:
    curves = examined["occlusion/label 1"].curves
    assert list(curves) == [HIGH_FIRST, LARGE_FIRST, AT_RANDOM]
    for curve in curves.values():
        assert curve.fractions == FRACTIONS and curve.scores[0] == pytest.approx(1, abs=1e-3)
    areas = {order: curve.area for order, curve in curves.items()}
    assert areas[HIGH_FIRST] < areas[AT_RANDOM] - 0.02
    # All orders end with the same image.
    assert np.ptp([curve.scores[-1] for curve in curves.values()]) < 1e-6


def test_attributions_by_one_weight_are_the_same_whatever_the_weight_is() -> None:
    """The gradient is the weight inside the region; occlusion, the weight times the difference."""
    volume, predictor = scan(1, (8, 8, 8)), wrapped(Linear(1), 1)
    labels = predictor(volume).labels
    settings = AttributionSettings(cell_mm=2.0, draws=1)
    methods: tuple[Method, ...] = ("occlusion", "smoothgrad")
    for method in methods:
        found = attribute(predictor, volume, method, region=labels, settings=settings)
        of_key = {one.key: one for one in found.values()}
        for one in examine_attributions(predictor, volume, labels, of_key).values():
            assert one.similarities == (pytest.approx(1), pytest.approx(1))


def test_attributions_by_several_weights_depend_on_them(
    examined: dict[str, AttributionTest],
) -> None:
    for one in examined.values():
        assert len(one.similarities) == 2 and 0 <= min(one.similarities) < 0.9


def test_results_are_shown_as_tables_curves_and_plain_data(
    examined: dict[str, AttributionTest],
) -> None:
    (table,) = examination_tables(examined)
    assert [row[0] for row in table.rows] == list(examined)
    one = examined["occlusion/label 1"]
    assert table.rows[0][1] == round(one.curves[HIGH_FIRST].area, 4)
    assert table.rows[0][4] == round(one.similarity, 4)
    assert [len(curve.lines) for curve in examination_curves(examined)] == [3, 3]
    told = one.figures()
    assert told["deletion_area"][AT_RANDOM] == one.curves[AT_RANDOM].area
    assert examination_tables({}) == [] and list(examination_curves({})) == []


def test_a_structure_that_is_not_predicted_has_no_curves_and_is_nan() -> None:
    one = AttributionTest("occlusion/x", {}, (math.nan,))
    assert math.isnan(one.similarity)
    (table,) = examination_tables({one.key: one})
    assert list(table.rows[0]) == ["occlusion/x", None, None, None, None]


def test_verdicts_test_attributions_also_of_a_network_without_gates() -> None:
    explanation = explain_volume(
        wrapped(Linear(1), 1),
        scan(1, (8, 8, 8)),
        verdicts=True,
        attributions=["occlusion"],
        attribution_settings=AttributionSettings(cell_mm=4.0),
    )
    assert explanation.worth is None and explanation.attributions
    assert list(explanation.attribution_tests) == list(explanation.attributions)
    titles = [table.title for table in explanation.page().tables]
    assert titles[-2:] == ["What is attributed", "Deletion and randomisation of attributions"]
    assert [curve.title for curve in explanation.page().curves] == [
        f"Deletion: {key}" for key in explanation.attributions
    ]
