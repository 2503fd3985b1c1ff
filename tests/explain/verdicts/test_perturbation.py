"""Laws of deletion and insertion, on scores whose sums are known."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from numpy import ndarray
from numpy.testing import assert_allclose
from scipy.integrate import trapezoid
from scipy.special import expit
from torch import Tensor

from segkit.explain.verdicts.perturbation import (
    FRACTIONS,
    Blocks,
    SoftDiceToFirst,
    cell_order,
    deletion_scores,
    insertion_scores,
    perturb,
)
from segkit.geometry.grid import Grid
from segkit.nn.map_tap import editing
from tests.planted import KEY, ball, planted, planted_case

IMAGE_GRID = Grid((4, 4, 4), np.diag([1.0, 2.0, 0.5, 1.0]))


def linear() -> tuple[Tensor, ndarray, Blocks]:
    """An image, and what each of its 2 x 2 x 2 blocks adds to the sum of all its voxels."""
    image = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    parts = image.view(2, 2, 2, 2, 2, 2, 2).sum(dim=(0, 2, 4, 6)).numpy()
    return image, parts, Blocks.of(IMAGE_GRID.placed((2, 2, 2), (2, 2, 2), (0.5,) * 3), IMAGE_GRID)


def test_what_a_linear_score_loses_are_partial_sums() -> None:
    image, parts, blocks = linear()
    order = cell_order(parts)
    eighths = [count / 8 for count in range(9)]
    black = torch.zeros_like(image)
    deleted = deletion_scores(
        image, black, blocks, order, lambda x: float(x.sum()), fractions=eighths
    )
    largest = np.concatenate([[0], np.sort(parts.ravel())[::-1].cumsum()])
    assert_allclose(deleted, parts.sum() - largest, atol=1e-4)
    inserted = insertion_scores(
        image, black, blocks, order, lambda x: float(x.sum()), fractions=eighths
    )
    assert_allclose(inserted, largest, atol=1e-4)
    # The two ends of an order: what one deletes first, the other deletes last.
    other = deletion_scores(
        image, black, blocks, order[::-1], lambda x: float(x.sum()), fractions=eighths
    )
    assert_allclose(trapezoid(deleted, eighths) + trapezoid(other, eighths), parts.sum(), rtol=1e-5)


def test_random_orders_of_a_linear_score_lie_about_half_its_sum() -> None:
    image, parts, blocks = linear()
    black, random = torch.zeros_like(image), np.random.default_rng(0)
    areas = [
        trapezoid(
            deletion_scores(image, black, blocks, random.permutation(8), lambda x: float(x.sum())),
            FRACTIONS,
        )
        for _ in range(100)
    ]
    assert_allclose(np.mean(areas), parts.sum() / 2, rtol=0.02)


@pytest.mark.parametrize("offset", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("stride", [2, 4])
def test_a_block_is_the_voxels_nearest_to_its_cell(stride: int, offset: float) -> None:
    image = Grid((5, 7, 3), np.diag([1.0, 2.0, 0.5, 1.0]))
    shape = [-(-size // stride) for size in image.shape]
    cells = image.placed(shape, (stride,) * 3, (offset,) * 3)
    blocks = Blocks.of(cells, image)
    index = np.stack(np.meshgrid(*blocks.cells, indexing="ij"), axis=-1).reshape(-1, 3)
    voxels, centres = image.centres().reshape(-1, 3), cells.centres()
    away = np.abs(voxels - centres[tuple(index.T)])
    for axis in range(3):
        lines = np.moveaxis(centres, axis, 0)[:, 0, 0, axis]
        nearest = np.abs(voxels[:, axis, None] - lines).min(axis=1)
        assert_allclose(away[:, axis], nearest, atol=1e-9)
    order = np.arange(int(np.prod(shape)))
    assert blocks.first(order, len(order)).all() and not blocks.first(order, 0).any()


def test_cells_come_from_high_to_low_and_ties_in_no_order() -> None:
    values = np.array([0.1, 0.9, 0.5, 0.7]).reshape(2, 2, 1)
    assert cell_order(values).tolist() == [1, 3, 2, 0]
    flat = np.ones((4, 4, 4))
    order = cell_order(flat, seed=1)
    assert sorted(order) == list(range(64)) and order.tolist() == cell_order(flat, seed=1).tolist()
    assert abs(np.corrcoef(order, np.arange(64))[0, 1]) < 0.3


def test_agreement_is_one_with_itself_and_soft_dice_with_others() -> None:
    """The other image says 'ball' with p = 1/2 everywhere: 2 Σ q/2 / (N/4 + Σ q²)."""
    predictor, case = planted("mask"), planted_case()
    image = predictor.prepare(case.volume).image
    agreement = SoftDiceToFirst(predictor, image, ["label 1"])
    assert agreement(image) == pytest.approx(1, abs=1e-4)
    inside = float(expit(10 * (expit(10.0) - 0.5)))
    share = np.where(ball(), inside, 1 - inside)
    with editing(predictor.model.network, {KEY: lambda gate: torch.full_like(gate, 0.5)}):
        found = agreement(image)
    assert found == pytest.approx(share.sum() / (share.size / 4 + (share**2).sum()), rel=1e-3)


@pytest.mark.parametrize("blur_mm", [None, 20.0])
def test_a_gate_that_is_the_mask_beats_random_orders_at_both(blur_mm: float | None) -> None:
    predictor, case = planted("mask"), planted_case()
    maps = predictor(case.volume, maps=True).maps
    before = case.volume.data.copy()
    curves = perturb(predictor, case.volume, maps, case="x", blur_mm=blur_mm)
    deletion, insertion = curves
    assert (deletion.mode, insertion.mode) == ("deletion", "insertion")
    for curve in curves:
        ends = (0, -1) if curve.mode == "deletion" else (-1, 0)
        assert curve.scores[ends[0]] == pytest.approx(1, abs=1e-4)
        assert curve.scores[ends[1]] < 0.1
        assert curve.auc == pytest.approx(trapezoid(curve.scores, FRACTIONS))
        assert curve.difference == pytest.approx(curve.auc - curve.random_auc)
        assert curve.gain > 0.2 and curve.gain > 4 * curve.random_spread
        assert curve.random_auc == pytest.approx(trapezoid(curve.random_scores, FRACTIONS))
    # The ball is 17 % of the voxels: with a fifth of the cells replaced it is gone.
    assert deletion.scores[2] < 0.1 and insertion.scores[2] > 0.9
    # A random order seen from its end is another.
    assert_allclose(deletion.random_scores, insertion.random_scores[::-1])
    assert (case.volume.data == before).all()
    json.dumps([asdict(curve) for curve in curves], allow_nan=False)


@pytest.mark.parametrize("kind", ["noise", "constant"])
def test_a_gate_that_knows_nothing_is_as_good_as_random(kind: str) -> None:
    predictor, case = planted(kind), planted_case()
    maps = predictor(case.volume, maps=True).maps
    for curve in perturb(predictor, case.volume, maps, case="x"):
        assert abs(curve.difference) < max(0.05, 3 * curve.random_spread)


def test_there_is_nothing_to_agree_with_where_nothing_is_predicted() -> None:
    predictor, case = planted("mask"), planted_case()
    nothing = case.volume.like(np.zeros_like(case.volume.data))
    maps = predictor(nothing, maps=True).maps
    assert perturb(predictor, nothing, maps, case="x") == []
