import itertools
import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.geometry.grid import Placement
from segkit.nn import multihead
from segkit.nn.map_tap import MapTap, editing, place_taps, recording
from segkit.nn.multihead import MultiHeadAttention, blocks, softmax_rows, windows_over

RECEIVED = "bottleneck/received"
BRANCH = "bottleneck/branch"


def features_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """Attention of 3 heads of 4 channels, from 6 (queries), 5 (keys) and 7 (values) to 8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = MultiHeadAttention(
            6, key_channels=5, value_channels=7, out_channels=8, heads=3, head_channels=4
        )
        # Far from uniform weights, and far from nothing.
        nn.init.normal_(self.attention.query.weight)
        nn.init.normal_(self.attention.key.weight)
        nn.init.normal_(self.attention.out.weight)
        self.matrix = MapTap("received", highest=math.inf)
        place_taps(self, "bottleneck", 0, Placement.identity(2))

    def forward(
        self,
        tokens: tuple[Tensor, Tensor, Tensor],
        bias: Tensor | None = None,
        inside: Tensor | None = None,
        samples: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return self.attention(
            *tokens, matrix=self.matrix, bias=bias, inside=inside, samples=samples
        )

    def output(
        self,
        tokens: tuple[Tensor, Tensor, Tensor],
        bias: Tensor | None = None,
        inside: Tensor | None = None,
        samples: int | None = None,
    ) -> Tensor:
        return self(tokens, bias, inside, samples)[0]


def tokens_of(
    batch_size: int = 2, queries: int = 9, keys: int = 11
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values for `Attention`."""
    return (
        features_of(batch_size, queries, 6, seed=1),
        features_of(batch_size, keys, 5, seed=2),
        features_of(batch_size, keys, 7, seed=3),
    )


