"""Settings of attention become modules: which, and where."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from segkit.config.attention import SelfAttentionConfig
from segkit.config.load import validated
from segkit.config.model import ModelDescription
from segkit.config.training import Config
from segkit.errors import ConfigError
from segkit.model.build import build_network
from segkit.model.build_attention import token_factory
from segkit.nn import channel_attention as channel
from segkit.nn import cross_attention as cross
from segkit.nn import gates, pooling
from segkit.nn import self_attention as bottleneck
from segkit.nn import spatial_attention as spatial
from segkit.nn.blocks import Modulated
from segkit.nn.large_kernel import LargeKernelAttention
from segkit.nn.map_tap import Stage
from segkit.nn.normalisation import GroupNormalisation, InstanceNormalisation
from segkit.nn.paired_attention import PairedAttention
from segkit.nn.slicewise import SlicewiseNetwork
from segkit.nn.transformer import TransformerBlock
from segkit.nn.unet import UNet
from tests.config.test_attention import OPTIONS, every_kind

CLASSES: dict[str, type[nn.Module]] = {
    "additive_grid": gates.AdditiveGridGate,
    "additive_same_level": gates.AdditiveSameLevelGate,
    "cross_attention": cross.CrossAttention,
    "u_transformer": cross.UTransformerGate,
    "se": channel.SqueezeExcitation,
    "eca": channel.EfficientChannelAttention,
    "bam": spatial.BottleneckAttention,
    "scse": spatial.ConcurrentExcitation,
    "spatial": spatial.PooledSpatialAttention,
    "sse": spatial.SpatialExcitation,
    "gc": channel.GlobalContext,
    "self_attention": bottleneck.SelfAttention,
    "additive_self": bottleneck.AdditiveSelfAttention,
    "transformer": Stage,
    "lka": LargeKernelAttention,
    "epa": PairedAttention,
    "mean": pooling.MeanPooling,
    "gated": pooling.GatedPooling,
    "learned_query": pooling.LearnedQueryPooling,
}


SIZES: dict[int, dict[str, Any]] = {
    2: {"folder": "scans", "patch_size": [48, 48]},
    3: {"folder": "scans", "patch_size": [48, 48, 48]},
}


def built(
    attention: dict[str, Any],
    *,
    patch_size: list[int] | None = None,
    num_labels: int = 3,
    **network: Any,
) -> UNet:
    """The network of a description, without the planes around one in 2D."""
    tree = {"spatial_dims": 2, "channels": [8, 12, 16, 20], **network, "attention": attention}
    description = ModelDescription(
        segkit="test",
        run="test",
        channels=["a", "b"],
        labels={f"label {number}": number for number in range(num_labels)},
        network=validated(
            Config, {"data": SIZES[tree["spatial_dims"]], "network": tree}, ""
        ).network,
        spacing=(1.0, 1.0, 1.0),
        normalisation=["zscore", "zscore"],  # type: ignore[list-item]
        slices="axial",
        patch_size=patch_size or SIZES[tree["spatial_dims"]]["patch_size"],
    )
    whole = build_network(description)
    assert isinstance(whole, SlicewiseNetwork) == (tree["spatial_dims"] == 2)
    return whole.network if isinstance(whole, SlicewiseNetwork) else whole


def attention_of(network: UNet) -> dict[str, nn.Module]:
    """What attends at each place where anything does; a lone map without what multiplies it."""
    places: dict[str, nn.Module | None] = {
        **{f"encoder.{level}": parts[2] for level, parts in enumerate(network.encoder)},
        **{f"decoder.{level}": join.attention for level, join in enumerate(network.decoder)},
        **{f"skip.{level}": join.gate for level, join in enumerate(network.decoder)},
        "bottleneck": network.bottleneck,
        "presence": network.presence,
    }
    return {
        place: module.attention_maps[0]
        if isinstance(module, Modulated) and len(module.attention_maps) == 1
        else module
        for place, module in places.items()
        if module is not None and not isinstance(module, nn.Identity)
    }


def squeezed_widths(module: nn.Module) -> set[int]:
    """Out of how many channels the channels' maps are made."""
    return {part.squeeze.out_features for part in module.modules() if hasattr(part, "squeeze")}


