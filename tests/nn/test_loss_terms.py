import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.testing import assert_close

from segkit.nn import loss_terms
from segkit.nn.loss_terms import LossInputs, distance_from, thinned
from segkit.nn.losses import (
    SummedLoss,
    deep_dice_binary_cross_entropy,
    deep_dice_cross_entropy,
    level_weights,
)
from segkit.nn.partly_labelled import PartlyLabelled
from tests.nn.test_losses import example

EVERY = {
    "dice": loss_terms.dice,
    "cross_entropy": loss_terms.cross_entropy,
    "focal": partial(loss_terms.focal, gamma=2.0),
    "top_k": partial(loss_terms.top_k, share=0.2),
    "tversky": partial(loss_terms.tversky, false_positives=0.3, false_negatives=0.7),
    "focal_tversky": partial(
        loss_terms.focal_tversky, false_positives=0.3, false_negatives=0.7, gamma=4 / 3
    ),
    "generalised_dice": loss_terms.generalised_dice,
    "boundary": partial(loss_terms.boundary, reach=3),
    "centre_line": partial(loss_terms.centre_line, iterations=3),
}
VOLUME = (6, 5, 4)


def alone(name: str, weights: tuple[float, ...] = (1.0, 1.0, 1.0), **changes: object) -> SummedLoss:
    return SummedLoss(((1.0, EVERY[name]),), weights=weights, **changes)  # type: ignore[arg-type]


