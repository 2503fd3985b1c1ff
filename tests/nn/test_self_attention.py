import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.geometry.grid import Placement
from segkit.nn import multihead
from segkit.nn.map_tap import editing, place_taps, recording
from segkit.nn.multihead import blocks
from segkit.nn.positions import PositionKind, cells_of, rotate, sincos
from segkit.nn.self_attention import AdditiveSelfAttention, SelfAttention

RECEIVED = "bottleneck/received"
BRANCH = "bottleneck/branch"
POSITIONS: tuple[PositionKind, ...] = ("none", "sincos", "relative", "rotary")
SPACES = [(4, 6), (4, 2, 3)]


def features_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fresh_self_attention(
    positions: PositionKind, window: Sequence[int] | None, spatial_dims: int = 2
) -> SelfAttention:
    """Attention of 2 heads of 12 channels among features of 12, as it starts."""
    torch.manual_seed(0)
    block = SelfAttention(12, heads=2, head_channels=12, positions=positions, window=window)
    place_taps(block, "bottleneck", 0, Placement.identity(spatial_dims))
    return block


def self_attention(
    positions: PositionKind, window: Sequence[int] | None, spatial_dims: int = 2
) -> SelfAttention:
    """Attention that does much, and by weights that are far from uniform."""
    block = fresh_self_attention(positions, window, spatial_dims)
    for layer in (block.attention.query, block.attention.key, block.attention.out):
        nn.init.normal_(layer.weight, std=0.5)
    if block.bias is not None:
        nn.init.normal_(block.bias.table)
    return block


def fresh_additive(spatial_dims: int = 2) -> AdditiveSelfAttention:
    """Additive attention of width 5 among features of 6, as it starts."""
    torch.manual_seed(0)
    block = AdditiveSelfAttention(6, width=5)
    place_taps(block, "bottleneck", 0, Placement.identity(spatial_dims))
    return block


def additive(spatial_dims: int = 2) -> AdditiveSelfAttention:
    """Additive attention that does much, and by weights that are far from uniform."""
    block = fresh_additive(spatial_dims)
    for layer in (block.query, block.key, block.energy, block.out):
        nn.init.normal_(layer.weight)
    return block


def uniform(rows: Tensor) -> Tensor:
    return torch.full_like(rows, 1 / rows.shape[-1])


def window_of(positions: PositionKind, window: Sequence[int]) -> Sequence[int] | None:
    """All cells, which is a window of their number where positions need one."""
    return window if positions == "relative" else None


def crops(space: Sequence[int], window: Sequence[int]) -> list[tuple[slice, ...]]:
    """Where the windows lie on a grid; the last ones are what is left of it."""
    starts = [range(0, size, width) for size, width in zip(space, window, strict=True)]
    return [
        (..., *(slice(at, at + width) for at, width in zip(corner, window, strict=True)))
        for corner in itertools.product(*starts)
    ]


def shuffled(features: Tensor) -> Tensor:
    """The voxels in another order."""
    cells = features.flatten(2)
    order = torch.randperm(cells.shape[2], generator=torch.Generator().manual_seed(2))
    return cells[:, :, order].view(features.shape)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("windowed", [False, True])
def test_self_attention_starts_as_the_identity(
    positions: PositionKind, space: tuple[int, ...], windowed: bool
) -> None:
    window = [3, 4, 2][: len(space)] if windowed else window_of(positions, space)
    features = features_of(2, 12, *space)
    assert torch.equal(fresh_self_attention(positions, window)(features), features)


@pytest.mark.parametrize("space", SPACES)
def test_additive_attention_starts_as_the_identity(space: tuple[int, ...]) -> None:
    features = features_of(2, 6, *space)
    assert torch.equal(fresh_additive()(features), features)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("space", SPACES)
def test_the_order_of_the_voxels_matters_if_and_only_if_positions_are_told(
    positions: PositionKind, space: tuple[int, ...]
) -> None:
    block = self_attention(positions, window_of(positions, space))
    features = features_of(2, 12, *space)
    first, then = shuffled(block(features)), block(shuffled(features))
    if positions == "none":
        assert_close(first, then)
    else:
        assert not torch.allclose(first, then, atol=0.1)


