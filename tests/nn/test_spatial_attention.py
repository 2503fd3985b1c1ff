from collections.abc import Callable
from typing import Literal, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.geometry.grid import Placement
from segkit.nn.blocks import Modulated
from segkit.nn.map_tap import editing, place_taps, recording
from segkit.nn.spatial_attention import (
    BottleneckAttention,
    ConcurrentExcitation,
    PooledSpatialAttention,
    SpatialExcitation,
    convolutional_block_attention,
)

Block = TypeVar("Block", bound=nn.Module)
Aggregation = Literal["max", "add", "concat"]
AGGREGATIONS: tuple[Aggregation, ...] = ("max", "add", "concat")
BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "pooled and channel": lambda dims: convolutional_block_attention(dims, 8, reduction=2),
    "pooled": lambda dims: Modulated(PooledSpatialAttention(dims)),
    "excitation": lambda dims: Modulated(SpatialExcitation(dims, 8)),
    "bottleneck": lambda dims: Modulated(BottleneckAttention(dims, 8, reduction=2)),
    "concurrent": lambda dims: ConcurrentExcitation(dims, 8),
}
"""Each attention over 8 channels, of so many spatial dimensions."""


def features_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def features_in(spatial_dims: int) -> Tensor:
    """Two samples of 8 channels."""
    return features_of(2, 8, *[6, 5, 4][:spatial_dims])


def placed(block: Block, spatial_dims: int) -> Block:
    """The block with maps far from flat, at the finest encoder level, in evaluation mode."""
    torch.manual_seed(0)
    for module in block.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            nn.init.normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    place_taps(block, "encoder.0", 0, Placement.identity(spatial_dims))
    return block.eval()


def placed_block_attention(spatial_dims: int) -> Modulated:
    """CBAM over 8 channels."""
    block = convolutional_block_attention(spatial_dims, 8, reduction=2, kernel_size=3)
    return placed(block, spatial_dims)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_spatial_convolution_of_zeros_halves_the_features(spatial_dims: int) -> None:
    block = Modulated(PooledSpatialAttention(spatial_dims))
    nn.init.zeros_(block.attention_maps[0].convolution.weight)
    features = features_in(spatial_dims)
    assert torch.equal(block(features), features / 2)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_spatial_map_does_not_see_the_order_of_the_channels(spatial_dims: int) -> None:
    torch.manual_seed(0)
    block = PooledSpatialAttention(spatial_dims, kernel_size=3).eval()
    nn.init.normal_(block.convolution.weight)
    features = features_in(spatial_dims)
    spatial_map = block(features)
    assert spatial_map.shape == (2, 1, *features.shape[2:])
    assert spatial_map.std() > 0.05
    assert spatial_map.min() > 0 and spatial_map.max() < 1
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    assert_close(block(features[:, order]), spatial_map)
    assert not torch.allclose(block(features.flip(2)), spatial_map, atol=1e-2)


def test_the_spatial_map_gives_the_values_worked_out_by_hand() -> None:
    block = PooledSpatialAttention(2, kernel_size=1).eval()
    block.norm.eps = 0.0
    with torch.no_grad():
        block.convolution.weight.copy_(torch.tensor([2.0, -1.0]).reshape(1, 2, 1, 1))
    # Two voxels with channels (1, 3) and (0, -4): max 3 and 0, mean 2 and -2. The kernel reads
    # [max; mean], so the logits are 2*3 - 2 = 4 and 2*0 + 2 = 2.
    features = torch.tensor([[[[1.0, 0.0]], [[3.0, -4.0]]]])
    assert_close(block(features), torch.sigmoid(torch.tensor([[[[4.0, 2.0]]]])))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_block_attention_weighs_channels_first_and_then_voxels(spatial_dims: int) -> None:
    block = placed_block_attention(spatial_dims)
    channel, spatial = block.attention_maps
    features = features_in(spatial_dims)
    with recording(block) as maps:
        output = block(features)
    by_channel = features * channel(features)
    assert_close(maps["encoder.0/channel"], channel(features))
    assert_close(maps["encoder.0/spatial"], spatial(by_channel))
    assert not torch.allclose(maps["encoder.0/spatial"], spatial(features), atol=1e-2)
    assert_close(output, by_channel * spatial(by_channel))
    with editing(block, {"encoder.0/spatial": torch.ones_like}):
        assert_close(block(features), by_channel)
    with editing(block, {"encoder.0/channel": torch.ones_like}):
        assert_close(block(features), features * spatial(features))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_maps_of_bfloat16_features_are_float32_but_the_product_is_not(
    spatial_dims: int, kind: str
) -> None:
    block = placed(BLOCKS[kind](spatial_dims), spatial_dims)
    features = features_in(spatial_dims)
    expected = block(features)
    with recording(block) as maps, torch.autocast("cpu", dtype=torch.bfloat16):
        output = block(features.bfloat16())
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    for attention_map in maps.values():
        assert not torch.equal(attention_map, attention_map.bfloat16().float()), "was rounded"


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_spatial_excitation_of_zeros_halves_the_features(spatial_dims: int) -> None:
    excitation = SpatialExcitation(spatial_dims, 8)
    nn.init.zeros_(excitation.convolution.weight)
    nn.init.zeros_(excitation.convolution.bias)
    features = features_in(spatial_dims)
    assert torch.equal(Modulated(excitation)(features), features / 2)


