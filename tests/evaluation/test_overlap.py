import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.testing import assert_close

from segkit.evaluation.overlap import Overlap, confusion_matrix

NAN = float("nan")
DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@st.composite
def label_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    num_classes = draw(st.integers(1, 6))
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    first, second = random.integers(num_classes, size=(2, *shape))
    dtype = draw(st.sampled_from(DTYPES))
    return torch.from_numpy(first).to(dtype), torch.from_numpy(second).to(dtype), num_classes


def brute_force(prediction: Tensor, reference: Tensor, num_classes: int) -> Tensor:
    expected = np.zeros((num_classes, num_classes), dtype=np.int64)
    for row in range(num_classes):
        for column in range(num_classes):
            both = (reference.numpy() == row) & (prediction.numpy() == column)
            expected[row, column] = both.sum()
    return torch.from_numpy(expected)


def by_class(confusion: Tensor) -> Overlap:
    """The overlap of each class alone."""
    return Overlap.of_groups(confusion, [(number,) for number in range(len(confusion))])


@settings(deadline=None, max_examples=60)
@given(label_pairs())
def test_the_confusion_matrix_counts_each_pair_of_labels(pair: tuple[Tensor, Tensor, int]) -> None:
    assert_close(confusion_matrix(*pair), brute_force(*pair), rtol=0, atol=0)


@settings(deadline=None, max_examples=30)
@given(label_pairs())
def test_swapping_the_images_transposes_the_matrix_and_keeps_the_scores(
    pair: tuple[Tensor, Tensor, int],
) -> None:
    prediction, reference, num_classes = pair
    forward = confusion_matrix(prediction, reference, num_classes)
    backward = confusion_matrix(reference, prediction, num_classes)
    assert_close(forward, backward.T, rtol=0, atol=0)
    one, other = by_class(forward), by_class(backward)
    assert_close(one.false_positive, other.false_negative, rtol=0, atol=0)
    assert_close(one.dice, other.dice, rtol=0, atol=0, equal_nan=True)
    assert_close(one.iou, other.iou, rtol=0, atol=0, equal_nan=True)


@settings(deadline=None, max_examples=30)
@given(label_pairs())
def test_dice_follows_from_iou(pair: tuple[Tensor, Tensor, int]) -> None:
    overlap = by_class(confusion_matrix(*pair))
    assert_close(overlap.dice, 2 * overlap.iou / (1 + overlap.iou), equal_nan=True)


def test_the_matrices_of_a_batch_add_to_the_matrix_of_the_whole() -> None:
    labels = torch.randint(4, (2, 3, 5, 5, 5), generator=torch.Generator().manual_seed(0))
    prediction, reference = labels
    parts = [confusion_matrix(p, r, 4) for p, r in zip(prediction, reference, strict=True)]
    assert_close(torch.stack(parts).sum(0), confusion_matrix(prediction, reference, 4))


def test_a_matrix_scores_each_class() -> None:
    matrices = torch.tensor([[[3, 1], [2, 4]], [[0, 0], [5, 0]]])
    # Of the first: class 0 has TP 3, FP 2, FN 1 and class 1 has TP 4, FP 1, FN 2.
    # Of the second: class 1 is always taken for class 0, so both have nothing right.
    expected = torch.tensor([[6 / 9, 8 / 11], [0, 0]], dtype=torch.float64)
    found = torch.stack([by_class(matrix).dice for matrix in matrices])
    assert_close(found, expected)


def test_one_case_has_the_scores_worked_out_by_hand() -> None:
    reference = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
    prediction = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 3]])
    matrix = confusion_matrix(prediction, reference, 5)
    expected = [[2, 1, 0, 0, 0], [1, 3, 0, 0, 0], [0, 0, 0, 1, 0], [0] * 5, [0] * 5]
    assert matrix.tolist() == expected
    overlap = by_class(matrix)
    assert overlap.true_positive.tolist() == [2, 3, 0, 0, 0]
    assert overlap.false_positive.tolist() == [1, 1, 0, 1, 0]
    assert overlap.false_negative.tolist() == [1, 1, 1, 0, 0]
    # Class 2 is only in the reference and 3 only in the prediction (0); 4 is in neither (NaN).
    assert_close(overlap.dice, torch.tensor([4 / 6, 6 / 8, 0, 0, NAN]).double(), equal_nan=True)
    assert_close(overlap.iou, torch.tensor([2 / 4, 3 / 5, 0, 0, NAN]).double(), equal_nan=True)


