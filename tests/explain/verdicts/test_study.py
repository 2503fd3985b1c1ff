"""Laws of the study behind `--verdicts`: gates of known worth, from the maps to the page."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from segkit.errors import ModelError
from segkit.explain.explain_scan import Explanation, explain_volume
from segkit.explain.verdicts.ablation import OPERATIONS
from segkit.explain.verdicts.study import Worth, check_gates, cohort_figures
from segkit.inference.predictor import Predictor
from tests.explain.heads.test_study import attending_model, self_attention
from tests.planted import KEY, Kind, Planted, planted, planted_case


def studied(kind: Kind, *, seed: int = 0, labelled: bool = True) -> Explanation:
    case = planted_case(seed)
    torch.manual_seed(0)
    reference = case.reference if labelled else None
    return explain_volume(
        planted(kind),
        case.volume,
        reference,
        name="case",
        verdicts=True,
        fresh=Planted("untrained"),
    )


def worth_of(explanation: Explanation) -> Worth:
    assert explanation.worth is not None
    return explanation.worth


@pytest.fixture(scope="module")
def mask() -> Explanation:
    return studied("mask")


def test_a_gate_that_is_the_mask_is_informative_in_every_file(
    mask: Explanation, tmp_path: Path
) -> None:
    written = mask.write(tmp_path)
    assert tmp_path / "ablation.csv" in written
    told = json.loads((tmp_path / "measures.json").read_text())["worth"]
    assert [(one["map"], one["verdict"]) for one in told["verdicts"]] == [(KEY, "informative")]
    assert told["figures"][0]["auroc"] == 1 and told["figures"][0]["against"] == "reference"
    rows = list(csv.DictReader((tmp_path / "ablation.csv").read_text().splitlines()))
    assert [row["operation"] for row in rows if not row["label"]] == list(OPERATIONS)
    evened = next(row for row in rows if row["operation"] == "mean" and not row["label"])
    assert float(evened["change"]) == told["figures"][0]["mean_change"] < -0.5
    assert '"verdict": "informative"' in (tmp_path / "index.html").read_text()


def test_the_page_has_what_the_verdict_rests_on(mask: Explanation) -> None:
    page = mask.page()
    assert [verdict.verdict for verdict in page.verdicts] == ["informative"]
    assert [curve.title for curve in page.curves] == [f"Deletion: {KEY}", f"Insertion: {KEY}"]
    for curve in page.curves:
        first, chance = curve.lines
        # Both begin and end with the same image.
        assert (first.y[0], first.y[-1]) == (chance.y[0], chance.y[-1])
    (rests,) = [table for table in page.tables if table.title == "What the verdicts rest on"]
    baselines = {
        one.of: one.value for one in mask.measures if one.name == "auroc" and one.of != "map"
    }
    either = {of: max(auroc, 1 - auroc) for of, auroc in baselines.items()}
    best = max(either, key=either.__getitem__)
    turned = " turned over" * (baselines[best] < 0.5)
    found: dict[str, Any] = dict(zip(rests.columns, rests.rows[0], strict=True))
    assert (found["AUROC"], found["best baseline"]) == (1, f"{best}{turned}")
    assert found["baseline's AUROC"] == pytest.approx(either[best], abs=1e-4)


def test_a_gate_of_one_value_is_uninformative() -> None:
    page = studied("constant").page()
    assert [verdict.verdict for verdict in page.verdicts] == ["uninformative"]
    assert "changes by +0.0000 with it evened out" in page.verdicts[0].reason


@pytest.mark.parametrize("kind", ["constant", "noise"])
def test_a_gate_that_knows_nothing_measures_as_chance_does(kind: Kind) -> None:
    """Exactly, of one value; of noise, on average over scans, but for pointing, which is 0 or 1."""
    found: dict[str, list[float]] = {}
    for seed in range(1 if kind == "constant" else 6):
        case = planted_case(seed)
        for one in explain_volume(planted(kind), case.volume, case.reference).measures:
            if one.of == "map" and one.structure and one.chance:
                found.setdefault(one.name, []).append(one.value / one.chance - 1)
    assert set(found) == {"energy", "enrichment", "pointing", "auroc", "iou"}
    for name in set(found) - ({"pointing"} if kind == "noise" else set()):
        tolerance = 1e-5 if kind == "constant" else 0.25 if name == "iou" else 0.1
        assert np.mean(found[name]) == pytest.approx(0, abs=tolerance), name


def test_without_a_reference_the_models_own_labels_stand_in() -> None:
    found = worth_of(studied("mask", labelled=False))
    (figures,) = found.figures["figures"]
    assert figures["against"] == "prediction" and figures["mean_change"] < -0.5
    assert found.verdicts[0].verdict == "informative"


def test_a_reference_without_a_structure_costs_the_verdict_and_no_more() -> None:
    case = planted_case()
    empty = case.reference.like(np.zeros_like(case.reference.data))
    fresh = Planted("untrained")
    found = worth_of(
        explain_volume(planted("mask"), case.volume, empty, verdicts=True, fresh=fresh)
    )
    assert found.verdicts == () and found.figures["ablation"] == []
    assert len(found.curves) == 2 and len(found.figures["randomisation"]) == 1


def test_scans_are_pooled_with_a_test_and_one_scan_has_none(mask: Explanation) -> None:
    evidence = worth_of(mask).evidence
    for count, p_value in ((1, None), (8, pytest.approx(4 * 2.0**-7))):
        scans = [
            replace(evidence, ablations=[replace(row, case=str(n)) for row in evidence.ablations])
            for n in range(count)
        ]
        verdicts, told = cohort_figures(scans)
        assert [verdict.verdict for verdict in verdicts] == ["informative"]
        assert verdicts[0].numbers["scans"] == count
        effects = {effect["operation"]: effect for effect in told["ablation"]}
        assert list(effects) == list(OPERATIONS) and effects["mean"]["p_holm"] == p_value


def test_a_model_without_gates_is_refused() -> None:
    predictor = Predictor(attending_model(bottleneck=self_attention(2)), device="cpu")
    with pytest.raises(ModelError, match=r"^verdicts are of gates and spatial maps.* train one"):
        check_gates(predictor)