def two_voxels() -> tuple[Tensor, Tensor]:
    """The first belongs to class 1, found with probability 3/4; the second to the background, where
    class 1 has probability 1/4."""
    log3 = math.log(3)
    return torch.tensor([[[[0.0, log3]], [[log3, 0.0]]]]), torch.tensor([[[1, 0]]])


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        # Cross-entropy is -log(3/4) at both.
        ("cross_entropy", -math.log(3 / 4)),
        ("focal", -(1 / 16) * math.log(3 / 4)),
        ("top_k", -math.log(3 / 4)),
        # 3/4 right, 1/4 false alarm, 1/4 missed.
        ("dice", 1 / 4),
        ("tversky", 1 - 0.75 / (0.75 + 0.3 * 0.25 + 0.7 * 0.25)),
        ("focal_tversky", (1 - 0.75 / (0.75 + 0.25)) ** 0.75),
        # Both classes have one voxel: weights are equal.
        ("generalised_dice", 1 / 4),
    ],
)
def test_two_voxels_give_the_values_worked_out_by_hand(name: str, by_hand: float) -> None:
    logits, label = two_voxels()
    loss = alone(name, (1.0, 1.0))([logits], label)
    assert_close(loss, torch.tensor(by_hand), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool_batch", [False, True])
@pytest.mark.parametrize("ignore", [None, 2])
@pytest.mark.parametrize("regions", [(), ((1, 2), (2,))])
def test_dice_and_cross_entropy_as_terms_are_the_plain_loss(
    pool_batch: bool, ignore: int | None, regions: tuple[tuple[int, ...], ...]
) -> None:
    logits, label = example(VOLUME, classes=2 if regions else 3)
    label = torch.where(label == 0, 0, label + (torch.rand(label.shape) > 0.5)).clamp(max=2)
    levels, together = [logits, logits[..., ::2]], {"pool_batch": pool_batch, "ignore": ignore}
    summed = SummedLoss(
        ((1.0, EVERY["dice"]), (1.0, EVERY["cross_entropy"])),
        weights=(1.0,) * logits.shape[1],
        regions=regions,
        **together,  # type: ignore[arg-type]
    )
    if regions:
        plain = deep_dice_binary_cross_entropy(levels, label, regions=regions, **together)  # type: ignore[arg-type]
    else:
        plain = deep_dice_cross_entropy(levels, label, **together)  # type: ignore[arg-type]
    assert_close(summed(levels, label), plain)


@pytest.mark.parametrize("regions", [(), ((1, 2), (2,))])
@pytest.mark.parametrize("name", EVERY)
def test_voxels_that_are_ignored_change_nothing(
    name: str, regions: tuple[tuple[int, ...], ...]
) -> None:
    logits, label = example(VOLUME, classes=2 if regions else 3)
    label[..., -1] = 7
    loss = alone(name, (1.0,) * logits.shape[1], regions=regions, ignore=7)
    before = loss([logits], label)
    logits[..., -1] += 5 * torch.randn(logits.shape[:-1])
    assert_close(loss([logits], label), before)
    assert torch.isfinite(loss([logits], torch.full_like(label, 7)))


@pytest.mark.parametrize("name", [name for name in EVERY if name != "centre_line"])
def test_ignored_voxels_count_as_if_they_were_absent(name: str) -> None:
    logits, label = example(VOLUME)
    less = alone(name)([logits[..., :-1]], label[..., :-1])
    label[..., -1] = 7
    assert_close(alone(name, ignore=7)([logits], label), less)


@pytest.mark.parametrize("regions", [(), ((1, 2), (2,))])
@pytest.mark.parametrize("name", EVERY)
def test_every_term_falls_along_its_gradient_and_is_least_if_all_is_right(
    name: str, regions: tuple[tuple[int, ...], ...]
) -> None:
    logits, label = example(VOLUME, classes=2 if regions else 3)
    loss = alone(name, (1.0,) * logits.shape[1], regions=regions)
    start = logits.requires_grad_()
    value = loss([start], label)
    (slope,) = torch.autograd.grad(value, start)
    assert torch.isfinite(slope).all() and slope.abs().max() > 0
    assert loss([start - 0.5 * slope / slope.abs().max()], label) < value
    groups = regions or ((0,), (1,), (2,))
    right = torch.stack([torch.isin(label, torch.tensor(group)) for group in groups], 1)
    perfect = 60 * (2 * right.float() - 1)
    assert loss([perfect], label) < value
    if name != "boundary":
        assert_close(loss([perfect], label), torch.tensor(0.0), atol=2e-5, rtol=0)
    (at_best,) = torch.autograd.grad(loss([perfect.requires_grad_()], label), perfect)
    assert torch.isfinite(at_best).all()


@pytest.mark.parity
@pytest.mark.parametrize("pool_batch", [False, True])
def test_tversky_and_generalised_dice_agree_with_monai(pool_batch: bool) -> None:
    losses = pytest.importorskip("monai.losses")
    logits, label = example(VOLUME)
    settings = {"to_onehot_y": True, "softmax": True, "batch": pool_batch}
    peer = losses.TverskyLoss(include_background=False, alpha=0.3, beta=0.7, **settings)
    ours = alone("tversky", pool_batch=pool_batch)([logits], label)
    assert_close(ours, peer(logits, label[:, None]), atol=1e-5, rtol=0)
    # MONAI adds its smoothing to sums that are far smaller, so that it would change the loss.
    peer = losses.GeneralizedDiceLoss(**settings, smooth_nr=0, smooth_dr=0)
    label[0][label[0] == 2] = 0  # a class that one sample lacks
    ours = alone("generalised_dice", pool_batch=pool_batch)([logits], label)
    assert_close(ours, peer(logits, label[:, None]), atol=1e-5, rtol=0)


@pytest.mark.parity
def test_focal_and_the_centre_line_agree_with_monai() -> None:
    losses = pytest.importorskip("monai.losses")
    logits, label = example(VOLUME)
    peer = losses.FocalLoss(to_onehot_y=True, use_softmax=True, gamma=2.0, reduction="none")
    expected = peer(logits, label[:, None]).sum(1).mean()
    assert_close(alone("focal")([logits], label), expected)
    found, target = logits.softmax(1), torch.nn.functional.one_hot(label, 3).movedim(-1, 1).float()
    peer = losses.SoftclDiceLoss(iter_=3, smooth_nr=1e-5, smooth_dr=1e-5)
    expected = torch.stack([peer(found[:, [c]], target[:, [c]]) for c in (1, 2)]).mean()
    ours = alone("centre_line")([logits], label)
    assert_close(ours, expected, atol=1e-4, rtol=0)


def test_the_weights_of_voxels_are_those_of_torchs_cross_entropy() -> None:
    logits, label = example(VOLUME)
    weights = (0.5, 1.0, 4.0)
    expected = torch.nn.functional.cross_entropy(logits, label, torch.tensor(weights))
    assert_close(alone("cross_entropy", weights)([logits], label), expected)
    focal = alone("focal", weights)([logits], label)
    by_focal = SummedLoss(((1.0, partial(loss_terms.focal, gamma=0.0)),), weights=weights)
    assert_close(by_focal([logits], label), expected)
    assert focal < expected


@pytest.mark.parametrize("name", ["dice", "tversky", "focal_tversky", "centre_line", "boundary"])
def test_classes_are_averaged_by_their_weights(name: str) -> None:
    logits, label = example(VOLUME)
    near, far = (alone(name, (9.0, *pair))([logits], label) for pair in ((1e6, 1.0), (1.0, 1e6)))
    mixed = alone(name, (9.0, 1.0, 3.0))([logits], label)
    assert_close(mixed, (near + 3 * far) / 4, atol=1e-5, rtol=1e-4)
    assert_close(alone(name, (9.0, 2.0, 2.0))([logits], label), alone(name)([logits], label))


def test_terms_and_levels_have_the_given_weights() -> None:
    logits, label = example(VOLUME)
    levels = [logits, logits[..., ::2], logits[:, :, ::2, :, ::4]]
    terms = ((2.0, EVERY["focal"]), (0.5, EVERY["dice"]))
    assert label.shape[1:] == VOLUME
    each = []
    for level in range(3):
        shares = tuple(float(other == level) for other in range(3))
        parts = [
            weight * SummedLoss(((1.0, term),), (1.0,) * 3, levels=shares)(levels, label)
            for weight, term in terms
        ]
        each.append(sum(parts))
    summed = SummedLoss(terms, (1.0,) * 3)(levels, label)
    assert_close(summed, sum(w * one for w, one in zip(level_weights(3), each, strict=True)))


def test_top_k_is_the_mean_of_the_largest() -> None:
    logits, label = example(VOLUME)
    each = torch.nn.functional.cross_entropy(logits, label, reduction="none").flatten()
    number = math.ceil(0.2 * len(each))
    assert_close(alone("top_k")([logits], label), each.topk(number).values.mean())


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)),
    st.tuples(*[st.sampled_from([0.5, 1.0, 3.0])] * 3),
    st.integers(1, 5),
    st.integers(0, 1000),
)
def test_distances_are_euclids_up_to_the_reach(
    shape: tuple[int, ...], spacing: tuple[float, ...], reach: int, seed: int
) -> None:
    seeds = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(seed)) > 0.8
    most = reach * min(spacing)
    if seeds.any():
        true = distance_transform_edt(~seeds[0, 0].numpy(), sampling=spacing)
    else:
        true = np.full(shape, np.inf)
    found = distance_from(seeds, spacing, reach)[0, 0]
    assert_close(found, torch.tensor(np.minimum(true, most)).float())