def weights_of(
    attention: Attention,
    tokens: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
    inside: Tensor | None = None,
) -> Tensor:
    """The matrix of weights that an edit is shown, all blocks beside one another."""
    seen: list[Tensor] = []

    def look(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows

    with editing(attention, {RECEIVED: look}):
        attention(tokens, bias, inside)
    return torch.cat(seen, dim=2)


def uniform(rows: Tensor) -> Tensor:
    return torch.full_like(rows, 1 / rows.shape[-1])


def off(*heads: int) -> Callable[[Tensor], Tensor]:
    """An edit that switches heads off."""

    def edit(switches: Tensor) -> Tensor:
        edited = switches.clone()
        edited[:, list(heads)] = 0
        return edited

    return edit


@pytest.mark.parity
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("of_itself", [True, False])
def test_attention_agrees_with_torchs_own(heads: int, of_itself: bool) -> None:
    torch.manual_seed(0)
    width, key_channels, value_channels = (12, 12, 12) if of_itself else (12, 5, 7)
    peer = nn.MultiheadAttention(
        width, heads, kdim=key_channels, vdim=value_channels, batch_first=True
    ).eval()
    # Theirs has a bias of the keys, which a softmax does not notice.
    nn.init.normal_(peer.in_proj_bias)
    ours = Attention()
    ours.attention = MultiHeadAttention(
        width,
        key_channels=key_channels,
        value_channels=value_channels,
        out_channels=width,
        heads=heads,
        head_channels=width // heads,
    )
    parts = (
        peer.in_proj_weight.chunk(3)
        if of_itself
        else (peer.q_proj_weight, peer.k_proj_weight, peer.v_proj_weight)
    )
    query_bias, _, value_bias = peer.in_proj_bias.chunk(3)
    with torch.no_grad():
        for layer, weight in zip(
            (ours.attention.query, ours.attention.key, ours.attention.value), parts, strict=True
        ):
            layer.weight.copy_(weight)
        ours.attention.query.bias.copy_(query_bias)
        ours.attention.value.bias.copy_(value_bias)
        ours.attention.out.weight.copy_(peer.out_proj.weight)

    query = features_of(2, 7, width)
    tokens = (
        (query, query, query)
        if of_itself
        else (query, features_of(2, 10, key_channels, seed=2), features_of(2, 10, 7, seed=3))
    )
    expected, weights = peer(*tokens, average_attn_weights=False)
    with recording(ours):
        output, share = ours(tokens)
    assert expected.std() > 0.05
    assert_close(output, expected)
    assert_close(share, weights.mean(dim=2) * weights.shape[3])


def test_logits_are_divided_by_the_root_of_the_width_of_one_head() -> None:
    attention = MultiHeadAttention(
        1, key_channels=1, value_channels=1, out_channels=8, heads=2, head_channels=4
    )
    with torch.no_grad():
        for layer, weight in ((attention.query, 0.0), (attention.key, 1.0), (attention.value, 1.0)):
            layer.weight.fill_(weight)
        attention.query.bias.fill_(1.0)
        attention.value.bias.zero_()
        attention.out.weight.copy_(torch.eye(8))
    # Queries of (1, 1, 1, 1) and keys of (1, 1, 1, 1) and 0: logits 4 / sqrt(4) = 2 and 0, so that
    # the first key weighs e^2 / (e^2 + 1). The values are 1 and 0.
    first = 1 / (1 + math.exp(-2))
    tokens = torch.tensor([[[1.0], [0.0]]])
    for edit in (None, lambda rows: rows):
        matrix = MapTap("received")
        matrix.edit = edit
        output, _ = attention(torch.zeros(1, 1, 1), tokens, tokens, matrix=matrix)
        assert_close(output, torch.full((1, 1, 8), first))


def test_a_matrix_holds_the_softmax_of_scaled_products_and_sums_to_1_over_the_keys() -> None:
    attention, tokens = Attention(), tokens_of()
    weights = weights_of(attention, tokens)
    assert weights.shape == (2, 3, 9, 11)
    assert weights.std() > 0.1
    assert_close(weights.sum(dim=3), torch.ones(2, 3, 9))
    query = attention.attention.query(tokens[0]).view(2, 9, 3, 4)
    key = attention.attention.key(tokens[1]).view(2, 11, 3, 4)
    logits = torch.einsum("bqhc,bkhc->bhqk", query, key) / 2
    assert_close(weights, logits.exp() / logits.exp().sum(dim=3, keepdim=True))


def test_a_bias_is_added_to_the_logits_of_each_pair() -> None:
    attention, tokens = Attention(), tokens_of()
    bias = features_of(1, 3, 9, 11, seed=4)
    raised = weights_of(attention, tokens) * bias.exp()
    expected = raised / raised.sum(dim=3, keepdim=True)
    assert_close(weights_of(attention, tokens, bias), expected)
    with editing(attention, {RECEIVED: lambda rows: expected}):
        by_hand = attention.output(tokens)
    assert_close(attention.output(tokens, bias), by_hand)


def test_turning_queries_and_keys_does_not_change_the_values() -> None:
    attention, tokens = Attention(), tokens_of()
    seen: list[Tensor] = []

    def turn(heads: Tensor) -> Tensor:
        seen.append(heads)
        return torch.zeros_like(heads)

    output, _ = attention.attention(*tokens, matrix=attention.matrix, turn=turn)
    with editing(attention, {RECEIVED: uniform}):
        assert_close(output, attention.output(tokens))
    assert_close(seen[0].transpose(1, 2).flatten(2), attention.attention.query(tokens[0]))
    assert_close(seen[1].transpose(1, 2).flatten(2), attention.attention.key(tokens[1]))


def test_a_key_receives_its_mean_weight_times_the_number_of_keys() -> None:
    attention, tokens = Attention(), tokens_of()
    with recording(attention):
        _, share = attention(tokens)
    assert share is not None
    assert_close(share, weights_of(attention, tokens).mean(dim=2) * 11)
    assert_close(share.mean(dim=2), torch.ones(2, 3))


@pytest.mark.parametrize("queries", [1, 9])
def test_every_key_receives_1_if_all_keys_are_equal(queries: int) -> None:
    attention, tokens = Attention(), tokens_of(queries=queries)
    nn.init.zeros_(attention.attention.key.weight)
    with recording(attention):
        _, share = attention(tokens)
    assert_close(share, torch.ones(2, 3, 11))


def test_received_attention_is_computed_only_if_it_is_recorded() -> None:
    assert Attention()(tokens_of())[1] is None


@pytest.mark.parametrize("masked", [False, True])
def test_recording_changes_no_bit_of_the_output(masked: bool) -> None:
    attention, tokens = Attention(), tokens_of(queries=11)
    inside = torch.arange(11).expand(2, 11) < 8 if masked else None
    before = attention.output(tokens, inside=inside)
    with recording(attention):
        during, share = attention(tokens, inside=inside)
    assert share is not None
    assert torch.equal(during, before)


@pytest.mark.parametrize("biased", [False, True])
def test_an_edit_that_changes_nothing_agrees_with_the_fused_kernel(biased: bool) -> None:
    attention, tokens = Attention(), tokens_of()
    bias = features_of(1, 3, 9, 11, seed=4) if biased else None
    # Before W_o, whose weights of about 1 would add up 12 roundings.
    nn.init.eye_(attention.attention.out.weight)
    fused = attention.output(tokens, bias)
    with editing(attention, {RECEIVED: lambda rows: rows}):
        explicit = attention.output(tokens, bias)
    assert fused.std() > 0.05
    assert_close(explicit, fused, rtol=0, atol=1e-6)


def test_uniform_weights_give_the_mean_of_the_values() -> None:
    attention, tokens = Attention(), tokens_of()
    with editing(attention, {RECEIVED: uniform}):
        output, share = attention(tokens)
    mean = attention.attention.value(tokens[2]).mean(dim=1, keepdim=True)
    assert_close(output, attention.attention.out(mean).expand(-1, 9, -1))
    assert_close(share, torch.ones(2, 3, 11))


def test_received_attention_follows_the_edited_weights() -> None:
    attention, tokens = Attention(), tokens_of()

    def first_key_only(rows: Tensor) -> Tensor:
        return torch.zeros_like(rows).index_fill(3, torch.tensor(0), 1.0)

    with editing(attention, {RECEIVED: first_key_only}):
        output, share = attention(tokens)
    assert_close(share, torch.tensor([11.0] + [0.0] * 10).expand(2, 3, 11))
    first = attention.attention.out(attention.attention.value(tokens[2][:, :1]))
    assert_close(output, first.expand(-1, 9, -1))


@given(num_queries=st.integers(1, 40), numbers=st.integers(1, 2**26))
def test_blocks_hold_every_query_once_and_no_more_numbers_than_allowed(
    num_queries: int, numbers: int
) -> None:
    parts = list(blocks(num_queries, numbers))
    assert [query for first, last in parts for query in range(first, last)] == [*range(num_queries)]
    for first, last in parts:
        assert (last - first) * numbers <= multihead.LARGEST_BLOCK or last - first == 1


# A query's weights are 2 samples x 3 heads x 11 keys = 66 numbers.
@pytest.mark.parametrize(("largest", "count"), [(1, 11), (2 * 66, 6), (4 * 66 + 65, 3)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias_rows", [None, 1, 11])
def test_block_by_block_is_the_same_as_all_at_once(
    monkeypatch: pytest.MonkeyPatch, largest: int, count: int, masked: bool, bias_rows: int | None
) -> None:
    attention, tokens = Attention(), tokens_of(queries=11)
    inside = torch.arange(11).expand(2, 11) < 8 if masked else None
    bias = None if bias_rows is None else features_of(1, 3, bias_rows, 11, seed=4)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        with recording(attention):
            share = attention(tokens, bias, inside)[1]
        # Squares, which are no longer normalised, so that an edit of the wrong rows shows.
        with editing(attention, {RECEIVED: torch.square}):
            output, edited_share = attention(tokens, bias, inside)
        return share, output, edited_share

    whole = run()
    monkeypatch.setattr(multihead, "LARGEST_BLOCK", largest)
    assert len(list(blocks(11, 66))) == count
    for by_blocks, at_once in zip(run(), whole, strict=True):
        # Sums of some dozens of float32 products, in whatever order the processor's kernels take.
        assert_close(by_blocks, at_once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("head", [0, 1, 2])
def test_a_head_that_is_off_is_as_if_its_columns_of_the_last_layer_were_0(
    head: int, edited: bool
) -> None:
    attention, tokens = Attention(), tokens_of()
    rows_too = {RECEIVED: torch.square} if edited else {}
    everything = attention.output(tokens)
    with editing(attention, {BRANCH: off(head), **rows_too}):
        without = attention.output(tokens)
    assert not torch.allclose(without, everything, atol=1e-2)
    with torch.no_grad():
        attention.attention.out.weight[:, 4 * head : 4 * head + 4] = 0
    with editing(attention, rows_too):
        assert_close(without, attention.output(tokens))


def test_the_output_is_the_sum_over_heads() -> None:
    attention, tokens = Attention(), tokens_of()
    alone = torch.zeros(2, 9, 8)
    for others in itertools.combinations(range(3), 2):
        with editing(attention, {BRANCH: off(*others)}):
            alone = alone + attention.output(tokens)
    assert_close(alone, attention.output(tokens))


def test_without_any_head_the_output_is_exactly_0() -> None:
    attention, tokens = Attention(), tokens_of()
    with editing(attention, {BRANCH: torch.zeros_like}):
        assert torch.equal(attention.output(tokens), torch.zeros(2, 9, 8))


def test_switches_are_per_sample_even_if_a_sample_has_several_windows() -> None:
    attention, tokens = Attention(), tokens_of(batch_size=6)
    everything = attention.output(tokens, samples=2)
    with editing(attention, {BRANCH: off(1)}):
        without = attention.output(tokens, samples=2)

    def of_second_sample(switches: Tensor) -> Tensor:
        assert switches.shape == (2, 3)
        return torch.cat([switches[:1], off(1)(switches[1:])])

    with editing(attention, {BRANCH: of_second_sample}):
        output = attention.output(tokens, samples=2)
    # The first three windows are of the first sample.
    assert torch.equal(output[:3], everything[:3])
    assert torch.equal(output[3:], without[3:])
    assert not torch.allclose(everything[3:], without[3:], atol=1e-2)


def test_a_switchs_gradient_is_the_product_of_the_heads_output_with_its_gradient() -> None:
    attention, tokens = Attention(), tokens_of()
    switches = torch.ones(2, 3, requires_grad=True)
    with editing(attention, {BRANCH: lambda ones: ones * switches}):
        output = attention.output(tokens)
    probe = features_of(2, 9, 8, seed=5)
    (output * probe).sum().backward()
    # The loss is linear in the switches, so a switch's gradient is what shutting it costs.
    for head in range(3):
        with editing(attention, {BRANCH: off(head)}):
            lost = output - attention.output(tokens)
        assert_close(switches.grad[:, head], (lost * probe).sum(dim=(1, 2)))


def test_keys_that_are_not_inside_weigh_and_receive_exactly_0() -> None:
    attention, tokens = Attention(), tokens_of(queries=11)
    inside = torch.arange(11) < torch.tensor([[8], [5]])
    weights = weights_of(attention, tokens, inside=inside)
    outside = ~inside[:, None, None].expand_as(weights)
    assert (weights[outside] == 0).all()
    # An edit is shown a row of nothing for a query that is not inside.
    assert_close(weights.sum(dim=3), inside[:, None].float().expand(2, 3, 11))
    with recording(attention):
        output, share = attention(tokens, inside=inside)
    with editing(attention, {RECEIVED: lambda rows: rows}):
        explicit, explicit_share = attention(tokens, inside=inside)
    assert_close(explicit[inside], output[inside])
    assert_close(explicit_share, share)
    for sample, count in enumerate((8, 5)):
        # As if the others were not there; theirs as queries count for nothing.
        cut = tuple(part[sample : sample + 1, :count] for part in tokens)
        with recording(attention):
            alone, alone_share = attention(cut)
        assert (share[sample, :, count:] == 0).all()
        assert_close(share[sample, :, :count], alone_share[0])
        assert_close(output[sample, :count], alone[0])


def neighbours(num_heads: int, offsets: list[list[int]], contents: Tensor) -> Tensor:
    """What heads set by hand copy from neighbours on a ring, one number per head and place."""
    size = len(contents)
    attention = MultiHeadAttention(
        size,
        key_channels=size,
        value_channels=1,
        out_channels=num_heads,
        heads=num_heads,
        head_channels=size,
    )
    places = torch.eye(size)[None]
    with torch.no_grad():
        for layer in (attention.query, attention.value):
            layer.weight.zero_()
            layer.bias.zero_()
        for head in range(num_heads):
            part = slice(size * head, size * (head + 1))
            # Place i asks for e_i, and place j offers all e_(j - offset) that may copy it.
            attention.query.weight[part] = 100 * torch.eye(size)
            attention.key.weight[part] = sum(
                torch.eye(size).roll(-offset, dims=0) for offset in offsets[head]
            )
            attention.value.weight[size * head] = 1.0
            attention.out.weight[head, size * head] = 1.0
    output, _ = attention(places, places, contents[None, :, None], matrix=MapTap("received"))
    return output[0]


def test_two_heads_copy_both_neighbours_at_once_but_one_head_only_their_mean() -> None:
    contents = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0])
    left, right = contents.roll(1), contents.roll(-1)
    both = neighbours(2, [[-1], [1]], contents)
    assert_close(both, torch.stack([left, right], dim=1))
    # The weights of one head sum to 1, so what it takes of both is half of each.
    assert_close(neighbours(1, [[-1, 1]], contents)[:, 0], (left + right) / 2)


def test_the_softmax_is_computed_in_float32_from_lower_precision() -> None:
    query, key = features_of(1, 2, 5, 4).bfloat16(), features_of(1, 2, 6, 4, seed=2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = softmax_rows(query, key, None, 0, 5)
    assert weights.dtype == torch.float32
    assert_close(weights, softmax_rows(query.float(), key.float(), None, 0, 5))


@st.composite
def cut_grids(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A grid's space and a window's, of 2 or 3 axes, and neither a multiple of the other."""
    dims = draw(st.integers(2, 3))
    sizes = st.tuples(*[st.integers(1, 7)] * dims)
    return draw(sizes), draw(sizes)


@settings(max_examples=50)
@given(grid=cut_grids(), batch_size=st.integers(1, 2))
def test_windows_put_together_again_are_the_grid(
    grid: tuple[tuple[int, ...], tuple[int, ...]], batch_size: int
) -> None:
    windows = windows_over(*grid)
    features = features_of(batch_size, 3, *grid[0])
    assert torch.equal(windows.join(windows.cut(features), batch_size), features)


@settings(max_examples=50)
@given(grid=cut_grids())
def test_a_window_holds_the_cells_that_slicing_gives_and_nothing_beyond_the_grid(
    grid: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    space, window = grid
    windows = windows_over(space, window)
    features = features_of(2, 3, *space)
    tokens = iter(windows.cut(features))
    inside = windows.inside(2, features.device)
    number = 0
    for sample in features:
        starts = [range(0, size, width) for size, width in zip(space, window, strict=True)]
        for corner in itertools.product(*starts):
            part = (
                slice(None),
                *(slice(at, at + width) for at, width in zip(corner, window, strict=True)),
            )
            there = sample[part]
            held = next(tokens).T.reshape(3, *window)
            on_grid = torch.zeros(window, dtype=torch.bool)
            on_grid[tuple(slice(size) for size in there.shape[1:])] = True
            assert torch.equal(held[:, on_grid], there.flatten(1))
            assert (held[:, ~on_grid] == 0).all()
            if inside is None:
                assert on_grid.all()
            else:
                assert torch.equal(inside[number], on_grid.flatten())
            number += 1
    assert next(tokens, None) is None


@pytest.mark.parametrize("space", [(4, 5), (3, 2, 4)])
def test_without_a_window_all_cells_are_in_one(space: tuple[int, ...]) -> None:
    windows = windows_over(space, None)
    features = features_of(2, 3, *space)
    assert torch.equal(windows.cut(features), features.flatten(2).transpose(1, 2))
    assert windows.inside(2, features.device) is None
