"""An explanation as an object: what it holds, and how it shows itself."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from segkit.config.attention import AdditiveGridGateConfig
from segkit.config.network import NetworkConfig
from segkit.errors import SegkitError, VolumeError
from segkit.explain.display import Table
from segkit.explain.explain_scan import explain_volume, facts_of
from segkit.explain.explanation import Explanation
from segkit.explain.page.page import write_page
from segkit.explain.verdicts.evidence import CaseEvidence
from segkit.explain.verdicts.rule import GateVerdict
from segkit.explain.verdicts.study import Worth
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from tests.browser import CHROMIUM, show
from tests.explain.heads.test_study import attending_model, noise_case
from tests.helpers import stored_otherwise

KEYS = ["skip.0/gate", "skip.1/gate", "fused/gate"]


def gated() -> Predictor:
    return Predictor(attending_model(skip=AdditiveGridGateConfig(levels=[0, 1])), device="cpu")


@pytest.fixture(scope="module")
def explained() -> Explanation:
    """Of a scan of two windows along its first axis, with its reference and a verdict."""
    scan = noise_case(12, 8, 8).volume
    verdict = GateVerdict(
        "skip.1/gate", 0, "label 1", "redundant", "lets through", "Looked at with a reference."
    )
    worth = Worth(CaseEvidence("a", "reference"), (verdict,), tables=(Table("t", [], []),))
    found = explain_volume(gated(), scan, layered(scan), name="<a>")
    assert found.worth is None and found.verdicts == ()
    return replace(found, worth=worth)


def layered(scan: Volume) -> Volume:
    """Labels of whole cells of any of the maps: 1 in the first third, 2 in the next."""
    labels = np.zeros(scan.grid.shape, np.uint8)
    labels[:4], labels[4:8] = 1, 2
    return scan.like(labels)


def test_maps_are_those_of_the_predictor_and_their_mean(explained: Explanation) -> None:
    plain = gated()(explained.scan, maps=True)
    assert list(explained.maps) == KEYS
    for key, one in plain.maps.items():
        found = explained.maps[key].volume
        assert found is not None and one.volume is not None
        assert_array_equal(found.data, one.volume.data)
    assert_array_equal(explained.labels.data, plain.labels.data)
    assert explained.on_scan("skip.1/gate").data.shape == explained.scan.grid.shape


def test_windows_disagree_only_in_cells_that_several_windows_cover(explained: Explanation) -> None:
    one = explained.maps["skip.0/gate"]
    assert one.volume is not None and one.disagreement is not None
    apart = one.disagreement.data
    # Windows of 8 voxels begin at 0 and 4: cells of 2 voxels meet from 4 to 7.
    stride = int(one.info.placement.stride[0]) if one.info.placement else 0
    told = np.isfinite(apart).all(axis=(1, 2)).tolist()
    assert told == [4 <= cell * stride < 8 for cell in range(apart.shape[0])]
    values = {measure.name: measure for measure in explained.measures if measure.map == KEYS[0]}
    inside = apart[np.isfinite(apart)]
    assert values["disagreement"].value == pytest.approx(inside.mean())
    assert values["disagreement_p95"].value == pytest.approx(np.percentile(inside, 95))


def test_one_window_has_nothing_to_disagree_with() -> None:
    found = explain_volume(gated(), noise_case(8, 8, 8).volume)
    told = {one.map: one.value for one in found.measures if one.name == "disagreement"}
    assert list(told) == KEYS[:2] and all(np.isnan(value) for value in told.values())
    assert found.against == "prediction" and found.dice == {}


def test_a_reference_on_another_grid_is_refused_by_name() -> None:
    scan, other = noise_case(8, 8, 8).volume, noise_case(8, 8, 12)
    with pytest.raises(VolumeError, match=r"^b: the reference lies on another grid than the scan"):
        explain_volume(gated(), scan, other.reference, name="b")


def test_a_reference_with_axes_in_another_order_gives_the_same_measures() -> None:
    case = noise_case(8, 8, 12)
    expected = explain_volume(gated(), case.volume, case.reference)
    values, grid = stored_otherwise(case.reference.data, case.reference.grid, (2, 0, 1), (1,))
    found = explain_volume(gated(), case.volume, Volume(values, grid))
    assert found.reference is not None
    assert_array_equal(found.reference.data, case.reference.data)
    assert found.dice == expected.dice and expected.dice
    assert str(found.measures) == str(expected.measures)  # NaN is itself


def test_disagreement_is_computed_only_on_request() -> None:
    maps = gated()(noise_case(12, 8, 8).volume, maps=True).maps
    assert all(one.disagreement is None for one in maps.values())


def test_dice_counts_both_sides(explained: Explanation) -> None:
    assert explained.reference is not None
    first, second = explained.labels.data > 0, explained.reference.data > 0
    expected = 2 * (first & second).sum() / (first.sum() + second.sum())
    assert explained.dice["foreground"] == pytest.approx(expected)


def test_the_page_shows_every_map_and_verdict(explained: Explanation) -> None:
    page = explained.page()
    assert [layer.name for layer in page.layers] == [*KEYS, "segmentation", "reference"]
    for layer in page.layers[:3]:
        native = explained.maps[layer.name].volume
        assert native is not None and layer.grid is native.grid
        assert_array_equal(layer.values, native.data)
        assert (layer.low, layer.high) == (0, 1)
    assert [verdict.reason for verdict in page.verdicts] == ["Looked at with a reference."]
    assert page.tables[-1].title == "t"
    bars = {bars.title: iter(bars.bars) for bars in page.bars}
    for one in explained.measures:
        if one.name == "auroc" and np.isfinite(one.value):
            bar = next(bars[f"AUROC: {one.structure}"])
            assert bar.value == abs(one.value - 0.5)
            name = one.map if one.of == "map" else one.of
            assert bar.name == (f"{name} ↓" if one.value < 0.5 else name)
            assert bar.baseline == (one.of != "map")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install chromium")
def test_a_browser_shows_the_page_without_errors(explained: Explanation, tmp_path: Path) -> None:
    write_page(tmp_path / "index.html", explained.page())
    shown = show(tmp_path / "index.html", tmp_path / "run")
    assert 'data-ready="yes"' in shown.dom and shown.console == []
    assert "Localisation" in shown.dom


def test_a_notebook_shows_pictures_and_tables(explained: Explanation) -> None:
    text = explained._repr_html_()
    assert "&lt;a&gt;" in text and "<a>" not in text
    assert text.count("data:image/png;base64,iVBOR") == 1
    assert all(text.count(key) >= 2 for key in KEYS)


def test_a_widget_without_ipyniivue_is_refused_in_a_sentence(
    explained: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ipyniivue", None)
    with pytest.raises(SegkitError, match=r"needs ipyniivue; run pip install 'segkit\[notebook\]'"):
        explained.to_niivue()


def test_rows_hold_each_measure_with_its_chance(explained: Explanation) -> None:
    rows = explained.rows()
    assert len({tuple(row) for row in rows}) == 1
    found = {(row["map"], row["of"], row["structure"]): row for row in rows}
    for one in explained.measures:
        row = found[one.map, one.of, one.structure]
        if np.isfinite(one.value):
            assert_allclose(row[one.name], one.value)
        else:
            assert row[one.name] == ""
        if one.chance is not None:
            assert row[f"{one.name}_chance"] == one.chance


def described(**changes: object) -> dict[str, str]:
    """The facts of a model whose description has other values."""
    model = attending_model(skip=AdditiveGridGateConfig(levels=[0, 1]))
    description = model.description.model_copy(update=changes)
    return facts_of(Predictor(replace(model, description=description), device="cpu"))


def test_facts_give_lengths_in_the_unit_of_the_model() -> None:
    assert described()["spacing"] == "1 x 1 x 1 mm"
    assert described(spacing=(2e-3, 2e-3, 2e-3), unit="µm")["spacing"] == "2 x 2 x 2 µm"
    assert described(unit="pixel")["spacing"] == "1 x 1 x 1 pixels"


def test_facts_of_a_network_that_segkit_did_not_build_are_its_own() -> None:
    network = NetworkConfig.model_validate({"given": {"multiple": [1, 1, 1], "name": "Theirs"}})
    facts = described(network=network)
    assert facts["network"].startswith("Theirs, 3D, ") and "U-Net" not in facts["network"]
    assert facts["maps"] == "skip.0/gate, skip.1/gate" and "attention" not in facts
