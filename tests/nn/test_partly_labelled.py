"""What nobody labelled may be anything: the marginal loss, by the logits that any loss is given."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from segkit.nn.losses import (
    deep_dice_binary_cross_entropy,
    deep_dice_cross_entropy,
    dice_cross_entropy,
    presence_cross_entropy,
)
from segkit.nn.partly_labelled import NEVER, PartlyLabelled, merged_with_background

CLASSES = PartlyLabelled(num_labels=4, unlabelled=((), (2,), (1, 2)), num_outputs=3)
"""Classes 0, 1 and 2; 3 is ignored."""


def batch(seed: int = 0, size: int = 8) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(seed)
    levels = [torch.randn(3, 3, size // n, size // n, requires_grad=True) for n in (1, 2)]
    return levels, torch.randint(4, (3, size, size))


def test_the_probability_of_unlabelled_classes_is_added_to_the_background() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0]])[..., None, None]
    merged = merged_with_background(logits, torch.tensor([[False, True, False]]))
    assert merged.flatten().tolist() == pytest.approx([math.log(math.e + math.e**2), NEVER, 0])
    before, after = (each.softmax(dim=1).flatten() for each in (logits, merged))
    assert after.tolist() == pytest.approx([float(before[0] + before[1]), 0, float(before[2])])


def test_the_gradient_is_that_of_the_log_of_the_sum() -> None:
    # d/dz_j of -log(sum over S of p) is p_j - [j in S] p_j / (sum over S of p).
    logits = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float32).view(1, 3, 1)
    logits.requires_grad_()
    merged = merged_with_background(logits, torch.tensor([[False, False, True]]))
    (-merged.log_softmax(dim=1)[0, 0, 0]).backward()
    p = logits.detach().flatten().softmax(dim=0)
    inside = torch.tensor([1.0, 0.0, 1.0])
    expected = p - inside * p / (p * inside).sum()
    torch.testing.assert_close(logits.grad.flatten(), expected)


@pytest.mark.parametrize("pool_batch", [False, True])
def test_with_all_labels_it_is_the_ordinary_loss_bit_for_bit(pool_batch: bool) -> None:
    loss = partial(deep_dice_cross_entropy, pool_batch=pool_batch, ignore=3)
    found = []
    for partly in (None, CLASSES):
        levels, label = batch()
        seen = (levels, label) if partly is None else partly.known(levels, None, label)[::2]
        value = loss(*seen)
        value.backward()
        found.append([value.detach(), *(level.grad for level in levels)])
    for plain, marginal in zip(*found, strict=True):
        assert torch.equal(plain, marginal)


def test_each_sample_has_its_own_set() -> None:
    levels, label = batch()
    sets = torch.tensor([0, 1, 2])
    marked = label + 4 * sets[:, None, None]
    (fine, coarse), _, known = CLASSES.known(levels, None, marked)
    for hidden, sample in zip(((), (2,), (1, 2)), range(3), strict=True):
        mask = torch.tensor([[output in hidden for output in range(3)]])
        for level, before in ((fine, levels[0]), (coarse, levels[1])):
            one = merged_with_background(before[sample : sample + 1], mask)
            assert torch.equal(level[sample : sample + 1], one)
        expected = torch.where(torch.isin(label[sample], torch.tensor([*hidden, -1])), 0, 0)
        kept = ~torch.isin(label[sample], torch.tensor([*hidden, -1]))
        assert torch.equal(known[sample], torch.where(kept, label[sample], expected))


def test_a_class_without_labels_has_no_gradient() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    label = torch.zeros(1, 4, 4, dtype=torch.long)
    label[0, 0] = 1
    (merged,), _, known = CLASSES.known([logits], None, label + 4)
    dice_cross_entropy(merged, known, pool_batch=False).backward()
    # Background and class 2 are one: their logits are pushed in the ratio of their probabilities.
    assert logits.grad is not None
    pushed, p = logits.grad[0], logits.detach()[0].softmax(dim=0)
    torch.testing.assert_close(pushed[0] * p[2], pushed[2] * p[0])


def test_regions_without_labels_have_no_loss_and_no_gradient() -> None:
    regions = ((1, 2), (2,))
    partly = PartlyLabelled(3, ((), (1,)), 2, regions)
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 4, 4, requires_grad=True)
    presence = torch.randn(2, 2, requires_grad=True)
    label = torch.randint(3, (2, 4, 4))
    marked = label + torch.tensor([0, 3])[:, None, None]
    (known,), seen, plain = partly.known([logits], presence, marked)
    assert torch.equal(plain, label) and torch.equal(known[0], logits[0])
    loss = deep_dice_binary_cross_entropy([known], plain, regions=regions, pool_batch=False)
    assert seen is not None
    (loss + presence_cross_entropy(seen, plain, regions=regions)).backward()
    assert logits.grad is not None and presence.grad is not None
    assert not logits.grad[1, 1].any() and logits.grad[1, 0].all() and logits.grad[0].all()
    assert not presence.grad[1, 1] and presence.grad[1, 0]


def test_presence_of_a_class_without_labels_has_no_gradient() -> None:
    presence = torch.randn(2, 2, requires_grad=True)
    label = torch.tensor([[[0, 1]], [[4, 5]]])
    _, seen, plain = CLASSES.known([torch.randn(2, 3, 1, 2)], presence, label)
    assert seen is not None
    presence_cross_entropy(seen, plain, ignore=3).backward()
    assert presence.grad is not None
    assert presence.grad[0].all() and presence.grad[1, 0] and not presence.grad[1, 1]
