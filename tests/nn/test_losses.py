import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from segkit.nn.losses import (
    deep_dice_cross_entropy,
    dice_cross_entropy,
    level_weights,
    presence_cross_entropy,
    soft_dice,
)

SPACES = [(6, 5), (4, 3, 5)]


def example(space: tuple[int, ...], *, batch: int = 2, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Logits and labels at random."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(batch, classes, *space, generator=generator)
    return logits, torch.randint(0, classes, (batch, *space), generator=generator)


def one_hot(label: Tensor, num_classes: int) -> Tensor:
    return torch.stack([(label == index).float() for index in range(num_classes)], dim=1)


@pytest.mark.parametrize("pool_batch", [False, True])
def test_a_perfect_prediction_has_dice_one(pool_batch: bool) -> None:
    # The third class is nowhere, in neither: the smoothing makes that 1 too.
    _, label = example((6, 5), classes=3)
    target = one_hot(label, 4)
    assert_close(soft_dice(target, target, pool_batch=pool_batch), torch.tensor(1.0))


@pytest.mark.parametrize("pool_batch", [False, True])
def test_a_perfect_prediction_has_no_loss(pool_batch: bool) -> None:
    _, label = example((6, 5))
    loss = dice_cross_entropy(100 * one_hot(label, 3), label, pool_batch=pool_batch)
    assert_close(loss, torch.tensor(0.0))


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_uniform_logits_have_the_cross_entropy_log_of_the_number_of_classes(
    num_classes: int,
) -> None:
    _, label = example((6, 5), classes=num_classes)
    logits = torch.full((2, num_classes, 6, 5), 4.0)
    uniform = torch.full_like(logits, 1 / num_classes)
    dice = soft_dice(uniform, one_hot(label, num_classes), pool_batch=True)
    loss = dice_cross_entropy(logits, label, pool_batch=True)
    assert_close(loss - (1 - dice), torch.tensor(math.log(num_classes)))


def test_two_voxels_give_the_value_worked_out_by_hand() -> None:
    # Two classes, two voxels with labels 1 and 0. Foreground probabilities 3/4 and 1/4 are logits
    # (0, log 3) and (log 3, 0). Cross-entropy: -log(3/4) at both. Dice: 2 * 3/4 over
    # (3/4 + 1/4) + 1, so 3/4, up to the smoothing: (1.5 + 1e-5) / (2 + 1e-5).
    log3 = math.log(3)
    logits = torch.tensor([[[[0.0, log3]], [[log3, 0.0]]]])
    label = torch.tensor([[[1, 0]]])
    expected = -math.log(3 / 4) + 1 - (1.5 + 1e-5) / (2 + 1e-5)
    assert_close(dice_cross_entropy(logits, label, pool_batch=False), torch.tensor(expected))


def test_pooling_the_batch_takes_one_dice_over_all_of_its_voxels() -> None:
    # The first sample has its one foreground voxel found, the second has none and two alarms.
    # Alone: 1 and 1e-5 / (2 + 1e-5). Pooled: 2 * 1 over 3 + 1.
    probabilities = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]])
    target = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]])
    alone = soft_dice(probabilities, target, pool_batch=False)
    pooled = soft_dice(probabilities, target, pool_batch=True)
    assert_close(alone, torch.tensor((1 + 1e-5 / (2 + 1e-5)) / 2))
    assert_close(pooled, torch.tensor((2 + 1e-5) / (4 + 1e-5)))


def test_the_background_does_not_count_in_dice() -> None:
    logits, label = example((6, 5))
    probabilities, target = logits.softmax(1), one_hot(label, 3)
    expected = soft_dice(probabilities, target, pool_batch=True)
    probabilities[:, 0] = 0.123
    assert torch.equal(soft_dice(probabilities, target, pool_batch=True), expected)


@pytest.mark.parity
@pytest.mark.parametrize("pool_batch", [False, True])
@pytest.mark.parametrize("space", SPACES)
def test_soft_dice_agrees_with_monai(space: tuple[int, ...], pool_batch: bool) -> None:
    losses = pytest.importorskip("monai.losses")
    logits, label = example(space)
    label[0][label[0] == 2] = 0  # a class that one sample lacks
    peer = losses.DiceLoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        batch=pool_batch,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
    )
    dice = soft_dice(logits.softmax(1), one_hot(label, 3), pool_batch=pool_batch)
    assert_close(1 - dice, peer(logits, label[:, None]))


@pytest.mark.parity
@pytest.mark.parametrize("pool_batch", [False, True])
@pytest.mark.parametrize("space", SPACES)
def test_the_loss_is_the_sum_of_torchs_cross_entropy_and_monais_dice(
    space: tuple[int, ...], pool_batch: bool
) -> None:
    losses = pytest.importorskip("monai.losses")
    logits, label = example(space)
    dice_loss = losses.DiceLoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=pool_batch
    )
    expected = F.cross_entropy(logits, label) + dice_loss(logits, label[:, None])
    assert_close(dice_cross_entropy(logits, label, pool_batch=pool_batch), expected)


