"""Laws of gate ablation, on maps whose worth is known."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn

from segkit.config.labels import Labelling
from segkit.errors import ModelError, VolumeError
from segkit.explain.heads.study import case_dice
from segkit.explain.verdicts.ablation import (
    OPERATIONS,
    ScanMean,
    ablate,
    ablated_maps,
    check_gates,
    class_dice,
    operation_edit,
)
from segkit.explain.verdicts.evidence import dice_drops
from segkit.geometry.grid import Grid
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.model.folder import Model
from segkit.nn.gates import Coefficients
from segkit.nn.map_tap import MapInfo, editing, taps
from tests.explain.heads.test_study import attending_model, noise_case, self_attention
from tests.planted import KEY, Planted, ball, planted, planted_case

GATE = MapInfo("skip.0/gate", "gate", 0, None, 0.0, 1.0)


def gated_model() -> Model:
    return attending_model(skip="additive_grid", encoder="sse", bottleneck="self_attention")


def open_gates(model: Model) -> None:
    """Maps that are 1 everywhere: the sigmoid of 100."""
    for module in model.network.modules():
        if isinstance(module, Coefficients):
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, 100.0)


def test_each_operation_changes_a_map_as_defined() -> None:
    values = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    scan_mean = ScanMean()
    edits = {name: operation_edit(GATE, name, scan_mean, seed=3) for name in OPERATIONS}
    assert torch.equal(scan_mean.observe(values), values)
    assert torch.equal(edits["open"](values), torch.ones_like(values))
    assert torch.equal(edits["inverted"](values), 1 - values)
    mean = edits["mean"](values)
    assert mean.shape == values.shape
    for sample, channel in np.ndindex(3, 2):
        assert_allclose(mean[sample, channel], values[:, channel].mean(), rtol=1e-6)
    shuffled = edits["permuted"](values)
    for sample, channel in np.ndindex(3, 2):
        before, after = values[sample, channel].flatten(), shuffled[sample, channel].flatten()
        assert torch.equal(before.sort().values, after.sort().values)
        assert not torch.equal(before, after)
    # Channels of a cell stay together.
    pairs = {tuple(pair) for pair in values[0].flatten(1).T.tolist()}
    assert {tuple(pair) for pair in shuffled[0].flatten(1).T.tolist()} == pairs
    assert torch.equal(shuffled, operation_edit(GATE, "permuted", scan_mean, seed=3)(values))
    assert not torch.equal(shuffled, edits["permuted"](values)), "each window has its own order"


@pytest.mark.parametrize(
    ("lowest", "highest", "expected"), [(1.0, 2.0, [2.0, 1.5]), (0.0, math.inf, [1.5, 1.0])]
)
def test_a_map_is_inverted_within_its_range_or_else_within_its_own_values(
    lowest: float, highest: float, expected: list[float]
) -> None:
    info = MapInfo("encoder.0/spatial", "spatial", 0, None, lowest, highest)
    turned = operation_edit(info, "inverted", ScanMean())(torch.tensor([[[1.0, 1.5]]]))
    assert turned.flatten().tolist() == expected


def test_gates_and_spatial_maps_are_ablated_and_no_others() -> None:
    predictor = Predictor(gated_model(), device="cpu")
    assert set(ablated_maps(predictor)) == {
        "skip.1/gate",
        "encoder.0/spatial",
        "encoder.1/spatial",
        "encoder.2/spatial",
    }


def test_opening_a_gate_that_stands_open_changes_nothing() -> None:
    model = gated_model()
    open_gates(model)
    predictor, case = Predictor(model, device="cpu"), noise_case(10, 8, 8)
    for reference in (case.reference, None):
        rows = ablate(
            predictor,
            case.volume,
            reference,
            case="x",
            keys=["skip.1/gate"],
            operations=["open", "mean", "permuted"],
        )
        assert rows and all(row.change == 0 for row in rows)


def test_a_row_is_the_dice_of_the_edited_prediction() -> None:
    model, case = gated_model(), noise_case(10, 8, 8)
    predictor = Predictor(model, device="cpu")
    rows = ablate(predictor, case.volume, case.reference, case="x", operations=["inverted"])
    assert [row.label for row in rows[:3]] == [None, "label 1", "label 2"]
    assert len(rows) == 4 * 3 and all(tap.edit is None for tap in taps(model.network).values())
    whole = case_dice(predictor, case)
    for row in (row for row in rows if row.label is None):
        with editing(model.network, {row.map: lambda values: 1 - values}):
            assert row.dice == pytest.approx(case_dice(predictor, case), rel=1e-12)
        assert row.dice_before == pytest.approx(whole, rel=1e-12)
        assert row.change == row.dice - row.dice_before
        means = [other.dice for other in rows if other.map == row.map and other.label is not None]
        assert row.dice == pytest.approx(sum(means) / 2)
    assert any(row.change != 0 for row in rows), "editing must show for this to be a test"
    json.dumps([asdict(row) for row in rows], allow_nan=False)


def test_a_gate_that_decides_all_labels_is_needed() -> None:
    """Of p ball and N - p background: open calls all ball, so that Dice is 2 p / (p + N); the
    mean is p / N < 1/2 everywhere, and nothing is found; inverted, all but the ball."""
    case = planted_case()
    rows = ablate(planted("mask"), case.volume, case.reference, case="x")
    found = {row.operation: row for row in rows if row.label == "label 1"}
    size, total = ball().sum(), ball().size
    assert found["open"].dice_before == 1
    assert found["open"].dice == pytest.approx(2 * size / (size + total))
    assert found["mean"].dice == found["inverted"].dice == 0
    assert found["permuted"].dice < 0.4
    assert {row.map for row in rows} == {KEY}


@pytest.mark.parametrize("kind", ["noise", "constant"])
def test_a_gate_that_changes_no_label_costs_nothing(kind: str) -> None:
    case = planted_case()
    rows = ablate(planted(kind), case.volume, case.reference, case="x")
    assert len(rows) == 8 and all(row.change == 0 and row.dice_before == 1 for row in rows)


def test_without_a_reference_dice_compares_with_the_prediction() -> None:
    case = planted_case()
    rows = ablate(planted("mask"), case.volume, case="x")
    assert {row.against for row in rows} == {"prediction"}
    assert all(row.dice_before == 1 and row.change <= 0 for row in rows)
    nothing = case.volume.like(np.zeros_like(case.volume.data))
    assert ablate(planted("mask"), nothing, case="x") == []


def test_a_reference_that_does_not_fit_is_refused() -> None:
    case = planted_case()
    empty = case.reference.like(np.zeros_like(case.reference.data))
    with pytest.raises(VolumeError, match="x: its reference contains only background"):
        ablate(planted("mask"), case.volume, empty, case="x")


def test_dice_is_that_of_classes_the_reference_holds() -> None:
    """a: one of three right, with none too many: 2 / (2 + 2). b is not there. Of the ignored, none
    counts."""
    labelling = Labelling({"background": 0, "a": 1, "b": 2}, ignore=3)
    grid = Grid((6, 1, 1), np.eye(4))
    reference = Volume(np.array([1, 1, 1, 0, 3, 3]).reshape(6, 1, 1), grid)
    found = Volume(np.array([1, 0, 0, 2, 1, 2]).reshape(6, 1, 1), grid)
    assert class_dice(found, reference, labelling) == {"a": 0.5}


def test_channels_are_replaced_one_by_one_by_their_means_over_all_windows() -> None:
    """Channel 0 is 1 in the first window and 0 in two others; channel 1 has one NaN, and else 3."""
    mean = ScanMean()
    for value in (1.0, 0.0, 0.0):
        window = torch.full((1, 2, 4, 5), value)
        window[:, 1] = 3.0
        window[0, 1, 0, 0] = torch.nan
        mean.observe(window)
    values = torch.rand(2, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    found = mean.replace_channels([0])(values)
    assert_allclose(found[:, 0], 1 / 3, rtol=1e-6)
    assert torch.equal(found[:, 1], values[:, 1])
    assert torch.equal(mean.replace_channels([0, 1])(values), mean.replace(values))
    assert torch.equal(mean.replace(values)[:, 1], torch.full((2, 4, 5), 3.0))


class ByWindow(Planted):
    """A gate that is constant in a window, and is all that the network segments by."""

    def forward(self, image: Tensor) -> Tensor:
        there = torch.sigmoid(20 * (image[:, :1].amax((2, 3, 4), keepdim=True) - 0.5))
        logit = 10 * (self.tap(there.expand_as(image[:, :1])) - 0.7)
        return torch.cat([-logit / 2, logit / 2], dim=1)


def test_a_gate_that_is_constant_in_each_window_is_needed() -> None:
    """Open in two of three windows, so that its mean, 2/3, opens none."""
    predictor = planted("mask")
    predictor.model.network.__class__ = ByWindow
    values = np.full((16, 8, 8, 3), 0.1, np.float32)  # windows of 0 would be skipped
    values[:8] = 1
    volume = Volume(values, Grid((16, 8, 8), np.eye(4)))
    labels = predictor.numbers_of(volume).data[:, 0, 0]
    assert labels[:8].all() and not labels[-4:].any()
    reference = predictor.numbers_of(volume)
    (_, row) = ablate(predictor, volume, reference, case="x", operations=["mean"])
    assert (row.dice_before, row.dice) == (1, 0)
    told = predictor(volume, maps=True)
    drops = dice_drops(predictor, volume, reference, told.labels, told.maps, [KEY])
    assert drops == {(KEY, 0): {"label 1": (1.0,)}}


def test_a_model_without_gates_is_refused() -> None:
    predictor = Predictor(attending_model(bottleneck=self_attention(2)), device="cpu")
    with pytest.raises(
        ModelError, match=r"^verdicts need a model with gates or spatial maps.* train one"
    ):
        check_gates(predictor)
