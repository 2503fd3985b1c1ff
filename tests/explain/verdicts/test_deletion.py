"""Laws of deletion, on scores whose sums are known."""

import numpy as np
import pytest
import torch
from numpy import ndarray
from numpy.testing import assert_allclose
from scipy.integrate import trapezoid
from scipy.special import expit
from torch import Tensor

from segkit.explain.verdicts.deletion import (
    FRACTIONS,
    Blocks,
    DeletionCurve,
    SoftDiceToFirst,
    cell_order,
    deletion_curves,
    mean_of_channels,
)
from segkit.geometry.grid import Grid
from segkit.nn.map_tap import editing
from tests.planted import KEY, Kind, ball, planted, planted_case

IMAGE_GRID = Grid((4, 4, 4), np.diag([1.0, 2.0, 0.5, 1.0]))


def linear() -> tuple[Tensor, ndarray, Blocks]:
    """An image, and what each of its 2 x 2 x 2 blocks adds to the sum of all its voxels."""
    image = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    parts = image.view(2, 2, 2, 2, 2, 2, 2).sum(dim=(0, 2, 4, 6)).numpy()
    return image, parts, Blocks.of(IMAGE_GRID.placed((2, 2, 2), (2, 2, 2), (0.5,) * 3), IMAGE_GRID)


def test_deletion_lowers_a_linear_score_by_partial_sums() -> None:
    image, parts, blocks = linear()
    order = cell_order(parts)
    eighths = [count / 8 for count in range(9)]
    black = torch.zeros_like(image)

    def total(one: Tensor) -> dict[str, float]:
        return {"all": float(one.sum()), "first": float(one[0].sum())}

    whole, first = deletion_curves(image, black, blocks, order, total, fractions=eighths)
    largest = np.concatenate([[0], np.sort(parts.ravel())[::-1].cumsum()])
    assert (whole.structure, first.structure) == ("all", "first")
    assert_allclose(whole.scores, parts.sum() - largest, atol=1e-4)
    # The two ends of an order: what one deletes first, the other deletes last.
    other, _ = deletion_curves(image, black, blocks, order[::-1], total, fractions=eighths)
    assert_allclose(whole.area + other.area, parts.sum(), rtol=1e-5)


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


def test_cells_are_ordered_from_high_to_low_and_ties_at_random() -> None:
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
    assert agreement(image) == pytest.approx({"label 1": 1}, abs=1e-4)
    inside = float(expit(10 * (expit(10.0) - 0.5)))
    share = np.where(ball(), inside, 1 - inside)
    with editing(predictor.model.network, {KEY: lambda gate: torch.full_like(gate, 0.5)}):
        found = agreement(image)
    expected = share.sum() / (share.size / 4 + (share**2).sum())
    assert found["label 1"] == pytest.approx(expected, rel=1e-3)


def curves_of(kind: Kind, values: ndarray) -> list[DeletionCurve]:
    """Of the planted network, in the order of values on its cells."""
    predictor, case = planted(kind), planted_case()
    prepared = predictor.prepare(case.volume)
    return deletion_curves(
        prepared.image,
        mean_of_channels(prepared.image, 3),
        Blocks.of(prepared.grid, prepared.grid),
        cell_order(values),
        SoftDiceToFirst(predictor, prepared.image, ["label 1"]),
    )


def test_deleting_voxels_that_the_network_uses_lowers_agreement_sooner() -> None:
    """The ball is 17 % of the voxels: with a fifth of the cells replaced it is gone."""
    (first,) = curves_of("mask", ball().astype(float))
    (last,) = curves_of("mask", -ball().astype(float))
    assert first.fractions == FRACTIONS and first.structure == "label 1"
    assert first.scores[0] == pytest.approx(1, abs=1e-4) and first.scores[2] < 0.1
    assert last.scores[4] > 0.9 and last.scores[-1] < 0.1
    assert first.area == pytest.approx(trapezoid(first.scores, FRACTIONS)) and first.area < 0.15
    assert first.scores[-1] == last.scores[-1]


def test_nan_cells_are_never_deleted() -> None:
    values = np.where(ball(), np.nan, 0.0)
    (curve,) = curves_of("mask", values)
    assert min(curve.scores) > 0.9
    assert sorted(cell_order(values)) == np.flatnonzero(~ball().ravel()).tolist()


def test_without_predicted_structures_there_is_no_agreement() -> None:
    predictor, case = planted("mask"), planted_case()
    nothing = case.volume.like(np.zeros_like(case.volume.data))
    image = predictor.prepare(nothing).image
    agreement = SoftDiceToFirst(predictor, image, ["label 1"])
    assert agreement.structures == [] and agreement(image) == {}