@pytest.mark.parametrize("space", SPACES)
def test_cross_entropy_is_that_of_torch(space: tuple[int, ...]) -> None:
    logits, label = example(space)
    dice = soft_dice(logits.softmax(1), one_hot(label, 3), pool_batch=True)
    loss = dice_cross_entropy(logits, label, pool_batch=True)
    assert_close(loss - (1 - dice), F.cross_entropy(logits, label))


@pytest.mark.parametrize("label_type", [torch.uint8, torch.int16, torch.int64])
def test_the_type_of_the_labels_does_not_matter(label_type: torch.dtype) -> None:
    logits, label = example((6, 5))
    expected = dice_cross_entropy(logits, label, pool_batch=True)
    assert torch.equal(dice_cross_entropy(logits, label.to(label_type), pool_batch=True), expected)


@pytest.mark.parametrize("num_levels", range(1, 7))
def test_level_weights_halve_and_sum_to_one(num_levels: int) -> None:
    weights = level_weights(num_levels)
    assert len(weights) == num_levels
    assert math.isclose(sum(weights), 1)
    for finer, coarser in itertools.pairwise(weights):
        assert math.isclose(coarser, finer / 2)


@pytest.mark.parametrize("pool_batch", [False, True])
@pytest.mark.parametrize("space", SPACES)
def test_one_level_of_supervision_is_the_plain_loss(
    space: tuple[int, ...], pool_batch: bool
) -> None:
    logits, label = example(space)
    deep = deep_dice_cross_entropy([logits], label, pool_batch=pool_batch)
    assert torch.equal(deep, dice_cross_entropy(logits, label, pool_batch=pool_batch))


def test_deep_supervision_weighs_every_level_against_its_own_labels() -> None:
    # Labels of a ramp of columns; the coarse cells take the first voxel past their centre:
    # columns 1, 3, 5, 7 and rows 1, 3 at stride 2, columns 2, 6 and row 2 at stride 4.
    label = torch.arange(8).expand(1, 4, 8).clone()
    label[:, :2] += 8
    half = torch.tensor([[[9, 11, 13, 15], [1, 3, 5, 7]]])
    quarter = torch.tensor([[[2, 6]]])
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(1, 16, *space, generator=generator) for space in ((4, 8), (2, 4), (1, 2))]
    alone = [
        dice_cross_entropy(logits, target, pool_batch=True)
        for logits, target in zip(levels, (label, half, quarter), strict=True)
    ]
    expected = (4 * alone[0] + 2 * alone[1] + alone[2]) / 7
    assert_close(deep_dice_cross_entropy(levels, label, pool_batch=True), expected)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=2, max_size=3),
    st.integers(0, 100),
)
def test_coarse_labels_are_labels_that_stand_in_their_own_cells(
    axes: list[tuple[int, int]], seed: int
) -> None:
    cells, strides = zip(*axes, strict=True)
    space = [count * stride for count, stride in axes]
    # A class of its own for each voxel, so that a blend or a neighbour would show; none is 0.
    num_voxels = math.prod(space)
    order = torch.randperm(num_voxels, generator=torch.Generator().manual_seed(seed))
    label = 1 + order.reshape(1, *space)
    found = []
    for cell in range(math.prod(cells)):
        place = [int(index) for index in torch.unravel_index(torch.tensor(cell), cells)]
        block = label[
            (
                0,
                *[
                    slice(index * stride, (index + 1) * stride)
                    for index, stride in zip(place, strides, strict=True)
                ],
            )
        ]
        found.append(block.flatten())
    # Logits that give a cell's voxels, and no others, a share each: the cross-entropy of a label in
    # the cell is the log of their number, and of any other, 1e4. Dice adds up to 1.
    logits = torch.full((1, 1 + num_voxels, math.prod(cells)), -1e4)
    for cell, classes in enumerate(found):
        logits[0, classes, cell] = 0
    logits = logits.reshape(1, 1 + num_voxels, *cells)
    loss = deep_dice_cross_entropy([logits], label, pool_batch=True)
    assert math.log(math.prod(strides)) - 1e-4 <= loss <= math.log(math.prod(strides)) + 1 + 1e-4


@pytest.mark.parametrize("pool_batch", [False, True])
@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_extreme_logits_have_a_finite_loss_and_gradient(magnitude: float, pool_batch: bool) -> None:
    _, label = example((6, 5))
    logits = magnitude * one_hot(label, 3)
    logits.requires_grad_()
    loss = dice_cross_entropy(logits, label, pool_batch=pool_batch)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None and logits.grad.isfinite().all()
    if magnitude < 0:
        # Sure and wrong everywhere: 1e4 for the missed class, no overlap.
        assert_close(loss, torch.tensor(1e4 + math.log(2) + 1))


