import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from segkit.nn.losses import (
    deep_dice_binary_cross_entropy,
    deep_dice_cross_entropy,
    dice_binary_cross_entropy,
    dice_cross_entropy,
    presence_cross_entropy,
)

NESTED = ((1, 2, 3), (2, 3), (3,))
IGNORE = 4
SPACES = [(6, 5), (4, 3, 5)]


def example(space: tuple[int, ...], *, outputs: int, highest: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, outputs, *space, generator=generator)
    return logits, torch.randint(0, highest + 1, (2, *space), generator=generator)


def regions_of(label: Tensor) -> Tensor:
    return torch.stack([torch.isin(label, torch.tensor(group)) for group in NESTED], dim=1).float()


def test_two_voxels_of_two_regions_give_the_value_worked_out_by_hand() -> None:
    # Labels 1 and 2; the outer region holds both, the inner one the second. Probabilities: outer
    # 3/4 and 3/4, inner 1/4 and 1/2. Cross-entropy: -(2 log 3/4 + log 3/4 + log 1/2) / 4.
    # Dice: outer 2 * (3/2) over 3/2 + 2, inner 2 * (1/2) over 3/4 + 1.
    log3 = math.log(3)
    logits = torch.tensor([[[[log3, log3]], [[-log3, 0.0]]]])
    label = torch.tensor([[[1, 2]]])
    cross_entropy = -(3 * math.log(3 / 4) + math.log(1 / 2)) / 4
    outer, inner = (3 + 1e-5) / (3.5 + 1e-5), (1 + 1e-5) / (1.75 + 1e-5)
    loss = dice_binary_cross_entropy(logits, label, regions=((1, 2), (2,)), pool_batch=False)
    assert_close(loss, torch.tensor(cross_entropy + 1 - (outer + inner) / 2))


@pytest.mark.parametrize("pool_batch", [False, True])
@pytest.mark.parametrize("space", SPACES)
def test_perfect_logits_of_regions_have_no_loss(space: tuple[int, ...], pool_batch: bool) -> None:
    _, label = example(space, outputs=3)
    logits = 100 * (2 * regions_of(label) - 1)
    loss = dice_binary_cross_entropy(logits, label, regions=NESTED, pool_batch=pool_batch)
    assert_close(loss, torch.tensor(0.0))


@pytest.mark.parity
@pytest.mark.parametrize("pool_batch", [False, True])
@pytest.mark.parametrize("space", SPACES)
def test_the_loss_of_regions_is_torchs_cross_entropy_and_monais_dice(
    space: tuple[int, ...], pool_batch: bool
) -> None:
    losses = pytest.importorskip("monai.losses")
    logits, label = example(space, outputs=3)
    target = regions_of(label)
    dice_loss = losses.DiceLoss(sigmoid=True, batch=pool_batch)
    expected = F.binary_cross_entropy_with_logits(logits, target) + dice_loss(logits, target)
    loss = dice_binary_cross_entropy(logits, label, regions=NESTED, pool_batch=pool_batch)
    assert_close(loss, expected)


def test_deep_supervision_of_regions_weighs_the_levels_own_losses() -> None:
    logits, label = example((8, 6), outputs=3)
    coarse, _ = example((4, 3), outputs=3)
    loss = deep_dice_binary_cross_entropy([logits, coarse], label, regions=NESTED, pool_batch=True)
    fine = dice_binary_cross_entropy(logits, label, regions=NESTED, pool_batch=True)
    shrunk = label[:, 1::2, 1::2]
    rough = dice_binary_cross_entropy(coarse, shrunk, regions=NESTED, pool_batch=True)
    assert_close(loss, (2 * fine + rough) / 3)


# Ignored voxels


def ignoring(loss_of_regions: bool, logits: Tensor, label: Tensor, **changes: int) -> Tensor:
    if loss_of_regions:
        return dice_binary_cross_entropy(
            logits[:, :3], label, regions=NESTED, pool_batch=True, **changes
        )
    return dice_cross_entropy(logits, label, pool_batch=True, **changes)


