"""A placement that is followed through layers is where the features really lie."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose
from torch import Tensor, nn

from segkit.nn.follow import Follower


def mean_kernel(size: int) -> Tensor:
    return torch.full((1, 1, size), 1.0 / size)


LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "stride": lambda x: F.conv1d(x, mean_kernel(3), stride=2, padding=1),
    "dilation": lambda x: F.conv1d(x, mean_kernel(3), dilation=2, padding=1),
    "same": lambda x: F.conv1d(x, mean_kernel(3), padding="same"),
    "pool": lambda x: F.avg_pool1d(x, 2),
    "pool to a size": lambda x: F.adaptive_avg_pool1d(x, 8),
    "moved axis": lambda x: x[None].movedim((-1, 0), (1, -1))[:, ::2, 0].movedim(-2, -1),
    "viewed": lambda x: x.flatten(1)[:, None].view_as(x).expand_as(x)[..., 1::2],
    "two pools": lambda x: F.avg_pool1d(F.avg_pool1d(x, 2), 3, stride=1),
    "linear": lambda x: F.interpolate(x, scale_factor=2, mode="linear"),
    "corners": lambda x: F.interpolate(x, size=9, mode="linear", align_corners=True),
    "factor": lambda x: F.interpolate(x[:, :, :31], scale_factor=0.5, mode="linear"),
    "factor of sizes": lambda x: F.interpolate(
        x[:, :, :31], scale_factor=0.5, mode="linear", recompute_scale_factor=True
    ),
    "nearest": lambda x: F.interpolate(x, scale_factor=0.5),
    "nearest, by size": lambda x: F.interpolate(x[:, :, :30], size=10),
    "down and up": lambda x: F.interpolate(F.avg_pool1d(x, 4), size=32, mode="linear"),
    "pad": lambda x: F.pad(x, (3, 1), mode="replicate"),
    "slice": lambda x: x[:, :, 3:-2:2],
    "last axis": lambda x: x.permute(0, 2, 1)[..., 1::2, :].transpose(1, 2),
    "tokens": lambda x: x.transpose(1, 2).reshape(1, -1, 1).transpose(-1, -2),
    "norm": lambda x: F.relu(F.instance_norm(x) * 0 + x + 5) - 5,
    "in place": lambda x: F.avg_pool1d(x, 2).add_(0),
    "patches": lambda x: torch.cat([x[:, :, 0::2], x[:, :, 1::2]], dim=1).mean(1, keepdim=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_field_of_coordinates_has_the_values_of_its_placement(name: str) -> None:
    image = torch.arange(32, dtype=torch.float32)[None, None]
    with Follower(image) as follower:
        features = LAYERS[name](image)
    followed = follower.of(features)
    assert followed is not None and followed.axes == (2,) and followed.cells == features.shape[2:]
    places = torch.arange(features.shape[2]) * followed.placement.stride[0]
    places += followed.placement.offset[0]
    inside = (places > 3) & (places < 28)
    assert inside.sum() > 4
    assert_allclose(features[0, 0][inside], places[inside], atol=1e-4)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize(
    ("size", "new"),
    [(8, 16), (8, 24), (12, 8), (8, 4), (16, 4), (9, 3), (8, 12), (12, 9), (12, 30)],
)
def test_nearest_cells_lie_on_average_where_they_come_from(size: int, new: int, mode: str) -> None:
    image = torch.arange(size, dtype=torch.float32)[None, None]
    with Follower(image) as follower:
        features = F.interpolate(image, size=new, mode=mode)
    followed = follower.of(features)
    assert followed is not None
    places = torch.arange(new) * followed.placement.stride[0] + followed.placement.offset[0]
    assert_allclose((features[0, 0] - places).mean(), 0, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "expected"),
    # The middle of each input cell, which has its value, lies at output s j + (k - 1) / 2 - p.
    [(2, 2, 0, (0.5, -0.25)), (3, 2, 1, (0.5, 0.0)), (4, 4, 0, (0.25, -0.375))],
)
def test_transposed_convolutions_place_cells_in_the_middle_of_their_outputs(
    kernel: int, stride: int, padding: int, expected: tuple[float, float]
) -> None:
    image = torch.zeros(1, 1, 8)
    layer = nn.ConvTranspose1d(1, 1, kernel, stride, padding)
    with Follower(image) as follower:
        features = layer(image)
    followed = follower.of(features)
    assert followed is not None
    assert (followed.placement.stride[0], followed.placement.offset[0]) == expected


def test_pooling_to_cells_of_several_sizes_or_to_one_has_no_placement() -> None:
    image = torch.zeros(1, 1, 12)
    with Follower(image) as follower:
        assert follower.of(F.adaptive_avg_pool1d(image, 5)) is None
        assert follower.of(F.adaptive_max_pool1d(image, 1)) is None
        assert follower.of(F.adaptive_max_pool1d(image, 4)) is not None


def test_tokens_are_followed_and_come_back_to_their_grid() -> None:
    image = torch.zeros(2, 3, 8, 12)
    patches = nn.Conv2d(3, 6, 4, stride=4)
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    with Follower(image) as follower:
        tokens = layer(patches(image).flatten(2).transpose(1, 2))
        back = tokens.transpose(1, 2).reshape(2, 6, 2, 3)
        shuffled = tokens.roll(1, dims=1)
    followed, again = follower.of(tokens), follower.of(back)
    assert followed is not None and followed.tokens and followed.axes == (1,)
    assert followed.cells == (2, 3)
    assert again is not None and again.axes == (2, 3)
    assert again.placement.stride == (4, 4) and again.placement.offset == (1.5, 1.5)
    assert follower.of(shuffled) is None


def test_a_lost_placement_returns_with_a_shortcut_and_the_skip_decides() -> None:
    image = torch.zeros(1, 2, 8, 8)
    with Follower(image) as follower:
        windows = image.view(1, 2, 2, 4, 2, 4).permute(0, 1, 2, 4, 3, 5)
        added = image + windows.permute(0, 1, 2, 4, 3, 5).reshape(1, 2, 8, 8)
        down = F.conv2d(image, torch.zeros(2, 2, 3, 3), stride=2, padding=1)
        up = F.conv_transpose2d(down, torch.zeros(2, 2, 2, 2), stride=2)
        joined = torch.cat([up, image], dim=1)
    assert follower.of(windows) is None
    found = follower.of(added)
    assert found is not None and found.placement.offset == (0, 0)
    # The decoder lies a quarter of a coarse cell off; the skip has fewer layers behind it.
    shifted, both = follower.of(up), follower.of(joined)
    assert shifted is not None and shifted.placement.offset == (-0.5, -0.5)
    assert both is not None and both.placement.offset == (0, 0)


MOVING: dict[str, Callable[[Tensor], Tensor]] = {
    "rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "index_select": lambda x: x.index_select(2, torch.arange(7, -1, -1)),
    "fftshift": lambda x: torch.fft.fftshift(x, dim=(2, 3)),
    "take_along_dim": lambda x: torch.take_along_dim(x, x.argsort(2), 2),
    "linear over cells": lambda x: F.linear(x, torch.ones(8, 8)),
    "mean over a row": lambda x: x.mean(2).unsqueeze(2).expand(-1, -1, 8, -1),
    "indices": lambda x: x[:, :, torch.arange(7, -1, -1)],
    "in place": lambda x: (x + 0).index_copy_(2, torch.arange(7, -1, -1), x),
    "set": lambda x: set_rows(x + 0),
    "like another": lambda x: torch.arange(128.0).reshape(1, 2, 8, 8).type_as(x),
}


def set_rows(x: Tensor) -> Tensor:
    x[:, :, :4] = x[:, :, 4:].clone()
    return x


@pytest.mark.parametrize("name", MOVING)
def test_a_call_that_may_move_cells_loses_their_placement(name: str) -> None:
    image = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with Follower(image) as follower:
        moved = MOVING[name](image)
    assert moved.shape == image.shape and follower.of(moved) is None


def test_axes_of_cells_are_followed_through_einsum_and_windows_of_the_whole_grid() -> None:
    image = torch.zeros(1, 2, 8, 8)
    with Follower(image) as follower:
        turned = torch.einsum("bchw->bcwh", image)
        windows = image.view(1, 2, 1, 8, 1, 8).permute(0, 2, 4, 3, 5, 1).reshape(1, 64, 2)
        parts = windows.reshape(1, 64, 2, 1).permute(2, 0, 1, 3)
        query = parts[0]
        (value, _) = parts.unbind(0)
    found = [follower.of(each) for each in (turned, windows, query, value)]
    assert [one.axes for one in found if one is not None] == [(3, 2), (1,), (1,), (1,)]


def test_a_product_of_queries_and_keys_has_the_cells_of_both() -> None:
    image = torch.zeros(1, 2, 8, 8)
    with Follower(image) as follower:
        queries = F.avg_pool2d(image, 2).flatten(2).transpose(1, 2)
        keys = F.avg_pool2d(image[:, :, 2:, 2:], 2).flatten(2).transpose(1, 2)
        products = [
            queries @ keys.transpose(1, 2),
            torch.bmm(queries, keys.mT.contiguous()),
            torch.einsum("bqd,bkd->bqk", queries, keys),
            (queries.unsqueeze(1) @ keys.unsqueeze(1).transpose(2, 3)).softmax(-1)[:, 0],
        ]
        mixed = products[0] @ keys
        channels = queries.transpose(1, 2) @ queries
    for number, product in enumerate(products):
        found, last = follower.of(product), follower.keys_of(product)
        assert found is not None and found.axes == (1,) and found.placement.offset == (0.5, 0.5)
        if number == 1:  # the attribute mT is not followed
            assert last is None
        else:
            assert last is not None and last.cells == (3, 3) and last.placement.offset == (2.5, 2.5)
    after = follower.of(mixed)
    assert after is not None and after.cells == (4, 4) and after.axes == (1,)
    assert follower.keys_of(mixed) is None and follower.of(channels) is None
