"""Laws of attributions: closed forms of linear networks, and sums that must come out."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy import ndarray
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from segkit.config.model import ModelDescription
from segkit.config.network import NetworkConfig
from segkit.errors import ModelError, VolumeError
from segkit.explain.attribution.attribute import (
    METHODS,
    Attribution,
    AttributionSettings,
    Method,
    attribute,
    baseline_image,
)
from segkit.explain.attribution.perturbations import kernel_shap, occlusion
from segkit.explain.attribution.supervoxels import Supervoxels
from segkit.explain.attribution.target import Quantity, SummedOutput
from segkit.geometry.grid import Grid
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.model.build import build_network, wrap_network
from segkit.model.folder import Model
from tests.helpers import affine_of
from tests.models import FAST, description, model_of

SHAPE = (12, 8, 8)
BOX = (slice(3, 7), slice(2, 5), slice(1, 6))
"""The region of the structure, in two of the three windows along the first axis."""


class Linear(nn.Module):
    """Logits that are weighted sums of the channels of each voxel, plus a constant."""

    weights = torch.tensor([[0.3, -0.2], [1.5, -0.75], [0.5, 0.25]])

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.look = nn.Conv3d(channels, 3, kernel_size=1)
        with torch.no_grad():
            self.look.weight.copy_(self.weights[:, :channels].view_as(self.look.weight))
            self.look.bias.copy_(torch.tensor([0.1, -0.4, 0.2]))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.look(image)
        return logits


class Curved(nn.Module):
    """Smooth logits of the voxels around each voxel: a network that is not linear."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv3d(channels, 4, kernel_size=3, padding=1)
        self.last = nn.Conv3d(4, 3, kernel_size=3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.tanh(self.first(image)))
        return logits


def wrapped(module: nn.Module, channels: int, **changes: Any) -> Predictor:
    """A predictor of windows of 8 voxels, which start at 0, 4, …"""
    given = NetworkConfig.model_validate({"given": {"name": "test", "multiple": [1, 1, 1]}})
    spacing = changes.pop("spacing", (1.0, 1.0, 1.0))
    told = description(channels=channels, classes=3, spacing=spacing, network=given)
    model = Model(told, wrap_network(told, module).eval())
    return Predictor(model, device="cpu", engine="torch", **changes)


def scan(channels: int = 2, shape: tuple[int, int, int] = SHAPE) -> Volume:
    size = shape if channels == 1 else (*shape, channels)
    values = np.random.default_rng(0).normal(2, 1, size).astype(np.float32)
    return Volume(values, Grid(shape, np.eye(4)))


def region(volume: Volume, label: int = 1) -> Volume:
    values = np.zeros(volume.grid.shape, np.uint8)
    values[BOX] = label
    return volume.like(values)


def found(method: Method, *, settings: AttributionSettings | None = None) -> Attribution:
    """The attribution of label 1 by the linear network, whose logit is 1.5 a - 0.75 b - 0.4."""
    volume = scan()
    return attribute(
        wrapped(Linear(), 2), volume, method, region=region(volume), settings=settings
    )["label 1"]


def in_region(volume: Volume) -> ndarray:
    return (region(volume).data > 0).astype(float)


WEIGHTS = np.array([1.5, -0.75])


def test_the_value_is_the_summed_logit_of_the_region() -> None:
    volume = scan()
    expected = (volume.data[BOX] @ WEIGHTS - 0.4).sum()
    for method in METHODS:
        one = found(method)
        assert one.value == pytest.approx(expected, rel=1e-5) and one.region_voxels == 4 * 3 * 5
        assert (one.method, one.structure, one.key) == (method, "label 1", f"{method}/label 1")


def test_integrated_gradients_of_a_linear_network_are_weight_times_difference() -> None:
    one = found("integrated_gradients", settings=AttributionSettings(baseline="mean", steps=2))
    volume = scan()
    means = volume.data.reshape(-1, 2).mean(axis=0)
    expected = in_region(volume)[..., None] * WEIGHTS * (volume.data - means)
    assert_allclose(one.values.data, expected, atol=1e-5)
    assert one.total == pytest.approx(one.explained, rel=1e-5)
    assert one.explained == pytest.approx(expected.sum(), rel=1e-4)