def test_the_boundary_term_is_the_mean_signed_distance_of_the_prediction() -> None:
    # Columns 0 to 5 of 2 mm, the structure is columns 2 and 3. Distances from its outside are 1, 1
    # voxel within and, from it, 2, 1 | 1, 2 beyond, as shares of a reach of 4 voxels.
    label = torch.zeros(1, 6, 1, 1, dtype=torch.long)
    label[0, 2:4] = 1
    signed = torch.tensor([2.0, 1, -1, -1, 1, 2]) / 4
    logits = torch.randn(1, 2, 6, 1, 1, generator=torch.Generator().manual_seed(0))
    term = partial(loss_terms.boundary, reach=4)
    loss = SummedLoss(((1.0, term),), (1.0, 1.0), spacing=(2.0, 9.0, 9.0))
    assert_close(loss([logits], label), (logits.softmax(1)[0, 1, :, 0, 0] * signed).mean())


def test_a_tube_is_thinned_to_its_axis_and_its_ends() -> None:
    tube = torch.zeros(1, 1, 12, 9, 9)
    tube[..., 3:6, 3:6] = 1
    line = thinned(tube, 3)[0, 0, 4:8]
    expected = torch.zeros(4, 9, 9)
    expected[:, 4, 4] = 1
    assert torch.equal(line, expected)