def test_the_spatial_excitation_gives_the_values_worked_out_by_hand() -> None:
    excitation = SpatialExcitation(2, 2)
    with torch.no_grad():
        excitation.convolution.weight.copy_(torch.tensor([2.0, -1.0]).reshape(1, 2, 1, 1))
        excitation.convolution.bias.fill_(0.5)
    # Two voxels with channels (1, 3) and (0, -4): 2*1 - 3 + 0.5 = -0.5 and 2*0 + 4 + 0.5 = 4.5.
    features = torch.tensor([[[[1.0, 0.0]], [[3.0, -4.0]]]])
    expected = torch.sigmoid(torch.tensor([[[[-0.5, 4.5]]]]))
    assert_close(excitation(features), expected)
    assert_close(Modulated(excitation)(features), features * expected)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_spatial_excitation_sees_each_voxel_on_its_own(spatial_dims: int) -> None:
    excitation = placed(SpatialExcitation(spatial_dims, 8), spatial_dims)
    features = features_in(spatial_dims)
    expected = excitation(features)
    assert expected.std() > 0.05
    order = torch.randperm(features[0, 0].numel(), generator=torch.Generator().manual_seed(2))
    shuffled = features.flatten(2)[:, :, order].reshape(features.shape)
    assert_close(excitation(shuffled).flatten(2), expected.flatten(2)[:, :, order])


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_bottleneck_map_is_the_sigmoid_of_a_sum_above_1(spatial_dims: int) -> None:
    attention = placed(BottleneckAttention(spatial_dims, 8, reduction=2), spatial_dims)
    features = features_in(spatial_dims)
    by_channel = attention.excitation(features.flatten(2).mean(dim=2))
    by_voxel = attention.spatial(features)
    logits = by_channel.view(2, 8, *[1] * spatial_dims) + by_voxel
    attention_map = attention(features)
    assert by_channel.std() > 0.1 and by_voxel.std() > 0.1
    assert attention_map.min() >= 1 and attention_map.max() <= 2
    assert attention_map.max() - attention_map.min() > 0.5
    assert_close(attention_map, 1 + 1 / (1 + torch.exp(-logits)))


