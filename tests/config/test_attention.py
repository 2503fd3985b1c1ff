"""Settings of attention: how they are written, and what is refused."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from segkit.config import attention as config_attention
from segkit.config.attention import AttentionConfig
from segkit.config.base import Section
from segkit.config.load import dump_yaml, load_config, validated
from segkit.config.training import Config
from segkit.errors import ConfigError

SMALLEST = "data: {folder: scans, patch_size: [32, 32, 16]}\n"

BLOCKS: dict[str, dict[str, Any]] = {
    "se": {"reduction": 4},
    "eca": {},
    "cbam": {"reduction": 2, "kernel_size": 3},
    "bam": {"reduction": 8, "dilation": 2},
    "scse": {"reduction": 3, "aggregation": "concat"},
    "spatial": {"kernel_size": 5},
    "sse": {},
    "gc": {"reduction": 4, "fusion": "scale"},
    "lka": {"levels": [1, 2], "layer_scale": 0.5},
    "epa": {"levels": [1, 2], "heads": 2, "projected": 8, "layer_scale": 0.25},
}
# Of every kind at every place, each option at another value than its default.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "skip": {
        "additive_grid": {
            "levels": [0, 2],
            "coefficients": "hard",
            "gates": 2,
            "initial_bias": 1.5,
            "output_transform": True,
        },
        "additive_same_level": {"levels": [1], "coefficients": "softmax", "initial_bias": -1.0},
        "cross_attention": {"levels": [1, 2], "heads": [2, 3], "head_channels": 8},
        "u_transformer": {"levels": [0], "heads": 3, "head_channels": 16, "initial_bias": 0.0},
    },
    "encoder": BLOCKS,
    "decoder": BLOCKS,
    "bottleneck": {
        "self_attention": {
            "heads": 3,
            "head_channels": 8,
            "positions": "rotary",
            "window": [1, 2, 1],
            "shift": True,
        },
        "additive_self": {"width": 7},
        "transformer": {
            "depth": 3,
            "heads": 2,
            "head_channels": 12,
            "expansion": 2.0,
            "layer_scale": 1.0,
            "drop_path": 0.0,
        },
    },
    "head": {
        "mean": {"weight": 0.5},
        "gated": {"width": 9, "weight": 1.0},
        "learned_query": {"weight": 0.25},
    },
}
KINDS = [(place, kind) for place, kinds in OPTIONS.items() for kind in kinds]
every_kind = pytest.mark.parametrize(("place", "kind"), KINDS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(SMALLEST)
    return tmp_path / "config.yaml"


def sections() -> dict[str, type[Section]]:
    """The settings of each kind."""
    return {
        section.model_fields["kind"].default: section
        for section in vars(config_attention).values()
        if inspect.isclass(section)
        and issubclass(section, Section)
        and "kind" in section.model_fields
    }


def config_of(attention: dict[str, Any], **network: Any) -> Config:
    """A config of three levels, whose coarsest grid has 4 cells along each axis."""
    tree = {"channels": [8, 16, 32], **network, "attention": attention}
    patch_size = [16] * int(tree.get("spatial_dims", 3))
    data = {"folder": "scans", "patch_size": patch_size}
    return validated(Config, {"data": data, "network": tree}, "settings")


# How they are written


def test_the_kinds_and_options_tested_here_are_all_there_are() -> None:
    found = sections()
    assert set(found) == {kind for _, kind in KINDS}
    for place, kind in KINDS:
        defaults = found[kind]().model_dump(exclude={"kind"})
        assert OPTIONS[place][kind].keys() == defaults.keys()
        assert all(OPTIONS[place][kind][name] != default for name, default in defaults.items())


@every_kind
def test_a_kind_is_a_bare_word_or_a_mapping(path: Path, place: str, kind: str) -> None:
    word = load_config(path, [f"network.attention.{place}={kind}"])
    mapping = load_config(path, [f"network.attention.{place}={{kind: {kind}}}"])
    path.write_text(SMALLEST + f"network: {{attention: {{{place}: {kind}}}}}\n")
    assert word == mapping == load_config(path)
    assert getattr(word.network.attention, place) == sections()[kind]()


@pytest.mark.parametrize("default", [True, False], ids=["defaults", "options"])
@every_kind
def test_a_kind_survives_being_written_out(
    tmp_path: Path, place: str, kind: str, default: bool
) -> None:
    options = {} if default else OPTIONS[place][kind]
    config = config_of(
        {place: {"kind": kind, **options}},
        channels=[8, 16, 32, 64],
        strides=[[2, 2, 2], [2, 2, 2], [1, 1, 1]],
    )
    (tmp_path / "written.yaml").write_text(dump_yaml(config))
    again = load_config(tmp_path / "written.yaml")
    assert again == config
    found = getattr(again.network.attention, place)
    assert type(found) is sections()[kind]
    assert found.model_dump() == {**sections()[kind]().model_dump(), **options}


def test_every_place_survives_being_written_out_beside_the_others(tmp_path: Path) -> None:
    config = config_of({place: list(kinds)[-1] for place, kinds in OPTIONS.items()})
    (tmp_path / "written.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "written.yaml") == config
    assert None not in config.network.attention.model_dump().values()


# What is refused


NOT_A_KIND = {
    "skip": "'additive_grid', 'additive_same_level', 'cross_attention', 'u_transformer'",
    "encoder": "'se', 'eca', 'cbam', 'bam', 'scse', 'spatial', 'sse', 'gc', 'lka', 'epa'",
    "decoder": "'se', 'eca', 'cbam', 'bam', 'scse', 'spatial', 'sse', 'gc', 'lka', 'epa'",
    "bottleneck": "'self_attention', 'additive_self', 'transformer'",
    "head": "'mean', 'gated', 'learned_query'",
}


@pytest.mark.parametrize("place", list(NOT_A_KIND))
def test_an_attention_kind_that_does_not_fit_its_place_is_refused_with_those_that_do(
    place: str,
) -> None:
    of_another_place = "se" if place in ("skip", "bottleneck", "head") else "additive_grid"
    for kind in ("softmax", of_another_place):
        reason = rf"^settings: network\.attention\.{place}\.kind is '{kind}'; choose "
        with pytest.raises(ConfigError, match=reason + NOT_A_KIND[place] + "$"):
            config_of({place: kind})


@every_kind
def test_an_option_that_a_kind_does_not_have_is_refused(place: str, kind: str) -> None:
    reason = rf"^settings: network\.attention\.{place}\.qqq is not a setting$"
    with pytest.raises(ConfigError, match=reason):
        config_of({place: {"kind": kind, "qqq": 1}})


@pytest.mark.parametrize(
    ("place", "options", "reason"),
    [
        ("encoder", {"kind": "se", "reduction": -2}, "reduction is -2: it should be greater than"),
        ("decoder", {"kind": "gc", "reduction": 0}, "reduction is 0: it should be greater than 0"),
        ("encoder", {"kind": "se", "reductoin": 2}, r"reductoin is not .* \(did you mean reductio"),
        ("encoder", {"kind": "cbam", "kernel_size": 4}, "kernel_size must be odd"),
        ("decoder", {"kind": "spatial", "kernel_size": 2}, "kernel_size must be odd"),
        ("decoder", {"kind": "spatial", "kernel_size": -3}, "kernel_size is -3: it should be gr"),
        ("encoder", {"kind": "bam", "dilation": 0}, "dilation is 0: it should be greater than 0"),
        (
            "encoder",
            {"kind": "scse", "aggregation": "mul"},
            "aggregation is 'mul': it should be 'm",
        ),
        (
            "decoder",
            {"kind": "gc", "fusion": "mul"},
            "fusion is 'mul': it should be 'add' or 'scal",
        ),
        ("skip", {"kind": "additive_grid", "levels": [2]}, "levels must be from 0 to 1"),
        ("skip", {"kind": "additive_same_level", "levels": [0, 7]}, "levels must be from 0 to 1"),
        ("skip", {"kind": "cross_attention", "levels": [2]}, "levels must be from 0 to 1"),
        ("skip", {"kind": "u_transformer", "levels": [-1]}, r"levels\.0 is -1: it should be grea"),
        ("skip", {"kind": "additive_grid", "gates": 0}, "gates is 0: it should be greater than 0"),
        ("skip", {"kind": "additive_grid", "coefficients": "tanh"}, "coefficients is 'tanh': it s"),
        (
            "skip",
            {"kind": "cross_attention", "levels": [1, 0], "heads": [2]},
            r"heads must be one number, or a list of 2 with one number for each of the levels "
            r"\[0, 1\]",
        ),
        (
            "skip",
            {"kind": "u_transformer", "heads": [1, 2]},
            r"heads must be one number, or a list of 1 with one number for each of the levels "
            r"\[1\]",
        ),
        (
            "bottleneck",
            {"kind": "self_attention", "window": [2, 2]},
            r"window must have 3 numbers, because network\.spatial_dims is 3",
        ),
        (
            "bottleneck",
            {"kind": "self_attention", "window": [2]},
            r"window is \[2\]: it should be a list of 2",
        ),
        ("bottleneck", {"kind": "self_attention", "window": [2, 0, 2]}, r"window\.1 is 0: it sho"),
        ("bottleneck", {"kind": "self_attention", "heads": 0}, "heads is 0: it should be greater"),
        ("bottleneck", {"kind": "self_attention", "positions": "alibi"}, "positions is 'alibi': "),
        (
            "bottleneck",
            {"kind": "self_attention", "positions": "rotary", "head_channels": 5},
            "positions: rotary needs 6 or more channels .*, found 5",
        ),
        (
            "bottleneck",
            {"kind": "self_attention", "positions": "none", "window": [4, 4, 8], "shift": True},
            r"shift needs windows smaller than the coarsest level, which has \[4, 4, 4\] voxels, "
            r".* found \[4, 4, 8\]; change the window, or set shift to false",
        ),
        (
            "bottleneck",
            {"kind": "self_attention", "shift": True},
            r"shift needs windows smaller than .*, found \[4, 4, 4\]",
        ),
        (
            "bottleneck",
            {"kind": "self_attention", "window": [1, 1, 1], "shift": True},
            r"shift needs windows .* longer than 1 voxel along at least one axis, found "
            r"\[1, 1, 1\]",
        ),
        (
            "bottleneck",
            {"kind": "transformer", "head_channels": 32},
            "head_channels must be a multiple of 6 for rotary .* 3 dimensions, found 32",
        ),
        ("bottleneck", {"kind": "transformer", "depth": 0}, "depth is 0: it should be greater"),
        ("bottleneck", {"kind": "transformer", "drop_path": 1}, "drop_path is 1: it should be les"),
        ("bottleneck", {"kind": "transformer", "layer_scale": 0}, "layer_scale is 0: it should be"),
        ("encoder", {"kind": "lka", "levels": [3]}, r"levels must be from 0 to 2, found \[3\]"),
        ("decoder", {"kind": "lka", "levels": [2]}, r"levels must be from 0 to 1, found \[2\]"),
        ("encoder", {"kind": "epa", "levels": []}, r"levels must be from 0 to 2, found \[\]"),
        (
            "encoder",
            {"kind": "epa", "heads": 3},
            "epa needs a number of channels that is even and a multiple of its 3 heads, but level "
            "0 has 8; change heads",
        ),
        ("decoder", {"kind": "epa", "projected": 0}, "projected is 0: it should be greater"),
        ("bottleneck", {"kind": "additive_self", "width": 0}, "width is 0: it should be greater"),
        ("head", {"kind": "mean", "weight": 0}, "weight is 0: it should be greater than 0"),
        ("head", {"kind": "gated", "width": -1}, "width is -1: it should be greater than 0"),
    ],
)
def test_an_option_that_is_wrong_is_refused_by_its_name(
    place: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^settings: network\.attention\.{place}[.:] ?{reason}"):
        config_of({place: options})


@pytest.mark.parametrize(("spatial_dims", "fewest"), [(2, 4), (3, 6)])
def test_positions_need_two_channels_for_each_axis(spatial_dims: int, fewest: int) -> None:
    def sincos(channels: int) -> Config:
        setting = {"kind": "self_attention", "positions": "sincos"}
        return config_of(
            {"bottleneck": setting}, channels=[8, 16, channels], spatial_dims=spatial_dims
        )

    def rotary(channels: int) -> Config:
        setting = {"kind": "self_attention", "positions": "rotary", "head_channels": channels}
        return config_of({"bottleneck": setting}, spatial_dims=spatial_dims)

    def skip(channels: int) -> Config:
        return config_of(
            {"skip": {"kind": "cross_attention", "levels": [0]}},
            channels=[channels, 16, 16],
            spatial_dims=spatial_dims,
        )

    for narrow, reason in (
        (sincos, rf"bottleneck\.positions: sincos needs {fewest} or more channels"),
        (rotary, rf"bottleneck\.positions: rotary needs {fewest} or more channels"),
        (skip, rf"skip needs {fewest} or more network\.channels"),
    ):
        assert narrow(fewest).network.spatial_dims == spatial_dims
        with pytest.raises(
            ConfigError, match=rf"network\.attention\.{reason}.* found {fewest - 1}"
        ):
            narrow(fewest - 1)


def test_attention_that_tells_no_positions_may_be_narrow() -> None:
    for positions in ("none", "relative"):
        setting = {"kind": "self_attention", "positions": positions, "head_channels": 1}
        config = config_of({"bottleneck": setting, "skip": "additive_grid"}, channels=[1, 1, 1])
        assert config.network.channels == [1, 1, 1]


def test_a_window_has_two_numbers_in_2d() -> None:
    setting = {"kind": "self_attention", "window": [2, 2, 2]}
    with pytest.raises(ConfigError, match=r"bottleneck\.window must have 2 numbers"):
        config_of({"bottleneck": setting}, spatial_dims=2)
    config_of({"bottleneck": {**setting, "window": [2, 2]}}, spatial_dims=2)


def config_of_size(patch_size: list[int], **attention: Any) -> Config:
    network = {"channels": [8, 16, 32], "attention": attention, "spatial_dims": len(patch_size)}
    data = {"folder": "scans", "patch_size": patch_size}
    return validated(Config, {"data": data, "network": network}, "settings")


def test_paired_attention_needs_a_level_that_is_small_enough() -> None:
    # Level 1 of 128 x 64 x 64 voxels has 64 x 32 x 32 = 65,536, level 2 8,192.
    config_of_size([128, 64, 64], encoder="epa")
    with pytest.raises(ConfigError, match=r"encoder\.levels: .*, but level 1 has 65,536"):
        config_of_size([128, 64, 64], encoder={"kind": "epa", "levels": [1, 2]})
    # A decoder has no level 2.
    for kind, remedy in (
        ("epa", "make the patch smaller or add levels"),
        ("lka", "set its levels"),
    ):
        reason = rf"decoder: {kind} needs a level of at most 32,768 voxels, .*; {remedy}$"
        with pytest.raises(ConfigError, match=reason):
            config_of_size([128, 64, 64], decoder=kind)
    config_of_size([128, 64, 64], decoder={"kind": "lka", "levels": [0]})


def test_a_transformer_among_too_many_voxels_is_refused() -> None:
    with pytest.raises(ConfigError, match="among the 262,144 voxels of the coarsest level takes"):
        config_of_size([2048, 2048], bottleneck="transformer")


def test_by_default_large_kernels_and_paired_attention_sit_at_small_levels() -> None:
    grids = [[128, 64, 64], [64, 32, 32], [32, 16, 16]]
    for place, deepest in (("encoder", 2), ("decoder", 1)):
        for kind in ("lka", "epa"):
            attention = AttentionConfig.model_validate({place: kind})
            assert attention.block_levels(place, grids) == [2][: deepest - 1]
        everywhere = AttentionConfig.model_validate({place: "se"})
        assert everywhere.block_levels(place, grids) == list(range(deepest + 1))
        given = AttentionConfig.model_validate({place: {"kind": "lka", "levels": [1, 0, 1]}})
        assert given.block_levels(place, grids) == [0, 1]
    assert AttentionConfig().block_levels("encoder", grids) == []


# At which skips


@pytest.mark.parametrize(
    ("kind", "num_levels", "expected"),
    [
        ("additive_grid", 4, [1, 2]),
        ("cross_attention", 4, [1, 2]),
        ("u_transformer", 4, [1, 2]),
        ("additive_same_level", 4, [0, 1, 2]),
        ("additive_grid", 3, [1]),
        ("additive_same_level", 2, [0]),
    ],
)
def test_by_default_all_skips_attend_but_the_finest_unless_it_is_cheap(
    kind: str, num_levels: int, expected: list[int]
) -> None:
    attention = AttentionConfig(skip=kind)  # type: ignore[arg-type]
    assert attention.skip_levels(num_levels) == expected


@pytest.mark.parametrize("kind", list(OPTIONS["skip"]))
@pytest.mark.parametrize(
    ("levels", "expected"),
    [([0], [0]), ([2, 0], [0, 2]), ([1, 2, 1, 1], [1, 2]), ([], []), ([2, 1, 0], [0, 1, 2])],
)
def test_levels_that_are_given_count_once_from_the_finest(
    kind: str, levels: list[int], expected: list[int]
) -> None:
    skip: Any = {"kind": kind, "levels": levels}
    assert AttentionConfig(skip=skip).skip_levels(4) == expected


def test_without_attention_at_skips_there_are_no_levels() -> None:
    assert AttentionConfig(encoder="se", head="mean").skip_levels(4) == []  # type: ignore[arg-type]