def test_the_inputs_of_terms_follow_the_label() -> None:
    logits, label = example(VOLUME)
    inputs: LossInputs = alone("dice", spacing=(1.0, 2.0, 3.0)).inputs(
        logits, label, (2.0, 1.0, 1.0)
    )
    assert torch.equal(inputs.target.argmax(1), label) and inputs.spacing == (2.0, 2.0, 3.0)
    assert_close(inputs.probabilities.sum(1), torch.ones(label.shape))


def test_generalised_dice_is_one_of_a_large_structure_that_is_missed() -> None:
    # 125,000 voxels in a row of 250,000. Weights are equal, so everything wrong is 1 and chance is
    # 1/2. One over the squared volume is 6.4e-11.
    label = torch.arange(250_000)[None, :, None, None] // 125_000
    logits = 60.0 * torch.stack([label * 2 - 1, 1 - label * 2], 1)
    loss = alone("generalised_dice", (1.0, 1.0))
    assert_close(loss([logits], label), torch.tensor(1.0))
    assert_close(loss([0 * logits], label), torch.tensor(0.5))


def test_generalised_dice_gives_an_absent_class_the_weight_of_the_smallest() -> None:
    # 6 voxels of background, 2 of class 1, none of class 2, all probabilities 1/3. Weights are 1/9,
    # 1 and 1: 2 (6/9 + 2) / 3 over (8/3 + 6)/9 + (8/3 + 2) + 8/3.
    label = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]).view(1, 8, 1)
    loss = alone("generalised_dice")([torch.zeros(1, 3, 8, 1)], label)
    overlap, total = (6 / 9 + 2) * 2 / 3, (8 / 3 + 6) / 9 + 14 / 3 + 8 / 3
    assert_close(loss, torch.tensor(1 - overlap / total), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("whole", "expected"), [(0, 0.25), (1, -0.25)])
def test_the_boundary_of_an_empty_or_full_label_is_beyond_reach(
    whole: int, expected: float
) -> None:
    logits = torch.full((1, 2, 9, 7), math.log(3))
    logits[:, 1] = 0  # class 1 has probability 1/4
    label = torch.full((1, 9, 7), whole)
    assert_close(alone("boundary", (1.0, 1.0))([logits], label), torch.tensor(expected))


def test_the_boundary_beside_ignored_voxels_does_not_count() -> None:
    # Columns 0 to 3 are the structure, 4 and 5 are ignored: its surface may be anywhere there.
    label = torch.tensor([1, 1, 1, 1, 7, 7]).view(1, 6, 1)
    loss = alone("boundary", (1.0, 1.0), ignore=7)([torch.zeros(1, 2, 6, 1)], label)
    assert_close(loss, torch.tensor(-0.5))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("thickness", [0.05, 1.0, 50.0])
def test_a_volume_of_one_slice_has_the_loss_of_the_slice(
    name: str, axis: int, thickness: float
) -> None:
    logits, label = example((9, 8))
    spacing = [0.5, 1.5]
    slices = alone(name, spacing=tuple(spacing))([logits, logits[..., ::2]], label)
    spacing.insert(axis, thickness)
    logits, label = logits.unsqueeze(2 + axis), label.unsqueeze(1 + axis)
    every_second = logits.index_select(-2 if axis == 2 else -1, torch.arange(0, 8, 2))
    volumes = alone(name, spacing=tuple(spacing))([logits, every_second], label)
    assert_close(volumes, slices)