@pytest.mark.parametrize("pool_batch", [False, True])
def test_the_loss_is_float32_under_bfloat16_autocast(pool_batch: bool) -> None:
    logits, label = example((6, 5))
    logits = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dice_cross_entropy(logits, label, pool_batch=pool_batch)
        deep = deep_dice_cross_entropy([logits, logits], label, pool_batch=pool_batch)
    assert loss.dtype == deep.dtype == torch.float32
    expected = dice_cross_entropy(logits.float(), label, pool_batch=pool_batch)
    assert torch.equal(loss, expected)
    assert_close(deep, expected)


def test_a_step_down_the_gradient_lowers_the_loss() -> None:
    logits, label = example((6, 5))
    logits.requires_grad_()
    loss = dice_cross_entropy(logits, label, pool_batch=True)
    loss.backward()
    assert logits.grad is not None
    after = dice_cross_entropy(logits.detach() - logits.grad, label, pool_batch=True)
    assert after < loss


def test_presence_has_the_cross_entropy_worked_out_by_hand() -> None:
    # Logits log 3 and 0 are probabilities 3/4 and 1/2; of the two classes the first is there.
    logits = torch.tensor([[math.log(3), 0.0]])
    label = torch.tensor([[[0, 1], [0, 0]]])
    expected = (-math.log(3 / 4) - math.log(1 / 2)) / 2
    assert_close(presence_cross_entropy(logits, label), torch.tensor(expected))


@pytest.mark.parametrize("space", SPACES)
def test_an_image_of_background_has_no_class(space: tuple[int, ...]) -> None:
    logits = example((), classes=3)[0]
    label = torch.zeros(2, *space, dtype=torch.long)
    # -log(1 - sigmoid(z)) = log(1 + e^z)
    expected = torch.log(1 + logits.exp()).mean()
    assert_close(presence_cross_entropy(logits, label), expected)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_logits_of_presence_begin_with_class_1(number: int) -> None:
    label = torch.zeros(1, 4, 5, dtype=torch.long)
    label[0, 2, 3] = number
    right = torch.full((1, 3), -30.0)
    right[0, number - 1] = 30.0
    assert presence_cross_entropy(right, label) < 1e-6
    # Another class in its stead is two logits wrong of three, by 30 each.
    assert_close(presence_cross_entropy(right.roll(1, dims=1), label), torch.tensor(20.0))


@pytest.mark.parametrize("space", SPACES)
def test_presence_depends_neither_on_position_nor_on_size(space: tuple[int, ...]) -> None:
    logits, _ = example((), classes=3)
    label = torch.zeros(2, math.prod(space), dtype=torch.long)
    label[0, 4], label[1, 7], label[1, 8] = 2, 3, 1
    expected = presence_cross_entropy(logits, label.reshape(2, *space))
    order = torch.randperm(label.shape[1], generator=torch.Generator().manual_seed(1))
    shuffled = label[:, order]
    shuffled[0, shuffled[0].argmin()] = 2  # one voxel more
    assert torch.equal(presence_cross_entropy(logits, shuffled.reshape(2, *space)), expected)
    swapped = label.flip(0).reshape(2, *space)  # each image with the other's classes
    assert abs(presence_cross_entropy(logits, swapped) - expected) > 0.1


def test_presence_is_counted_for_each_image_on_its_own() -> None:
    logits, _ = example((), classes=2)
    label = torch.zeros(2, 3, 4, dtype=torch.long)
    label[0, 1, 1] = 1
    alone = [presence_cross_entropy(logits[[one]], label[[one]]) for one in range(2)]
    assert_close(presence_cross_entropy(logits, label), torch.stack(alone).mean())


@pytest.mark.parametrize("label_type", [torch.uint8, torch.int64])
def test_presence_has_the_cross_entropy_of_torch(label_type: torch.dtype) -> None:
    logits, _ = example((), batch=4, classes=3)
    label = torch.zeros(4, 2, 3, dtype=label_type)
    label[0, 0, 0] = 1
    label[1] = 3
    label[3] = torch.tensor([[1, 2, 3], [3, 2, 1]])
    target = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    expected = F.binary_cross_entropy(logits.sigmoid(), target)
    assert_close(presence_cross_entropy(logits, label), expected)


def test_the_loss_of_presence_is_float32_of_bfloat16_logits() -> None:
    logits, label = example((6, 5), classes=3)
    logits = logits[:, 1:, 0, 0].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = presence_cross_entropy(logits, label)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, presence_cross_entropy(logits.float(), label))
    assert loss != loss.bfloat16().float(), "was rounded"


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_extreme_logits_of_presence_have_a_finite_loss_and_gradient(magnitude: float) -> None:
    label = torch.ones(1, 3, 3, dtype=torch.long)
    logits = torch.full((1, 2), magnitude, requires_grad=True)
    loss = presence_cross_entropy(logits, label)
    loss.backward()
    # One of the two classes is there and the other is not: one logit is wrong whatever the sign.
    assert_close(loss, torch.tensor(5e3))
    assert logits.grad is not None
    wrong = [0.0, 0.5] if magnitude > 0 else [-0.5, 0.0]
    assert_close(logits.grad, torch.tensor([wrong]))
