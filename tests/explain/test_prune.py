"""Laws of pruning: a model without heads is the model with them masked, only smaller."""

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from segkit.config.attention import CrossAttentionConfig, UTransformerGateConfig
from segkit.errors import ModelError
from segkit.explain.heads.study import masking, multi_headed
from segkit.explain.prune import prune
from segkit.inference.predictor import Predictor
from segkit.model.folder import Model, load_model, save_model
from segkit.nn.map_tap import editing
from tests.explain.heads.test_study import attending_model, noise_volume, self_attention

Dims = Literal[2, 3]
POSITION_KINDS = ("none", "sincos", "relative", "rotary")


def image_of(seed: int = 0) -> Tensor:
    """Two volumes, of 2 x 2 x 2 cells at the coarsest level, or eight planes of 2 x 2 each."""
    return torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


def output_of(model: Model, kept: dict[str, list[int]] | None = None) -> Tensor:
    """Logits in double precision, of named positions all heads masked but those kept."""
    edits = {}
    for position, heads in (kept or {}).items():
        edits.update(masking(position, heads))
    network = copy.deepcopy(model.network).double()
    with torch.no_grad(), editing(network, edits):
        return network(image_of())


def num_parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.network.parameters())


def assert_pruned_is_masked(model: Model, kept: dict[str, list[int]]) -> Model:
    pruned = prune(model, kept)
    assert_close(output_of(pruned), output_of(model, kept), rtol=1e-6, atol=1e-6)
    everything = output_of(model)
    assert not torch.allclose(output_of(pruned), everything, rtol=1e-3, atol=1e-3)
    return pruned


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("positions", POSITION_KINDS)
def test_self_attention_without_heads_is_that_with_them_masked(
    positions: str, windowed: bool, spatial_dims: Dims
) -> None:
    window = [1, 2, 2][-spatial_dims:] if windowed else None
    model = attending_model(
        spatial_dims=spatial_dims,
        bottleneck=self_attention(3, head_channels=6, positions=positions, window=window),
    )
    pruned = assert_pruned_is_masked(model, {"bottleneck": [0, 2]})
    # Of 8 channels each, W_q and W_v with a bias and W_k and W_o without, for six channels.
    fewer = 6 * (9 + 8 + 9 + 8)
    if positions == "relative":
        fewer += {True: {2: 9, 3: 9}, False: {2: 9, 3: 27}}[windowed][spatial_dims]
    assert num_parameters(model) - num_parameters(pruned) == fewer


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("kind", [CrossAttentionConfig, UTransformerGateConfig])
def test_attention_at_skips_without_heads_is_that_with_them_masked(
    kind: type[CrossAttentionConfig] | type[UTransformerGateConfig], spatial_dims: Dims
) -> None:
    model = attending_model(
        spatial_dims=spatial_dims, skip=kind(levels=[0, 1], heads=[2, 3], head_channels=4)
    )
    pruned = assert_pruned_is_masked(model, {"skip.0": [1], "skip.1": [2, 0]})
    # Queries are of the coarser level, of 7 and 8 channels, values of the skip, of 6 and 7; keys
    # are of the skip in `cross_attention` and of the coarser level in `u_transformer`.
    keys = (6, 7) if kind is CrossAttentionConfig else (7, 8)
    fewer = 4 * ((8 + keys[0] + 7 + 6) + (9 + keys[1] + 8 + 7))
    assert num_parameters(model) - num_parameters(pruned) == fewer
    assert pruned.description.network.attention.skip.heads == [1, 2]


@pytest.mark.parametrize("kept", [[0], [1], [2]])
def test_any_one_head_may_be_left(kept: list[int]) -> None:
    model = attending_model(bottleneck=self_attention(3))
    assert_pruned_is_masked(model, {"bottleneck": kept})


def test_the_order_and_repetition_of_heads_to_keep_are_of_no_matter() -> None:
    model = attending_model(bottleneck=self_attention(3))
    tidy, untidy = (prune(model, {"bottleneck": kept}) for kept in ([0, 2], [2, 0, 2]))
    assert torch.equal(output_of(tidy), output_of(untidy))


def test_positions_that_are_not_named_keep_all_their_heads() -> None:
    attention: dict[str, Any] = {
        "skip": CrossAttentionConfig(levels=[0, 1], heads=2, head_channels=4),
        "bottleneck": self_attention(3),
    }
    model = attending_model(**attention)
    pruned = assert_pruned_is_masked(model, {"skip.1": [1]})
    found = {position: m.attention.heads for position, m in multi_headed(pruned.network).items()}
    assert found == {"skip.0": 2, "skip.1": 1, "bottleneck": 3}


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_pruning_nothing_changes_no_bit(spatial_dims: Dims) -> None:
    model = attending_model(spatial_dims=spatial_dims, bottleneck=self_attention(2))
    for kept in ({}, {"bottleneck": [0, 1]}):
        same = prune(model, kept)
        assert same.description.network.attention.bottleneck.heads == 2
        assert torch.equal(output_of(same), output_of(model))


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(
    ("attention", "kept"),
    [
        ({"bottleneck": self_attention(3, positions="relative")}, {"bottleneck": [2]}),
        (
            {
                "skip": UTransformerGateConfig(levels=[0, 1], heads=2, head_channels=4),
                "bottleneck": self_attention(3),
            },
            {"skip.0": [1], "bottleneck": [1, 2]},
        ),
    ],
    ids=["bottleneck", "both"],
)
def test_a_pruned_model_is_saved_and_loaded_as_any_other(
    attention: dict[str, Any], kept: dict[str, list[int]], spatial_dims: Dims, tmp_path: Path
) -> None:
    pruned = prune(attending_model(spatial_dims=spatial_dims, **attention), kept)
    save_model(tmp_path, pruned)
    loaded = load_model(tmp_path)
    assert loaded.description == pruned.description
    assert torch.equal(output_of(loaded), output_of(pruned))


def test_a_pruned_model_segments_as_the_masked_one() -> None:
    model = attending_model(bottleneck=self_attention(3))
    volume = noise_volume(10, 8, 9)
    with editing(model.network, masking("bottleneck", [1])):
        masked = Predictor(model, device="cpu")(volume).labels.data
    pruned = Predictor(prune(model, {"bottleneck": [1]}), device="cpu")(volume).labels.data
    whole = Predictor(model, device="cpu")(volume).labels.data
    assert (pruned == masked).mean() > 0.999
    assert (pruned == whole).mean() < 0.999


def test_the_model_itself_is_left_alone() -> None:
    model = attending_model(bottleneck=self_attention(3, positions="relative"))
    described = model.description.model_dump()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    pruned = prune(model, {"bottleneck": [1]})
    for parameter in pruned.network.parameters():
        parameter.data.fill_(7.0)
    assert model.description.model_dump() == described
    after = model.network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.network.training is False and pruned.network.training is False


def test_heads_that_are_not_there_cannot_be_kept() -> None:
    model = attending_model(bottleneck=self_attention(3))
    for kept, message in (
        ({"skip.1": [0]}, r"^no attention with heads at skip\.1; the model has \['bottleneck'\]$"),
        ({"bottleneck": [0, 3]}, r"^bottleneck: heads to keep .* 0 … 2, found \[0, 3\]$"),
        ({"bottleneck": [-1]}, r"^bottleneck: heads to keep .* 0 … 2, found \[-1\]$"),
        ({"bottleneck": []}, r"^bottleneck: heads to keep .* 0 … 2, found \[\]$"),
    ):
        with pytest.raises(ModelError, match=message):
            prune(model, kept)
