"""Laws of how far attention reaches: closed forms, and distances of a network's own weights."""

import itertools
import math
from typing import Literal

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from numpy import ndarray
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor, nn

from segkit.config.attention import AdditiveSelfAttentionConfig, CrossAttentionConfig
from segkit.explain.heads.reach import HeadReach, ReachWatcher, boxes, uniform_distance, watching
from segkit.geometry.grid import Grid, Placement
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.nn import multihead
from segkit.nn import self_attention as bottleneck
from segkit.nn.map_tap import Edit, editing, place_taps, taps
from segkit.nn.multihead import MultiHeadAttention, windows_over
from tests.explain.heads.test_study import Slices, attending_model, noise_volume, self_attention

GRIDS = st.lists(
    st.tuples(st.integers(1, 5), st.floats(0.1, 6.0, allow_nan=False)), min_size=1, max_size=3
)


def uniform_rows(num_cells: int, *, batch_size: int = 1, heads: int = 1) -> Tensor:
    return torch.full((batch_size, heads, num_cells, num_cells), 1 / num_cells)


def random_rows(batch_size: int, heads: int, num_cells: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch_size, heads, num_cells, num_cells, generator=generator)
    return (3 * logits).softmax(dim=-1)


def centres_mm(cells: tuple[int, ...], pitch_mm: tuple[float, ...]) -> ndarray:
    index = np.array(list(itertools.product(*[range(size) for size in cells])))
    return index * np.array(pitch_mm)


def distances_mm(cells: tuple[int, ...], pitch_mm: tuple[float, ...]) -> ndarray:
    """Of every pair of cells."""
    centres = centres_mm(cells, pitch_mm)
    return np.linalg.norm(centres[:, None] - centres[None], axis=-1)


def reach_of(
    rows: Tensor,
    cells: tuple[int, ...],
    pitch_mm: tuple[float, ...],
    window: tuple[int, ...] | None = None,
) -> list[HeadReach]:
    watcher = ReachWatcher(cells, window=window, pitch_mm=pitch_mm)
    watcher(rows)
    return watcher.result()


def test_a_cell_that_attends_to_itself_has_distance_0() -> None:
    (head,) = reach_of(torch.eye(12)[None, None], (3, 4), (0.7, 1.3))
    assert head.distance_mm == 0 and head.entropy == 0
    assert head.figures() == {
        "distance_mm": 0,
        "distance_over_uniform": 0,
        "entropy": 0,
        "entropy_over_uniform": 0,
    }


@pytest.mark.parametrize("num_cells", [2, 3, 7])
@pytest.mark.parametrize("pitch", [1.0, 4.5])
def test_uniform_attention_on_a_line_has_a_closed_form(num_cells: int, pitch: float) -> None:
    (head,) = reach_of(uniform_rows(num_cells), (num_cells,), (pitch,))
    expected = pitch * (num_cells**2 - 1) / (3 * num_cells)
    assert_allclose([head.distance_mm, head.uniform_distance_mm], expected, rtol=1e-6)
    assert_allclose([head.entropy, head.uniform_entropy], math.log(num_cells), rtol=1e-6)
    assert_allclose(list(head.figures().values())[1::2], 1, rtol=1e-6)
    assert head.distance_ratio == pytest.approx(1)


@given(st.floats(0.1, 6.0), st.floats(0.1, 6.0))
def test_uniform_attention_on_a_square_is_a_mean_of_sides_and_diagonal(a: float, b: float) -> None:
    (head,) = reach_of(uniform_rows(4), (2, 2), (a, b))
    expected = (a + b + math.hypot(a, b)) / 4
    assert_allclose([head.distance_mm, head.uniform_distance_mm], expected, rtol=1e-6)


@given(GRIDS)
def test_distance_of_uniform_attention_is_the_mean_over_all_pairs(
    axes: list[tuple[int, float]],
) -> None:
    cells, pitch = (tuple(part) for part in zip(*axes, strict=True))
    expected = distances_mm(cells, pitch).mean()
    assert_allclose(uniform_distance(cells, pitch), expected, rtol=1e-9, atol=1e-12)


def test_a_single_cell_has_a_ratio_of_1() -> None:
    (head,) = reach_of(torch.ones(1, 1, 1, 1), (1, 1), (2.0, 3.0))
    assert head.distance_mm == head.uniform_distance_mm == head.uniform_entropy == 0
    assert head.figures()["distance_over_uniform"] == head.figures()["entropy_over_uniform"] == 1