def test_counts_beyond_the_precision_of_float32_keep_their_last_voxel() -> None:
    matrix = torch.tensor([[0, 1], [0, 2**24]])
    assert by_class(matrix).dice[1].item() == 2**25 / (2**25 + 1) < 1


def test_an_image_against_itself_scores_one() -> None:
    labels = torch.arange(3).repeat(7)
    overlap = by_class(confusion_matrix(labels, labels, 3))
    assert overlap.dice.tolist() == overlap.iou.tolist() == [1, 1, 1]


@pytest.mark.parametrize("stray", [3, -1, 255, 10**6])
@pytest.mark.parametrize("in_prediction", [True, False])
def test_a_label_out_of_range_is_refused_and_never_lands_in_another_cell(
    stray: int, in_prediction: bool
) -> None:
    inside, outside = torch.tensor([0, 1, 2]), torch.tensor([0, 1, stray])
    pair = (outside, inside) if in_prediction else (inside, outside)
    with pytest.raises(ValueError, match=r"expected labels in \[0, 3\), got .*; map them to 0..2"):
        confusion_matrix(*pair, num_classes=3)


def test_images_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(3, 2\); resample"):
        confusion_matrix(torch.zeros(2, 3).long(), torch.zeros(3, 2).long(), 2)


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(9, 8), (6, 7, 5)])
def test_dice_and_iou_equal_monai(shape: tuple[int, ...]) -> None:
    metrics = pytest.importorskip("monai.metrics")
    generator = torch.Generator().manual_seed(1)
    prediction, reference = torch.randint(4, (2, 3, *shape), generator=generator)
    # One class is missing from the first prediction only: both give 0 there. A class missing from
    # the reference is not compared, since MONAI leaves it undefined even with false positives.
    prediction[0][prediction[0] == 2] = 1
    matrices = [confusion_matrix(p, r, 4) for p, r in zip(prediction, reference, strict=True)]
    ours = [by_class(matrix) for matrix in matrices]
    assert ours[0].dice[2] == 0
    one_hot = [
        torch.nn.functional.one_hot(labels, 4).movedim(-1, 1) for labels in (prediction, reference)
    ]
    dice, iou = metrics.compute_dice(*one_hot), metrics.compute_iou(*one_hot)
    found = [torch.stack([getattr(one, name) for one in ours]) for name in ("dice", "iou")]
    assert_close(found, [dice.double(), iou.double()], rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(label_pairs())
def test_groups_of_one_label_each_count_the_rows_and_columns_of_the_matrix(
    pair: tuple[Tensor, Tensor, int],
) -> None:
    matrix = confusion_matrix(*pair)
    groups, right = by_class(matrix), matrix.diagonal()
    assert torch.equal(groups.true_positive, right)
    assert torch.equal(groups.false_positive, matrix.sum(dim=0) - right)
    assert torch.equal(groups.false_negative, matrix.sum(dim=1) - right)


def test_groups_that_share_labels_have_the_overlap_of_their_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 4, (6, 5), generator=generator)
    reference = torch.randint(0, 5, (6, 5), generator=generator)
    groups = [(1, 2, 3), (2, 3), (3,)]
    overlap = Overlap.of_groups(confusion_matrix(prediction, reference, 5), groups, ignore=4)
    counted = reference != 4
    for number, group in enumerate(groups):
        found = torch.isin(prediction, torch.tensor(group)) & counted
        right = torch.isin(reference, torch.tensor(group)) & counted
        assert overlap.true_positive[number] == (found & right).sum() > 0
        assert overlap.false_positive[number] == (found & ~right).sum()
        assert overlap.false_negative[number] == (right & ~found).sum()
    arrays = prediction.numpy().astype(np.uint8), reference.numpy().astype(np.uint8)
    same = Overlap.of_labels(*arrays, groups, num_labels=5, ignore=4)
    assert torch.equal(same.dice, overlap.dice) and bool((same.dice > 0).all())
