import math
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.geometry.grid import Placement
from segkit.nn.gates import (
    AdditiveGridGate,
    AdditiveSameLevelGate,
    CoefficientKind,
    Coefficients,
    HardGate,
    anneal,
)
from segkit.nn.map_tap import editing, place_taps, recording
from segkit.nn.unet import Join, UNet

GateKind = Literal["grid", "same_level"]
GATE_KINDS: tuple[GateKind, ...] = ("grid", "same_level")
COEFFICIENT_KINDS: tuple[CoefficientKind, ...] = ("sigmoid", "softmax", "mean_flow", "hard")
SHARES: tuple[CoefficientKind, ...] = ("softmax", "mean_flow")
KEY = "skip.0/gate"


def placed_gate(
    kind: GateKind,
    spatial_dims: int = 2,
    *,
    initial_bias: float = 3.0,
    coefficients: CoefficientKind = "sigmoid",
    seed: int = 0,
) -> AdditiveGridGate | AdditiveSameLevelGate:
    """A gate of a skip of 6 channels, steered by a signal of 5."""
    torch.manual_seed(seed)
    gate: AdditiveGridGate | AdditiveSameLevelGate
    if kind == "grid":
        gate = AdditiveGridGate(
            spatial_dims,
            skip_channels=6,
            signal_channels=5,
            stride=[2, 3, 1][:spatial_dims],
            deepest=True,
            initial_bias=initial_bias,
            coefficients=coefficients,
        )
    else:
        gate = AdditiveSameLevelGate(
            spatial_dims,
            skip_channels=6,
            signal_channels=5,
            initial_bias=initial_bias,
            coefficients=coefficients,
        )
    place_taps(gate, "skip.0", 0, Placement.identity(spatial_dims))
    return gate