@pytest.mark.parametrize("space", SPACES)
def test_additive_attention_ignores_the_order_of_voxels(space: tuple[int, ...]) -> None:
    block = additive()
    features = features_of(2, 6, *space)
    assert_close(shuffled(block(features)), block(shuffled(features)))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("space", SPACES)
def test_self_attention_adds_the_softmax_weighted_mean_of_the_values(
    positions: PositionKind, space: tuple[int, ...]
) -> None:
    block = self_attention(positions, window_of(positions, space), len(space))
    nn.init.normal_(block.norm.weight)
    nn.init.normal_(block.norm.bias)
    features = features_of(2, 12, *space)
    with recording(block) as maps:
        output = block(features)

    cells = features.flatten(2).transpose(1, 2)
    centred = cells - cells.mean(dim=2, keepdim=True)
    tokens = centred / (centred.square().mean(dim=2, keepdim=True) + block.norm.eps).sqrt()
    tokens = tokens * block.norm.weight + block.norm.bias
    if positions == "sincos":
        tokens = tokens + sincos(space, 12)
    query, key, value = (
        layer(tokens).view(2, -1, 2, 12).transpose(1, 2)
        for layer in (block.attention.query, block.attention.key, block.attention.value)
    )
    if positions == "rotary":
        query, key = rotate(query, space), rotate(key, space)
    logits = torch.einsum("bhqc,bhkc->bhqk", query, key) / math.sqrt(12)
    if block.bias is not None:
        logits = logits + block.bias()
    weights = logits.exp() / logits.exp().sum(dim=3, keepdim=True)
    taken = torch.einsum("bhqk,bhkc->bqhc", weights, value).flatten(2)
    added = (taken @ block.attention.out.weight.T).transpose(1, 2).view(features.shape)
    assert added.std() > 0.5
    assert_close(output, features + added, rtol=1e-5, atol=1e-5)
    assert_close(maps[RECEIVED], weights.sum(dim=2).view(2, 2, *space))


@pytest.mark.parametrize("positions", ["none", "sincos", "rotary"])
@pytest.mark.parametrize("space", SPACES)
def test_a_window_as_large_as_the_map_is_no_window(
    positions: PositionKind, space: tuple[int, ...]
) -> None:
    features = features_of(2, 12, *space)
    whole, windowed = self_attention(positions, None), self_attention(positions, space)
    assert torch.equal(windowed(features), whole(features))


@pytest.mark.parametrize("positions", ["none", "relative", "rotary"])
@pytest.mark.parametrize(
    ("space", "window"),
    [
        ((4, 6), (2, 3)),  # cut evenly
        ((5, 7), (2, 4)),  # with something left of each axis
        ((3, 7), (5, 4)),  # larger than an axis
        ((3, 2, 5), (2, 1, 3)),
    ],
)
def test_attention_in_windows_is_attention_in_each_crop(
    positions: PositionKind, space: tuple[int, ...], window: tuple[int, ...]
) -> None:
    block = self_attention(positions, window, len(space))
    features = features_of(2, 12, *space)
    with recording(block) as maps:
        output = block(features)
    # Offsets within a crop do not depend on where it lies. A bias needs the window's table.
    alone = block if positions == "relative" else self_attention(positions, None, len(space))
    for crop in crops(space, window):
        with recording(alone) as alone_maps:
            expected = alone(features[crop])
        assert_close(output[crop], expected, rtol=1e-5, atol=1e-5)
        assert_close(maps[RECEIVED][crop], alone_maps[RECEIVED], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    ("space", "window"), [((4, 6), (2, 3)), ((5, 7), (2, 4)), ((3, 2, 5), (2, 1, 3))]
)
def test_a_window_never_sees_beyond_itself(
    positions: PositionKind, space: tuple[int, ...], window: tuple[int, ...]
) -> None:
    block = self_attention(positions, window)
    features, others = features_of(2, 12, *space), features_of(2, 12, *space, seed=2)
    before = block(features)
    for crop in crops(space, window):
        elsewhere = others.clone()
        elsewhere[crop] = features[crop]
        assert_close(block(elsewhere)[crop], before[crop])
        # But the cells of the window do see one another: change the first of them alone.
        changed = features.clone()
        first = (..., *(part.start for part in crop[1:]))
        changed[first] = others[first]
        moved = (block(changed) - before).abs().amax(dim=(0, 1))
        within = torch.zeros(space, dtype=torch.bool)
        within[crop] = True
        assert (moved[within] > 1e-4).all()
        assert (moved[~within] < 1e-5).all()


