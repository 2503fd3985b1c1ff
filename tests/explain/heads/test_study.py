"""Laws of what heads of attention are worth: importance by definition, Dice by masking."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn

from segkit.config.attention import (
    AdditiveGridGateConfig,
    AdditiveSelfAttentionConfig,
    AttentionConfig,
    CrossAttentionConfig,
    SelfAttentionConfig,
    UTransformerGateConfig,
)
from segkit.config.network import NetworkConfig
from segkit.errors import ModelError, VolumeError
from segkit.explain.heads import study as explained
from segkit.explain.heads.study import (
    HeadFigures,
    PositionFigures,
    ScoredVolume,
    case_dice,
    head_importance,
    head_table,
    masking,
    multi_headed,
    study_heads,
)
from segkit.geometry.grid import Grid
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.model.build import build_network
from segkit.model.folder import Model
from segkit.nn.losses import dice_cross_entropy
from segkit.nn.map_tap import editing, taps
from segkit.nn.multihead import MultiHeadAttention
from segkit.nn.positions import RelativeBias
from segkit.nn.unet import UNet
from tests.helpers import stored_otherwise
from tests.models import description

PATCH = (8, 8, 8)
Slices = Literal["sagittal", "coronal", "axial"]


def attending_model(
    *,
    spatial_dims: Literal[2, 3] = 3,
    patch_size: tuple[int, ...] | None = None,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    strides: list[list[int]] | None = None,
    slices: Slices = "axial",
    seed: int = 0,
    **attention: Any,
) -> Model:
    """An untrained network of three levels and three classes, whose heads matter."""
    torch.manual_seed(seed)
    told = description(
        classes=3,
        spacing=spacing,
        patch_size=patch_size or PATCH[:spatial_dims],
        network=NetworkConfig(
            spatial_dims=spatial_dims,
            channels=[6, 7, 8],
            strides=strides,
            deep_supervision=False,
            attention=AttentionConfig(**attention),
        ),
    ).model_copy(update={"slices": slices})
    network = build_network(told)
    for module in network.modules():
        if isinstance(module, MultiHeadAttention):
            nn.init.normal_(module.query.weight)  # far from uniform weights
            nn.init.normal_(module.key.weight)
            nn.init.normal_(module.out.weight)  # and far from nothing
        elif isinstance(module, RelativeBias):
            nn.init.normal_(module.table)
    return Model(told, network.eval())


def noise_volume(*shape: int, seed: int = 0) -> Volume:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return Volume(values, Grid((shape[0], shape[1], shape[2]), np.eye(4)))


def noise_case(*shape: int, seed: int = 0) -> ScoredVolume:
    """Noise in the image, and three labels for no reason."""
    volume = noise_volume(*shape, seed=seed)
    labels = np.random.default_rng(100 + seed).integers(0, 3, shape).astype(np.uint8)
    return ScoredVolume(f"case {seed}", volume, volume.like(labels))


def self_attention(heads: int, **more: Any) -> SelfAttentionConfig:
    return SelfAttentionConfig(**{"heads": heads, "head_channels": 4, "positions": "none", **more})


@pytest.mark.parametrize("kept", [[], [0], [2, 1], [0, 1, 2, 3]])
def test_masking_zeroes_all_heads_but_those_kept(kept: list[int]) -> None:
    ((key, edit),) = masking("skip.1", kept).items()
    assert key == "skip.1/branch"
    switches = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    masked = edit(switches)
    for head in range(4):
        assert masked[:, head].tolist() == (switches[:, head].tolist() if head in kept else [0, 0])
    assert switches.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_modules_with_heads_are_found_by_position() -> None:
    model = attending_model(
        skip=CrossAttentionConfig(levels=[0, 1], heads=[2, 3], head_channels=4),
        bottleneck=self_attention(5),
    )
    found = {position: m.attention.heads for position, m in multi_headed(model.network).items()}
    assert found == {"skip.0": 2, "skip.1": 3, "bottleneck": 5}
    assert multi_headed(attending_model(bottleneck=AdditiveSelfAttentionConfig()).network) == {}


@contextmanager
def heads_outputs(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """By position, what comes into W_o: the outputs of all heads beside one another."""
    seen: dict[str, Tensor] = {}
    handles = []
    for position, module in multi_headed(network).items():

        def keep(_: nn.Module, given: tuple[Tensor], position: str = position) -> None:
            seen[position] = given[0]

        handles.append(module.attention.out.register_forward_pre_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def window_losses(model: Model, case: ScoredVolume, starts: list[int]) -> Iterator[Tensor]:
    """The loss of each window of a volume that is one window wide but along its first axis."""
    for start in starts:
        region = slice(start, start + PATCH[0])
        image = torch.from_numpy(case.volume.data[region])[None, None]
        label = torch.from_numpy(case.reference.data[region].astype("int64"))[None]
        yield dice_cross_entropy(model.network(image), label, pool_batch=False)


def importance_by_definition(model: Model, cases: list[ScoredVolume]) -> dict[str, list[float]]:
    """|Att_h^T dL / dAtt_h| of Michel et al. (2019, Eq. 2), summed over windows and normed."""
    modules = multi_headed(model.network)
    totals = {position: np.zeros(m.attention.heads) for position, m in modules.items()}
    samples = 8 if model.description.network.spatial_dims == 2 else 1
    with heads_outputs(model.network) as outputs:
        for case in cases:
            for loss in window_losses(model, case, [0, 4, 8]):
                slopes = torch.autograd.grad(loss, list(outputs.values()))
                for (position, taken), slope in zip(outputs.items(), slopes, strict=True):
                    heads = modules[position].attention.heads
                    products = (taken * slope).detach().unflatten(2, (heads, -1)).sum(dim=(1, 3))
                    per_sample = products.view(samples, -1, heads).sum(dim=1)
                    totals[position] += per_sample.abs().sum(dim=0).numpy()
    return {position: list(total / np.linalg.norm(total)) for position, total in totals.items()}


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(
    "attention",
    [
        {"bottleneck": self_attention(3)},
        {"skip": CrossAttentionConfig(levels=[0, 1], heads=[2, 3], head_channels=4)},
        {
            "skip": UTransformerGateConfig(heads=2, head_channels=4),
            "bottleneck": self_attention(3, positions="rotary", head_channels=6),
        },
    ],
    ids=["bottleneck", "skips", "both"],
)
def test_importance_is_each_windows_derivative_by_definition(
    attention: dict[str, Any], spatial_dims: Literal[2, 3]
) -> None:
    model = attending_model(spatial_dims=spatial_dims, **attention)
    cases = [noise_case(16, 8, 8, seed=seed) for seed in range(2)]
    found = head_importance(Predictor(model, device="cpu"), cases)
    expected = importance_by_definition(model, cases)
    assert set(found) == set(expected)
    for position, scores in found.items():
        assert_allclose(scores, expected[position], rtol=1e-3)
        assert_allclose(np.square(scores).sum(), 1)


def test_importance_within_windows_of_attention_is_summed_over_them() -> None:
    model = attending_model(patch_size=(8, 8, 8), bottleneck=self_attention(3, window=[1, 2, 2]))
    cases = [noise_case(16, 8, 8)]
    found = head_importance(Predictor(model, device="cpu"), cases)
    assert_allclose(
        found["bottleneck"], importance_by_definition(model, cases)["bottleneck"], rtol=1e-3
    )


def test_importance_is_the_slope_of_the_loss_in_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By finite differences, in double precision, of a loss that is not cast to single."""

    def mean_right_logit(
        logits: Tensor, label: Tensor, *, pool_batch: bool, ignore: None = None
    ) -> Tensor:
        return logits.gather(1, label[:, None]).mean()

    monkeypatch.setattr(explained, "dice_cross_entropy", mean_right_logit)
    model = attending_model(bottleneck=self_attention(3))
    case = noise_case(*PATCH)
    image = torch.from_numpy(case.volume.data)[None, None].double()
    label = torch.from_numpy(case.reference.data.astype("int64"))[None]
    network = copy.deepcopy(model.network).double()

    def loss(switches: Tensor) -> float:
        with torch.no_grad(), editing(network, {"bottleneck/branch": lambda ones: switches}):
            return float(mean_right_logit(network(image), label, pool_batch=False))

    ones, steps = torch.ones(1, 3).double(), 1e-5 * torch.eye(3).double()[:, None]
    slopes = [abs(loss(ones + step) - loss(ones - step)) for step in steps]
    found = head_importance(Predictor(model, device="cpu"), [case])["bottleneck"]
    assert_allclose(found, np.array(slopes) / np.linalg.norm(slopes), rtol=1e-3)


