"""Paired attention: against loops over heads, on other grids, and by permutation."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.geometry.grid import Placement
from segkit.nn.map_tap import editing, maps_of, place_taps, recording
from segkit.nn.paired_attention import PairedAttention

MATRIX, BRANCH = "encoder.1/channel", "encoder.1/branch"
GRIDS = [(3, 4), (2, 3, 2)]


def features_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block_of(grid: tuple[int, ...], channels: int = 8) -> PairedAttention:
    torch.manual_seed(0)
    block = PairedAttention(channels, grid=grid, heads=2, projected=5, layer_scale=1.0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.6)
    place_taps(block, "encoder.1", 1, Placement.identity(len(grid)))
    return block.eval()


def written_out(block: PairedAttention, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of one sample's tokens (cells, channels), what is added, and what each channel receives."""
    channels, heads = tokens.shape[1], block.heads
    width = channels // heads
    query, key, by_channel, by_voxel = (tokens @ block.tokens.weight.T).split(channels, dim=1)
    mix, offset = block.projection.weight, block.projection.bias[:, None]
    voxels, kept, received = [], [], []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        q, k = query[:, own], key[:, own]
        unit_q, unit_k = (one / one.norm(dim=0, keepdim=True) for one in (q, k))
        rows = (unit_q @ (mix @ k + offset).T * block.voxel_temperature[head]).softmax(dim=1)
        voxels.append(rows @ (mix @ by_voxel[:, own] + offset))
        between = (unit_q.T @ unit_k * block.channel_temperature[head]).softmax(dim=1)
        kept.append((between @ by_channel[:, own].T).T)
        received.append(between.sum(dim=0))
    halves = block.of_voxels(torch.cat(voxels, 1)), block.of_channels(torch.cat(kept, 1))
    return torch.cat(halves, dim=1) * block.scale.weight, torch.cat(received)


@pytest.mark.parametrize("grid", GRIDS)
def test_it_is_its_formula_head_by_head(grid: tuple[int, ...]) -> None:
    block = block_of(grid)
    features = features_of(2, 8, *grid)
    with recording(block) as maps:
        output = block(features)
    for sample in range(2):
        tokens = block.norm(features[sample].flatten(1).T) + block.positions[0]
        added, received = written_out(block, tokens)
        expected = features[sample] + added.T.reshape(8, *grid)
        assert_close(output[sample], expected, rtol=1e-4, atol=1e-4)
        assert_close(maps[MATRIX][sample].flatten(), received)


def test_on_another_grid_it_is_paid_within_windows_filled_up_with_zeros() -> None:
    block = block_of((3, 4))
    features = features_of(1, 8, 5, 4)
    with recording(block) as maps:
        output = block(features)
    shares = []
    for first in (0, 3):
        own = features[:, :, first : first + 3]
        tokens = torch.zeros(3, 4, 8)
        tokens[: own.shape[2]] = block.norm(own[0].movedim(0, 2))
        tokens[: own.shape[2]] += block.positions[0].view(3, 4, 8)[: own.shape[2]]
        added, received = written_out(block, tokens.view(12, 8))
        expected = own[0] + added.T.view(8, 3, 4)[:, : own.shape[2]]
        assert_close(output[0, :, first : first + 3], expected, rtol=1e-4, atol=1e-4)
        shares.append(received)
    assert_close(maps[MATRIX][0].flatten(), (shares[0] + shares[1]) / 2)


@pytest.mark.parametrize("grid", GRIDS)
def test_voxels_in_another_order_give_results_in_that_order_if_positions_go_with_them(
    grid: tuple[int, ...],
) -> None:
    block, other = block_of(grid), block_of(grid)
    features = features_of(1, 8, *grid)
    cells = features.flatten(2).shape[2]
    order = torch.randperm(cells, generator=torch.Generator().manual_seed(3))
    moved = features.flatten(2)[:, :, order].view(features.shape)
    expected = block(features).flatten(2)[:, :, order]
    assert not torch.allclose(other(moved).flatten(2), expected, atol=1e-2)
    with torch.no_grad():
        other.positions.copy_(block.positions[:, order])
        other.projection.weight.copy_(block.projection.weight[:, order])
    assert_close(other(moved).flatten(2), expected, rtol=1e-4, atol=1e-4)


def test_channels_receive_1_on_average_and_all_alike_at_no_temperature() -> None:
    block = block_of((3, 4))
    features = features_of(2, 8, 3, 4)
    with recording(block) as maps:
        block(features)
    assert_close(maps[MATRIX].view(2, 2, 4).mean(dim=2), torch.ones(2, 2))
    nn.init.zeros_(block.channel_temperature)
    with recording(block) as maps:
        block(features)
    assert_close(maps[MATRIX], torch.ones(2, 8, 1, 1))
    assert maps_of(block)[MATRIX].placement is None


def test_an_edit_reaches_the_weights_between_channels() -> None:
    block = block_of((3, 4))
    features = features_of(2, 8, 3, 4)
    whole = block(features)

    def uniform(rows: Tensor) -> Tensor:
        assert rows.shape == (2, 2, 4, 4)
        return torch.full_like(rows, 0.25)

    with editing(block, {MATRIX: uniform}):
        edited = block(features)
    nn.init.zeros_(block.channel_temperature)
    assert_close(edited, block(features))
    assert not torch.allclose(edited, whole, atol=1e-2)


def test_it_starts_as_next_to_the_identity_and_a_sample_can_do_without_it() -> None:
    features = features_of(2, 8, 3, 4)
    fresh = PairedAttention(8, grid=(3, 4), heads=2)
    assert_close(fresh(features), features, rtol=0, atol=1e-4)
    block = block_of((3, 4))
    output = block(features)
    with editing(block, {BRANCH: lambda ones: ones * torch.tensor([[0.0], [1.0]])}):
        switched = block(features)
    assert torch.equal(switched[0], features[0])
    assert torch.equal(switched[1], output[1])