def test_a_window_larger_than_the_map_takes_its_biases_by_offset_and_nothing_from_beyond() -> None:
    space, window = (2, 3), (4, 5)
    block = self_attention("relative", window)
    features = features_of(2, 12, *space)
    with recording(block) as maps:
        output = block(features)

    tokens = block.norm(features.flatten(2).transpose(1, 2))
    query, key, value = (
        layer(tokens).view(2, 6, 2, 12).transpose(1, 2)
        for layer in (block.attention.query, block.attention.key, block.attention.value)
    )
    # Of the window's 4 x 5 cells, those of the map.
    held = (cells_of(window) < torch.tensor(space)).all(dim=1)
    logits = query @ key.transpose(2, 3) / math.sqrt(12) + block.bias()[:, held][:, :, held]
    weights = logits.softmax(dim=3)
    taken = block.attention.out((weights @ value).transpose(1, 2).flatten(2))
    assert_close(output, features + taken.transpose(1, 2).view(features.shape))
    assert_close(maps[RECEIVED], weights.sum(dim=2).view(2, 2, *space))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    ("space", "window"), [((4, 6), (2, 3)), ((5, 7), (3, 4)), ((3, 2, 5), (2, 3, 3))]
)
def test_the_received_attention_of_all_voxels_sums_to_their_number(
    positions: PositionKind, space: tuple[int, ...], window: tuple[int, ...]
) -> None:
    block = self_attention(positions, window, len(space))
    with recording(block) as maps:
        block(features_of(2, 12, *space))
    share = maps[RECEIVED]
    assert share.shape == (2, 2, *space)
    assert share.std() > 0.1
    assert_close(share.flatten(2).sum(dim=2), torch.full((2, 2), float(math.prod(space))))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(("space", "window"), [((5, 7), (3, 4)), ((3, 2, 5), (2, 3, 3))])
def test_samples_of_a_batch_do_not_see_one_another(
    positions: PositionKind, space: tuple[int, ...], window: tuple[int, ...]
) -> None:
    block = self_attention(positions, window, len(space))
    features = features_of(3, 12, *space)
    with recording(block) as maps:
        output = block(features)
    for sample in range(3):
        with recording(block) as alone:
            assert_close(block(features[sample : sample + 1])[0], output[sample])
        assert_close(alone[RECEIVED][0], maps[RECEIVED][sample])


@pytest.mark.parametrize("window", [None, (3, 4)])
def test_recording_self_attention_changes_no_bit_and_the_identity_edit_nothing(
    window: tuple[int, ...] | None,
) -> None:
    block = self_attention("rotary", window)
    features = features_of(2, 12, 5, 7)
    output = block(features)
    with recording(block) as maps:
        assert torch.equal(block(features), output)
    with recording(block) as edited, editing(block, {RECEIVED: lambda rows: rows}):
        assert_close(block(features), output, rtol=1e-5, atol=1e-5)
    assert_close(edited[RECEIVED], maps[RECEIVED])


def test_self_attention_edited_to_uniform_adds_the_mean_of_the_values() -> None:
    block = self_attention("rotary", (2, 3))
    features = features_of(2, 12, 4, 6)
    with recording(block) as maps, editing(block, {RECEIVED: uniform}):
        output = block(features)
    assert_close(maps[RECEIVED], torch.ones(2, 2, 4, 6))
    for crop in crops((4, 6), (2, 3)):
        tokens = block.norm(features[crop].flatten(2).transpose(1, 2))
        mean = block.attention.out(block.attention.value(tokens).mean(dim=1))
        assert_close(output[crop], features[crop] + mean[:, :, None, None])


