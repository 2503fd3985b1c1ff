import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.geometry import Placement
from segkit.nn.blocks import Modulated
from segkit.nn.channel import PooledChannelAttention, SqueezeExcitation
from segkit.nn.spatial import PooledSpatialAttention, convolutional_block_attention
from segkit.nn.taps import editing, place_taps, recording


def features_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def placed_block_attention(spatial_dims: int) -> Modulated:
    """CBAM over 8 channels whose maps are far from flat, in evaluation mode."""
    torch.manual_seed(0)
    block = convolutional_block_attention(spatial_dims, 8, reduction=2, kernel_size=3)
    for module in block.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            nn.init.normal_(module.weight)
    place_taps(block, "encoder.0", 0, Placement.identity(spatial_dims))
    return block.eval()


@pytest.mark.parity
@pytest.mark.parametrize("space", [(7, 6), (5, 4, 3)])
@pytest.mark.parametrize("reduction", [2, 4])
def test_squeeze_and_excitation_agrees_with_monai(space: tuple[int, ...], reduction: int) -> None:
    blocks = pytest.importorskip("monai.networks.blocks")
    torch.manual_seed(0)
    peer = blocks.ChannelSELayer(len(space), 8, r=reduction)
    ours = SqueezeExcitation(8, reduction=reduction)
    ours.excitation.squeeze.load_state_dict(peer.fc[0].state_dict())
    ours.excitation.expand.load_state_dict(peer.fc[2].state_dict())
    features = 5 * features_of(3, 8, *space)
    gated = Modulated(ours)(features)
    assert (gated / features).std() > 0.05
    assert_close(gated, peer(features))


@pytest.mark.parametrize("attention", [SqueezeExcitation, PooledChannelAttention])
@pytest.mark.parametrize("space", [(7, 6), (5, 4, 3)])
def test_a_last_layer_of_zeros_halves_the_features(
    attention: type[SqueezeExcitation | PooledChannelAttention], space: tuple[int, ...]
) -> None:
    block = Modulated(attention(8, reduction=2))
    expand = block.attention_maps[0].excitation.expand
    nn.init.zeros_(expand.weight)
    nn.init.zeros_(expand.bias)
    features = features_of(2, 8, *space)
    assert torch.equal(block(features), features / 2)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_spatial_convolution_of_zeros_halves_the_features(spatial_dims: int) -> None:
    block = Modulated(PooledSpatialAttention(spatial_dims))
    nn.init.zeros_(block.attention_maps[0].convolution.weight)
    features = features_of(2, 8, *[6, 5, 4][:spatial_dims])
    assert torch.equal(block(features), features / 2)


@pytest.mark.parametrize("attention", [SqueezeExcitation, PooledChannelAttention])
def test_a_channel_map_does_not_see_where_the_voxels_lie(
    attention: type[SqueezeExcitation | PooledChannelAttention],
) -> None:
    torch.manual_seed(0)
    block = attention(8, reduction=2)
    features = features_of(2, 8, 4, 3, 5) + 3 * features_of(2, 8, 1, 1, 1, seed=3)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    shuffled = features.flatten(2)[:, :, order].reshape(features.shape)
    channel_map = block(features)
    assert channel_map.shape == (2, 8, 1, 1, 1)
    assert channel_map.std() > 0.05
    assert channel_map.min() > 0 and channel_map.max() < 1
    assert_close(block(shuffled), channel_map)
    # One that did not look at the features at all would pass so far.
    assert not torch.allclose(block(features.flip(1)), channel_map, atol=1e-2)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_spatial_map_does_not_see_the_order_of_the_channels(spatial_dims: int) -> None:
    torch.manual_seed(0)
    block = PooledSpatialAttention(spatial_dims, kernel_size=3).eval()
    nn.init.normal_(block.convolution.weight)
    features = features_of(2, 8, *[6, 5, 4][:spatial_dims])
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


def test_the_layers_that_mean_and_maximum_share_give_the_values_worked_out_by_hand() -> None:
    block = PooledChannelAttention(2, reduction=2)
    with torch.no_grad():
        block.excitation.squeeze.weight.copy_(torch.tensor([[1.0, -1.0]]))
        block.excitation.squeeze.bias.fill_(0.5)
        block.excitation.expand.weight.copy_(torch.tensor([[1.0], [-2.0]]))
        block.excitation.expand.bias.copy_(torch.tensor([0.25, -0.5]))
    features = torch.tensor([[[[0.0, 4.0]], [[-1.0, 3.0]]]])
    # Mean (2, 1): relu(2 - 1 + 0.5) = 1.5, so (1.5 + 0.25, -3 - 0.5) = (1.75, -3.5).
    # Max (4, 3): relu(4 - 3 + 0.5) = 1.5, the same again. Sum (3.5, -7).
    expected = torch.sigmoid(torch.tensor([3.5, -7.0])).reshape(1, 2, 1, 1)
    assert_close(block(features), expected)
    # With the second channel (-1, 5), mean (2, 2): relu(0.5), so (0.75, -1.5);
    # max (4, 5): relu(4 - 5 + 0.5) = 0 leaves the bias (0.25, -0.5). Sum (1, -2).
    features[0, 1, 0, 1] = 5.0
    expected = torch.sigmoid(torch.tensor([1.0, -2.0])).reshape(1, 2, 1, 1)
    assert_close(block(features), expected)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_block_attention_weighs_channels_first_and_then_voxels(spatial_dims: int) -> None:
    block = placed_block_attention(spatial_dims)
    channel, spatial = block.attention_maps
    features = features_of(2, 8, *[6, 5, 4][:spatial_dims])
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


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_maps_of_bfloat16_features_are_float32_but_the_product_is_not(spatial_dims: int) -> None:
    block = placed_block_attention(spatial_dims)
    features = features_of(2, 8, *[6, 5, 4][:spatial_dims])
    expected = block(features)
    with recording(block) as maps, torch.autocast("cpu", dtype=torch.bfloat16):
        output = block(features.bfloat16())
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    for attention_map in maps.values():
        assert not torch.equal(attention_map, attention_map.bfloat16().float()), "was rounded"


def test_a_reduction_beyond_the_channels_leaves_one() -> None:
    assert SqueezeExcitation(4, reduction=16).excitation.squeeze.out_features == 1
