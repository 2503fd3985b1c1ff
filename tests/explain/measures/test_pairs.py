"""Laws of pairs of a scan and its reference."""

from pathlib import Path
from typing import Any

import pytest

from segkit.errors import VolumeError
from segkit.explain.measures.pairs import pairs_of
from segkit.explain.verdicts.judge import judge_gates
from tests.planted import moved_case, planted


def test_pairs_are_tuples_or_lists_with_or_without_a_reference() -> None:
    case = moved_case(0)
    pair = (case.volume, case.reference)
    assert list(pairs_of([pair, list(pair), (case.volume, None)])) == [
        pair,
        pair,
        (case.volume, None),
    ]


def test_other_values_are_refused_with_what_they_are() -> None:
    case = moved_case(0)
    pair = (case.volume, case.reference)
    paths = (Path("scan.nii.gz"), Path("label.nii.gz"))
    wrong: list[tuple[Any, str]] = [
        ({"one": pair}, "case 0: expected a pair .* found str;"),
        ([pair, case.volume], "case 1: expected a pair .* found Volume;"),
        ([case], "case 0: expected a pair .* found ScoredVolume;"),
        ([(*pair, None)], r"found 3 values \(Volume, Volume, NoneType\); pass \[\(scan, ref"),
        (case.volume, r"^expected pairs of a scan and its reference, found Volume; pass \[\(scan"),
        ([[case.volume]], r"found 1 value \(Volume\);"),
        ([paths], r"found 2 values \(PosixPath, PosixPath\);"),
        ([(None, case.reference)], r"found 2 values \(NoneType, Volume\);"),
    ]
    for cases, told in wrong:
        with pytest.raises(VolumeError, match=told):
            list(pairs_of(cases))
    with pytest.raises(VolumeError, match="case 1"):
        pairs_of([pair, case])  # before any is used
    predictor = planted("mask")
    with pytest.raises(VolumeError, match=r"expected a pair .* found str;"):
        judge_gates(predictor, {"one": pair})  # type: ignore[arg-type]