# Which modules they become

PLACES = {
    "skip": ["skip.1", "skip.2"],
    "encoder": ["encoder.0", "encoder.1", "encoder.2", "encoder.3"],
    "decoder": ["decoder.0", "decoder.1", "decoder.2"],
    "bottleneck": ["bottleneck"],
    "head": ["presence"],
}


@pytest.mark.parametrize("spatial_dims", [2, 3])
@every_kind
def test_a_kind_sits_at_its_place_and_at_no_other(place: str, kind: str, spatial_dims: int) -> None:
    found = attention_of(built({place: kind}, spatial_dims=spatial_dims, channels=[8, 8, 8, 8]))
    expected = (["skip.0"] if kind == "additive_same_level" else []) + PLACES[place]
    if kind in ("epa", "lka") and spatial_dims == 3:
        # 48 x 48 x 48 voxels are too many.
        expected = expected[1:]
    assert sorted(found) == expected
    for module in found.values():
        if kind == "cbam":
            assert isinstance(module, Modulated)
            assert [type(part) for part in module.attention_maps] == [
                channel.PooledChannelAttention,
                spatial.PooledSpatialAttention,
            ]
        else:
            assert type(module) is CLASSES[kind]


def test_without_settings_nothing_attends() -> None:
    assert attention_of(built({})) == {}


def test_kinds_at_all_places_do_not_mix() -> None:
    kinds = {
        "skip": "additive_grid",
        "encoder": "eca",
        "decoder": "sse",
        "bottleneck": "additive_self",
        "head": "gated",
    }
    found = attention_of(built(kinds))
    assert found.keys() == {name for names in PLACES.values() for name in names}
    for place, kind in kinds.items():
        assert all(type(found[name]) is CLASSES[kind] for name in PLACES[place])


@pytest.mark.parametrize("kind", list(OPTIONS["skip"]))
@pytest.mark.parametrize("levels", [[0], [2, 0], [1, 1], []])
def test_skips_attend_only_at_the_given_levels(kind: str, levels: list[int]) -> None:
    found = attention_of(built({"skip": {"kind": kind, "levels": levels}}))
    assert sorted(found) == [f"skip.{level}" for level in sorted(set(levels))]


@every_kind
def test_attention_changes_no_key_or_shape_of_the_other_weights(place: str, kind: str) -> None:
    def shapes(network: UNet) -> dict[str, tuple[int, ...]]:
        return {name: tuple(weight.shape) for name, weight in network.state_dict().items()}

    plain, attended = shapes(built({})), shapes(built({place: kind}))
    assert attended.items() > plain.items()
    inside = {
        "skip": [f"decoder.{level}.gate." for level in range(3)],
        "encoder": [f"encoder.{level}.2." for level in range(4)],
        "decoder": [f"decoder.{level}.attention." for level in range(3)],
        "bottleneck": ["bottleneck."],
        "head": ["presence."],
    }
    for name in attended.keys() - plain.keys():
        assert name.startswith(tuple(inside[place])), name


@pytest.mark.parametrize(
    "attention",
    [
        {"kind": "se"},
        {"kind": "cbam"},
        {"kind": "scse"},
        {"kind": "gc", "fusion": "add"},
        {"kind": "gc", "fusion": "scale"},
    ],
    ids=lambda attention: "-".join(attention.values()),
)
def test_channels_are_squeezed_by_the_reduction_but_to_no_fewer_than_4(
    attention: dict[str, Any],
) -> None:
    channels = [2, 6, 10, 16, 64, 80]
    for reduction, expected in (
        (1, [2, 6, 10, 16, 64, 80]),
        # 6 channels by 2 would be 3, so they are not squeezed at all; 10 by 2 are 5.
        (2, [2, 6, 5, 8, 32, 40]),
        # 10 are squeezed by 2 and 16 by 4 at the most.
        (16, [2, 6, 5, 4, 4, 5]),
    ):
        found = attention_of(
            built(
                {"encoder": {**attention, "reduction": reduction}},
                channels=channels,
                strides=[[2, 2]] * 4 + [[1, 1]],
            )
        )
        widths = [squeezed_widths(found[f"encoder.{level}"]) for level in range(6)]
        assert widths == [{width} for width in expected]


