import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.geometry.grid import Placement
from segkit.nn.blocks import Modulated
from segkit.nn.channel_attention import (
    ContextPooling,
    EfficientChannelAttention,
    GlobalContext,
    GlobalContextExcitation,
    PooledChannelAttention,
    SqueezeExcitation,
)
from segkit.nn.map_tap import editing, place_taps, recording

SPACES = [(7, 6), (5, 4, 3)]
CHANNEL_MAPS: dict[str, Callable[[int], nn.Module]] = {
    "squeeze": lambda spatial_dims: SqueezeExcitation(8, reduction=2),
    "pooled": lambda spatial_dims: PooledChannelAttention(8, reduction=2),
    "efficient": lambda spatial_dims: EfficientChannelAttention(8),
    "context": lambda spatial_dims: GlobalContextExcitation(spatial_dims, 8, reduction=2),
}
"""Each map over 8 channels, of so many spatial dimensions."""


def features_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven_features(*space: int) -> Tensor:
    """Two samples of 8 channels whose means lie apart."""
    return features_of(2, 8, *space) + 3 * features_of(2, 8, *[1] * len(space), seed=3)


def shuffled(features: Tensor) -> Tensor:
    """The features with their voxels in another order."""
    order = torch.randperm(features[0, 0].numel(), generator=torch.Generator().manual_seed(2))
    return features.flatten(2)[:, :, order].reshape(features.shape)


def placed_context(spatial_dims: int) -> GlobalContext:
    """A block over 8 channels with random weights throughout, at the finest encoder level."""
    torch.manual_seed(0)
    block = GlobalContext(spatial_dims, 8, reduction=2)
    nn.init.normal_(block.expand.weight)
    nn.init.normal_(block.expand.bias)
    place_taps(block, "encoder.0", 0, Placement.identity(spatial_dims))
    return block


@pytest.mark.parity
@pytest.mark.parametrize("space", SPACES)
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


@pytest.mark.parametrize("kind", CHANNEL_MAPS)
@pytest.mark.parametrize("space", SPACES)
def test_a_last_layer_of_zeros_halves_the_features(kind: str, space: tuple[int, ...]) -> None:
    attention = CHANNEL_MAPS[kind](len(space))
    is_efficient = isinstance(attention, EfficientChannelAttention)
    last = attention.convolution if is_efficient else attention.excitation.expand
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    features = features_of(2, 8, *space)
    assert torch.equal(Modulated(attention)(features), features / 2)