def test_smoothgrad_of_a_linear_network_is_its_weights() -> None:
    one, volume = found("smoothgrad"), scan()
    assert_allclose(one.values.data, in_region(volume)[..., None] * WEIGHTS, atol=1e-5)
    assert np.isnan(one.baseline_value) and np.isnan(one.explained)


@pytest.mark.parametrize("method", ["occlusion", "kernel_shap"])
@pytest.mark.parametrize("quantity", ["logit"])
def test_occlusion_and_shap_of_a_linear_network_are_its_sums_over_boxes(
    method: Method, quantity: Quantity
) -> None:
    settings = AttributionSettings(cell_mm=3.0, baseline=0.5, quantity=quantity)
    one, volume = found(method, settings=settings), scan()
    each = in_region(volume) * ((volume.data - 0.5) @ WEIGHTS)
    padded = np.pad(each, [(0, 0), (0, 1), (0, 1)])  # boxes of 3 voxels, the last ones cut off
    expected = padded.reshape(4, 3, 3, 3, 3, 3).sum(axis=(1, 3, 5))
    assert_allclose(one.values.data, expected, atol=1e-4)
    assert one.total == pytest.approx(each.sum(), rel=1e-4)
    # Each box lies in the middle of its voxels.
    assert_allclose(
        one.values.grid.affine, [[3, 0, 0, 1], [0, 3, 0, 1], [0, 0, 3, 1], [0, 0, 0, 1]]
    )


@pytest.mark.parametrize("quantity", ["logit", "probability"])
def test_gradients_are_those_of_finite_differences(quantity: Quantity) -> None:
    predictor, volume = wrapped(Curved(), 1), scan(1)
    masks = {"label 1": torch.from_numpy(region(volume).data > 0)}
    target = SummedOutput(
        predictor.members[0], SHAPE, masks, outputs={"label 1": 1}, quantity=quantity
    )
    image = torch.from_numpy(volume.data)[None]
    gradient = target.gradient([image], [1.0], what="gradient")[0, 0]
    step = 0.05
    for place in [(3, 3, 3), (5, 4, 2), (6, 1, 5), (2, 2, 1), (8, 4, 4)]:
        ends = []
        for sign in (-1, 1):
            moved = image.clone()
            moved[(0, *place)] += sign * step
            ends.append(target.value(moved)[0])
        expected = (ends[1] - ends[0]) / (2 * step)
        assert float(gradient[place]) == pytest.approx(expected, abs=2e-3)
    assert float(gradient.abs().max()) > 0.05


@pytest.mark.parametrize("quantity", ["logit", "probability"])
def test_integrated_gradients_are_complete(quantity: Quantity) -> None:
    volume = scan(1)
    settings = AttributionSettings(quantity=quantity, steps=12)
    one = attribute(
        wrapped(Curved(), 1), volume, "integrated_gradients", region=region(volume),
        settings=settings,
    )["label 1"]  # fmt: skip
    assert one.total == pytest.approx(one.explained, abs=1e-3 * abs(one.explained) + 1e-4)
    assert np.nansum(one.values.data) == pytest.approx(one.total, rel=1e-4)


def targets(quantity: Quantity) -> tuple[SummedOutput, Tensor, Tensor]:
    """Sums of two structures in three windows, an image and its baseline."""
    predictor, volume = wrapped(Curved(), 1), scan(1, (16, 8, 8))
    masks = {name: torch.zeros(16, 8, 8, dtype=torch.bool) for name in ("label 1", "label 2")}
    masks["label 1"][1:6, 2:5, 1:6] = True
    masks["label 2"][4:11, 3:7, 3:5] = True
    outputs = {"label 1": 1, "label 2": 2}
    target = SummedOutput(
        predictor.members[0], (16, 8, 8), masks, outputs=outputs, quantity=quantity
    )
    image = torch.from_numpy(volume.data)[None]
    return target, image, baseline_image(image, 1, "mean", patch_size=(8, 8, 8))