def test_bam_keeps_at_least_8_channels() -> None:
    for reduction, expected in ((1, [6, 16, 80]), (2, [6, 8, 40]), (16, [6, 8, 8])):
        attention = {"encoder": {"kind": "bam", "reduction": reduction}}
        found = attention_of(built(attention, channels=[6, 16, 80]))
        widths = [squeezed_widths(found[f"encoder.{level}"]) for level in range(3)]
        assert widths == [{width} for width in expected]


def test_the_papers_reductions_are_the_defaults() -> None:
    for kind, expected in (("se", 64), ("scse", 64), ("cbam", 8), ("bam", 8), ("gc", 8)):
        found = attention_of(built({"decoder": kind}, channels=[128, 2, 2]))
        assert squeezed_widths(found["decoder.0"]) == {expected}, kind


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("dilation", [1, 3])
def test_the_convolutions_of_bam_have_its_dilation_and_width(
    dilation: int, spatial_dims: int
) -> None:
    setting = {"kind": "bam", "dilation": dilation, "reduction": 2}
    found = attention_of(
        built({"decoder": setting}, spatial_dims=spatial_dims, normalisation="batch")
    )
    for name, width in (("decoder.0", 8), ("decoder.1", 12), ("decoder.2", 8)):
        layers = list(found[name].spatial)
        convolutions = [layer for layer in layers if hasattr(layer, "dilation")]
        assert [layer.out_channels for layer in convolutions] == [width, width, width, 1]
        dilated = [layer for layer in convolutions if layer.kernel_size == (3,) * spatial_dims]
        assert len(dilated) == 2
        for layer in dilated:
            # With as much padding, the grid stays.
            assert layer.dilation == layer.padding == (dilation,) * spatial_dims


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("kind", ["cbam", "spatial"])
def test_spatial_convolutions_have_the_size_given_and_7_by_default(
    kind: str, spatial_dims: int
) -> None:
    for options, size in (({}, 7), ({"kernel_size": 5}, 5)):
        network = built({"encoder": {"kind": kind, **options}}, spatial_dims=spatial_dims)
        for module in attention_of(network).values():
            (found,) = [
                part for part in module.modules() if type(part) is spatial.PooledSpatialAttention
            ]
            assert found.convolution.kernel_size == (size,) * spatial_dims


def test_scse_is_combined_as_configured() -> None:
    for aggregation in ("max", "add", "concat"):
        found = attention_of(built({"encoder": {"kind": "scse", "aggregation": aggregation}}))
        for name, width in (("encoder.0", 8), ("encoder.3", 20)):
            module = found[name]
            assert module.aggregation == aggregation
            if aggregation == "concat":
                assert module.merge.weight.shape[:2] == (width, 2 * width)
            else:
                assert isinstance(module.merge, nn.Identity)


def test_a_global_context_is_added_or_scales() -> None:
    def fused(**options: str) -> set[type[nn.Module]]:
        found = attention_of(built({"encoder": {"kind": "gc", **options}}))
        return {type(module) for module in found.values()}

    assert fused() == fused(fusion="add") == {channel.GlobalContext}
    assert fused(fusion="scale") == {channel.GlobalContextExcitation}


@pytest.mark.parametrize("kind", ["additive_grid", "additive_same_level"])
@pytest.mark.parametrize("coefficients", ["sigmoid", "softmax", "mean_flow", "hard"])
def test_gates_have_the_coefficients_and_the_bias_given(kind: str, coefficients: str) -> None:
    setting = {"kind": kind, "coefficients": coefficients, "initial_bias": -1.5}
    for gate in attention_of(built({"skip": setting})).values():
        found = gate.coefficients
        assert found.kind == coefficients
        assert isinstance(found.hard, gates.HardGate) == (coefficients == "hard")
        if coefficients in ("sigmoid", "hard"):
            assert found.bias.tolist() == [-1.5]
        else:
            assert found.bias is None