@pytest.mark.parametrize("window", [None, (3, 4)])
def test_a_sample_whose_heads_are_off_passes_bit_for_bit_and_the_others_unchanged(
    window: tuple[int, ...] | None,
) -> None:
    block = self_attention("rotary", window)
    features = features_of(2, 12, 5, 7)
    output = block(features)
    second_off = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    with editing(block, {BRANCH: lambda switches: switches * second_off}):
        switched = block(features)
    assert torch.equal(switched[0], output[0])
    assert torch.equal(switched[1], features[1])
    assert not torch.allclose(output[1], features[1], atol=0.1)


def test_gradients_reach_all_of_a_window_and_nothing_beyond() -> None:
    block = self_attention("relative", (2, 3))
    features = features_of(1, 12, 5, 7).requires_grad_()
    block(features)[0, :, 2, 3].sum().backward()
    reached = features.grad[0].abs().amax(dim=0) > 0
    expected = torch.zeros(5, 7, dtype=torch.bool)
    expected[2:4, 3:6] = True
    assert torch.equal(reached, expected)


def test_relative_positions_without_a_window_are_refused() -> None:
    with pytest.raises(AssertionError, match="relative positions need a window"):
        SelfAttention(12, heads=2, head_channels=12, positions="relative")


@pytest.mark.parametrize("space", SPACES)
def test_additive_attention_without_energy_adds_the_mean_of_the_values(
    space: tuple[int, ...],
) -> None:
    block = additive(len(space))
    nn.init.zeros_(block.energy.weight)
    features = features_of(2, 6, *space)
    with recording(block) as maps:
        output = block(features)
    values = block.value(block.norm(features.flatten(2).transpose(1, 2)))
    mean = values.mean(dim=1) @ block.out.weight.T
    assert_close(output, features + mean.view(2, 6, *[1] * len(space)))
    assert_close(maps[RECEIVED], torch.ones(2, 1, *space))


def test_additive_attention_between_two_voxels_gives_the_values_worked_out_by_hand() -> None:
    block = AdditiveSelfAttention(2, width=1)
    block.norm.eps = 0.0
    with torch.no_grad():
        block.query.weight.copy_(torch.tensor([[1.0, 0.0]]))
        block.query.bias.fill_(0.5)
        block.key.weight.copy_(torch.tensor([[2.0, 0.0]]))
        block.energy.weight.fill_(3.0)
        block.value.weight.copy_(torch.eye(2))
        block.value.bias.copy_(torch.tensor([0.0, 1.0]))
        block.out.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 10.0]]))
    features = torch.tensor([[[[3.0, 0.0]], [[1.0, 4.0]]]])
    # Voxels (3, 1) and (0, 4) become (1, -1) and (-1, 1). Queries 1 + 0.5 and -1 + 0.5, keys 2 and
    # -2; energies 3 tanh of the sums: 3.5 and -0.5 for the first query, 1.5 and -2.5 for the other.
    place_taps(block, "bottleneck", 0, Placement.identity(2))
    of_first = 1 / (1 + math.exp(3 * math.tanh(-0.5) - 3 * math.tanh(3.5)))
    of_other = 1 / (1 + math.exp(3 * math.tanh(-2.5) - 3 * math.tanh(1.5)))
    # Values (1, 0) and (-1, 2), of which the second channel counts tenfold.
    expected = [
        [3 + of_first - (1 - of_first), 0 + of_other - (1 - of_other)],
        [1 + 10 * 2 * (1 - of_first), 4 + 10 * 2 * (1 - of_other)],
    ]
    with recording(block) as maps:
        assert_close(block(features), torch.tensor(expected)[None, :, None])
    received = [of_first + of_other, 2 - of_first - of_other]
    assert_close(maps[RECEIVED], torch.tensor([[[received]]]))


