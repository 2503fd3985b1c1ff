"""Laws of the study behind `--verdicts`: from the maps of a scan to the page and the files."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from segkit.explain.explain_scan import explain_volume
from segkit.explain.explanation import Explanation
from segkit.explain.verdicts.ablation import OPERATIONS
from segkit.explain.verdicts.study import Worth, cohort_figures, shown_verdicts
from tests.planted import KEY, Kind, moved_case, planted, planted_case, untrained_planted


def studied(kind: Kind, *, labelled: bool = True) -> Explanation:
    case = moved_case(0)
    reference = case.reference if labelled else None
    return explain_volume(
        planted(kind),
        case.volume,
        reference,
        name="case",
        verdicts=True,
        untrained=untrained_planted,
    )


def worth_of(explanation: Explanation) -> Worth:
    assert explanation.worth is not None
    return explanation.worth


@pytest.fixture(scope="module")
def mask() -> Explanation:
    return studied("mask")


def test_one_scan_gives_evidence_in_every_file_but_cannot_tell(
    mask: Explanation, tmp_path: Path
) -> None:
    written = mask.write(tmp_path)
    assert tmp_path / "ablation.csv" in written
    told = json.loads((tmp_path / "measures.json").read_text())["worth"]
    (verdict,) = told["verdicts"]
    assert (verdict["map"], verdict["channel"], verdict["structure"]) == (KEY, 0, "label 1")
    assert (verdict["word"], verdict["direction"]) == ("cannot tell", "lets through")
    (channel,) = told["evidence"]["channels"]
    assert channel["auroc"]["label 1"]["map"] == 1 and channel["dice_lost"] == {"label 1": [1.0]}
    rows = list(csv.DictReader((tmp_path / "ablation.csv").read_text().splitlines()))
    assert [row["operation"] for row in rows if not row["label"]] == list(OPERATIONS)
    evened = next(row for row in rows if row["operation"] == "mean" and not row["label"])
    assert float(evened["change"]) == -channel["dice_lost"]["label 1"][0]
    assert '"verdict": "cannot tell"' in (tmp_path / "index.html").read_text()


def test_the_page_shows_the_evidence_of_a_verdict(mask: Explanation) -> None:
    page = mask.page()
    assert [verdict.verdict for verdict in page.verdicts] == ["cannot tell"]
    assert [curve.title for curve in page.curves] == [f"Deletion: {KEY}"]
    first, *others = page.curves[0].lines
    assert first.name == "highest first" and {"lowest first", "untrained network 0"} <= {
        line.name for line in others
    }
    for line in others:  # all begin and end with the same image
        assert (line.y[0], line.y[-1]) == (first.y[0], first.y[-1])
    titles = [table.title for table in page.tables]
    assert {"Each gate channel and structure", "Dice without each map"} <= set(titles)


@pytest.mark.parametrize("kind", ["constant", "noise"])
def test_a_gate_without_information_measures_as_chance(kind: Kind) -> None:
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


def test_without_a_reference_there_is_no_verdict() -> None:
    found = studied("mask", labelled=False)
    assert [verdict.word for verdict in found.verdicts] == [None]
    assert worth_of(found).evidence.against == "prediction"
    assert [verdict.verdict for verdict in found.page().verdicts] == ["no verdict"]


def test_an_empty_reference_gives_no_ablation_and_no_verdict() -> None:
    case = planted_case()
    empty = case.reference.like(np.zeros_like(case.reference.data))
    found = worth_of(
        explain_volume(
            planted("mask"), case.volume, empty, verdicts=True, untrained=untrained_planted
        )
    )
    assert found.verdicts == () and found.figures["ablation"] == []
    assert len(found.curves) == 1


def test_scans_are_judged_together(mask: Explanation) -> None:
    """In copies of one scan the map always points at the same place, as other scans' maps do."""
    evidence = worth_of(mask).evidence
    verdicts, told = cohort_figures([replace(evidence, case=f"{n}") for n in range(8)])
    assert [one.figures["scans"] for one in verdicts] == [8]
    assert verdicts[0].figures["AUROC: best comparator"] == "mean map of the other scans"
    assert [one["case"] for one in told["evidence"]] == [f"{n}" for n in range(8)]
    (shown,) = shown_verdicts(verdicts)
    assert shown.numbers["scans"] == 8 and shown.verdict == verdicts[0].word