@pytest.mark.parametrize("kind", ["additive_grid", "additive_same_level", "u_transformer"])
def test_gates_start_open_by_default(kind: str) -> None:
    for gate in attention_of(built({"skip": kind})).values():
        bias = gate.norm.bias if kind == "u_transformer" else gate.coefficients.bias
        assert set(bias.tolist()) == {3.0}


def test_a_u_transformer_has_the_bias_given_for_every_channel() -> None:
    found = attention_of(built({"skip": {"kind": "u_transformer", "initial_bias": 0.25}}))
    for name, width in (("skip.1", 12), ("skip.2", 16)):
        # The normalisation's own; a second would be one too many.
        assert found[name].norm.bias.tolist() == [0.25] * width
        assert found[name].bias is None


def test_relative_positions_among_too_many_voxels_are_refused() -> None:
    relative = {"kind": "self_attention", "positions": "relative"}
    with pytest.raises(ConfigError, match="need too much memory; set a window of at most 4096"):
        token_factory(validated(SelfAttentionConfig, relative, "c"), (17, 16, 16))(8)
    token_factory(
        validated(SelfAttentionConfig, {**relative, "window": [4, 4, 4]}, "c"), (17, 16, 16)
    )(8)


def test_there_are_as_many_grid_gates_as_configured() -> None:
    found = attention_of(built({"skip": {"kind": "additive_grid", "gates": 3}}))
    for name, width in (("skip.1", 12), ("skip.2", 16)):
        gate = found[name]
        assert gate.coefficients.num_gates == len(gate.coefficients.bias) == 3
        assert gate.from_skip.weight.shape[:2] == (3 * width, width)


def test_an_output_transform_follows_the_product_if_configured_or_needed() -> None:
    def transforms(**options: Any) -> list[bool]:
        found = attention_of(built({"skip": {"kind": "additive_grid", **options}}))
        return [not isinstance(gate.output_transform, nn.Identity) for gate in found.values()]

    assert transforms() == [False, False]
    assert transforms(output_transform=True) == [True, True]
    assert transforms(gates=2) == [True, True]


@pytest.mark.parametrize("kind", ["additive_grid", "cross_attention", "u_transformer"])
def test_attention_on_the_coarser_grid_comes_down_by_the_stride_of_its_level(kind: str) -> None:
    strides = [[1, 2], [3, 1], [2, 2]]
    found = attention_of(built({"skip": {"kind": kind, "levels": [0, 1, 2]}}, strides=strides))
    for level, stride in enumerate(strides):
        down = found[f"skip.{level}"].from_skip
        assert list(down.kernel_size) == list(down.stride) == stride


def test_gates_read_the_signal_that_steers_them() -> None:
    # Of the widths 8, 12, 16, 20 the coarser one, or the level's own after upsampling.
    grid = attention_of(built({"skip": {"kind": "additive_grid", "levels": [0, 1, 2]}}))
    level = attention_of(built({"skip": "additive_same_level"}))
    names = ["skip.0", "skip.1", "skip.2"]
    assert [grid[name].from_signal.in_channels for name in names] == [12, 16, 20]
    assert [level[name].from_signal[0].in_channels for name in names] == [8, 12, 16]


def test_only_the_deepest_skip_prepares_its_signal() -> None:
    found = attention_of(built({"skip": {"kind": "additive_grid", "levels": [0, 1, 2]}}))
    prepared = [not isinstance(gate.prepare_signal, nn.Identity) for gate in found.values()]
    assert prepared == [False, False, True]
    # Not the deepest of those that have a gate.
    found = attention_of(built({"skip": {"kind": "additive_grid", "levels": [0, 1]}}))
    assert all(isinstance(gate.prepare_signal, nn.Identity) for gate in found.values())