@pytest.mark.parametrize("quantity", ["logit", "probability"])
def test_occlusion_with_kept_windows_is_occlusion_with_all_windows_computed(
    quantity: Quantity,
) -> None:
    target, image, baseline = targets(quantity)
    assert len(target.windows) == 3
    parts = Supervoxels.boxes_of(Grid((16, 8, 8), np.eye(4)), (4, 4, 8))
    calls = counting(target)
    kept = occlusion(target, image, baseline, parts)
    once, calls[:] = list(calls), []
    whole = target.value(image)
    naive = np.stack(
        [
            whole - target.value(parts.replaced(image, baseline, np.array([part])))
            for part in range(len(parts))
        ],
        axis=1,
    )
    assert_allclose(kept, naive, atol=1e-5)
    assert np.abs(naive[0, :4]).min() > 1e-3 and np.abs(naive).max() > 0.1
    # Two structures in one pass; each part computes only its own windows, and all once to begin.
    assert sum(once) == 3 + sum(len(inside) for inside in parts.in_windows(target)) == 3 + 12
    assert sum(calls) == 3 + 3 * len(parts) == 3 + 24


def counting(target: SummedOutput) -> list[int]:
    """The sizes of the batches that the network computes from now on."""
    calls: list[int] = []
    engine = target.member.engine

    def counted(windows: Tensor, keys: Any) -> dict[str, Tensor]:
        calls.append(len(windows))
        return engine(windows, keys)

    target.member.engine = counted
    return calls


@pytest.mark.parametrize("quantity", ["logit", "probability"])
def test_shap_by_windows_is_the_shapley_value_of_the_whole(quantity: Quantity) -> None:
    target, image, baseline = targets(quantity)
    parts = Supervoxels.boxes_of(Grid((16, 8, 8), np.eye(4)), (4, 8, 8))  # 4 parts, 16 coalitions
    values = kernel_shap(target, image, baseline, parts, samples=16)
    gains = np.zeros((2, 4))
    orders = list(itertools.permutations(range(4)))
    known: dict[frozenset[int], ndarray] = {}
    for order in orders:
        for place, part in enumerate(order):
            pair = []
            for inside in (frozenset(order[:place]), frozenset(order[: place + 1])):
                if inside not in known:
                    removed = np.array(sorted(set(range(4)) - inside), np.int64)
                    known[inside] = target.value(parts.replaced(image, baseline, removed))
                pair.append(known[inside])
            gains[:, part] += (pair[1] - pair[0]) / len(orders)
    assert_allclose(values, gains, atol=1e-5)
    assert_allclose(values.sum(axis=1), target.value(image) - target.value(baseline), atol=1e-5)


def test_sampled_shap_values_sum_to_the_difference() -> None:
    volume = scan(1)
    settings = AttributionSettings(cell_mm=2.0, samples=20)
    one = attribute(
        wrapped(Curved(), 1), volume, "kernel_shap", region=region(volume), settings=settings
    )["label 1"]
    assert one.values.data.shape == (6, 4, 4)
    assert one.total == pytest.approx(one.explained, rel=1e-5)


def test_supervoxels_of_any_shape_have_a_value_each() -> None:
    volume = scan()
    numbers = np.zeros(SHAPE, np.uint16)
    numbers[3:5] = 7
    numbers[5:, 4:] = 2
    one = attribute(
        wrapped(Linear(), 2),
        volume,
        "occlusion",
        region=region(volume),
        supervoxels=volume.like(numbers),
        settings=AttributionSettings(baseline=0.0),
    )["label 1"]
    each = in_region(volume) * (volume.data @ WEIGHTS)
    for number in (2, 7):
        assert_allclose(
            one.values.data[numbers == number], each[numbers == number].sum(), rtol=1e-4
        )
    assert np.isnan(one.values.data[numbers == 0]).all()


