"""Facts of the pictures of a dataset, in words."""

from segkit.checking.dataset_pictures import range_of


def test_a_column_of_equal_numbers_is_given_once() -> None:
    rows = [(64, 32), (64, 40), (64, 48)]
    assert range_of(rows, "d") == "64, 32 to 48 (median 40)"


def test_numbers_that_look_alike_are_equal() -> None:
    assert range_of([(0.97999,), (0.98001,)], ".3g") == "0.98"
    assert range_of([(0.97,), (0.98,)], ".3g") == "0.97 to 0.98 (median 0.975)"