@pytest.mark.parametrize(
    "attention",
    [
        {"skip": {"kind": "additive_grid", "output_transform": True}},
        {"skip": {"kind": "additive_same_level"}},
        {"skip": {"kind": "u_transformer"}},
        {"decoder": {"kind": "bam"}},
    ],
    ids=lambda attention: str(next(iter(attention.values()))["kind"]),
)
def test_attention_is_normalised_as_the_network_is(attention: dict[str, Any]) -> None:
    kinds = {
        "instance": InstanceNormalisation,
        "batch": nn.BatchNorm2d,
        "group": GroupNormalisation,
        "none": nn.Identity,
    }
    for name, kind in kinds.items():
        found = attention_of(built(attention, normalisation=name))
        norms = {
            type(part)
            for module in found.values()
            for part in module.modules()
            if isinstance(part, nn.BatchNorm2d | nn.GroupNorm)
        }
        # The single channel of bam's last convolution has always a batch normalisation.
        own = {nn.BatchNorm2d} if "decoder" in attention else set()
        assert norms == ({kind} - {nn.Identity}) | own


# Of today


def test_shifted_windows_are_two_attentions() -> None:
    setting = {"kind": "self_attention", "window": [4, 2], "shift": True, "head_channels": 4}
    pair = built({"bottleneck": setting}).bottleneck
    assert [layer.shift for layer in pair] == [(0, 0), (2, 1)]  # type: ignore[union-attr]
    assert {layer.window for layer in pair} == {(4, 2)}  # type: ignore[union-attr]
    assert {layer.attention.heads for layer in pair} == {5}  # type: ignore[union-attr]


def test_a_transformer_has_the_depth_heads_and_widths_given() -> None:
    options = {"depth": 3, "heads": 2, "head_channels": 8, "expansion": 1.5, "layer_scale": 0.5}
    stage = built({"bottleneck": {"kind": "transformer", **options, "drop_path": 0.4}}).bottleneck
    for number, block in enumerate(stage):  # type: ignore[arg-type]
        assert type(block) is TransformerBlock
        assert block.attention.attention.heads == 2
        assert block.attention.attention.query.out_features == 16
        assert block.perceptron.gate.out_features == 30
        assert (block.perceptron_scale.weight == 0.5).all()
        assert block.drop_path.rate == [0.0, 0.2, 0.4][number]


def test_a_transformer_has_as_many_heads_as_there_is_room_for() -> None:
    for width, heads in ((20, 1), (72, 2), (128, 3)):
        stage = built({"bottleneck": "transformer"}, channels=[8, width]).bottleneck
        assert {block.attention.attention.heads for block in stage} == {heads}  # type: ignore[union-attr]


def test_paired_attention_has_a_weight_for_each_voxel_of_its_level() -> None:
    setting = {"kind": "epa", "heads": 2, "projected": 7, "levels": [1, 3]}
    found = attention_of(built({"encoder": setting}, patch_size=[32, 16]))
    assert list(found) == ["encoder.1", "encoder.3"]
    for name, cells, width in (("encoder.1", 16 * 8, 12), ("encoder.3", 4 * 2, 20)):
        assert found[name].projection.weight.shape == (7, cells)
        assert found[name].positions.shape == (1, cells, width)
        assert found[name].heads == 2 and (found[name].scale.weight == 1e-6).all()


def test_large_kernels_sit_at_the_levels_given() -> None:
    setting = {"kind": "lka", "levels": [2], "layer_scale": 0.5}
    found = attention_of(built({"encoder": setting, "decoder": {"kind": "lka", "levels": [0]}}))
    assert list(found) == ["encoder.2", "decoder.0"]
    assert (found["encoder.2"].scale.weight == 0.5).all()
    assert (found["decoder.0"].scale.weight == 0.01).all()


# Of tokens

WIDTHS = [8, 32, 100, 128]


