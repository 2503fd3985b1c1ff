"""Token blocks: against formulas written out, and by what dropping and turning must keep."""

import math
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.geometry.grid import Placement
from segkit.nn.map_tap import maps_of, place_taps
from segkit.nn.positions import rotate
from segkit.nn.transformer import (
    DropPath,
    GatedPerceptron,
    LayerScale,
    TransformerBlock,
    transformer_stage,
)

GRIDS = [(3, 4), (2, 3, 2)]


def features_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm(layer: nn.Module, tokens: Tensor) -> Tensor:
    """Layer normalisation, written out."""
    norm = cast(nn.LayerNorm, layer)
    mean = tokens.mean(dim=-1, keepdim=True)
    variance = (tokens - mean).square().mean(dim=-1, keepdim=True)
    return (tokens - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def test_a_token_is_turned_by_the_angles_worked_out_by_hand() -> None:
    tokens = torch.arange(1.0, 7.0).expand(1, 1, 24, 6)
    turned = rotate(tokens, (2, 3, 4), base=10_000.0)
    # The last of 2 x 3 x 4 cells lies at (1, 2, 3). Six channels are one pair an axis, of frequency
    # 1: channels 0 and 3 are turned by 1 rad, 1 and 4 by 2 rad, 2 and 5 by 3 rad.
    expected = [
        1 * math.cos(1) - 4 * math.sin(1),
        2 * math.cos(2) - 5 * math.sin(2),
        3 * math.cos(3) - 6 * math.sin(3),
        1 * math.sin(1) + 4 * math.cos(1),
        2 * math.sin(2) + 5 * math.cos(2),
        3 * math.sin(3) + 6 * math.cos(3),
    ]
    assert_close(turned[0, 0, -1], torch.tensor(expected))
    assert_close(turned[0, 0, 0], tokens[0, 0, 0])


def test_the_base_sets_the_second_frequency() -> None:
    tokens = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 5, 4)
    for base in (100.0, 10_000.0):
        turned = rotate(tokens, (5,), base=base)[0, 0]
        assert_close(turned[3, 2], torch.tensor(math.sin(3.0)))
        assert_close(turned[3, 3], torch.tensor(math.sin(3 / math.sqrt(base))))


def test_a_dropped_path_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(8000, 2, 3))
    samples = dropped.flatten(1)
    assert (samples == samples[:, :1]).all()
    assert set(samples[:, 0].unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    # The deviation of the mean of 8000 such values is sqrt(1/3 / 8000) = 0.0065.
    assert abs(samples[:, 0].mean().item() - 1) < 4 * 0.0065


def test_nothing_is_dropped_in_prediction_or_at_a_rate_of_0() -> None:
    features = features_of(4, 3, 2, 2)
    assert torch.equal(DropPath(0.9).eval()(features), features)
    assert torch.equal(DropPath(0.0).train()(features), features)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_later_blocks_are_dropped_more_often(depth: int) -> None:
    stage = transformer_stage(2, 8, depth=depth, heads=1, head_channels=4, drop_path=0.2)
    rates = [cast(TransformerBlock, block).drop_path.rate for block in stage]
    assert_close(rates, [0.2 * number / max(depth - 1, 1) for number in range(depth)])


def test_a_layer_scale_is_a_number_a_channel() -> None:
    scale = LayerScale(3, initial=0.1)
    features = features_of(2, 3, 4, 5)
    assert_close(scale(features), 0.1 * features)
    with torch.no_grad():
        scale.weight.copy_(torch.tensor([0.0, 1.0, -2.0]))
    assert_close(scale(features)[:, 2], -2 * features[:, 2])
    assert not scale(features)[:, 0].any()


def test_the_gated_perceptron_is_its_formula() -> None:
    torch.manual_seed(0)
    layer = GatedPerceptron(4, hidden=7)
    tokens = features_of(2, 3, 4)
    gate = tokens @ layer.gate.weight.T + layer.gate.bias
    hidden = gate / (1 + (-gate).exp()) * (tokens @ layer.value.weight.T + layer.value.bias)
    expected = norm(layer.norm, hidden) @ layer.out.weight.T + layer.out.bias
    assert_close(layer(tokens), expected)


@pytest.mark.parametrize("space", GRIDS)
def test_a_block_is_its_formula(space: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    block = TransformerBlock(len(space), 8, heads=2, head_channels=12, layer_scale=0.5).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    features = features_of(2, 8, *space)
    tokens = features.flatten(2).transpose(1, 2)

    attention = block.attention.attention
    seen = norm(block.attention.norm, tokens)
    query, key, value = (
        layer(seen).view(2, -1, 2, 12).transpose(1, 2)
        for layer in (attention.query, attention.key, attention.value)
    )
    query, key = (rotate(one, space, base=10_000.0) for one in (query, key))
    taken = ((query @ key.transpose(2, 3) / math.sqrt(12)).softmax(dim=3) @ value).transpose(1, 2)
    taken = norm(attention.inner_norm, taken.flatten(2)) @ attention.out.weight.T
    tokens = tokens + block.attention_scale.weight * taken
    perceptron = block.perceptron
    seen = norm(block.norm, tokens)
    hidden = F.silu(perceptron.gate(seen)) * perceptron.value(seen)
    added = perceptron.out(norm(perceptron.norm, hidden))
    tokens = tokens + block.perceptron_scale.weight * added
    assert_close(block(features), tokens.transpose(1, 2).view(features.shape), rtol=1e-4, atol=1e-4)


def test_weights_start_as_those_of_primus() -> None:
    torch.manual_seed(0)
    stage = transformer_stage(3, 96, depth=3, heads=4, head_channels=24)
    for number, block in enumerate(stage):
        block = cast(TransformerBlock, block)
        shrunk = 0.02 / math.sqrt(2 * (number + 1))
        for layer, deviation in (
            (block.attention.attention.query, 0.02),
            (block.perceptron.gate, 0.02),
            (block.attention.attention.out, shrunk),
            (block.perceptron.out, shrunk),
        ):
            assert_close(layer.weight.std().item(), deviation, rtol=0.03, atol=0)
        assert (block.attention_scale.weight == 0.1).all()
        # int(96 * 8 / 3)
        assert block.perceptron.gate.out_features == 256


def test_each_block_of_a_stage_has_its_own_map() -> None:
    stage = transformer_stage(2, 8, depth=3, heads=1, head_channels=4)
    place_taps(stage, "bottleneck", 2, Placement.identity(2))
    assert list(maps_of(stage)) == [f"bottleneck.{number}/received" for number in range(3)]
