"""Cells of tables are rounded for a reader."""

from segkit.explain.display import rounded


def test_only_floats_are_rounded_and_nan_is_nothing() -> None:
    assert rounded(0.123456) == 0.1235
    assert rounded(float("nan")) is None
    assert [rounded(value) for value in (None, 3, "0.123456")] == [None, 3, "0.123456"]
