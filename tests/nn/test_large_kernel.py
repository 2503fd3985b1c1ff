"""Large-kernel attention: against convolutions written out, and by how far it reaches."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.geometry.grid import Placement
from segkit.nn.blocks import CONV_FUNCTION
from segkit.nn.large_kernel import LargeKernelAttention
from segkit.nn.map_tap import editing, place_taps, recording

SPATIAL, BRANCH = "encoder.0/spatial", "encoder.0/branch"


def features_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block_of(spatial_dims: int, channels: int = 3) -> LargeKernelAttention:
    torch.manual_seed(0)
    block = LargeKernelAttention(spatial_dims, channels, norm="none", layer_scale=1.0)
    for layer in (block.project, block.local, block.distant, block.mix, block.out):
        assert layer.bias is not None
        nn.init.normal_(layer.bias, std=0.1)
    place_taps(block, "encoder.0", 0, Placement.identity(spatial_dims))
    return block.eval()


def every_third(weight: Tensor) -> Tensor:
    """A kernel whose cells lie three apart, with zeros between them."""
    dims = weight.ndim - 2
    wide = weight.new_zeros(*weight.shape[:2], *[3 * (size - 1) + 1 for size in weight.shape[2:]])
    wide[(..., *[slice(None, None, 3)] * dims)] = weight
    return wide


@pytest.mark.parametrize("space", [(9, 12), (6, 5, 7)])
def test_it_is_the_convolutions_one_after_another(space: tuple[int, ...]) -> None:
    dims, convolve = len(space), CONV_FUNCTION[len(space)]
    block = block_of(dims)
    features = features_of(2, 3, *space)
    gated = F.gelu(convolve(features, block.project.weight, block.project.bias))
    local = convolve(gated, block.local.weight, block.local.bias, padding=2, groups=3)
    wide = every_third(block.distant.weight)
    distant = convolve(local, wide, block.distant.bias, padding=9, groups=3)
    attention = convolve(distant, block.mix.weight, block.mix.bias)
    added = convolve(attention * gated, block.out.weight, block.out.bias)
    with recording(block) as maps:
        assert_close(block(features), features + added, rtol=1e-4, atol=1e-4)
    expected = attention.abs().mean(dim=1, keepdim=True)
    assert_close(maps[SPATIAL], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_map_of_a_voxel_sees_11_voxels_far_and_no_farther(spatial_dims: int) -> None:
    # 2 cells of the first convolution and 3 x 3 of the second, along each axis by itself.
    block = block_of(spatial_dims)
    for axis in range(spatial_dims):
        space = [25 if number == axis else 1 for number in range(spatial_dims)]
        features = features_of(1, 3, *space).requires_grad_()
        maps: dict[str, Tensor] = {}

        def look(attention: Tensor, seen: dict[str, Tensor] = maps) -> Tensor:
            seen["map"] = attention
            return attention

        with editing(block, {SPATIAL: look}):
            block(features)
        maps["map"].flatten(2)[0, :, 12].sum().backward()
        assert features.grad is not None
        reached = features.grad.abs().sum(dim=1).flatten().nonzero().flatten().tolist()
        assert reached == list(range(1, 24))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_moved_image_gives_moved_features_away_from_the_border(spatial_dims: int) -> None:
    block = block_of(spatial_dims)
    space = [30, *[3] * (spatial_dims - 1)]
    features = features_of(1, 3, *space)
    moved = features.roll(2, dims=2)
    found, expected = block(moved), block(features).roll(2, dims=2)
    assert_close(found[:, :, 13:17], expected[:, :, 13:17])


def test_without_a_map_only_a_bias_is_added() -> None:
    block = block_of(2)
    features = features_of(2, 3, 4, 5)
    with editing(block, {SPATIAL: torch.zeros_like}):
        assert block.out.bias is not None
        assert_close(block(features), features + block.out.bias.view(-1, 1, 1))
    with editing(block, {BRANCH: torch.zeros_like}):
        assert torch.equal(block(features), features)


def test_large_kernel_attention_starts_with_a_scale_of_a_hundredth() -> None:
    torch.manual_seed(0)
    block = LargeKernelAttention(3, 8)
    assert (block.scale.weight == 0.01).all()
    # Weights N(0, 2 / inputs): of a 1x1 convolution 2/8, of channel-wise ones 2/125 and 2/343.
    for layer, inputs in ((block.mix, 8), (block.local, 125), (block.distant, 343)):
        deviation = math.sqrt(2 / inputs)
        assert_close(layer.weight.std().item(), deviation, rtol=0.25, atol=0)
