import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.geometry.grid import Placement
from segkit.nn.cross_attention import CrossAttention, UTransformerGate
from segkit.nn.map_tap import editing, place_taps, recording, taps
from segkit.nn.positions import sincos

RECEIVED = "skip.1/received"
GATE = "skip.1/gate"
BRANCH = "skip.1/branch"
STRIDE = (2, 3, 1)
COARSE = (4, 3, 5)
Make = Callable[[int], CrossAttention | UTransformerGate]
SIGMOID_OF_3 = 1 / (1 + math.exp(-3))


def skip_and_signal(spatial_dims: int) -> tuple[Tensor, Tensor]:
    """A skip of 6 channels and a coarser signal of 8."""
    generator = torch.Generator().manual_seed(1)
    coarse = COARSE[:spatial_dims]
    space = [size * step for size, step in zip(coarse, STRIDE, strict=False)]
    return (
        torch.randn(2, 6, *space, generator=generator),
        torch.randn(2, 8, *coarse, generator=generator),
    )


def fresh_cross_attention(spatial_dims: int) -> CrossAttention:
    """Attention of 2 heads of 4 channels, as it starts."""
    torch.manual_seed(0)
    block = CrossAttention(
        spatial_dims,
        skip_channels=6,
        signal_channels=8,
        stride=STRIDE[:spatial_dims],
        heads=2,
        head_channels=4,
    )
    place_taps(block, "skip.1", 1, Placement.identity(spatial_dims))
    return block


def cross_attention(spatial_dims: int) -> CrossAttention:
    """Attention that does much, and by weights that are far from uniform."""
    block = fresh_cross_attention(spatial_dims)
    make_attention_matter(block)
    return block


def u_transformer(
    spatial_dims: int, *, initial_bias: float = 3.0, seed: int = 0
) -> UTransformerGate:
    """A gate of 2 heads of 4 channels, as it starts."""
    torch.manual_seed(seed)
    gate = UTransformerGate(
        spatial_dims,
        skip_channels=6,
        signal_channels=8,
        stride=STRIDE[:spatial_dims],
        heads=2,
        head_channels=4,
        initial_bias=initial_bias,
    )
    place_taps(gate, "skip.1", 1, Placement.identity(spatial_dims))
    return gate


def make_attention_matter(block: CrossAttention | UTransformerGate) -> None:
    for layer in (block.attention.query, block.attention.key, block.attention.out):
        nn.init.normal_(layer.weight, std=0.5)
    for norm in (block.norm_skip, block.norm_signal):
        nn.init.normal_(norm.weight, mean=1.0, std=0.3)
        nn.init.normal_(norm.bias)