class LinearHeads(UNet):
    """Logits that are linear in two switches: the image's values and half their size."""

    def forward(self, image: Tensor) -> Tensor:
        switches = taps(self)["bottleneck/branch"](image.new_ones(len(image), 2))
        first, second = switches[:, :, None, None, None, None].unbind(dim=1)
        value = first * image + second * image.abs() / 2
        return torch.cat([value, value, value], dim=1)


def test_slopes_of_two_windows_do_not_cancel_and_a_linear_loss_drops_by_the_importance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows of +1 and of -1 alone: dLoss/dSwitch of the first head is 1 and -1, of the second
    0.5 twice. The means of their sizes, 1 and 0.5, over their norm are 2 and 1 over the root of 5.
    """

    def mean_logit(
        logits: Tensor, label: Tensor, *, pool_batch: bool, ignore: None = None
    ) -> Tensor:
        return logits.mean()

    monkeypatch.setattr(explained, "dice_cross_entropy", mean_logit)
    model = attending_model(bottleneck=self_attention(2))
    model.network.__class__ = LinearHeads
    values = np.ones((16, 8, 8), np.float32)
    values[8:] = -1
    volume = Volume(values, Grid((16, 8, 8), np.eye(4)))
    case = ScoredVolume("x", volume, volume.like(np.ones((16, 8, 8), np.uint8)))
    found = head_importance(Predictor(model, device="cpu", overlap=0.0), [case])["bottleneck"]
    assert_allclose(found, [2 / math.sqrt(5), 1 / math.sqrt(5)], rtol=1e-6)
    drops = []
    for head in range(2):
        with torch.no_grad():
            window = torch.from_numpy(values[None, None, :8])
            whole = model.network(window).mean()
            with editing(model.network, masking("bottleneck", {1 - head})):
                drops.append(float(whole - model.network(window).mean()))
    assert_allclose(np.array(drops) / np.linalg.norm(drops), found, rtol=1e-6)


def test_measuring_importance_leaves_the_network_as_it_was() -> None:
    model = attending_model(bottleneck=self_attention(2))
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    head_importance(Predictor(model, device="cpu"), [noise_case(*PATCH)])
    assert all(tap.edit is None for tap in taps(model.network).values())
    assert all(parameter.grad is None for parameter in model.network.parameters())
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, before[name])


def masked_dice(predictor: Predictor, cases: list[ScoredVolume], kept: list[int]) -> list[float]:
    with editing(predictor.model.network, masking("bottleneck", kept)):
        return [case_dice(predictor, case) for case in cases]


def test_a_study_holds_the_dice_of_every_masking() -> None:
    model = attending_model(
        skip=CrossAttentionConfig(heads=1, head_channels=4), bottleneck=self_attention(3)
    )
    predictor = Predictor(model, device="cpu")
    cases = [noise_case(*PATCH, seed=seed) for seed in range(2)]
    studied = {figures.position: figures for figures in study_heads(predictor, cases)}
    assert set(studied) == {"skip.1", "bottleneck"} and len(studied["skip.1"].heads) == 1
    figures = studied["bottleneck"]
    assert figures.dice == [case_dice(predictor, case) for case in cases]
    assert figures.dice == studied["skip.1"].dice
    assert figures.dice_without_any == masked_dice(predictor, cases, [])
    assert [head.head for head in figures.heads] == [0, 1, 2]
    for head in figures.heads:
        others = [other for other in range(3) if other != head.head]
        assert head.dice_without == masked_dice(predictor, cases, others)
        assert head.dice_alone == masked_dice(predictor, cases, [head.head])
    importance = [head.importance for head in figures.heads]
    assert importance == head_importance(predictor, cases)["bottleneck"]
    least, middle, most = np.argsort(importance).tolist()
    orders = {
        "least_first": [[least, middle, most], [middle, most], [most], []],
        "most_first": [[least, middle, most], [least, middle], [least], []],
    }
    for name, order in orders.items():
        expected = [np.mean(masked_dice(predictor, cases, kept)) for kept in order]
        assert_allclose(getattr(figures, name), expected, rtol=1e-12)
        assert len(set(getattr(figures, name))) == 4, "masking must show for this to be a test"


def test_dice_of_a_case_is_the_mean_over_its_classes() -> None:
    """Of 8 voxels, the model says 1 everywhere. The reference has 1 at six and 2 at two: Dice is
    12/14 and 0. Without the 2, class 2 is nowhere, and does not count."""
    model = attending_model(bottleneck=self_attention(1), patch_size=(8, 8, 8))

    class Ones(UNet):
        def forward(self, image: Tensor) -> Tensor:
            return torch.cat([0 * image, 0 * image + 1, 0 * image], dim=1)

    model.network.__class__ = Ones
    volume = noise_volume(2, 2, 2)
    labels = np.array([1, 1, 1, 1, 1, 1, 2, 2], np.uint8).reshape(2, 2, 2)
    predictor = Predictor(model, device="cpu")
    assert case_dice(predictor, ScoredVolume("x", volume, volume.like(labels))) == pytest.approx(
        6 / 14
    )
    labels = np.where(labels == 2, 0, labels)
    assert case_dice(predictor, ScoredVolume("x", volume, volume.like(labels))) == pytest.approx(
        12 / 14
    )


def figures_of(
    gains: list[float], *, heads: int = 2, without_any: float = 0.25, best: int = 1
) -> PositionFigures:
    """A position whose best head alone has a Dice of 0.5, and all together that and the gains."""
    return PositionFigures(
        "bottleneck",
        [
            HeadFigures(
                head,
                0.5,
                dice_without=[0.75] * len(gains),
                dice_alone=[0.5 if head == best else 0.125] * len(gains),
            )
            for head in range(heads)
        ],
        dice=[0.5 + gain for gain in gains],
        dice_without_any=[without_any] * len(gains),
        least_first=[],
        most_first=[],
    )


def test_the_gain_is_relative_to_the_best_single_head() -> None:
    figures = figures_of([0.25, -0.125, 0.0], heads=3, best=1)
    assert figures.best_alone.head == 1
    assert figures.gain == [0.25, -0.125, 0.0]


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([0.25] * 6, 2 / 64),
        ([-0.25] * 6, 2 / 64),
        ([0.25] * 3 + [-0.125] * 3, 1.0),
        ([0.25] * 5 + [-0.125], 2 * 7 / 64),  # 1 + 6 of the 64 outcomes are as lopsided
        ([0.25] * 6 + [0.0] * 4, 2 / 64),  # ties are left out
        ([0.0, 0.0], 1.0),
        ([0.25], 1.0),
    ],
)
def test_the_sign_test_has_the_p_values_worked_out_by_hand(
    gains: list[float], expected: float
) -> None:
    assert figures_of(gains).p_value == expected


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (
            figures_of([0.25, 0.25], heads=1, best=0),
            "bottleneck: one head; Dice 0.7500 with it and 0.2500 without (+0.5000)",
        ),
        (
            figures_of([0.25, 0.25]),
            "bottleneck: 2 heads, 2 cases cannot tell: Dice 0.7500 with all, 0.5000 with only "
            "head 1, 0.2500 with none; all are better than head 1 in 2 of 2 cases and worse in 0 "
            "(p = 0.5)",
        ),
        (
            figures_of([-0.25], heads=3),
            "bottleneck: 3 heads, 1 case cannot tell: Dice 0.2500 with all, 0.5000 with only "
            "head 1, 0.2500 with none; all are better than head 1 in 0 of 1 case and worse in 1 "
            "(p = 1)",
        ),
        (
            figures_of([0.25] * 6),
            "bottleneck: 2 heads, better than one: Dice 0.7500 with all, 0.5000 with only "
            "head 1, 0.2500 with none; all are better than head 1 in 6 of 6 cases and worse in 0 "
            "(p = 0.0312)",
        ),
        (
            figures_of([-0.25] * 6, best=0),
            "bottleneck: 2 heads, no better than one: Dice 0.2500 with all, 0.5000 with only "
            "head 0, 0.2500 with none; all are better than head 0 in 0 of 6 cases and worse in 6 "
            "(p = 0.0312)",
        ),
    ],
    ids=["one", "two cases", "one case", "better", "no better"],
)
def test_the_answer_says_what_the_sign_test_can_tell(
    figures: PositionFigures, expected: str
) -> None:
    assert figures.answer() == expected


def test_the_table_has_a_row_per_head_with_means_over_cases() -> None:
    assert head_table([figures_of([0.25, 0.5])]) == [
        {
            "position": "bottleneck",
            "head": head,
            "importance": 0.5,
            "dice_all": 0.875,
            "dice_without": 0.75,
            "dice_alone": alone,
        }
        for head, alone in ((0, 0.125), (1, 0.5))
    ]


@pytest.mark.parametrize(
    "attention",
    [{}, {"skip": AdditiveGridGateConfig()}, {"bottleneck": AdditiveSelfAttentionConfig()}],
)
def test_a_model_without_attention_heads_is_refused(attention: dict[str, Any]) -> None:
    predictor = Predictor(attending_model(**attention), device="cpu")
    with pytest.raises(
        ModelError, match="expected a model with attention heads, but this one has none"
    ):
        study_heads(predictor, [noise_case(*PATCH)])


def test_references_that_cannot_be_compared_are_refused() -> None:
    predictor = Predictor(attending_model(bottleneck=self_attention(2)), device="cpu")
    good = noise_case(*PATCH, seed=1)
    shifted = np.eye(4)
    shifted[0, 3] = 2.0
    elsewhere = Volume(good.reference.data, Grid(PATCH, shifted))
    empty = good.volume.like(np.zeros(PATCH, np.uint8))
    beyond = good.volume.like(np.full(PATCH, 3, np.uint8))
    for reference, message in (
        (
            elsewhere,
            "^case 1: its reference lies on another grid than the volume: its first voxel lies 2 "
            "mm off, so that voxels lie up to 2 voxels apart; resample one onto the other$",
        ),
        (empty, "^case 1: its reference contains only background; leave the case out$"),
        (
            beyond,
            r"^case 1: expected a reference with the model's labels 0 … 2, found 3 … 3; use labels "
            "of the same classes$",
        ),
    ):
        with pytest.raises(VolumeError, match=message):
            study_heads(
                predictor, [noise_case(*PATCH), ScoredVolume("case 1", good.volume, reference)]
            )


def test_a_reference_with_axes_in_another_order_is_the_same_case() -> None:
    predictor = Predictor(attending_model(bottleneck=self_attention(2)), device="cpu")
    case = noise_case(*PATCH)
    stored = stored_otherwise(case.reference.data, case.reference.grid, (1, 2, 0), (0, 2))
    turned = ScoredVolume(case.name, case.volume, Volume(*stored))
    assert study_heads(predictor, [turned]) == study_heads(predictor, [case])


def test_one_outlier_does_not_change_the_answer() -> None:
    study = figures_of([0.0625] * 9 + [-0.5])
    assert sum(study.gain) > 0 and study.won_and_lost == (9, 1)
    assert "2 heads, better than one" in study.answer()
    worse_by_mean = figures_of([0.03125] * 9 + [-0.5])
    assert sum(worse_by_mean.gain) < 0
    assert "2 heads, better than one" in worse_by_mean.answer()