@pytest.mark.parametrize("kind", ["cross_attention", "u_transformer"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # One for each 32 of the skip's channels, and one where there are fewer.
        ({}, [1, 1, 3]),
        ({"head_channels": 8}, [1, 4, 12]),
        ({"heads": 5}, [5, 5, 5]),
        ({"heads": [1, 4, 2]}, [1, 4, 2]),
        # The list begins at the finest level, in whichever order the levels are given.
        ({"levels": [2, 0, 1], "heads": [1, 4, 2], "head_channels": 7}, [1, 4, 2]),
        ({"levels": [2, 1], "heads": [6, 3]}, [None, 6, 3]),
        ({"levels": [2]}, [None, None, 3]),
    ],
)
def test_skips_have_the_heads_given_or_as_many_as_their_channels_have_room_for(
    kind: str, options: dict[str, Any], expected: list[int | None]
) -> None:
    skip = {"kind": kind, "levels": [0, 1, 2], **options}
    found = attention_of(built({"skip": skip}, channels=WIDTHS))
    for level, heads in enumerate(expected):
        gate = found.get(f"skip.{level}")
        assert (None if gate is None else gate.attention.heads) == heads
        if gate is not None:
            inner = gate.attention.heads * options.get("head_channels", 32)
            assert gate.attention.query.weight.shape == (inner, WIDTHS[level + 1])
            assert gate.attention.out.weight.shape == (WIDTHS[level], inner)


@pytest.mark.parametrize(
    ("options", "width", "heads"),
    [
        ({}, 128, 4),
        ({}, 100, 3),
        ({}, 20, 1),
        ({"head_channels": 16}, 128, 8),
        ({"head_channels": 16, "heads": 3}, 128, 3),
        ({"heads": 6}, 20, 6),
    ],
)
def test_the_bottleneck_has_the_given_heads_or_as_many_as_fit(
    options: dict[str, Any], width: int, heads: int
) -> None:
    setting = {"kind": "self_attention", **options}
    attention = built({"bottleneck": setting}, channels=[8, 8, width]).bottleneck.attention
    assert attention.heads == heads
    assert attention.query.weight.shape == (heads * options.get("head_channels", 32), width)


@pytest.mark.parametrize("positions", ["none", "sincos", "relative", "rotary"])
def test_only_relative_positions_have_a_default_window_the_coarsest_grid(
    positions: str,
) -> None:
    def found(spatial_dims: int, **options: Any) -> bottleneck.SelfAttention:
        flat = spatial_dims == 2
        network = built(
            {"bottleneck": {"kind": "self_attention", "positions": positions, **options}},
            patch_size=[16, 24] if flat else [16, 24, 8],
            spatial_dims=spatial_dims,
            channels=[4, 4, 8],
            strides=[[2, 2], [2, 1]] if flat else [[2, 2, 2], [2, 1, 2]],
        ).bottleneck
        assert isinstance(network, bottleneck.SelfAttention)
        assert network.positions == positions
        assert (network.bias is None) == (positions != "relative")
        return network

    relative = positions == "relative"
    assert found(2).window == ((4, 12) if relative else None)
    assert found(3).window == ((4, 12, 2) if relative else None)
    given = found(3, window=[2, 3, 1], heads=5)
    assert given.window == (2, 3, 1)
    if given.bias is not None:
        assert given.bias.table.shape == (math.prod([3, 5, 1]), 5)


def test_positions_are_relative_by_default() -> None:
    assert built({"bottleneck": "self_attention"}).bottleneck.positions == "relative"


def test_additive_self_attention_has_the_width_given() -> None:
    for options, width in (({}, 32), ({"width": 7}, 7)):
        module = built({"bottleneck": {"kind": "additive_self", **options}}).bottleneck
        assert module.query.weight.shape == (width, 20)
        assert module.energy.weight.shape == (1, width)


@pytest.mark.parametrize("kind", list(OPTIONS["head"]))
@pytest.mark.parametrize("num_labels", [2, 5])
def test_a_head_has_an_output_for_every_label_but_the_background(
    kind: str, num_labels: int
) -> None:
    head = built({"head": kind}, num_labels=num_labels).presence
    assert head is not None
    torch.manual_seed(0)
    # From the coarsest level's 20 channels.
    assert head(torch.randn(2, 20, 3, 3)).shape == (2, num_labels - 1)


def test_gated_pooling_has_the_width_given() -> None:
    for options, width in (({}, 128), ({"width": 9}, 9)):
        head = built({"head": {"kind": "gated", **options}}).presence
        assert isinstance(head, pooling.GatedPooling)
        assert head.content.weight.shape == head.gate.weight.shape == (width, 20)