@pytest.mark.parametrize("cells", [(3, 4), (2, 3, 2)])
def test_distance_and_entropy_are_means_over_queries_of_each_head(cells: tuple[int, ...]) -> None:
    pitch = (0.7, 1.3, 4.0)[: len(cells)]
    rows = random_rows(3, 2, math.prod(cells))
    found = reach_of(rows, cells, pitch)
    values = rows.double().numpy()
    distance = (values * distances_mm(cells, pitch)).sum(axis=3).mean(axis=(0, 2))
    entropy = -(values * np.log(values)).sum(axis=3).mean(axis=(0, 2))
    assert_allclose([head.distance_mm for head in found], distance, rtol=1e-6)
    assert_allclose([head.entropy for head in found], entropy, rtol=1e-6)
    assert distance[0] != pytest.approx(distance[1], rel=1e-3)


def test_heads_are_separate_and_samples_are_averaged() -> None:
    """The first head looks at itself, then at all alike; the second the other way round; the third
    at itself always. On a line of 3, all alike is 8/9 of the pitch."""
    itself, alike = torch.eye(3), torch.full((3, 3), 1 / 3)
    first = torch.stack([itself, alike, itself])[None]
    second = torch.stack([alike, itself, itself])[None]
    watcher = ReachWatcher((3,), window=None, pitch_mm=(9.0,))
    watcher(first)
    apart = [head.distance_mm for head in watcher.result()]
    watcher(second)
    together = [head.distance_mm for head in watcher.result()]
    assert_allclose(apart, [0, 8, 0], atol=1e-6)
    assert_allclose(together, [4, 4, 0], atol=1e-6)
    at_once = reach_of(torch.cat([first, second]), (3,), (9.0,))
    assert_allclose([head.distance_mm for head in at_once], together)


@given(st.sets(st.integers(1, 11)), st.integers(1, 2))
def test_rows_in_blocks_give_the_same_as_the_whole_matrix(cuts: set[int], passes: int) -> None:
    rows = random_rows(2, 2, 12)
    blockwise = ReachWatcher((3, 4), window=None, pitch_mm=(1.0, 2.5))
    for _ in range(passes):
        for first, last in itertools.pairwise([0, *sorted(cuts), 12]):
            blockwise(rows[:, :, first:last])
    for found, whole in zip(blockwise.result(), reach_of(rows, (3, 4), (1.0, 2.5)), strict=True):
        assert_allclose(found.distance_mm, whole.distance_mm, rtol=1e-9)
        assert_allclose(found.entropy, whole.entropy, rtol=1e-9)


def test_rows_pass_unchanged() -> None:
    rows = random_rows(2, 3, 6)
    before = rows.clone()
    assert ReachWatcher((2, 3), window=None, pitch_mm=(1.0, 1.0))(rows) is rows
    assert torch.equal(rows, before)


@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 4)), min_size=1, max_size=3))
def test_boxes_are_the_cells_that_windows_hold(axes: list[tuple[int, int]]) -> None:
    cells, window = (list(part) for part in zip(*axes, strict=True))
    sizes = [math.prod(box) for box in boxes(cells, window)]
    assert sum(sizes) == math.prod(cells)
    inside = windows_over(cells, window).inside(1, torch.device("cpu"))
    held = [math.prod(window)] * len(sizes) if inside is None else inside.sum(dim=1).tolist()
    assert sizes == held


def test_boxes_of_shifted_windows_are_the_cells_that_attend_to_one_another() -> None:
    # Windows of 3 shifted by 1 hold 1, 3 and 3 of 7 cells along an axis, and 1, 3 and 1 of 5.
    assert list(boxes((7, 5), (3, 3), (1, 1))) == list(itertools.product((1, 3, 3), (1, 3, 1)))
    # A window that covers an axis is not shifted there.
    assert list(boxes((4, 3), (2, 3), (1, 1))) == [(1, 3), (2, 3), (1, 3)]


def test_uniform_attention_in_shifted_windows_has_a_ratio_of_one() -> None:
    torch.manual_seed(0)
    block = bottleneck.SelfAttention(
        8, heads=2, head_channels=4, positions="none", window=(2, 3), shift=(1, 1)
    )
    nn.init.zeros_(block.attention.query.weight)
    nn.init.zeros_(block.attention.query.bias)
    place_taps(block, "bottleneck", 0, Placement.identity(2))
    watcher = ReachWatcher((5, 7), window=(2, 3), shift=(1, 1), pitch_mm=(2.0, 1.5))
    with editing(block, {"bottleneck/received": watcher}):
        block(torch.randn(2, 8, 5, 7))
    for head in watcher.result():
        assert head.distance_ratio == pytest.approx(1.0, rel=1e-5)
        assert head.entropy == pytest.approx(head.uniform_entropy, rel=1e-5)


