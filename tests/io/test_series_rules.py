"""Rules choose series by what headers say of them, in the words of the command line."""

from pathlib import Path

import pytest

from segkit.errors import VolumeError
from segkit.io.dicom_headers import Slice
from segkit.io.dicom_listing import Series
from segkit.io.series_rules import SeriesRule, parse_series

ONE = Slice(Path("a"), (2, 2, 1), 1, 0, (), (), (), 1.0)
CHEST = Series(Path("/data/p1/CT"), "1.2.3", "Thorax  VENOUS", "CT", (ONE,) * 30)


@pytest.mark.parametrize(
    ("words", "admitted"),
    [
        (["modality=ct"], True),
        (["modality=MR"], False),
        (["description=*venous*"], True),
        (["description=venous"], False),
        (["description=head*", "description=thorax*"], True),
        (["slices=30"], True),
        (["slices=31.."], False),
        (["slices=..30"], True),
        (["slices=10..29"], False),
        (["folder=*/CT"], True),
        (["folder=p2/*"], False),
        (["modality=CT", "slices=40.."], False),
    ],
)
def test_a_series_is_admitted_if_all_conditions_hold(words: list[str], admitted: bool) -> None:
    rule = parse_series(words)
    assert isinstance(rule, SeriesRule)
    assert rule.admits(CHEST, Path("/data")) == admitted


def test_a_lone_uid_is_a_uid_and_nothing_is_no_rule() -> None:
    assert parse_series(["1.2.840.1"]) == "1.2.840.1"
    assert parse_series(None) is None and parse_series([]) is None


@pytest.mark.parametrize(
    "words",
    [["thorax"], ["modality="], ["slices=many"], ["1.2.3", "modality=CT"], ["modality=CT"] * 2],
)
def test_unknown_conditions_of_series_are_refused_with_the_known_ones(words: list[str]) -> None:
    with pytest.raises(VolumeError, match=r"expected a UID, modality=CT, description=\*thorax\*"):
        parse_series(words)
