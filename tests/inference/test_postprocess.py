"""Laws of the largest component: what stays, what goes, and when that is adopted."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as arrays
from numpy import ndarray
from numpy.testing import assert_array_equal
from scipy import ndimage

from segkit.inference.postprocess import (
    BOTH,
    CLASSES,
    LARGEST_FOREGROUND,
    Decision,
    apply,
    candidates,
    class_means,
    decide,
    largest_component,
)

NAN = float("nan")
labelled = arrays.arrays(
    np.uint8,
    st.tuples(*[st.integers(1, 6)] * 3),
    elements=st.sampled_from([0, 0, 0, 0, 1, 2, 3]),
)


def line(*values: int) -> ndarray:
    """Labels along one axis of a volume."""
    return np.array(values, np.uint8).reshape(-1, 1, 1)


# What stays


def test_of_two_blobs_the_larger_stays() -> None:
    labels = line(1, 1, 0, 1, 1, 1, 0)
    assert_array_equal(apply(labels, True, ()), line(0, 0, 0, 1, 1, 1, 0))
    assert_array_equal(apply(labels, False, [1]), line(0, 0, 0, 1, 1, 1, 0))
    assert_array_equal(labels, line(1, 1, 0, 1, 1, 1, 0))  # the argument stays as it was


def test_the_foreground_is_one_whatever_its_classes() -> None:
    labels = line(1, 2, 2, 0, 1, 1)
    assert_array_equal(apply(labels, True, ()), line(1, 2, 2, 0, 0, 0))
    assert_array_equal(apply(labels, False, [1]), line(0, 2, 2, 0, 1, 1))


def test_a_classs_largest_is_sought_after_the_foregrounds() -> None:
    # Class 1's largest component lies apart from the largest foreground.
    labels = line(1, 2, 2, 2, 0, 1, 1)
    assert_array_equal(apply(labels, True, [1]), line(1, 2, 2, 2, 0, 0, 0))
    assert_array_equal(apply(labels, False, [1]), line(0, 2, 2, 2, 0, 1, 1))


@pytest.mark.parametrize("step", [(1, 0, 0), (1, 1, 0), (1, 1, 1), (1, -1, 1)])
def test_voxels_that_touch_by_a_face_an_edge_or_a_corner_are_connected(
    step: tuple[int, int, int],
) -> None:
    labels = np.zeros((5, 5, 5), np.uint8)
    labels[2, 2, 2] = labels[tuple(np.add(2, step))] = 1
    labels[0, 0, 0] = 1
    kept = labels.copy()
    kept[0, 0, 0] = 0
    assert_array_equal(apply(labels, False, [1]), kept)
    apart = np.zeros((5, 5, 5), np.uint8)
    apart[2, 2, 2] = apart[tuple(np.add(2, np.multiply(2, step)))] = 1
    assert ndimage.label(apart, np.ones((3, 3, 3)))[1] == 2


def test_of_components_that_are_equally_large_all_stay() -> None:
    labels = line(1, 1, 0, 1, 0, 1, 1)
    assert_array_equal(apply(labels, True, ()), line(1, 1, 0, 0, 0, 1, 1))


def test_without_any_step_the_array_itself_is_returned() -> None:
    labels = line(1, 0, 1)
    assert apply(labels, False, ()) is labels


@pytest.mark.parametrize("labels", [line(0, 0), line(2, 0)])
def test_post_processing_accepts_a_class_that_is_absent(labels: ndarray) -> None:
    assert_array_equal(apply(labels, True, [1, 7]), labels)


@pytest.mark.parametrize("order", ["C", "F"])
@given(labels=labelled)
def test_the_component_that_is_kept_is_scipys_largest(labels: ndarray, order: str) -> None:
    labels = np.array(labels, order=order)  # type: ignore[call-overload]
    expected = labels.copy()
    for number in (1, 3):
        pieces, count = ndimage.label(labels == number, ndimage.generate_binary_structure(3, 3))
        sizes = [int((pieces == piece).sum()) for piece in range(1, count + 1)]
        for piece, size in enumerate(sizes, start=1):
            if size < max(sizes):
                expected[pieces == piece] = 0
    kept = apply(labels, False, {3, 1})
    assert_array_equal(kept, expected)
    assert kept.dtype == labels.dtype and kept.flags["F_CONTIGUOUS"] == labels.flags["F_CONTIGUOUS"]


@given(labels=labelled)
def test_keeping_the_largest_twice_is_keeping_it_once(labels: ndarray) -> None:
    once = apply(labels, True, [1, 2, 3])
    assert_array_equal(apply(once, False, [1, 2, 3]), once)
    foreground = apply(labels, True, ())
    assert_array_equal(apply(foreground, True, ()), foreground)
    assert_array_equal(largest_component(labels > 0), foreground > 0)


@given(labels=labelled)
def test_one_classs_largest_component_does_not_change_anothers(labels: ndarray) -> None:
    together = candidates([1, 2, 3])[CLASSES](labels)
    for number in (1, 2, 3):
        alone = apply(labels, False, [number])
        assert_array_equal(alone == number, together == number)


# When it is adopted


def tables(
    raw: list[list[float]],
    foreground: list[list[float]],
    classes: list[list[float]],
    both: list[list[float]] | None = None,
) -> tuple[ndarray, dict[str, ndarray]]:
    after = {LARGEST_FOREGROUND: foreground, CLASSES: classes, BOTH: both or foreground}
    return np.array(raw), {name: np.array(table) for name, table in after.items()}


# Of two classes, the means before and after keeping the foreground's largest component.
FOREGROUND_ALONE = {
    "both rise": ([0.5, 0.5], [0.6, 0.6], True),
    "one rises, one stays": ([0.5, 0.5], [0.6, 0.5], True),
    "the mean rises, one falls": ([0.5, 0.5], [0.9, 0.4], False),
    "the mean stays, one falls": ([0.5, 0.5], [0.6, 0.4], False),
    "all stay": ([0.5, 0.5], [0.5, 0.5], False),
    "both fall": ([0.5, 0.5], [0.4, 0.4], False),
    "a class that is nowhere": ([0.5, NAN], [0.6, NAN], True),
    "nothing defined": ([NAN, NAN], [NAN, NAN], False),
}


@pytest.mark.parametrize("name", FOREGROUND_ALONE)
def test_the_foregrounds_largest_is_adopted_if_the_mean_rises_and_no_class_falls(name: str) -> None:
    raw, foreground, adopted = FOREGROUND_ALONE[name]
    found = decide(*tables([raw], [foreground], [raw], [foreground]))
    assert found == Decision(adopted, ())


def test_a_classs_largest_is_adopted_if_that_class_rises() -> None:
    raw = [[0.5, 0.5, 0.5, NAN]]
    assert decide(*tables(raw, raw, [[0.6, 0.5, 0.4, NAN]])) == Decision(False, (0,))


def test_means_are_over_cases_so_that_one_case_may_fall() -> None:
    raw = [[0.5, 0.9], [0.5, 0.9]]
    after = [[0.4, 0.9], [0.8, 0.9]]
    assert decide(*tables(raw, after, raw)) == Decision(True, ())
    assert decide(*tables(raw, raw, after)) == Decision(False, (0,))


def test_after_the_foreground_a_class_is_measured_against_the_foregrounds() -> None:
    raw, foreground = [[0.5, 0.5]], [[0.7, 0.5]]
    # Alone, class 0 would rise from 0.5 to 0.6; after the foreground it is 0.7 already.
    assert decide(*tables(raw, foreground, [[0.6, 0.6]], [[0.7, 0.8]])) == Decision(True, (1,))
    # And where the foreground's is not adopted, what came after it says nothing.
    worse = [[0.7, 0.4]]
    assert decide(*tables(raw, worse, [[0.6, 0.5]], [[0.9, 0.9]])) == Decision(False, (0,))


def test_a_false_alarm_that_goes_away_raises_the_mean_of_the_other_cases() -> None:
    # In the second case the class is not there; its removal leaves Dice undefined.
    raw, after = [[0.8], [0.0]], [[0.8], [NAN]]
    assert class_means(np.array(after)) == [0.8]
    assert decide(*tables(raw, after, after)) == Decision(True, ())


def test_of_one_class_foreground_and_class_are_the_same_and_adopted_once() -> None:
    raw, after = [[0.5]], [[0.6]]
    assert decide(*tables(raw, after, after)) == Decision(True, ())
    assert decide(*tables(after, raw, raw)) == Decision(False, ())


def test_the_dice_of_a_decision_comes_from_the_tables() -> None:
    raw, after = tables([[0.5, 0.5]], [[0.7, 0.5]], [[0.6, 0.6]], [[0.7, 0.8]])
    assert_array_equal(Decision(True, (1,)).dice(raw, after), [[0.7, 0.8]])
    assert_array_equal(Decision(True, ()).dice(raw, after), [[0.7, 0.5]])
    assert_array_equal(Decision(False, (0,)).dice(raw, after), [[0.6, 0.5]])
    assert_array_equal(Decision(False, ()).dice(raw, after), [[0.5, 0.5]])
    assert raw.tolist() == [[0.5, 0.5]]


@given(data=st.data())
def test_adopted_steps_never_lower_the_dice_of_a_class(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 3)))
    table = arrays.arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    raw = data.draw(table)
    after = {name: data.draw(table) for name in (LARGEST_FOREGROUND, CLASSES, BOTH)}
    chosen = decide(raw, after).dice(raw, after)
    assert (class_means(chosen) >= class_means(raw)).all()