def test_windows_are_weighted_by_their_number_of_cells() -> None:
    """A line of 3 in windows of 2: one of two cells, whose mean distance is half the pitch and
    whose entropy is log 2, and one of a single cell. Per cell, that is a third and 2/3 log 2."""
    (head,) = reach_of(
        torch.stack([torch.full((1, 2, 2), 0.5), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])]),
        (3,),
        (6.0,),
        window=(2,),
    )
    assert_allclose([head.distance_mm, head.uniform_distance_mm], 2)
    assert_allclose([head.entropy, head.uniform_entropy], 2 / 3 * math.log(2), rtol=1e-6)


@pytest.mark.parametrize("block", [2**24, 30, 1])
@pytest.mark.parametrize(
    ("cells", "window"),
    [((5, 4), (2, 3)), ((3, 2), (4, 4)), ((3, 5, 2), (2, 2, 2)), ((4, 4), (2, 2)), ((2, 3), None)],
)
def test_uniform_attention_has_a_ratio_of_one_whatever_the_windows(
    cells: tuple[int, ...],
    window: tuple[int, ...] | None,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(multihead, "LARGEST_BLOCK", block)
    torch.manual_seed(0)
    attention = bottleneck.SelfAttention(6, heads=2, head_channels=4, window=window)
    nn.init.normal_(attention.attention.out.weight)
    for part in (attention.attention.query, attention.attention.key):
        nn.init.zeros_(part.weight)
    place_taps(attention, "bottleneck", 0, Placement.identity(len(cells)))
    features = torch.randn(2, 6, *cells)
    watcher = ReachWatcher(cells, window=window, pitch_mm=(0.7, 1.3, 4.0)[: len(cells)])
    with editing(attention, {"bottleneck/received": watcher}):
        watched = attention(features)
    assert_allclose(watched.detach(), attention(features).detach(), rtol=1e-4, atol=1e-5)
    for head in watcher.result():
        assert head.distance_ratio == pytest.approx(1, rel=1e-6)
        assert head.entropy == pytest.approx(head.uniform_entropy, rel=1e-6)


@torch.no_grad()
def explicit_reach(
    module: bottleneck.SelfAttention, features: list[Tensor], pitch_mm: tuple[float, ...]
) -> tuple[ndarray, ndarray]:
    """Distance and entropy of each head, the windows cut out by hand, of the layer's own q and k.

    Every query of every image counts alike.
    """
    attention = module.attention
    distance, entropy, queries = np.zeros(attention.heads), np.zeros(attention.heads), 0
    for image in features:
        space = image.shape[2:]
        window = module.window or space
        starts = [range(0, size, width) for size, width in zip(space, window, strict=True)]
        for corner in itertools.product(*starts):
            region = tuple(
                slice(first, first + width) for first, width in zip(corner, window, strict=True)
            )
            part = image[(slice(None), slice(None), *region)]
            tokens = module.norm(part.flatten(2).transpose(1, 2))
            query = attention.query(tokens).unflatten(2, (attention.heads, -1)).double()
            key = attention.key(tokens).unflatten(2, (attention.heads, -1)).double()
            logits = torch.einsum("bqhc,bkhc->bhqk", query, key) / math.sqrt(query.shape[-1])
            weights = logits.softmax(dim=-1).detach().numpy()
            apart = distances_mm(tuple(part.shape[2:]), pitch_mm)
            distance += (weights * apart).sum(axis=(0, 2, 3))
            entropy -= (weights * np.log(np.maximum(weights, 1e-300))).sum(axis=(0, 2, 3))
            queries += weights.shape[0] * weights.shape[2]
    return distance / queries, entropy / queries


SPACING = (0.7, 1.3, 4.0)


def volume_of(*shape: int, seed: int = 0) -> Volume:
    values = noise_volume(*shape, seed=seed).data
    return Volume(values, Grid(values.shape, np.diag([*SPACING, 1.0])))


@pytest.mark.parametrize("window", [None, [3, 2, 1], [2, 2, 2]])
def test_reach_is_that_of_the_whole_matrix_in_millimetres(window: list[int] | None) -> None:
    model = attending_model(
        patch_size=(20, 8, 8),
        spacing=SPACING,
        strides=[[2, 2, 1], [2, 2, 2]],
        bottleneck=self_attention(3, window=window),
    )
    module = next(m for m in model.network.modules() if isinstance(m, bottleneck.SelfAttention))
    features: list[Tensor] = []
    predictor, volume = Predictor(model, device="cpu"), volume_of(23, 8, 13)
    with watching(predictor) as watchers:
        watched = predictor(volume)
    handle = module.register_forward_pre_hook(lambda _, given: features.append(given[0].clone()))
    plain = predictor(volume)
    handle.remove()
    assert_array_equal(watched.labels.data, plain.labels.data)
    assert len(np.unique(plain.labels.data)) > 1
    assert len(features) > 1 and features[0].shape[2:] == (5, 2, 4)
    assert all(tap.edit is None for tap in taps(model.network).values())
    (found,) = [watcher.result() for watcher in watchers.values()]
    distance, entropy = explicit_reach(module, features, (4 * 0.7, 4 * 1.3, 2 * 4.0))
    assert_allclose([head.distance_mm for head in found], distance, rtol=1e-4)
    assert_allclose([head.entropy for head in found], entropy, rtol=1e-4)


def test_every_matrix_is_observed_with_its_own_cells_and_pitch() -> None:
    model = attending_model(
        patch_size=(16, 8, 8),
        spacing=SPACING,
        strides=[[2, 2, 1], [2, 2, 2]],
        skip=CrossAttentionConfig(levels=[0, 1], heads=[1, 2], head_channels=4),
        bottleneck=AdditiveSelfAttentionConfig(width=5),
    )
    predictor, volume = Predictor(model, device="cpu"), volume_of(16, 8, 8)
    seen: dict[str, list[Tensor]] = {"skip.0": [], "skip.1": [], "bottleneck": []}

    def keeper(kept: list[Tensor]) -> Edit:
        def keep(rows: Tensor) -> Tensor:
            kept.append(rows.clone())
            return rows

        return keep

    with editing(model.network, {f"{key}/received": keeper(kept) for key, kept in seen.items()}):
        predictor(volume)
    with watching(predictor) as watchers:
        predictor(volume)
    assert set(watchers) == set(seen)
    for position, cells, stride in (
        ("skip.0", (8, 4, 8), (2, 2, 1)),
        ("skip.1", (4, 2, 4), (4, 4, 2)),
        ("bottleneck", (4, 2, 4), (4, 4, 2)),
    ):
        pitch = tuple(mm * step for mm, step in zip(SPACING, stride, strict=True))
        rows = torch.cat(seen[position]).double().numpy()
        expected = (rows * distances_mm(cells, pitch)).sum(axis=3).mean(axis=(0, 2))
        found = watchers[position].result()
        assert_allclose([head.distance_mm for head in found], expected, rtol=1e-5)
        assert {head.uniform_distance_mm for head in found} == {uniform_distance(cells, pitch)}


@pytest.mark.parametrize(
    ("slices", "in_plane"),
    [("sagittal", (1.3, 4.0)), ("coronal", (0.7, 4.0)), ("axial", (0.7, 1.3))],
)
def test_the_pitch_of_slices_is_that_of_their_own_axes(
    slices: Slices, in_plane: tuple[float, float]
) -> None:
    model = attending_model(
        spatial_dims=2,
        patch_size=(8, 12),
        spacing=SPACING,
        strides=[[2, 1], [2, 2]],
        slices=slices,
        bottleneck=self_attention(2),
    )
    for module in model.network.modules():
        if isinstance(module, MultiHeadAttention):
            nn.init.zeros_(module.query.weight)
            nn.init.zeros_(module.query.bias)
    predictor = Predictor(model, device="cpu")
    with watching(predictor) as watchers:
        predictor(volume_of(9, 10, 11))
    pitch = (4 * in_plane[0], 2 * in_plane[1])
    expected = distances_mm((2, 6), pitch).mean()
    for head in watchers["bottleneck"].result():
        assert_allclose([head.distance_mm, head.uniform_distance_mm], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["none", "gates"])
def test_a_model_without_attention_matrix_has_nothing_to_observe(
    kind: Literal["none", "gates"],
) -> None:
    attention = {"skip": "additive_grid", "encoder": "se"} if kind == "gates" else {}
    predictor = Predictor(attending_model(**attention), device="cpu")
    with watching(predictor) as watchers:
        predictor(noise_volume(8, 8, 8))
    assert watchers == {}