@pytest.mark.parametrize("of_regions", [False, True])
def test_the_loss_counts_only_the_other_voxels(of_regions: bool) -> None:
    logits, label = example((7, 6), outputs=4, highest=IGNORE)
    counted = label != IGNORE
    assert 0 < counted.sum() < counted.numel()
    # The voxels that count, put in a row: with the batch pooled, where they lie is all the same.
    row, row_label = logits.movedim(1, -1)[counted].T[None], label[counted][None]
    expected = ignoring(of_regions, row, row_label)
    assert_close(ignoring(of_regions, logits, label, ignore=IGNORE), expected)


@pytest.mark.parametrize("pool_batch", [False, True])
@pytest.mark.parametrize("of_regions", [False, True])
def test_neither_loss_nor_gradient_looks_at_ignored_voxels(
    of_regions: bool, pool_batch: bool
) -> None:
    logits, label = example((7, 6), outputs=3 if of_regions else 4, highest=IGNORE)
    losses, gradients = [], []
    for strange in (0.0, 50.0):
        seen = torch.where((label == IGNORE)[:, None], logits + strange, logits).requires_grad_()
        levels = [seen, seen[:, :, ::2, ::2]]
        if of_regions:
            loss = deep_dice_binary_cross_entropy(
                levels[:1], label, regions=NESTED, pool_batch=pool_batch, ignore=IGNORE
            )
        else:
            loss = deep_dice_cross_entropy(levels[:1], label, pool_batch=pool_batch, ignore=IGNORE)
        loss.backward()
        assert seen.grad is not None
        losses.append(loss)
        gradients.append(seen.grad)
    assert_close(losses[0], losses[1])
    assert_close(gradients[0], gradients[1])
    assert (gradients[0].movedim(1, -1)[label == IGNORE] == 0).all()


@pytest.mark.parametrize("of_regions", [False, True])
def test_without_ignored_voxels_the_loss_does_not_change(of_regions: bool) -> None:
    logits, label = example((7, 6), outputs=4)
    expected = ignoring(of_regions, logits, label)
    assert_close(ignoring(of_regions, logits, label, ignore=IGNORE), expected)


@pytest.mark.parametrize("of_regions", [False, True])
def test_a_patch_that_is_ignored_whole_has_no_loss_and_no_gradient(of_regions: bool) -> None:
    logits, label = example((7, 6), outputs=4)
    logits.requires_grad_()
    loss = ignoring(of_regions, logits, torch.full_like(label, IGNORE), ignore=IGNORE)
    loss.backward()
    assert_close(loss, torch.tensor(0.0))
    assert logits.grad is not None and not logits.grad.any()


def test_at_coarser_levels_ignored_voxels_are_left_out_as_well() -> None:
    _, label = example((8, 6), outputs=4)
    label[:, 1::2, 1::2] = IGNORE  # what the coarse level sees
    fine, coarse = example((8, 6), outputs=4)[0], example((4, 3), outputs=4)[0]
    loss = deep_dice_cross_entropy([fine, coarse], label, pool_batch=True, ignore=IGNORE)
    alone = dice_cross_entropy(fine, label, pool_batch=True, ignore=IGNORE)
    assert_close(loss, alone * 2 / 3)


@pytest.mark.parametrize("of_regions", [False, True])
def test_the_losses_are_float32_of_bfloat16_logits(of_regions: bool) -> None:
    logits, label = example((7, 6), outputs=4, highest=IGNORE)
    logits = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ignoring(of_regions, logits, label, ignore=IGNORE)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ignoring(of_regions, logits.float(), label, ignore=IGNORE))


# Presence


def test_presence_of_regions_is_that_of_any_of_their_labels() -> None:
    label = torch.tensor([[[0, 2], [0, 0]]])
    right = torch.tensor([[30.0, 30.0, -30.0]])
    assert presence_cross_entropy(right, label, regions=NESTED) < 1e-6
    wrong = presence_cross_entropy(-right, label, regions=NESTED)
    assert_close(wrong, torch.tensor(30.0))


def test_a_class_that_ignored_voxels_may_hold_does_not_count() -> None:
    # The first image holds 1 and hides the rest, the second holds nothing and hides nothing.
    label = torch.tensor([[[0, 1], [IGNORE, 0]], [[0, 0], [0, 0]]])
    logits = torch.tensor([[0.0, 3.0, 5.0], [0.0, 0.0, 0.0]])
    loss = presence_cross_entropy(logits, label, ignore=IGNORE)
    assert_close(loss, torch.tensor(math.log(2)))