@pytest.mark.parametrize("regions", [(), ((1, 2), (2,))])
@pytest.mark.parametrize("ignore", [None, 7])
@pytest.mark.parametrize("name", EVERY)
def test_every_term_is_finite_in_half_precision_of_one_voxel_and_of_no_voxel(
    name: str, ignore: int | None, regions: tuple[tuple[int, ...], ...]
) -> None:
    outputs = 2 if regions else 3
    loss = alone(name, (1.0,) * outputs, regions=regions, ignore=ignore)
    # The largest logits of float16, and any probability, in a coarsest level of one voxel.
    for dtype, size in ((torch.float16, 60_000.0), (torch.bfloat16, 1.0)):
        levels = [
            (size * example(space, classes=outputs)[0].clamp(-1, 1)).to(dtype).requires_grad_()
            for space in ((4, 4, 2), (1, 1, 1))
        ]
        _, label = example((4, 4, 2))
        for seen in (label, torch.full_like(label, 7 if ignore else 0)):
            with torch.autocast("cpu", dtype):
                value = loss(levels, seen)
            assert value.dtype == torch.float32 and torch.isfinite(value)
            for slope in torch.autograd.grad(value, levels):
                assert torch.isfinite(slope).all()


@pytest.mark.parametrize("pool_batch", [False, True])
@pytest.mark.parametrize("regions", [(), ((1, 2), (2,))])
@pytest.mark.parametrize("name", EVERY)
def test_an_unlabelled_class_has_no_gradient_in_any_term(
    name: str, regions: tuple[tuple[int, ...], ...], pool_batch: bool
) -> None:
    outputs = 2 if regions else 3
    hidden = 1 if regions else 2
    partly = PartlyLabelled(3, ((), (hidden,)), outputs, regions)
    logits, label = example(VOLUME, classes=outputs)
    label = label.clamp(max=1)
    label[0] += 3  # sample 0 has no labels of the last output
    loss = alone(name, (1.0,) * outputs, regions=regions, pool_batch=pool_batch)
    start = logits.requires_grad_()
    levels, _, known = partly.known([start], None, label)
    value = loss(levels, known)
    (slope,) = torch.autograd.grad(value, start)
    assert torch.isfinite(value) and torch.isfinite(slope).all() and slope[1, hidden].any()
    if regions:
        assert not slope[0, hidden].any()
    else:  # as a part of the background: its share of the background's gradient
        share = (start[0, hidden] - start[0, 0]).exp()
        assert_close(slope[0, hidden], share * slope[0, 0], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_top_k_leaves_voxels_that_look_alike_at_one_half(share: float) -> None:
    # 40 of 100 voxels look alike, and 8 of them are the structure. While their probability p is
    # below 1/2, all 8 are among the k worst: the mean is least at p = 8/k. Above 1/2 the worst are
    # background only, as 32 >= k. So the least is at min(8/k, 1/2): nothing is ever found.
    label = torch.zeros(1, 100, 1, dtype=torch.long)
    label[0, :8] = 1
    term = partial(loss_terms.top_k, share=share)
    loss = SummedLoss(((1.0, term),), (1.0, 1.0))
    tried = torch.linspace(0.01, 0.99, 99)
    values = []
    for p in tried.tolist():
        logits = torch.zeros(1, 2, 100, 1)
        logits[0, 1] = -30.0
        logits[0, 1, :40] = math.log(p / (1 - p))
        values.append(float(loss([logits], label)))
    number = round(100 * share)
    expected = min(8 / number, 0.5)
    assert float(tried[int(np.argmin(values))]) == pytest.approx(expected, abs=0.006)
    by_hand = -(8 * math.log(expected) + (number - 8) * math.log(1 - expected)) / number
    assert min(values) == pytest.approx(by_hand, abs=1e-4)
