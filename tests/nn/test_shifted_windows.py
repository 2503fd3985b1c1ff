"""Shifted windows, beside MONAI's Swin transformer."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.geometry.grid import Placement
from segkit.nn.map_tap import editing, place_taps, recording
from segkit.nn.multihead import windows_over
from segkit.nn.self_attention import SelfAttention, shifted_pair

GRIDS = [((6, 4), (3, 2)), ((4, 6, 4), (2, 3, 2)), ((5, 4), (2, 3))]


def features_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shifted(window: tuple[int, ...], shift: tuple[int, ...] | None = None) -> SelfAttention:
    torch.manual_seed(0)
    block = SelfAttention(
        8,
        heads=2,
        head_channels=4,
        positions="relative",
        window=window,
        shift=shift or [size // 2 for size in window],
    )
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    place_taps(block, "bottleneck", 0, Placement.identity(len(window)))
    return block


@pytest.mark.parity
@pytest.mark.parametrize(("space", "window"), GRIDS[:2])
def test_shifted_windows_are_monais(space: tuple[int, ...], window: tuple[int, ...]) -> None:
    swin = pytest.importorskip("monai.networks.nets.swin_unetr")
    block = shifted(window)
    shift = tuple(size // 2 for size in window)
    theirs = swin.WindowAttention(8, num_heads=2, window_size=window, qkv_bias=True)
    ours = block.attention
    assert block.bias is not None
    with torch.no_grad():
        theirs.relative_position_bias_table.copy_(block.bias.table)
        layers = (ours.query, ours.key, ours.value)
        theirs.qkv.weight.copy_(torch.cat([layer.weight for layer in layers]))
        theirs.qkv.bias.copy_(torch.cat([ours.query.bias, torch.zeros(8), ours.value.bias]))
        theirs.proj.weight.copy_(ours.out.weight)
        theirs.proj.bias.zero_()
    features = features_of(2, 8, *space)
    tokens = block.norm(features.movedim(1, -1))
    axes = tuple(range(1, 1 + len(space)))
    rolled = tokens.roll([-step for step in shift], dims=axes)
    mask = swin.compute_mask(list(space), window, shift, torch.device("cpu"))
    parts = theirs(swin.window_partition(rolled, window), mask)
    whole = swin.window_reverse(parts.view(-1, *window, 8), window, [2, *space])
    expected = features + whole.roll(shift, dims=axes).movedim(-1, 1)
    assert_close(block(features), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("space", "window"), GRIDS)
def test_cut_and_joined_windows_give_the_grid_back(
    space: tuple[int, ...], window: tuple[int, ...]
) -> None:
    windows = windows_over(space, window, [size // 2 for size in window])
    features = features_of(2, 3, *space)
    assert torch.equal(windows.join(windows.cut(features), 2), features)


@pytest.mark.parametrize(("space", "window"), GRIDS)
def test_a_voxel_attends_to_its_window_and_to_no_other(
    space: tuple[int, ...], window: tuple[int, ...]
) -> None:
    block = shifted(window)
    features = features_of(1, 8, *space).requires_grad_()
    # Along each axis the first window ends at the shift, and each of the others is whole.
    shift = [size // 2 if cells > size else 0 for size, cells in zip(window, space, strict=True)]
    for cell in ((0,) * len(space), tuple(size - 1 for size in space)):
        (gradient,) = torch.autograd.grad(block(features)[(0, slice(None), *cell)].sum(), features)
        expected = torch.ones(space, dtype=torch.bool)
        for axis, at in enumerate(cell):
            index = torch.arange(space[axis])
            number = (index - shift[axis]) // window[axis]
            same = number == (at - shift[axis]) // window[axis]
            expected &= same.view(-1, *[1] * (len(space) - axis - 1))
        assert torch.equal(gradient[0].abs().sum(dim=0) > 0, expected)


def test_no_shift_is_the_attention_that_was_there() -> None:
    plain = SelfAttention(8, heads=2, head_channels=4, positions="relative", window=(2, 3))
    block = shifted((2, 3), (0, 0))
    plain.load_state_dict(block.state_dict())
    features = features_of(2, 8, 4, 7)
    assert torch.equal(block(features), plain(features))


def test_a_grid_of_one_window_is_not_shifted() -> None:
    block, plain = shifted((4, 3)), shifted((4, 3), (0, 0))
    assert torch.equal(block(features_of(2, 8, 4, 3)), plain(features_of(2, 8, 4, 3)))


@pytest.mark.parametrize(("space", "window"), GRIDS)
def test_all_voxels_together_receive_as_much_as_they_are_whatever_the_edit(
    space: tuple[int, ...], window: tuple[int, ...]
) -> None:
    block = shifted(window)
    features = features_of(2, 8, *space)
    with recording(block) as maps:
        output = block(features)
    total = torch.full((2, 2), float(math.prod(space)))
    assert_close(maps["bottleneck/received"].flatten(2).sum(dim=2), total)
    with recording(block) as again, editing(block, {"bottleneck/received": lambda rows: rows}):
        assert_close(block(features), output, rtol=1e-4, atol=1e-4)
    assert_close(again["bottleneck/received"], maps["bottleneck/received"])
    rows_of: list[Tensor] = []

    def spill(rows: Tensor) -> Tensor:
        rows_of.append(rows)
        return torch.ones_like(rows)

    with recording(block) as edited, editing(block, {"bottleneck/received": spill}):
        block(features)
    # Of ones, each voxel receives one from each voxel of its own window, and from none beyond.
    assert_close(
        edited["bottleneck/received"][0, 0].flatten().max().item(), float(math.prod(window))
    )


def test_gradients_are_finite_where_windows_are_filled_up() -> None:
    block = shifted((2, 3))
    features = features_of(1, 8, 5, 4).requires_grad_()
    block(features).square().sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()


def test_the_pair_lets_voxels_of_different_windows_meet() -> None:
    torch.manual_seed(0)
    pair = shifted_pair(8, heads=2, head_channels=4, positions="relative", window=(2, 2))
    for parameter in pair.parameters():
        nn.init.normal_(parameter, std=0.5)
    features = features_of(1, 8, 6, 6).requires_grad_()

    def reached(block: nn.Module) -> set[tuple[int, ...]]:
        (gradient,) = torch.autograd.grad(block(features)[0, :, 2, 2].sum(), features)
        return {tuple(cell) for cell in gradient[0].abs().sum(dim=0).nonzero().tolist()}

    assert reached(pair[0]) == {(i, j) for i in (2, 3) for j in (2, 3)}
    assert reached(pair) == {(i, j) for i in range(4) for j in range(4)}