@pytest.mark.parametrize("quantity", ["logit", "probability"])
def test_windows_without_a_supervoxel_have_no_game(quantity: Quantity) -> None:
    target, image, baseline = targets(quantity)
    numbers = np.zeros((16, 8, 8), int)
    numbers[:2], numbers[2:4] = 9, 40  # only in the first window
    parts = Supervoxels.of(numbers, Grid((16, 8, 8), np.eye(4)))
    assert len(parts) == 2 and [len(inside) for inside in parts.in_windows(target)] == [2, 0, 0]
    values = kernel_shap(target, image, baseline, parts)
    without = parts.replaced(image, baseline, np.array([0, 1]))
    assert_allclose(values.sum(axis=1), target.value(image) - target.value(without), atol=1e-5)
    placed = parts.placed(values[0], target.computed)
    assert_array_equal(np.isnan(placed), numbers == 0)
    assert_allclose(placed[:2], values[0, 0])


def test_another_output_can_be_summed_over_the_same_region() -> None:
    volume = scan()
    one = attribute(
        wrapped(Linear(), 2), volume, "smoothgrad", region=region(volume), output="label 0"
    )["label 1"]
    assert_allclose(one.values.data[BOX], np.broadcast_to([0.3, -0.2], (4, 3, 5, 2)), atol=1e-5)


def test_the_region_is_the_prediction_if_none_is_given() -> None:
    volume = scan()
    predictor = wrapped(Linear(), 2)
    labels = predictor(volume).labels
    by_default = attribute(predictor, volume, "smoothgrad")
    assert set(by_default) == {
        f"label {number}" for number in (1, 2) if (labels.data == number).any()
    }
    for one in by_default.values():
        number = int(one.structure[-1])
        assert_array_equal((one.values.data != 0).any(axis=3), labels.data == number)


def test_an_attribution_on_the_scan_keeps_its_world_positions() -> None:
    """A resampled, oblique scan whose stored axes run otherwise, with air around the body."""
    grid = Grid((9, 14, 11), affine_of("PIR", (1.0, 1.5, 2.0)))
    values = np.zeros(grid.shape, np.float32)
    values[1:-1, 2:-1, 1:-2] = np.random.default_rng(1).normal(5, 1, (7, 11, 8))
    volume = Volume(values, grid)
    labels = np.zeros(grid.shape, np.uint8)
    labels[3:6, 4:9, 3:7] = 1
    one = attribute(
        wrapped(Linear(1), 1, spacing=(1.5, 1.0, 2.0)),
        volume,
        "smoothgrad",
        region=volume.like(labels),
        settings=AttributionSettings(draws=1),
    )["label 1"]
    on_scan = one.on_scan()
    assert on_scan.grid is grid or (on_scan.grid.affine == grid.affine).all()
    assert np.isnan(on_scan.data[values == 0]).all()
    assert np.isfinite(on_scan.data[values != 0]).all()
    deep = np.zeros(grid.shape, bool)
    deep[4, 5:8, 4:6] = True
    assert_allclose(on_scan.data[deep], 1.5, rtol=1e-4)
    assert np.nanmax(np.abs(on_scan.data[1])) == 0  # far from the region


def test_windows_without_a_voxel_other_than_0_are_nan() -> None:
    volume = scan(1, (24, 8, 8))
    volume.data[8:16] = 0
    volume.data[0, 0, 0] = volume.data[-1, -1, -1] = 1
    labels = np.zeros(volume.grid.shape, np.uint8)
    labels[2:5] = 1
    for method in METHODS:
        one = attribute(
            wrapped(Linear(1), 1, overlap=0.0),
            volume,
            method,
            region=volume.like(labels),
            settings=AttributionSettings(cell_mm=4.0, draws=1, steps=1),
        )["label 1"]
        third = one.values.grid.shape[0] // 3
        assert np.isnan(one.values.data[third : 2 * third]).all()
        assert (one.values.data[2 * third :] == 0).all()  # computed, and without any part in it
        assert np.abs(one.values.data[:third]).max() > 0