@pytest.mark.parametrize("kind", CHANNEL_MAPS)
@pytest.mark.parametrize("space", SPACES)
def test_a_channel_map_ignores_the_order_of_voxels(kind: str, space: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    attention = CHANNEL_MAPS[kind](len(space))
    features = uneven_features(*space)
    channel_map = attention(features)
    assert channel_map.shape == (2, 8, *[1] * len(space))
    assert channel_map.std() > 0.05
    assert channel_map.min() > 0 and channel_map.max() < 1
    assert_close(attention(shuffled(features)), channel_map)
    # One that did not look at the features at all would pass so far.
    assert not torch.allclose(attention(features.flip(1)), channel_map, atol=1e-2)


@pytest.mark.parametrize("kind", CHANNEL_MAPS)
@pytest.mark.parametrize("space", SPACES)
def test_channel_maps_of_bfloat16_features_are_float32_but_the_product_is_not(
    kind: str, space: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    block = Modulated(CHANNEL_MAPS[kind](len(space)))
    place_taps(block, "encoder.0", 0, Placement.identity(len(space)))
    features = uneven_features(*space)
    expected = block(features)
    with recording(block) as maps, torch.autocast("cpu", dtype=torch.bfloat16):
        output = block(features.bfloat16())
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    for attention_map in maps.values():
        assert not torch.equal(attention_map, attention_map.bfloat16().float()), "was rounded"


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


def test_a_reduction_beyond_the_channels_leaves_one() -> None:
    assert SqueezeExcitation(4, reduction=16).excitation.squeeze.out_features == 1


@pytest.mark.parametrize(
    ("channels", "size"), [(4, 1), (8, 3), (16, 3), (32, 3), (64, 3), (128, 5), (256, 5)]
)
def test_the_efficient_map_sees_the_further_the_more_channels_there_are(
    channels: int, size: int
) -> None:
    # (log2(C) + 1) / 2 is 1.5, 2, 2.5, 3, 3.5, 4 and 4.5: the whole part, and if that is even, one
    # more.
    attention = EfficientChannelAttention(channels)
    nn.init.ones_(attention.convolution.weight)
    features = torch.zeros(1, channels, 1, 1)
    middle = channels // 2
    features[0, middle] = 1.0
    seen = attention(features).flatten() > 0.5
    expected = torch.arange(channels).sub(middle).abs() <= size // 2
    assert torch.equal(seen, expected)


def test_the_efficient_map_has_no_weight_but_its_kernel() -> None:
    attention = EfficientChannelAttention(64)
    assert {name: value.numel() for name, value in attention.named_parameters()} == {
        "convolution.weight": 3
    }


def test_the_efficient_map_gives_the_values_worked_out_by_hand() -> None:
    attention = EfficientChannelAttention(8)
    with torch.no_grad():
        attention.convolution.weight.copy_(torch.tensor([[[0.5, 1.0, -1.0]]]))
    # Two voxels per channel, 1 below and 1 above its mean.
    means = torch.tensor([1.0, -1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 4.0])
    features = means.reshape(1, 8, 1, 1) + torch.tensor([-1.0, 1.0])
    # Half the channel before, plus its own, less the one after, and nothing beyond either end:
    logits = [1 + 1, 0.5 - 1 - 2, -0.5 + 2, 1.0, 0.0, 0.0, -4.0, 4.0]
    expected = torch.sigmoid(torch.tensor(logits)).reshape(1, 8, 1, 1)
    assert_close(attention(features), expected)


@pytest.mark.parity
@pytest.mark.parametrize("channels", [8, 64, 256])
@pytest.mark.parametrize("space", SPACES)
def test_the_efficient_map_is_numpys_correlation_along_the_means(
    space: tuple[int, ...], channels: int
) -> None:
    torch.manual_seed(0)
    attention = EfficientChannelAttention(channels)
    features = 5 * features_of(2, channels, *space)
    kernel = attention.convolution.weight.detach().flatten().numpy()
    means = features.numpy().mean(axis=tuple(range(2, features.ndim)))
    logits = np.stack([np.correlate(sample, kernel, mode="same") for sample in means])
    channel_map = attention(features)
    assert channel_map.std() > 0.02
    assert_close(channel_map.flatten(1), torch.sigmoid(torch.from_numpy(logits)))


@pytest.mark.parametrize("space", SPACES)
def test_context_without_weights_is_the_plain_mean(space: tuple[int, ...]) -> None:
    pooling = ContextPooling(len(space), 8)
    nn.init.zeros_(pooling.logits.weight)
    features = uneven_features(*space)
    assert_close(pooling(features), features.flatten(2).mean(dim=2))


@pytest.mark.parametrize("space", SPACES)
def test_a_voxel_whose_logit_stands_out_by_50_is_the_context(space: tuple[int, ...]) -> None:
    pooling = ContextPooling(len(space), 8)
    nn.init.zeros_(pooling.logits.weight)
    with torch.no_grad():
        pooling.logits.weight[0, 0] = 50.0
    features = uneven_features(*space)
    # The first channel says which: in the first sample voxel 5, in the second voxel 17.
    features[:, 0] = 0.0
    chosen = features.flatten(2)
    chosen[0, 0, 5] = chosen[1, 0, 17] = 1.0
    expected = torch.stack([chosen[0, :, 5], chosen[1, :, 17]])
    assert_close(pooling(chosen.view(features.shape)), expected)


@pytest.mark.parametrize("space", SPACES)
def test_shares_of_the_context_sum_to_1_and_weigh_its_mean(space: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    pooling = ContextPooling(len(space), 8)
    place_taps(pooling, "encoder.0", 0, Placement.identity(len(space)))
    features = uneven_features(*space)
    with recording(pooling) as maps:
        context = pooling(features)
    shares = maps["encoder.0/pool"]
    assert shares.shape == (2, 1, *space)
    assert shares.min() >= 0 and shares.amax() > 3 / shares[0].numel()
    assert_close(shares.flatten(1).sum(dim=1), torch.ones(2))
    logits = torch.einsum("o,bo...->b...", pooling.logits.weight.flatten(), features)
    by_hand = torch.exp(logits) / torch.exp(logits).flatten(1).sum(dim=1).view(2, *[1] * len(space))
    assert_close(shares[:, 0], by_hand)
    assert_close(context, (features * shares).flatten(2).sum(dim=2))


@pytest.mark.parametrize("space", SPACES)
def test_the_global_context_ignores_the_order_of_voxels(space: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    pooling = ContextPooling(len(space), 8)
    features = uneven_features(*space)
    context = pooling(features)
    assert not torch.allclose(context, features.flatten(2).mean(dim=2), atol=1e-2)
    assert_close(pooling(shuffled(features)), context)


@pytest.mark.parametrize("space", SPACES)
def test_excitation_by_a_plain_mean_is_squeeze_and_excitation(space: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    by_context = GlobalContextExcitation(len(space), 8, reduction=2)
    place_taps(by_context, "encoder.0", 0, Placement.identity(len(space)))
    squeeze = SqueezeExcitation(8, reduction=2)
    squeeze.excitation.load_state_dict(by_context.excitation.state_dict())
    features = uneven_features(*space)
    expected = squeeze(features)
    assert not torch.allclose(by_context(features), expected, atol=1e-2)
    # The mean is plain where all voxels have the same share,
    even = {"encoder.0/pool": lambda shares: torch.full_like(shares, 1 / shares[0].numel())}
    with editing(by_context, even):
        assert_close(by_context(features), expected)
    # as they do without weights.
    nn.init.zeros_(by_context.context.logits.weight)
    assert_close(by_context(features), expected)


@pytest.mark.parametrize("space", SPACES)
def test_a_fresh_global_context_changes_nothing(space: tuple[int, ...]) -> None:
    features = features_of(2, 8, *space)
    assert torch.equal(GlobalContext(len(space), 8)(features), features)
    assert torch.equal(GlobalContext(len(space), 8, reduction=2)(features), features)


def test_the_global_context_gives_the_values_worked_out_by_hand() -> None:
    block = GlobalContext(2, 2, reduction=1)
    block.norm.eps = 0.0
    with torch.no_grad():
        block.context.logits.weight.copy_(torch.tensor([math.log(3) / 4, 0.0]).view(1, 2, 1, 1))
        block.squeeze.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        block.squeeze.bias.copy_(torch.tensor([1.0, 0.0]))
        block.norm.weight.copy_(torch.tensor([2.0, 1.0]))
        block.norm.bias.copy_(torch.tensor([0.5, 0.25]))
        block.expand.weight.copy_(torch.tensor([[1.0, 5.0], [-2.0, 5.0]]))
        block.expand.bias.copy_(torch.tensor([0.0, 0.25]))
    # Logits 0 and log(3), shares 1/4 and 3/4: the context is (3, 1). W1 makes it (5, 2), which the
    # normalisation makes (1, -1), and its weights (2.5, -0.75); relu leaves (2.5, 0), and
    # W2 makes it (2.5, -5 + 0.25).
    features = torch.tensor([[[[0.0, 4.0]], [[4.0, 0.0]]]])
    expected = torch.tensor([[[[2.5, 6.5]], [[-0.75, -4.75]]]])
    assert_close(block(features), expected)


def test_a_context_squeezed_to_a_single_value_is_not_normalised() -> None:
    block = GlobalContext(2, 2, reduction=2)
    with torch.no_grad():
        nn.init.zeros_(block.context.logits.weight)
        block.squeeze.weight.copy_(torch.tensor([[1.0, 2.0]]))
        block.squeeze.bias.fill_(-1.0)
        block.expand.weight.copy_(torch.tensor([[1.0], [-2.0]]))
    # The plain mean (2, 1): relu(2 + 2 - 1) = 3, so the shift is (3, -6).
    features = torch.tensor([[[[0.0, 4.0]], [[2.0, 0.0]]]])
    expected = torch.tensor([[[[3.0, 7.0]], [[-4.0, -6.0]]]])
    assert_close(block(features), expected)


@pytest.mark.parametrize("space", SPACES)
def test_the_global_context_shifts_every_voxel_of_a_channel_alike(space: tuple[int, ...]) -> None:
    block = placed_context(len(space))
    features = uneven_features(*space)
    shift = (block(features) - features).flatten(2)
    assert shift[:, :, 0].std() > 0.5
    assert_close(shift, shift[:, :, :1].expand(shift.shape), rtol=0, atol=1e-5)
    of_shuffled = (block(shuffled(features)) - shuffled(features)).flatten(2)
    assert_close(of_shuffled, shift, rtol=0, atol=1e-5)
    assert not torch.allclose(shift[0], shift[1], atol=1e-2)


@pytest.mark.parametrize("space", SPACES)
def test_the_global_context_switched_off_changes_nothing(space: tuple[int, ...]) -> None:
    block = placed_context(len(space))
    features = uneven_features(*space)
    output = block(features)
    assert not torch.allclose(output, features, atol=1e-1)
    with editing(block, {"encoder.0/branch": torch.zeros_like}):
        assert torch.equal(block(features), features)
    with editing(block, {"encoder.0/branch": torch.ones_like}):
        assert torch.equal(block(features), output)
    with editing(block, {"encoder.0/branch": lambda switch: switch / 2}):
        assert_close(block(features), (features + output) / 2)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_switch_of_the_global_context_is_no_map_of_its_own(spatial_dims: int) -> None:
    block = placed_context(spatial_dims)
    features = uneven_features(*[6, 5, 4][:spatial_dims])
    with recording(block) as maps, editing(block, {"encoder.0/branch": torch.zeros_like}):
        block(features)
    assert set(maps) == {"encoder.0/pool"}