def tokens_of(features: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Cells as tokens, each normalised over its channels."""
    cells = features.flatten(2).transpose(1, 2)
    centred = cells - cells.mean(dim=2, keepdim=True)
    scaled = centred / (centred.square().mean(dim=2, keepdim=True) + norm.eps).sqrt()
    return scaled * norm.weight + norm.bias


def brought_down(skip: Tensor, block: CrossAttention | UTransformerGate) -> Tensor:
    """The skip on the coarse grid: each of its blocks of a stride's size, times the kernel."""
    spatial_dims = skip.ndim - 2
    parts = skip
    for axis, step in enumerate(STRIDE[:spatial_dims]):
        parts = parts.unfold(axis + 2, step, step)
    kernel = block.from_skip.weight
    bias = block.from_skip.bias.view(-1, *[1] * spatial_dims)
    letters, steps = "xyz"[:spatial_dims], "uvw"[:spatial_dims]
    return torch.einsum(f"bi{letters}{steps},oi{steps}->bo{letters}", parts, kernel) + bias


def weights_of(block: CrossAttention | UTransformerGate, query: Tensor, key: Tensor) -> Tensor:
    """The softmax over keys of each head's products."""
    asked = block.attention.query(query).view(2, -1, 2, 4)
    offered = block.attention.key(key).view(2, -1, 2, 4)
    logits = torch.einsum("bqhc,bkhc->bhqk", asked, offered) / 2
    # Less their largest, or exp() would overflow.
    raised = (logits - logits.amax(dim=3, keepdim=True)).exp()
    return raised / raised.sum(dim=3, keepdim=True)


def taken_by(block: CrossAttention | UTransformerGate, weights: Tensor, value: Tensor) -> Tensor:
    """What the queries take of the values, through W_o."""
    values = block.attention.value(value).view(2, -1, 2, 4)
    taken = torch.einsum("bhqk,bkhc->bqhc", weights, values).flatten(2)
    return (taken @ block.attention.out.weight.T).transpose(1, 2)


def upsampled(coarse: Tensor, skip: Tensor) -> Tensor:
    mode = {2: "bilinear", 3: "trilinear"}[skip.ndim - 2]
    return F.interpolate(coarse, size=skip.shape[2:], mode=mode, align_corners=False)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_cross_attention_starts_by_letting_the_skip_through_bit_for_bit(spatial_dims: int) -> None:
    skip, signal = skip_and_signal(spatial_dims)
    assert torch.equal(fresh_cross_attention(spatial_dims).let_through(skip, signal), skip)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_cross_attention_adds_attention_from_the_signal_to_the_skip(spatial_dims: int) -> None:
    block = cross_attention(spatial_dims)
    skip, signal = skip_and_signal(spatial_dims)
    cells = signal.shape[2:]
    with recording(block) as maps:
        output = block.let_through(skip, signal)
    asked = tokens_of(signal, block.norm_signal) + sincos(cells, 8)
    offered = tokens_of(brought_down(skip, block), block.norm_skip)
    weights = weights_of(block, asked, offered + sincos(cells, 6))
    added = upsampled(taken_by(block, weights, offered).view(2, 6, *cells), skip)
    assert added.std() > 0.3
    assert_close(output, skip + added, rtol=1e-5, atol=1e-5)
    assert weights.std() > 0.02
    assert_close(maps[RECEIVED], weights.sum(dim=2).view(2, 2, *cells))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_cross_attention_edited_to_uniform_adds_the_same_everywhere(spatial_dims: int) -> None:
    block = cross_attention(spatial_dims)
    skip, signal = skip_and_signal(spatial_dims)
    with editing(block, {RECEIVED: lambda rows: torch.full_like(rows, 1 / rows.shape[-1])}):
        added = block(skip, signal)
    offered = tokens_of(brought_down(skip, block), block.norm_skip)
    mean = block.attention.value(offered).mean(dim=1) @ block.attention.out.weight.T
    assert_close(added, mean.view(2, 6, *[1] * spatial_dims).expand_as(skip))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_cross_attention_without_heads_lets_the_skip_through_bit_for_bit(
    spatial_dims: int,
) -> None:
    block = cross_attention(spatial_dims)
    skip, signal = skip_and_signal(spatial_dims)
    assert not torch.allclose(block.let_through(skip, signal), skip, atol=0.1)
    with editing(block, {BRANCH: torch.zeros_like}):
        assert torch.equal(block.let_through(skip, signal), skip)


@pytest.mark.parametrize("make", [cross_attention, u_transformer])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_recording_changes_no_bit_and_the_identity_edit_nothing(
    make: Make, spatial_dims: int
) -> None:
    block = make(spatial_dims)
    skip, signal = skip_and_signal(spatial_dims)
    output = block.let_through(skip, signal)
    with recording(block) as maps:
        assert torch.equal(block.let_through(skip, signal), output)
    with recording(block) as edited, editing(block, {RECEIVED: lambda rows: rows}):
        # Fused attention and its parts round differently, by up to 3e-5 on some processors.
        assert_close(block.let_through(skip, signal), output, rtol=1e-4, atol=1e-4)
    assert_close(edited[RECEIVED], maps[RECEIVED])


@pytest.mark.parametrize("make", [cross_attention, u_transformer])
def test_samples_of_a_batch_do_not_see_one_another(
    make: Make,
) -> None:
    block = make(2)
    skip, signal = skip_and_signal(2)
    output = block(skip, signal)
    for sample in range(2):
        part = slice(sample, sample + 1)
        assert_close(block(skip[part], signal[part]), output[part])


@pytest.mark.parametrize("make", [cross_attention, u_transformer])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_maps_lie_where_blocks_of_the_stride_have_their_centres(
    make: Make, spatial_dims: int
) -> None:
    block = make(spatial_dims)
    # The skip's cell j has its centre at voxel 4 j + 1.5.
    skip_lies = Placement((4.0,) * spatial_dims, (1.5,) * spatial_dims)
    place_taps(block, "skip.1", 1, skip_lies)
    with recording(block) as maps:
        block(*skip_and_signal(spatial_dims))
    # Blocks of 2, 3 and 1 cells have their centres at cells 1/2, 1 and 0 of the skip, so at voxels
    # 4/2 + 1.5, 4 + 1.5 and 1.5, and lie 8, 12 and 4 voxels apart.
    expected = Placement((8.0, 12.0, 4.0)[:spatial_dims], (3.5, 5.5, 1.5)[:spatial_dims])
    assert RECEIVED in maps
    for key, recorded in maps.items():
        info = taps(block)[key].info
        assert info is not None and info.placement == expected
        assert recorded.shape[2:] == COARSE[:spatial_dims]


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_u_transformer_gate_is_the_sigmoid_of_attention_to_the_skip(
    spatial_dims: int,
) -> None:
    gate = u_transformer(spatial_dims)
    make_attention_matter(gate)
    for parameter in (gate.norm.weight, gate.norm.bias):
        nn.init.normal_(parameter)
    skip, signal = skip_and_signal(spatial_dims)
    cells = signal.shape[2:]
    with recording(gate) as maps:
        attention_map = gate(skip, signal)

    asked = tokens_of(signal, gate.norm_signal) + sincos(cells, 8)
    weights = weights_of(gate, asked, asked)
    taken = taken_by(gate, weights, tokens_of(brought_down(skip, gate), gate.norm_skip))
    # Instance normalisation: over the cells of each channel.
    centred = taken - taken.mean(dim=2, keepdim=True)
    scaled = centred / (centred.square().mean(dim=2, keepdim=True) + gate.norm.eps).sqrt()
    shift = gate.norm.bias
    coarse = torch.sigmoid(scaled * gate.norm.weight[:, None] + shift[:, None]).view(2, 6, *cells)
    assert coarse.std() > 0.1
    assert_close(attention_map, upsampled(coarse, skip), rtol=1e-4, atol=1e-5)
    assert_close(gate.let_through(skip, signal), skip * attention_map)
    # Recorded as one map, while each channel has its own.
    assert_close(maps[GATE], coarse.mean(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert_close(maps[RECEIVED], weights.sum(dim=2).view(2, 2, *cells))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_u_transformer_gate_lies_in_the_open_unit_interval(spatial_dims: int) -> None:
    gate = u_transformer(spatial_dims, initial_bias=0.0)
    attention_map = gate(*skip_and_signal(spatial_dims))
    assert attention_map.min() > 0 and attention_map.max() < 1
    assert attention_map.max() - attention_map.min() > 0.3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_u_transformer_gate_starts_open(spatial_dims: int, seed: int) -> None:
    gate = u_transformer(spatial_dims, seed=seed)
    mean = gate(*skip_and_signal(spatial_dims)).mean().item()
    # Logits of mean 3 and variance 1; the sigmoid bends downwards there, so a little below.
    assert SIGMOID_OF_3 - 0.04 < mean < SIGMOID_OF_3


@pytest.mark.parametrize("initial_bias", [-2.0, 0.0, 3.0])
def test_a_u_transformer_gate_without_heads_is_the_sigmoid_of_its_bias(
    initial_bias: float,
) -> None:
    gate = u_transformer(2, initial_bias=initial_bias)
    skip, signal = skip_and_signal(2)
    with editing(gate, {BRANCH: torch.zeros_like}):
        attention_map = gate(skip, signal)
    assert_close(attention_map, torch.full_like(skip, 1 / (1 + math.exp(-initial_bias))))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_u_transformer_gate_edited_to_ones_lets_the_skip_through_bit_for_bit(
    spatial_dims: int,
) -> None:
    gate = u_transformer(spatial_dims)
    skip, signal = skip_and_signal(spatial_dims)
    with editing(gate, {GATE: torch.ones_like}):
        assert torch.equal(gate.let_through(skip, signal), skip)
    with editing(gate, {GATE: torch.zeros_like}):
        assert torch.equal(gate.let_through(skip, signal), torch.zeros_like(skip))


def test_an_edit_of_a_u_transformer_gate_sees_a_map_of_every_channel() -> None:
    gate = u_transformer(2)
    skip, signal = skip_and_signal(2)

    def first_channel_shut(maps: Tensor) -> Tensor:
        return maps.index_fill(1, torch.tensor(0), 0.0)

    before = gate.let_through(skip, signal)
    with recording(gate) as maps, editing(gate, {GATE: first_channel_shut}):
        after = gate.let_through(skip, signal)
    assert (after[:, 0] == 0).all()
    assert torch.equal(after[:, 1:], before[:, 1:])
    # Of six channels, open but for one: what is recorded has been edited.
    assert maps[GATE].shape[1] == 1
    assert maps[GATE].max() < 5 / 6


@pytest.mark.parametrize("make", [cross_attention, u_transformer])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_bfloat16_features_stay_so_but_their_maps_are_float32(
    make: Make, spatial_dims: int
) -> None:
    block = make(spatial_dims)
    nn.init.normal_(block.attention.out.weight, std=0.2)
    skip, signal = skip_and_signal(spatial_dims)
    expected = block.let_through(skip, signal)
    with recording(block) as maps, torch.autocast("cpu", dtype=torch.bfloat16):
        output = block.let_through(skip.bfloat16(), signal.bfloat16())
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    for attention_map in maps.values():
        assert not torch.equal(attention_map, attention_map.bfloat16().float()), "was rounded"