@pytest.mark.parametrize(
    "kind", [pytest.param("self-attention", marks=pytest.mark.slow), "planes with presence"]
)
def test_attention_networks_in_2d_and_3d_have_attributions(kind: str) -> None:
    dims, attention = FAST[kind]
    predictor = Predictor(model_of(attention, dims), device="cpu", engine="torch")
    volume = scan(2, (16, 12 if dims == 2 else 8, 8))
    labels = np.zeros(volume.grid.shape, np.uint8)
    labels[4:8, 3:6, 2:5], labels[8:12, 3:6, 2:5] = 1, 2
    given = volume.like(labels)
    settings = AttributionSettings(draws=1, samples=1, cell_mm=8.0)
    gradients = attribute(predictor, volume, "smoothgrad", region=given, settings=settings)
    assert list(gradients) == ["one", "two"]
    for one in gradients.values():
        assert one.values.data.shape == (*volume.grid.shape, 2)
        assert np.isfinite(one.values.data).all() and one.values.data.std() > 0
    shap = attribute(predictor, volume, "kernel_shap", region=given, settings=settings)
    for one in shap.values():
        assert one.total == pytest.approx(one.explained, rel=1e-4)


class Normalised(nn.Module):
    """A network that divides by the standard deviation of a window."""

    def forward(self, image: Tensor) -> Tensor:
        scaled = nn.functional.instance_norm(image)
        return torch.cat([-scaled, torch.tanh(scaled), scaled**2], dim=1)


def test_a_blurred_baseline_is_complete_although_a_network_normalises_its_window() -> None:
    volume = scan(1)
    values: dict[str, float] = {}
    for baseline in (None, "mean"):
        one = attribute(
            wrapped(Normalised(), 1),
            volume,
            "integrated_gradients",
            region=region(volume),
            settings=AttributionSettings(baseline=baseline),  # type: ignore[arg-type]
        )["label 1"]
        values[str(baseline)] = abs(one.total - one.explained) / abs(one.explained)
    assert values["None"] < 0.01 < 0.1 < values["mean"]