def skip_and_signal(kind: GateKind, spatial_dims: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    space = [8, 12, 5][:spatial_dims]
    coarse = [4, 4, 5][:spatial_dims]
    return (
        torch.randn(2, 6, *space, generator=generator),
        torch.randn(2, 5, *(coarse if kind == "grid" else space), generator=generator),
    )


@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_gate_lies_in_the_open_unit_interval_on_the_grid_of_the_skip(
    kind: GateKind, spatial_dims: int
) -> None:
    gate = placed_gate(kind, spatial_dims, initial_bias=0.0)
    nn.init.normal_(gate.coefficients.weight)  # far from flat
    skip, signal = skip_and_signal(kind, spatial_dims)
    attention_map = gate(skip, signal)
    assert attention_map.shape == (2, 1, *skip.shape[2:])
    assert attention_map.min() > 0 and attention_map.max() < 1
    assert attention_map.max() - attention_map.min() > 0.3


@pytest.mark.parametrize("coefficients", COEFFICIENT_KINDS)
@pytest.mark.parametrize("kind", GATE_KINDS)
def test_a_gate_stays_finite_where_its_features_are_huge(
    kind: GateKind, coefficients: CoefficientKind
) -> None:
    gate = placed_gate(kind, coefficients=coefficients)
    skip, signal = skip_and_signal(kind)
    attention_map = gate(1e6 * skip, -1e6 * signal)
    assert attention_map.isfinite().all()
    assert attention_map.min() >= 0 and attention_map.max() <= gate.tap.highest


@pytest.mark.parametrize("initial_bias", [-2.0, 0.0, 3.0])
@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_gate_starts_at_the_sigmoid_of_its_initial_bias(
    kind: GateKind, spatial_dims: int, initial_bias: float
) -> None:
    start = 1 / (1 + math.exp(-initial_bias))
    for seed in range(5):
        gate = placed_gate(kind, spatial_dims, initial_bias=initial_bias, seed=seed)
        attention_map = gate(*skip_and_signal(kind, spatial_dims))
        assert abs(attention_map.mean().item() - start) < 0.01


def test_the_grid_gate_gives_the_value_worked_out_by_hand() -> None:
    gate = AdditiveGridGate(2, skip_channels=1, signal_channels=1, stride=(2, 2), deepest=False)
    with torch.no_grad():
        gate.from_skip.weight.copy_(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
        gate.from_signal.weight.fill_(2.0)
        gate.from_signal.bias.fill_(1.0)
        gate.coefficients.weight.fill_(0.5)
        gate.coefficients.bias.fill_(-1.0)
    skip = torch.tensor([[[[1.0, -1.0], [0.0, 2.0]]]])
    # From the skip 1*1 + 2*(-1) + 3*0 + 4*2 = 7, from a signal of -2.5: 2*(-2.5) + 1 = -4;
    # relu(7 - 4) = 3; 0.5*3 - 1 = 0.5. One cell is interpolated to four equal ones.
    open_map = gate(skip, torch.tensor([[[[-2.5]]]]))
    assert_close(open_map, torch.full((1, 1, 2, 2), 1 / (1 + math.exp(-0.5))))
    # A signal of -5 gives 2*(-5) + 1 = -9; relu(7 - 9) = 0 leaves the bias of -1.
    shut_map = gate(skip, torch.tensor([[[[-5.0]]]]))
    assert_close(shut_map, torch.full((1, 1, 2, 2), 1 / (1 + math.e)))


def test_the_same_level_gate_gives_the_value_worked_out_by_hand() -> None:
    gate = AdditiveSameLevelGate(2, skip_channels=1, signal_channels=1, norm="none")
    with torch.no_grad():
        for convolution, weight, bias in (
            (gate.from_skip[0], 2.0, 0.5),
            (gate.from_signal[0], -1.0, 0.25),
            (gate.coefficients, 4.0, -1.0),
        ):
            convolution.weight.fill_(weight)
            convolution.bias.fill_(bias)
    # Cell by cell: relu((2*1 + 0.5) + (-1*2 + 0.25)) = 0.75 and 4*0.75 - 1 = 2;
    # relu((2*0 + 0.5) + (-1*1 + 0.25)) = relu(-0.25) = 0 leaves -1.
    attention_map = gate(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[2.0, 1.0]]]]))
    expected = [1 / (1 + math.exp(-2)), 1 / (1 + math.e)]
    assert_close(attention_map, torch.tensor([[[expected]]]))


@pytest.mark.parity
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_same_level_gate_agrees_with_monai(spatial_dims: int) -> None:
    attentionunet = pytest.importorskip("monai.networks.nets.attentionunet")
    torch.manual_seed(0)
    gate = AdditiveSameLevelGate(
        spatial_dims, skip_channels=6, signal_channels=5, initial_bias=0.0, norm="batch"
    ).eval()
    peer = attentionunet.AttentionBlock(spatial_dims, f_int=3, f_g=5, f_l=6).eval()
    # Fresh normalisations do nothing; make them matter.
    for norm in peer.modules():
        if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.normal_(norm.weight, mean=1.0)
            nn.init.normal_(norm.bias)
    for ours, theirs in ((gate.from_skip, peer.W_x), (gate.from_signal, peer.W_g)):
        ours[0].load_state_dict(theirs[0].conv.state_dict())
        ours[1].load_state_dict(theirs[1].state_dict())
    # MONAI normalises the map itself too: scale * (w x + b - mean) / std + shift is again a 1x1
    # convolution.
    last, norm = peer.psi[0].conv, peer.psi[1]
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    with torch.no_grad():
        gate.coefficients.weight.copy_(last.weight * scale)
        gate.coefficients.bias.copy_((last.bias - norm.running_mean) * scale + norm.bias)

    skip, signal = skip_and_signal("same_level", spatial_dims)
    attention_map = gate(skip, signal)
    assert attention_map.std() > 0.05
    assert_close(skip * attention_map, peer(g=signal, x=skip))