# All pairs of a query are 2 samples x 24 keys x width 5 = 240 numbers, and its weights 48.
@pytest.mark.parametrize(("largest", "count"), [(1, 24), (240 * 5 + 1, 5), (240 * 23, 2)])
@pytest.mark.parametrize("space", SPACES)
def test_additive_attention_block_by_block_has_the_same_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, space: tuple[int, ...], largest: int, count: int
) -> None:
    block = additive(len(space))
    features = features_of(2, 6, *space).requires_grad_()
    probe = features_of(2, 6, *space, seed=2)

    def run() -> list[Tensor]:
        with recording(block) as maps:
            output = block(features)
        inputs = [features, *block.parameters()]
        gradients = torch.autograd.grad((output * probe).sum(), inputs)
        with torch.no_grad():
            unwatched = block(features)
            with editing(block, {RECEIVED: torch.square}):
                edited = block(features)
        return [output, maps[RECEIVED], unwatched, edited, *gradients]

    whole = run()
    monkeypatch.setattr(multihead, "LARGEST_BLOCK", largest)
    assert len(list(blocks(24, 240))) == count
    for by_blocks, at_once in zip(run(), whole, strict=True):
        assert_close(by_blocks, at_once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_edits_of_additive_attention_reach_its_weights(space: tuple[int, ...]) -> None:
    block = additive(len(space))
    features = features_of(2, 6, *space)
    output = block(features)
    with recording(block) as maps:
        assert torch.equal(block(features), output)
    assert_close(maps[RECEIVED].flatten(1).mean(dim=1), torch.ones(2))
    seen: list[Tensor] = []

    def look(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows

    with recording(block) as edited_maps, editing(block, {RECEIVED: look}):
        assert_close(block(features), output)
    assert_close(edited_maps[RECEIVED], maps[RECEIVED])
    assert_close(seen[0].sum(dim=3), torch.ones(2, 1, math.prod(space)))
    assert_close(maps[RECEIVED], seen[0].sum(dim=2).view(2, 1, *space))

    with editing(block, {RECEIVED: uniform}):
        by_uniform = block(features)
    assert not torch.allclose(by_uniform, output, atol=0.1)
    nn.init.zeros_(block.energy.weight)
    assert_close(by_uniform, block(features))


def test_a_sample_whose_additive_attention_is_off_passes_bit_for_bit() -> None:
    block = additive()
    features = features_of(2, 6, 4, 6)
    output = block(features)
    first_off = torch.tensor([[0.0], [1.0]])
    with editing(block, {BRANCH: lambda switches: switches * first_off}):
        switched = block(features)
    assert torch.equal(switched[0], features[0])
    assert torch.equal(switched[1], output[1])
    assert not torch.allclose(output[0], features[0], atol=0.1)


def test_samples_of_additive_attention_do_not_see_one_another() -> None:
    block = additive()
    features = features_of(3, 6, 4, 6)
    for sample, expected in enumerate(block(features)):
        assert_close(block(features[sample : sample + 1])[0], expected)


@pytest.mark.parametrize("kind", ["multi_head", "additive"])
def test_bfloat16_features_stay_bfloat16_but_received_attention_is_float32(kind: str) -> None:
    block = self_attention("none", (3, 4)) if kind == "multi_head" else additive()
    features = features_of(2, 12 if kind == "multi_head" else 6, 5, 7)
    # Where products are small, rounding them does little.
    with torch.no_grad():
        for name, weight in block.named_parameters():
            if "query" in name or "energy" in name:
                weight.mul_(0.2)
    expected = block(features)
    with recording(block) as maps, torch.autocast("cpu", dtype=torch.bfloat16):
        output = block(features.bfloat16())
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    assert not torch.equal(maps[RECEIVED], maps[RECEIVED].bfloat16().float()), "was rounded"
    total = maps[RECEIVED].flatten(2).sum(dim=2)
    assert_close(total, torch.full_like(total, 35.0))
