"""Classes that nobody labelled in a reference count in no Dice, no measure and no verdict."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from segkit.config.attention import AdditiveGridGateConfig
from segkit.errors import VolumeError
from segkit.explain.explain_files import explain_files
from segkit.explain.explain_scan import explain_volume
from segkit.explain.explanation import Explanation
from segkit.explain.heads.study import ScoredVolume, case_dice, head_importance
from segkit.explain.measures.measure_maps import FOREGROUND
from segkit.explain.verdicts.identity import judge_attention
from segkit.explain.verdicts.judge import judge_gates
from segkit.inference.predictor import Predictor
from segkit.io.inputs import find_inputs
from segkit.io.volume import write_volume
from tests.explain.heads.test_study import attending_model, noise_volume, self_attention

FIRST, SECOND = "label 1", "label 2"


def halves(seed: int = 0) -> ScoredVolume:
    """Noise; the first class in one half, and the second in a quarter."""
    volume = noise_volume(8, 8, 8, seed=seed)
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[:4], labels[4:, :4] = 1, 2
    return ScoredVolume(f"case {seed}", volume, volume.like(labels))


def predictor_of(**attention: Any) -> Predictor:
    return Predictor(attending_model(patch_size=(8, 8, 8), **attention), device="cpu")


def without_second(case: ScoredVolume, unlabelled: tuple[str, ...] = (SECOND,)) -> ScoredVolume:
    """The case, with no voxel of the second class in its reference."""
    values = np.where(case.reference.data == 2, 0, case.reference.data)
    return ScoredVolume(case.name, case.volume, case.reference.like(values), unlabelled)


def explained(case: ScoredVolume, **more: Any) -> Explanation:
    predictor = predictor_of(skip=AdditiveGridGateConfig())
    return explain_volume(predictor, case.volume, case.reference, **more)


def test_dice_of_unlabelled_classes_is_nan_and_their_measures_are_missing() -> None:
    case = halves()
    whole, partly = explained(case), explained(case, unlabelled=[SECOND])
    assert math.isnan(partly.dice[SECOND]) and math.isnan(partly.dice[FOREGROUND])
    assert partly.dice[FIRST] == whole.dice[FIRST] > 0
    assert {one.structure for one in whole.measures} == {"", FIRST, SECOND, FOREGROUND}
    kept = [one for one in whole.measures if one.structure in ("", FIRST)]
    assert repr(partly.measures) == repr(kept)  # as text, because some measures are NaN
    assert partly.facts["not labelled in the reference"] == SECOND
    assert "not labelled in the reference" not in whole.facts


def test_without_a_reference_nothing_is_unlabelled() -> None:
    case = halves()
    predictor = predictor_of(skip=AdditiveGridGateConfig())
    found = explain_volume(predictor, case.volume, unlabelled=[SECOND])
    assert found.unlabelled == () and SECOND in {one.structure for one in found.measures}


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(VolumeError, match=r"unlabelled has 'liver', which is not one of label 1, "):
        explained(halves(), unlabelled=["liver"])


@pytest.mark.slow
def test_verdicts_count_only_labelled_classes() -> None:
    case = halves()
    partly = explained(case, unlabelled=[SECOND], verdicts=True)
    bare = explained(without_second(case), unlabelled=[SECOND], verdicts=True)
    assert partly.worth is not None and bare.worth is not None
    for worth in (partly.worth, bare.worth):
        for channel in worth.evidence.channels.values():
            assert set(channel.drops) == set(channel.aurocs) == {FIRST}
        assert {row.label for row in worth.ablations} == {None, FIRST}
    # Voxels of the class in the reference change nothing, as they may be only some of it.
    assert [vars(row) for row in partly.worth.ablations] == [
        vars(row) for row in bare.worth.ablations
    ]
    assert partly.worth.figures["evidence"] == bare.worth.figures["evidence"]
    predictor = predictor_of(skip=AdditiveGridGateConfig())
    other = halves(1)
    pairs = [(one.volume, one.reference) for one in (case, other)]
    verdicts = judge_gates(predictor, pairs, unlabelled={0: [SECOND]})
    scans = {one.structure: one.figures for one in verdicts}
    assert {FIRST, SECOND} <= set(scans)


def test_attention_is_judged_only_by_labelled_classes() -> None:
    predictor = predictor_of(skip=AdditiveGridGateConfig())
    case, other = halves(), halves(1)
    pairs = [(one.volume, one.reference) for one in (case, other)]
    bare = [(case.volume, without_second(case).reference), pairs[1]]
    found = judge_attention(predictor, pairs, unlabelled={0: [SECOND]})
    assert {row.label for row in found.ablations if row.case == "case 0"} == {None, FIRST}
    assert {row.label for row in found.ablations if row.case == "case 1"} == {None, FIRST, SECOND}
    # Voxels of the class in the reference change nothing, as they may be only some of it.
    assert found.to_json() == judge_attention(predictor, bare, unlabelled={0: [SECOND]}).to_json()
    mean, first = found.ablations[:2]
    assert (
        mean.dice_before
        == first.dice_before
        == case_dice(predictor, ScoredVolume(case.name, case.volume, case.reference, (SECOND,)))
    )


@pytest.mark.parametrize("judge", [judge_attention, judge_gates])
def test_verdicts_refuse_an_unknown_class(judge: Callable[..., object]) -> None:
    predictor, case = predictor_of(skip=AdditiveGridGateConfig()), halves()
    with pytest.raises(VolumeError, match=r"case 0: unlabelled has 'liver', which is not one of"):
        judge(predictor, [(case.volume, case.reference)], unlabelled={0: ["liver"]})


def test_heads_count_only_labelled_classes() -> None:
    case = halves()
    partly = ScoredVolume(case.name, case.volume, case.reference, (SECOND,))
    predictor = predictor_of(bottleneck=self_attention(2))
    importance = head_importance(predictor, [partly])
    assert importance == head_importance(predictor, [without_second(case)])
    assert importance != head_importance(predictor, [without_second(case, ())])
    found, right = predictor.numbers_of(case.volume).data == 1, case.reference.data == 1
    expected = 2 * (found & right).sum() / (found.sum() + right.sum())
    assert case_dice(predictor, partly) == pytest.approx(expected)


def test_the_table_of_a_dataset_says_what_is_labelled(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        case = halves(seed)
        write_volume(tmp_path / "imagesTr" / f"{name}.nii.gz", case.volume)
        write_volume(tmp_path / "labelsTr" / f"{name}.nii.gz", case.reference)
    files = {"images": {"MRI": "imagesTr/*.nii.gz"}, "label": "labelsTr/*.nii.gz"}
    data = {
        "folder": str(tmp_path),
        "files": files,
        "labels": {"background": 0, FIRST: 1, SECOND: 2},
        "labelled": {"b": [FIRST]},
    }
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({"data": data}))
    inputs, out = find_inputs([tmp_path / "imagesTr"], 1), tmp_path / "out"
    predictor = predictor_of(skip=AdditiveGridGateConfig())
    results = list(explain_files(predictor, inputs, out, references=tmp_path / "dataset.yaml"))
    assert [result.error for result in results] == [None, None]
    figures = {name: json.loads((out / name / "measures.json").read_text()) for name in "ab"}
    assert figures["a"]["dice"][SECOND] is not None and "unlabelled" not in figures["a"]
    assert figures["b"]["dice"][SECOND] is None and figures["b"]["unlabelled"] == [SECOND]
    assert {one["structure"] for one in figures["b"]["measures"]} == {"", FIRST}
