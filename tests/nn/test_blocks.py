"""Layers keep their grid, multiply in order, and saturate in float32."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.nn.blocks import (
    ConvolutionBlock,
    Modulated,
    convolution,
    normalisation,
    sigmoid_in_float32,
)


class Mean(nn.Module):
    """A map that is the mean of the features."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean().expand_as(features)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_strided_cell_has_its_centre_at_its_multiple_of_the_input(
    spatial_dims: int, stride: int
) -> None:
    layer = convolution(
        spatial_dims, 1, 1, kernel=[3] * spatial_dims, stride=[stride] * spatial_dims
    )
    nn.init.zeros_(layer.weight)
    layer.weight.data[(0, 0, *[1] * spatial_dims)] = 1  # the kernel's middle alone
    image = torch.randn(1, 1, *[12] * spatial_dims)
    picked = image[(slice(None), slice(None), *[slice(None, None, stride)] * spatial_dims)]
    assert_close(layer(image), picked)


def test_each_map_sees_the_product_so_far() -> None:
    features = torch.full((1, 1, 2, 2), 3.0)
    # 3 * 3 = 9, of which the mean is 9: 9 * 9 = 81.
    assert_close(Modulated(Mean(), Mean())(features), torch.full((1, 1, 2, 2), 81.0))


def test_only_the_first_convolution_of_a_block_strides() -> None:
    block = ConvolutionBlock(2, 1, widths=[2, 4], kernel=[3, 3], stride=[2, 1])
    assert block(torch.randn(1, 1, 8, 8)).shape == (1, 4, 4, 8)


@pytest.mark.parametrize(("channels", "groups"), [(32, 8), (8, 2), (12, 1), (4, 1), (1, 1)])
def test_a_group_has_four_channels_at_least_unless_there_are_fewer(
    channels: int, groups: int
) -> None:
    assert normalisation("group", 3, channels).num_groups == groups


def test_a_sigmoid_of_half_precision_is_that_of_the_number_in_float32() -> None:
    logits = torch.tensor([9.0, -9.0, 0.0], dtype=torch.bfloat16)
    found = sigmoid_in_float32(logits)
    assert found.dtype == torch.float32 and 0 < 1 - found[0] < 2e-4