@pytest.mark.parametrize("dilation", [1, 4])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_spatial_half_of_the_bottleneck_map_is_four_convolutions(
    spatial_dims: int, dilation: int
) -> None:
    attention = placed(
        BottleneckAttention(spatial_dims, 8, reduction=2, dilation=dilation, norm="none"),
        spatial_dims,
    )
    kernels = [module for module in attention.spatial if isinstance(module, nn.Conv2d | nn.Conv3d)]
    assert [kernel.kernel_size[0] for kernel in kernels] == [1, 3, 3, 1]
    assert [kernel.weight.shape[:2] for kernel in kernels] == [(4, 8), (4, 4), (4, 4), (1, 4)]
    convolve = {2: F.conv2d, 3: F.conv3d}[spatial_dims]
    features = features_in(spatial_dims)
    expected = features
    for kernel, spread in zip(kernels, (0, dilation, dilation, 0), strict=True):
        expected = convolve(
            expected, kernel.weight, kernel.bias, padding=spread, dilation=max(spread, 1)
        )
        if kernel is not kernels[-1]:
            expected = torch.where(expected < 0, 0.01 * expected, expected)
    # A fresh batch normalisation that evaluates divides by the root of 1 and its small number.
    expected = expected / (1 + 1e-5) ** 0.5
    assert_close(attention.spatial(features), expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_last_layers_of_zeros_leave_a_bottleneck_map_of_one_and_a_half(
    spatial_dims: int, training: bool
) -> None:
    attention = placed(BottleneckAttention(spatial_dims, 8, reduction=2), spatial_dims)
    for parameter in (
        *attention.excitation.expand.parameters(),
        *attention.spatial[-2].parameters(),
    ):
        nn.init.zeros_(parameter)
    features = features_in(spatial_dims)
    assert torch.equal(Modulated(attention.train(training))(features), 1.5 * features)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_bottleneck_map_is_recorded_as_its_mean_over_channels(spatial_dims: int) -> None:
    attention = placed(BottleneckAttention(spatial_dims, 8, reduction=2), spatial_dims)
    features = features_in(spatial_dims)
    with recording(attention) as maps:
        attention_map = attention(features)
    assert set(maps) == {"encoder.0/spatial"}
    assert (attention_map - attention_map.flip(1)).abs().max() > 0.1
    assert_close(maps["encoder.0/spatial"], attention_map.mean(dim=1)[:, None])


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_bottleneck_map_of_ones_returns_the_features(spatial_dims: int) -> None:
    block = placed(Modulated(BottleneckAttention(spatial_dims, 8, reduction=2)), spatial_dims)
    features = features_in(spatial_dims)
    assert not torch.allclose(block(features), features, atol=1e-1)
    with editing(block, {"encoder.0/spatial": torch.ones_like}):
        assert torch.equal(block(features), features)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_concurrent_excitation_joins_two_products(
    spatial_dims: int, aggregation: Aggregation
) -> None:
    block = placed(ConcurrentExcitation(spatial_dims, 8, aggregation=aggregation), spatial_dims)
    features = features_in(spatial_dims)
    squeeze, expand = block.channel.excitation.squeeze, block.channel.excitation.expand
    assert squeeze.weight.shape == (4, 8)
    means = features.flatten(2).mean(dim=2)
    hidden = (means @ squeeze.weight.T + squeeze.bias).clamp(min=0)
    channel_map = torch.sigmoid(hidden @ expand.weight.T + expand.bias)
    by_channel = torch.einsum("bc...,bc->bc...", features, channel_map)
    convolution = block.spatial.convolution
    logits = torch.einsum("c,bc...->b...", convolution.weight.flatten(), features)
    spatial_map = torch.sigmoid(logits + convolution.bias)
    by_voxel = torch.einsum("bc...,b...->bc...", features, spatial_map)
    if aggregation == "max":
        expected = torch.where(by_channel > by_voxel, by_channel, by_voxel)
    elif aggregation == "add":
        expected = by_channel + by_voxel
    else:
        weight = block.merge.weight.flatten(1)
        bias = block.merge.bias.view(-1, *[1] * spatial_dims)
        expected = (
            torch.einsum("oc,bc...->bo...", weight[:, :8], by_channel)
            + torch.einsum("oc,bc...->bo...", weight[:, 8:], by_voxel)
            + bias
        )
    assert_close(block(features), expected)


@pytest.mark.parametrize(("aggregation", "share"), [("max", 0.5), ("add", 1.0)])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_concurrent_excitation_of_zeros_scales_the_features(
    spatial_dims: int, aggregation: Aggregation, share: float
) -> None:
    block = ConcurrentExcitation(spatial_dims, 8, aggregation=aggregation)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    features = features_in(spatial_dims)
    assert torch.equal(block(features), share * features)


def test_of_two_negative_products_the_one_nearer_to_0_is_the_larger() -> None:
    block = placed(ConcurrentExcitation(2, 2), 2)
    features = torch.tensor([[[[4.0, -4.0]], [[-8.0, 8.0]]]])
    channel_map = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)
    halves = {
        "encoder.0/channel": lambda _: channel_map,
        "encoder.0/spatial": lambda spatial_map: torch.full_like(spatial_map, 0.5),
    }
    # By channel (1, -1) and (-6, 6); by voxel (2, -2) and (-4, 4).
    with editing(block, halves):
        output = block(features)
    assert torch.equal(output, torch.tensor([[[[2.0, -1.0]], [[-4.0, 6.0]]]]))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_both_maps_of_concurrent_excitation_are_recorded_and_edited(
    aggregation: Aggregation,
) -> None:
    block = placed(ConcurrentExcitation(2, 8, aggregation=aggregation), 2)
    features = features_in(2)
    with recording(block) as maps:
        block(features)
    assert_close(maps["encoder.0/channel"], block.channel(features))
    assert_close(maps["encoder.0/spatial"], block.spatial(features))
    shut = {"encoder.0/channel": torch.zeros_like, "encoder.0/spatial": torch.zeros_like}
    with editing(block, shut):
        nothing = block(torch.zeros_like(features))
        assert_close(block(features), nothing)
