import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.geometry import Placement
from segkit.nn.gates import AdditiveGridGate, AdditiveSameLevelGate
from segkit.nn.taps import editing, place_taps, recording
from segkit.nn.unet import Join

GateKind = Literal["grid", "same_level"]
GATE_KINDS: tuple[GateKind, ...] = ("grid", "same_level")
KEY = "skip.0/gate"


def placed_gate(
    kind: GateKind, spatial_dims: int = 2, *, initial_bias: float = 3.0, seed: int = 0
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
        )
    else:
        gate = AdditiveSameLevelGate(
            spatial_dims, skip_channels=6, signal_channels=5, initial_bias=initial_bias
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


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_a_gate_stays_finite_where_its_features_are_huge(kind: GateKind) -> None:
    gate = placed_gate(kind)
    skip, signal = skip_and_signal(kind)
    attention_map = gate(1e6 * skip, -1e6 * signal)
    assert attention_map.isfinite().all()
    assert attention_map.min() >= 0 and attention_map.max() <= 1


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


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_the_gradient_that_reaches_the_skip_is_scaled_by_the_map(kind: GateKind) -> None:
    gate = placed_gate(kind, initial_bias=0.0)
    nn.init.normal_(gate.coefficients.weight)
    skip, signal = skip_and_signal(kind)
    skip.requires_grad_()
    upsample = nn.Upsample(scale_factor=(2, 3)) if kind == "grid" else nn.Identity()
    join = Join(upsample, gate, nn.Identity(), nn.Identity())
    with editing(gate, {KEY: Tensor.detach}):
        features = join(skip, signal)
        attention_map = gate(skip, signal)
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


def test_the_deepest_grid_gate_alone_prepares_its_signal() -> None:
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