def test_baselines_are_the_values_that_their_names_say() -> None:
    image = torch.rand(3, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    for values, expected in (("mean", image[1].mean()), ("minimum", image[1].min()), (0.5, 0.5)):
        made = baseline_image(image, 2, values, patch_size=(8, 8, 8))  # type: ignore[arg-type]
        assert_allclose(made[1], np.full((6, 6, 6), float(expected)), rtol=1e-6)
        assert (made[2] == image[2]).all()  # from a first stage
    blurred = baseline_image(image, 2, "blurred", patch_size=(16, 16, 16))
    assert_allclose(blurred[:2], gaussian_filter(image[:2].numpy(), (0, 2, 2, 2), mode="nearest"))


def test_probabilities_of_regions_have_the_slope_of_a_sigmoid() -> None:
    given = NetworkConfig.model_validate({"given": {"name": "test", "multiple": [1, 1, 1]}})
    told = description(channels=2, classes=4, spacing=(1.0, 1.0, 1.0), network=given)
    regions = {"label 1": [1, 2, 3], "label 2": [2, 3], "label 3": [3]}
    told = ModelDescription.model_validate({**told.model_dump(), "regions": regions})
    model = Model(told, wrap_network(told, Linear()).eval())
    volume = scan()
    one = attribute(
        Predictor(model, device="cpu", engine="torch"),
        volume,
        "smoothgrad",
        structure="label 2",
        region=region(volume, 3),
        settings=AttributionSettings(quantity="probability", draws=1, noise=0.0),
    )["label 2"]
    share = 1 / (1 + np.exp(0.4 - volume.data @ WEIGHTS))  # the second of the network's outputs
    expected = in_region(volume) * share * (1 - share)
    assert_allclose(one.values.data, expected[..., None] * WEIGHTS, atol=1e-6)
    assert one.value == pytest.approx((in_region(volume) * share).sum(), rel=1e-5)


def test_labels_of_a_first_stage_stay_as_they_are() -> None:
    torch.manual_seed(0)
    network = NetworkConfig(channels=[2, 2])
    first = description(classes=2, spacing=(1.0, 1.0, 1.0), network=network)
    told = ModelDescription.model_validate(
        {**first.model_dump(), "first_stage": {"classes": ["label 1"], "models": 1}}
    )
    model = Model(told, build_network(told).eval(), (Model(first, build_network(first).eval()),))
    predictor = Predictor(model, device="cpu", engine="torch")
    volume = scan(1, (8, 8, 8))
    given = region(volume)
    settings = AttributionSettings(draws=1, cell_mm=8.0, baseline=0.0)
    one = attribute(predictor, volume, "occlusion", region=given, settings=settings)["label 1"]
    image = predictor.prepare(volume).image
    assert len(image) == 2
    target = SummedOutput(
        predictor.members[0],
        (8, 8, 8),
        {"label 1": torch.from_numpy(given.data > 0)},
        outputs={"label 1": 1},
    )
    without = torch.cat([torch.zeros_like(image[:1]), image[1:]])
    expected = target.value(image)[0] - target.value(without)[0]
    assert one.values.data.ravel().tolist() == [pytest.approx(expected, rel=1e-5)]
    gradient = attribute(predictor, volume, "smoothgrad", region=given, settings=settings)
    assert gradient["label 1"].values.data.shape == (8, 8, 8)


def test_mistakes_are_refused_in_a_sentence() -> None:
    volume, predictor = scan(), wrapped(Linear(), 2)
    with pytest.raises(
        ModelError, match=r"expected a method out of integrated_gradients, .*'lime'"
    ):
        attribute(predictor, volume, "lime")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="expected one of label 1, label 2, found 'liver'"):
        attribute(predictor, volume, "occlusion", structure="liver")
    with pytest.raises(ModelError, match="expected one of label 0, label 1, label 2, found 'x'"):
        attribute(predictor, volume, "occlusion", output="x")
    with pytest.raises(VolumeError, match="expected at least one voxel of label 2 in the region"):
        attribute(predictor, volume, "occlusion", structure="label 2", region=region(volume))
    with pytest.raises(VolumeError, match="the region lies on another grid than the scan"):
        attribute(predictor, volume, "occlusion", region=region(scan(2, (12, 8, 4)), 1))
    with pytest.raises(ModelError, match="steps: expected a whole number from 1 on, found 0"):
        AttributionSettings(steps=0)
    with pytest.raises(ModelError, match="quantity: expected logit, probability, found 'loss'"):
        AttributionSettings(quantity="loss")  # type: ignore[arg-type]
    message = "baseline: expected mean, minimum, blurred, or a number, found 'zero'"
    with pytest.raises(ModelError, match=message):
        AttributionSettings(baseline="zero")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="cell_mm: expected more than 0 mm, found 0"):
        AttributionSettings(cell_mm=0)
    empty = volume.like(np.zeros(SHAPE, np.uint8))
    with pytest.raises(
        VolumeError, match="supervoxels: expected the parts of the scan numbered from 1"
    ):
        attribute(predictor, volume, "occlusion", region=region(volume), supervoxels=empty)
    assert attribute(predictor, volume, "occlusion", region=empty) == {}


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": 2.5},
        {"draws": 2.5},
        {"samples": 0},
        {"seed": -1},
        {"noise": math.inf},
        {"noise": -0.1},
        {"baseline": math.nan},
        {"baseline": -math.inf},
        {"cell_mm": math.inf},
        {"cell_mm": math.nan},
        {"cell_mm": 0.0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(ModelError, match=f"^{name}: expected .*, found .*; change it$"):
        AttributionSettings(**setting)