@pytest.mark.parametrize("coefficients", COEFFICIENT_KINDS)
@pytest.mark.parametrize("kind", GATE_KINDS)
def test_the_gradient_that_reaches_the_skip_is_scaled_by_the_map(
    kind: GateKind, coefficients: CoefficientKind
) -> None:
    gate = placed_gate(kind, initial_bias=0.0, coefficients=coefficients)
    nn.init.normal_(gate.coefficients.weight)
    skip, signal = skip_and_signal(kind)
    skip.requires_grad_()
    upsample = nn.Upsample(scale_factor=(2, 3)) if kind == "grid" else nn.Identity()
    join = Join(upsample, gate, nn.Identity(), nn.Identity())
    with editing(gate, {KEY: Tensor.detach}):
        torch.manual_seed(3)  # what a hard gate draws
        features = join(skip, signal)
        torch.manual_seed(3)
        attention_map = gate(skip, signal)
    assert attention_map.std() > 0.05
    probe = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features * probe).sum().backward()
    # The join gives [upsampled; gated skip].
    assert_close(skip.grad, probe[:, 5:] * attention_map)


@pytest.mark.parametrize("constant", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_map_edited_to_a_constant_is_that_constant_at_every_voxel_of_the_skip(
    kind: GateKind, spatial_dims: int, constant: float
) -> None:
    gate = placed_gate(kind, spatial_dims)
    skip, signal = skip_and_signal(kind, spatial_dims)
    with editing(gate, {KEY: lambda attention_map: torch.full_like(attention_map, constant)}):
        attention_map = gate(skip, signal)
    assert_close(attention_map, torch.full((2, 1, *skip.shape[2:]), constant))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_an_interpolated_map_stays_between_the_extremes_of_the_coarse_one(
    spatial_dims: int,
) -> None:
    gate = placed_gate("grid", spatial_dims, initial_bias=0.0)
    nn.init.normal_(gate.coefficients.weight)
    with recording(gate) as maps:
        fine = gate(*skip_and_signal("grid", spatial_dims))
    coarse = maps[KEY]
    assert coarse.shape[2:] != fine.shape[2:]
    for of_coarse, of_fine in zip(coarse, fine, strict=True):
        rounding = 1e-6
        assert of_fine.min() >= of_coarse.min() - rounding
        assert of_fine.max() <= of_coarse.max() + rounding


def test_only_the_deepest_grid_gate_prepares_its_signal() -> None:
    def prepared(deepest: bool) -> nn.Module:
        return AdditiveGridGate(
            2, skip_channels=6, signal_channels=5, stride=(2, 2), deepest=deepest
        ).prepare_signal

    signal = skip_and_signal("grid")[1]
    assert torch.equal(prepared(False)(signal), signal)
    # Normalised over each channel's cells, then a leaky ReLU of slope 0.01 undone.
    through = prepared(True)(signal)
    undone = torch.where(through < 0, through / 0.01, through)
    assert_close(undone.mean(dim=(2, 3)), torch.zeros(2, 5), rtol=0, atol=1e-5)
    assert_close(undone.var(dim=(2, 3), correction=0), torch.ones(2, 5), rtol=0, atol=1e-2)


def test_the_output_transform_acts_on_the_gated_skip() -> None:
    torch.manual_seed(0)
    gate = AdditiveGridGate(
        2,
        skip_channels=6,
        signal_channels=5,
        stride=(2, 3),
        deepest=False,
        output_transform=True,
        norm="none",
    )
    skip, signal = skip_and_signal("grid")
    upsample = nn.Upsample(scale_factor=(2, 3))
    features = Join(upsample, gate, nn.Identity(), nn.Identity())(skip, signal)
    weight = gate.output_transform[0].weight.squeeze()
    expected = torch.einsum("oi,bixy->boxy", weight, skip * gate(skip, signal))
    assert_close(features, torch.cat([upsample(signal), expected], dim=1))


def coefficients_of_logits(kind: CoefficientKind, spatial_dims: int = 2) -> Coefficients:
    """What makes maps of logits that are the first channel plus the second."""
    coefficients = Coefficients(spatial_dims, 2, initial_bias=0.0, kind=kind)
    nn.init.ones_(coefficients.weight)
    return coefficients


def logits_in(spatial_dims: int) -> Tensor:
    """Uneven logits, and a second channel of zeros."""
    space = [6, 5, 4][:spatial_dims]
    logits = 2 * torch.randn(2, 1, *space, generator=torch.Generator().manual_seed(1))
    return torch.cat([logits, torch.zeros_like(logits)], dim=1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Shares of 1/8, 1/8, 2/8 and 4/8 of four voxels,
        ("softmax", [0.5, 0.5, 1.0, 2.0]),
        # heights of 0, 0, log(2) and 2 log(2), whose mean is 3/4 log(2),
        ("mean_flow", [0.0, 0.0, 4 / 3, 8 / 3]),
        # and log(1) = 0 is not above 0.
        ("hard", [0.0, 0.0, 1.0, 1.0]),
    ],
)
def test_maps_of_logits_have_the_values_worked_out_by_hand(
    kind: CoefficientKind, expected: list[float]
) -> None:
    features = torch.tensor([1.0, 1.0, 2.0, 4.0]).log().view(1, 1, 2, 2).repeat(1, 2, 1, 1)
    features[:, 1] = 0.0
    attention_map = coefficients_of_logits(kind).eval()(features)
    assert_close(attention_map, torch.tensor(expected).view(1, 1, 2, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_softmax_coefficients_are_shares_times_the_number_of_voxels(spatial_dims: int) -> None:
    features = logits_in(spatial_dims)
    attention_map = coefficients_of_logits("softmax", spatial_dims)(features)
    for of_sample, logits in zip(attention_map, features[:, 0], strict=True):
        shares = logits.exp() / logits.exp().sum()
        assert_close(of_sample[0], logits.numel() * shares)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_mean_flow_coefficients_are_heights_above_the_lowest_over_their_mean(
    spatial_dims: int,
) -> None:
    features = logits_in(spatial_dims)
    attention_map = coefficients_of_logits("mean_flow", spatial_dims)(features)
    for of_sample, logits in zip(attention_map, features[:, 0], strict=True):
        heights = logits - logits.min()
        assert_close(of_sample[0], heights / heights.mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("coefficients", SHARES)
@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_shares_have_a_mean_of_1_over_the_voxels_of_each_sample(
    kind: GateKind, spatial_dims: int, coefficients: CoefficientKind
) -> None:
    gate = placed_gate(kind, spatial_dims, coefficients=coefficients)
    nn.init.normal_(gate.coefficients.weight)
    with recording(gate) as maps:
        gate(*skip_and_signal(kind, spatial_dims))
    attention_map = maps[KEY]
    assert attention_map.min() >= 0 and attention_map.std() > 0.1
    assert_close(attention_map.flatten(1).mean(dim=1), torch.ones(2))


@pytest.mark.parametrize("coefficients", SHARES)
@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_shares_of_flat_logits_let_everything_through(
    kind: GateKind, spatial_dims: int, coefficients: CoefficientKind
) -> None:
    gate = placed_gate(kind, spatial_dims, coefficients=coefficients)
    nn.init.zeros_(gate.coefficients.weight)
    attention_map = gate(*skip_and_signal(kind, spatial_dims))
    assert_close(attention_map, torch.ones_like(attention_map))


@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_number_added_to_all_logits_changes_no_share(
    spatial_dims: int, kind: CoefficientKind
) -> None:
    coefficients = coefficients_of_logits(kind, spatial_dims)
    features = (8 * logits_in(spatial_dims)).round() / 8  # so that the sum is exact
    raised = features.clone()
    raised[:, 1] = 16.0
    assert_close(coefficients(raised), coefficients(features), rtol=1e-6, atol=1e-6)
    sigmoid = coefficients_of_logits("sigmoid", spatial_dims)
    assert (sigmoid(raised) - sigmoid(features)).abs().max() > 0.1


@pytest.mark.parametrize("kind", COEFFICIENT_KINDS)
def test_coefficients_have_a_bias_only_if_it_would_change_them(kind: CoefficientKind) -> None:
    def parameters(initial_bias: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        coefficients = Coefficients(2, 3, initial_bias=initial_bias, kind=kind)
        return dict(coefficients.named_parameters())

    has_bias = kind in ("sigmoid", "hard")
    assert set(parameters(3.0)) == ({"weight", "bias"} if has_bias else {"weight"})
    low, high = parameters(-2.0), parameters(3.0)
    assert torch.equal(low["weight"], high["weight"])
    if has_bias:
        assert low["bias"].tolist() == [-2.0] and high["bias"].tolist() == [3.0]


@pytest.mark.parametrize("kind", COEFFICIENT_KINDS)
def test_coefficients_of_bfloat16_features_are_computed_in_float32(kind: CoefficientKind) -> None:
    coefficients = coefficients_of_logits(kind)
    features = logits_in(2).bfloat16()
    torch.manual_seed(3)
    expected = coefficients(features.float())
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention_map = coefficients(features)
    assert attention_map.dtype == torch.float32
    assert attention_map.std() > 0.05
    assert torch.equal(attention_map, expected)


@pytest.mark.parametrize("coefficients", COEFFICIENT_KINDS)
@pytest.mark.parametrize("kind", GATE_KINDS)
def test_a_gate_under_autocast_gives_its_map_in_the_precision_of_the_skip(
    kind: GateKind, coefficients: CoefficientKind
) -> None:
    gate = placed_gate(kind, initial_bias=0.0, coefficients=coefficients)
    nn.init.normal_(gate.coefficients.weight)
    skip, signal = skip_and_signal(kind)
    with recording(gate) as maps, torch.autocast("cpu", dtype=torch.bfloat16):
        assert gate(skip, signal).dtype == torch.float32
        assert gate(skip.bfloat16(), signal.bfloat16()).dtype == torch.bfloat16
    rounded = torch.equal(maps[KEY], maps[KEY].bfloat16().float())
    assert rounded == (coefficients == "hard")  # bfloat16 holds 0 and 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_hard_gate_is_open_or_shut(spatial_dims: int, training: bool) -> None:
    torch.manual_seed(0)
    coefficients = coefficients_of_logits("hard", spatial_dims).train(training)
    attention_map = coefficients(logits_in(spatial_dims))
    assert set(attention_map.unique().tolist()) == {0.0, 1.0}


def test_a_hard_gate_that_evaluates_is_open_above_0_and_draws_nothing() -> None:
    gate = HardGate().eval()
    logits = torch.tensor([[[-3.0, -1e-6, 0.0, 1e-6, 0.5, 80.0]]])
    before = torch.get_rng_state()
    assert gate(logits).tolist() == [[[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_a_hard_gate_opens_with_the_probability_of_its_sigmoid_at_any_temperature(
    progress: float,
) -> None:
    torch.manual_seed(0)
    gate = HardGate()
    anneal(gate.modules(), progress)
    num_draws = 20_000
    for logit in (-2.0, -0.5, 0.0, 1.0, 3.0):
        draws = gate(torch.full((1, 1, num_draws), logit))
        probability = 1 / (1 + math.exp(-logit))
        deviation = math.sqrt(probability * (1 - probability) / num_draws)
        assert abs(draws.mean().item() - probability) < 4 * deviation


def test_each_voxel_of_a_hard_gate_draws_on_its_own() -> None:
    torch.manual_seed(0)
    gate = HardGate()
    draws = gate(torch.zeros(2, 2, 5000)).flatten(0, 1)
    # Of independent fair coins, pairs agree half the time: 4 deviations of 5000 are 0.028.
    for first in range(4):
        for second in range(first):
            agree = (draws[first] == draws[second]).float().mean().item()
            assert abs(agree - 0.5) < 0.029
    shifted = (draws[:, 1:] == draws[:, :-1]).float().mean().item()
    assert abs(shifted - 0.5) < 0.029


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_the_gradient_of_a_hard_gate_is_that_of_the_relaxed_one(progress: float) -> None:
    gate = HardGate()
    anneal(gate.modules(), progress)
    temperature = 1 - progress / 2
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 1, 6, 5, generator=generator).requires_grad_()
    probe = torch.randn(2, 1, 6, 5, generator=generator)
    torch.manual_seed(4)
    opened = gate(logits)
    (opened * probe).sum().backward()
    torch.manual_seed(4)
    uniform = torch.rand(2, 1, 6, 5)
    noise = uniform.log() - (1 - uniform).log()
    relaxed = 1 / (1 + torch.exp(-(logits.detach() + noise) / temperature))
    assert torch.equal(opened, (relaxed > 0.5).float())
    assert_close(logits.grad, probe * relaxed * (1 - relaxed) / temperature, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_a_fresh_hard_gate_stands_open_in_evaluation(kind: GateKind) -> None:
    gate = placed_gate(kind, coefficients="hard").eval()
    attention_map = gate(*skip_and_signal(kind))
    assert torch.equal(attention_map, torch.ones_like(attention_map))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_hard_gate_gives_each_voxel_the_value_of_its_cell(
    spatial_dims: int, training: bool
) -> None:
    gate = placed_gate("grid", spatial_dims, initial_bias=-1.0, coefficients="hard")
    nn.init.normal_(gate.coefficients.weight)
    with recording(gate) as maps:
        fine = gate.train(training)(*skip_and_signal("grid", spatial_dims))
    expected = maps[KEY]
    assert set(expected.unique().tolist()) == {0.0, 1.0}
    for axis, stride in enumerate([2, 3, 1][:spatial_dims]):
        expected = expected.repeat_interleave(stride, dim=axis + 2)
    assert torch.equal(fine, expected)


def hard_unet() -> UNet:
    """Three skips, each with a hard gate."""

    def make(
        *,
        level: int,
        skip_channels: int,
        coarse_channels: int,
        upsampled_channels: int,
        stride: Sequence[int],
        deepest: bool,
    ) -> nn.Module:
        if level == 0:
            return AdditiveSameLevelGate(
                2,
                skip_channels=skip_channels,
                signal_channels=upsampled_channels,
                coefficients="hard",
            )
        return AdditiveGridGate(
            2,
            skip_channels=skip_channels,
            signal_channels=coarse_channels,
            stride=stride,
            deepest=deepest,
            coefficients="hard",
            num_gates=2,
        )

    return UNet(2, 1, out_channels=2, channels=(2, 2, 4, 4), skip_gate=make)


def temperatures(network: nn.Module) -> list[float]:
    return [gate.temperature.item() for gate in network.modules() if isinstance(gate, HardGate)]


def test_annealing_lowers_the_temperature_of_every_hard_gate_from_1_to_a_half() -> None:
    network = hard_unet()
    assert temperatures(network) == [1.0, 1.0, 1.0]
    for progress, temperature in ((0.5, 0.75), (1.0, 0.5), (0.0, 1.0)):
        anneal(network.modules(), progress)
        assert temperatures(network) == [temperature] * 3


def test_annealing_changes_nothing_but_temperatures() -> None:
    network = hard_unet()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    anneal(network.modules(), 1.0)
    changed = {
        name for name, value in network.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {f"decoder.{level}.gate.coefficients.hard.temperature" for level in range(3)}


def test_the_temperature_survives_a_round_trip_through_a_state_dict() -> None:
    network, other = hard_unet(), hard_unet()
    anneal(network.modules(), 0.25)
    other.load_state_dict(network.state_dict())
    assert temperatures(other) == [0.875] * 3


def gates_of(num_gates: int, spatial_dims: int, coefficients: CoefficientKind) -> AdditiveGridGate:
    """A grid gate of a skip of 6 channels, steered by a signal of 5, with weights far from flat."""
    torch.manual_seed(0)
    gate = AdditiveGridGate(
        spatial_dims,
        skip_channels=6,
        signal_channels=5,
        stride=[2, 3, 1][:spatial_dims],
        deepest=True,
        coefficients=coefficients,
        num_gates=num_gates,
    )
    nn.init.normal_(gate.coefficients.weight)
    if gate.coefficients.bias is not None:
        nn.init.normal_(gate.coefficients.bias)
    place_taps(gate, "skip.0", 0, Placement.identity(spatial_dims))
    return gate.eval()


@pytest.mark.parametrize("coefficients", COEFFICIENT_KINDS)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_two_gates_are_two_single_gates_that_share_no_weights(
    spatial_dims: int, coefficients: CoefficientKind
) -> None:
    both = gates_of(2, spatial_dims, coefficients)
    skip, signal = skip_and_signal("grid", spatial_dims)
    attention_maps = both(skip, signal)
    assert attention_maps.shape == (2, 2, *skip.shape[2:])
    assert (attention_maps[:, 0] - attention_maps[:, 1]).abs().max() > 0.1
    for number in range(2):
        single = gates_of(1, spatial_dims, coefficients)
        state = both.prepare_signal.state_dict()
        single.prepare_signal.load_state_dict(state)
        half = slice(6 * number, 6 * (number + 1))
        with torch.no_grad():
            single.from_skip.weight.copy_(both.from_skip.weight[half])
            single.from_signal.weight.copy_(both.from_signal.weight[half])
            single.from_signal.bias.copy_(both.from_signal.bias[half])
            single.coefficients.weight.copy_(both.coefficients.weight[number : number + 1])
            if single.coefficients.bias is not None:
                single.coefficients.bias.copy_(both.coefficients.bias[number : number + 1])
        assert_close(attention_maps[:, number : number + 1], single(skip, signal))


@pytest.mark.parametrize("num_gates", [2, 3])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_output_of_several_gates_has_the_channels_of_the_skip(
    spatial_dims: int, num_gates: int
) -> None:
    gate = gates_of(num_gates, spatial_dims, "sigmoid")
    skip, signal = skip_and_signal("grid", spatial_dims)
    attention_maps = gate(skip, signal)
    products = torch.cat(
        [skip * attention_maps[:, number : number + 1] for number in range(num_gates)], dim=1
    )
    convolution, norm, _ = gate.output_transform.layers
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    nn.init.normal_(convolution.bias)
    weight = convolution.weight.flatten(1)
    assert weight.shape == (6, 6 * num_gates)
    mixed = torch.einsum("oi,bi...->bo...", weight, products)  # the norm cancels the bias
    expected = F.leaky_relu(F.instance_norm(mixed, weight=norm.weight, bias=norm.bias), 0.01)
    assert_close(gate.let_through(skip, signal), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_through_several_gates_is_scaled_by_each_map() -> None:
    gate = gates_of(2, 2, "sigmoid")
    gate.output_transform = nn.Identity()
    skip, signal = skip_and_signal("grid")
    skip.requires_grad_()
    with editing(gate, {KEY: Tensor.detach}):
        products = gate.let_through(skip, signal)
        attention_maps = gate(skip, signal)
    probe = torch.randn(products.shape, generator=torch.Generator().manual_seed(2))
    (products * probe).sum().backward()
    first, second = attention_maps.split(1, dim=1)
    assert_close(skip.grad, probe[:, :6] * first + probe[:, 6:] * second)
