import itertools
import math
from collections import defaultdict

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.testing import assert_close

from segkit.nn.positions import RelativeBias, cells_of, rotate, sincos

GRIDS = [(4, 5), (3, 2, 4)]

windows = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def features_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5,), *GRIDS])
def test_cells_are_listed_with_the_last_axis_running_fastest(shape: tuple[int, ...]) -> None:
    assert cells_of(shape).tolist() == [
        list(cell) for cell in itertools.product(*map(range, shape))
    ]


def test_sines_and_cosines_along_one_axis_are_those_worked_out_by_hand() -> None:
    # Four channels are two frequencies: 10000^0 = 1 and 10000^(-1/2) = 1/100.
    expected = [[math.sin(i), math.sin(i / 100), math.cos(i), math.cos(i / 100)] for i in range(6)]
    assert_close(sincos((6,), 4), torch.tensor(expected))


@pytest.mark.parametrize("shape", GRIDS)
def test_each_axis_has_its_own_channels_with_the_code_of_one_axis(shape: tuple[int, ...]) -> None:
    codes = sincos(shape, 6 * len(shape)).view(*shape, len(shape), 6)
    for axis, size in enumerate(shape):
        along = sincos((size,), 6).view(*[size if a == axis else 1 for a in range(len(shape))], 6)
        assert_close(codes[..., axis, :], along.expand(*shape, 6))


@pytest.mark.parametrize("shape", [(16, 16), (8, 6, 10)])
def test_no_two_cells_have_the_same_code(shape: tuple[int, ...]) -> None:
    codes = sincos(shape, 4 * len(shape))
    distances = torch.cdist(codes, codes, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(math.inf)
    # Nearest are those six cells apart, almost a whole turn of the first frequency: 2 sin(6 / 2).
    assert distances.min() > 2 * math.sin(3)


@pytest.mark.parametrize(
    ("shape", "channels", "used"), [((5,), 7, 6), ((4, 5), 11, 8), ((3, 2, 4), 17, 12)]
)
def test_channels_that_cannot_be_shared_out_stay_0(
    shape: tuple[int, ...], channels: int, used: int
) -> None:
    codes = sincos(shape, channels)
    assert codes.shape == (math.prod(shape), channels)
    assert torch.equal(codes[:, :used], sincos(shape, used))
    assert (codes[:, used:] == 0).all()
    assert (codes[:, :used].abs().amax(dim=0) > 0).all()


def test_a_token_is_turned_by_the_angles_worked_out_by_hand() -> None:
    # Four channels are two pairs, (0, 2) and (1, 3), with frequencies 1 and 100^(-1/2) = 1/10.
    tokens = torch.tensor([1.0, 0.0, 0.0, 2.0]).expand(1, 1, 4, 4)
    expected = [
        [math.cos(i), -2 * math.sin(i / 10), math.sin(i), 2 * math.cos(i / 10)] for i in range(4)
    ]
    assert_close(rotate(tokens, (4,)), torch.tensor([[expected]]))


@pytest.mark.parametrize("shape", GRIDS)
@pytest.mark.parametrize("channels", [12, 15])
def test_turning_keeps_lengths_and_pairs_that_are_left_over(
    shape: tuple[int, ...], channels: int
) -> None:
    tokens = features_of(2, 3, math.prod(shape), channels)
    turned = rotate(tokens, shape)
    assert_close(turned.norm(dim=3), tokens.norm(dim=3))
    assert torch.equal(turned[..., 12:], tokens[..., 12:])
    assert not torch.allclose(turned, tokens, atol=0.1)


@pytest.mark.parametrize("shape", GRIDS)
def test_the_first_cell_is_not_turned(shape: tuple[int, ...]) -> None:
    tokens = features_of(2, 3, math.prod(shape), 12)
    assert torch.equal(rotate(tokens, shape)[:, :, 0], tokens[:, :, 0])


@pytest.mark.parametrize("shape", GRIDS)
def test_a_product_of_rotated_tokens_depends_only_on_their_offset(shape: tuple[int, ...]) -> None:
    query, key = features_of(2, 1, 1, 1, 12, seed=3).expand(-1, -1, -1, math.prod(shape), -1)
    products = (rotate(query, shape) @ rotate(key, shape).transpose(2, 3))[0, 0]
    by_offset = defaultdict(list)
    cells = cells_of(shape)
    for (i, one), (j, other) in itertools.product(enumerate(cells), repeat=2):
        by_offset[tuple((one - other).tolist())].append(products[i, j])
    means = []
    for same in by_offset.values():
        values = torch.stack(same)
        assert_close(values, values[:1].expand_as(values), rtol=0, atol=1e-5)
        means.append(values.mean())
    assert len(means) == math.prod(2 * size - 1 for size in shape)
    # Every axis counts: no two offsets give the same.
    assert torch.stack(means).sort().values.diff().min() > 1e-5


def test_a_token_of_low_precision_keeps_its_type() -> None:
    assert rotate(features_of(1, 1, 6, 8).bfloat16(), (2, 3)).dtype == torch.bfloat16


@settings(max_examples=40)
@given(window=windows, heads=st.integers(1, 3))
def test_a_relative_bias_has_one_number_for_each_offset_and_head(
    window: tuple[int, ...], heads: int
) -> None:
    bias = RelativeBias(window, heads=heads)
    num_offsets = math.prod(2 * size - 1 for size in window)
    assert bias.table.shape == (num_offsets, heads)
    # Numbers that are all different show which of them is read where.
    with torch.no_grad():
        bias.table.copy_(torch.arange(num_offsets * heads).view(num_offsets, heads))
    cells = cells_of(window)
    offsets = (cells[:, None] - cells[None]).flatten(0, 1).tolist()
    for head, of_head in enumerate(bias()):
        pairs = {
            (tuple(offset), int(value))
            for offset, value in zip(offsets, of_head.flatten().tolist(), strict=True)
        }
        # As many pairs as offsets and as values: each offset has one value, and no other has it.
        assert len(pairs) == num_offsets
        assert len({offset for offset, _ in pairs}) == num_offsets
        assert {value for _, value in pairs} == set(range(head, num_offsets * heads, heads))


def test_only_the_table_of_a_relative_bias_is_saved() -> None:
    assert list(RelativeBias((2, 3), heads=2).state_dict()) == ["table"]
