import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from segkit.config.attention import (
    AdditiveGridGateConfig,
    AttentionConfig,
    GatedPoolingConfig,
    GlobalContextConfig,
    SelfAttentionConfig,
)
from segkit.config.data import CtWindowConfig
from segkit.config.load import changed, dump_yaml, load_config, validated
from segkit.config.network import NetworkConfig
from segkit.config.training import Config
from segkit.errors import ConfigError

ROOT = Path(__file__).parents[2]
SMALLEST = "data: {folder: scans, patch_size: [32, 32, 16]}\n"
# Another value than the default wherever a setting has room for one.
THOROUGH = """
name: hippocampus-2
data:
  folder: scans
  validation: [anna, ben]
  spacing: [1, 1.5, 2]
  interpolation: linear
  normalisation: {kind: ct, lower: -160, upper: 240, mean: 40.5, std: 50}
  slices: coronal
  patch_size: [32, 48, 16]
  batch_size: 3
  mirror: [y, z]
  cache: elsewhere
network:
  channels: [8, 16, 32]
  strides: [[2, 2, 1], [2, 2, 2]]
  kernels: [[3, 3, 1], [3, 3, 3], [3, 3, 3]]
  normalisation: batch
  attention: {skip: {kind: additive_same_level, levels: [0]}, encoder: {kind: se, reduction: 4}}
train: {steps: 50, optimiser: sgd, learning_rate: 0.02}
trainer: {devices: [0, 1], max_time: "00:01:00:00"}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(SMALLEST)
    return tmp_path / "config.yaml"


def value_at(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


# What is read


def test_a_config_file_holds_only_values_that_differ_from_the_defaults(path: Path) -> None:
    config = load_config(path)
    assert config.data.folder == Path("scans")
    assert config.data.patch_size == [32, 32, 16]
    assert config.model_dump(exclude={"data"}) == Config(data=config.data).model_dump(
        exclude={"data"}
    )


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=500", 500),
        ("train.learning_rate=1e-3", 0.001),
        ("train.learning_rate=null", None),
        ("train.batch_dice=true", True),
        ("data.validation=[anna, ben]", ["anna", "ben"]),
        ("data.validation=0.25", 0.25),
        ("data.spacing=[1, 1, 2.5]", (1.0, 1.0, 2.5)),
        ("data.folder=/scans/a=b", Path("/scans/a=b")),
        ("network.channels=[8, 16]", [8, 16]),
        ("trainer.devices=[0, 1]", [0, 1]),
        ("trainer.precision=16-mixed", "16-mixed"),
        ("name=second", "second"),
    ],
)
def test_an_overrides_value_is_yaml(path: Path, override: str, value: object) -> None:
    found = value_at(load_config(path, [override]), override.partition("=")[0])
    assert found == value
    assert type(found) is type(value)


def test_a_later_override_wins(path: Path) -> None:
    assert load_config(path, ["train.steps=5", "train.steps=6"]).train.steps == 6


def test_an_override_changes_one_setting_of_a_section(tmp_path: Path) -> None:
    (tmp_path / "thorough.yaml").write_text(THOROUGH)
    before = load_config(tmp_path / "thorough.yaml")
    after = load_config(tmp_path / "thorough.yaml", ["network.attention.skip.initial_bias=1.0"])
    assert after.network.attention.skip.initial_bias == 1.0
    again = validated(
        Config,
        after.model_dump() | {"network": before.network.model_dump()},
        source="the same but for the network",
    )
    assert again == before


def test_the_name_of_a_kind_stands_for_its_section(path: Path) -> None:
    short = load_config(path, ["network.attention.skip=additive_grid"])
    long = load_config(path, ["network.attention.skip={kind: additive_grid}"])
    assert short == long
    assert short.network.attention.skip == AdditiveGridGateConfig()
    assert load_config(path, ["data.normalisation=ct"]).data.normalisation == CtWindowConfig()


def test_an_override_changes_a_setting_of_a_kind_given_by_its_name(path: Path) -> None:
    path.write_text(SMALLEST + "network: {attention: {skip: additive_grid}}\n")
    config = load_config(path, ["network.attention.skip.levels=[2]"])
    assert config.network.attention.skip == AdditiveGridGateConfig(levels=[2])


@pytest.mark.parametrize(
    ("place", "kind", "option", "expected"),
    [
        ("encoder", "gc", "reduction=4", GlobalContextConfig(reduction=4)),
        ("bottleneck", "self_attention", "window=[2, 4, 2]", SelfAttentionConfig(window=[2, 4, 2])),
        ("head", "gated", "weight=0.5", GatedPoolingConfig(weight=0.5)),
    ],
)
def test_an_override_reaches_attention_at_every_place(
    path: Path, place: str, kind: str, option: str, expected: object
) -> None:
    change = f"network.attention.{place}.{option}"
    path.write_text(SMALLEST + f"network: {{attention: {{{place}: {kind}}}}}\n")
    assert getattr(load_config(path, [change]).network.attention, place) == expected
    without = load_config(path, [f"network.attention.{place}=null"])
    assert without.network.attention == AttentionConfig()
    path.write_text(SMALLEST)
    with pytest.raises(ConfigError, match=rf"network\.attention\.{place}\.kind is missing; name"):
        load_config(path, [change])


def test_an_override_fills_an_empty_section(path: Path) -> None:
    path.write_text(SMALLEST + "train:\n")
    assert load_config(path, ["train.steps=7"]).train.steps == 7


@pytest.mark.parametrize("text", [SMALLEST, THOROUGH])
def test_a_config_written_out_is_read_back_the_same(tmp_path: Path, text: str) -> None:
    (tmp_path / "first.yaml").write_text(text)
    config = load_config(tmp_path / "first.yaml")
    (tmp_path / "second.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "second.yaml") == config
    assert dump_yaml(load_config(tmp_path / "second.yaml")) == dump_yaml(config)


def test_a_config_written_out_has_every_setting(path: Path) -> None:
    written = yaml.safe_load(dump_yaml(load_config(path)))
    assert set(written) == set(Config.model_fields)
    assert written["train"]["steps"] == Config.model_fields["train"].default.steps


@pytest.mark.parametrize(
    ("settings", "total"),
    [
        (["network.channels=[8, 16, 32]"], [4, 4, 4]),
        (["network.channels=[8, 16, 32]", "network.strides=[[1, 2, 2], [2, 2, 1]]"], [2, 4, 2]),
        (["network.spatial_dims=2", "data.patch_size=[32, 32]"], [8, 8]),
    ],
)
def test_the_total_stride_is_the_product_of_the_steps(
    path: Path, settings: list[str], total: list[int]
) -> None:
    assert load_config(path, settings).network.total_stride == total


# What is refused


REFUSED_VALUES = [
    ("train.step=3", r"train\.step is not a setting \(did you mean steps\?\)"),
    ("data.patch_sise=[8, 8, 8]", r"data\.patch_sise is not a setting \(did you mean patch_size"),
    ("trian.steps=3", r"trian is not a setting \(did you mean train\?\)"),
    ("zzzz=3", "zzzz is not a setting$"),
    ("train.steps=many", r"train\.steps is 'many': it should be a whole number"),
    ("train.steps=1.5", r"train\.steps is 1\.5: it should be a whole number"),
    ("train.steps=0", r"train\.steps is 0: it should be greater than 0"),
    ("train.learning_rate=.nan", r"train\.learning_rate is nan: it should be a finite number"),
    ("data.augment=sometimes", r"data\.augment is 'sometimes': it should be true or false"),
    ("data.validation=2", r"data\.validation is 2: it should be less than or equal to 1"),
    ("data.spacing=[1, 1, 0]", r"data\.spacing\.2 is 0: it should be greater than 0"),
    ("data.spacing=[1, 1]", r"data\.spacing\.2 is missing"),
    ("data.mirror=[w]", r"data\.mirror\.0 is 'w': it should be 'x', 'y' or 'z'"),
    ("trainer.devices=1.5", r"trainer\.devices is 1\.5: it should be a whole number"),
    ("trainer.devices=[a]", r"trainer\.devices\.0 is 'a': it should be a whole number"),
    ("name=con", "a possible name of a folder, also on Windows, found 'con'; change it"),
    ("name=run.", r"a folder, also on Windows, found 'run\.'; change it"),
    ("name=../elsewhere", r"name is '\.\./elsewhere': it should be a name of letters, digits"),
    ("network=unet", "network is 'unet': it should be a section of names and values"),
    ("data.folder=null", r"data\.folder is None: "),
    (
        "data.patch_size=[30, 32, 16]",
        r"data\.patch_size \[30, 32, 16\] must be multiples of \[8, 8, 8\], the product of "
        r"network\.strides",
    ),
    (
        "data.patch_size=[32, 32]",
        r"data\.patch_size \[32, 32\] must have 3 numbers, because network\.spatial_dims is 3",
    ),
    ("network.strides=[[2, 2]]", r"network\.strides must have 3 lists of 3 numbers for 4 levels"),
    (
        "network.kernels=[[3, 3, 3], [3, 3, 3], [3, 3, 3]]",
        r"network\.kernels must have 4 lists of 3 numbers for 4 levels",
    ),
    (
        "network.kernels=[[2, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]",
        r"network\.kernels must be odd",
    ),
    (
        "network.attention.skip=softmax",
        r"network\.attention\.skip\.kind is 'softmax'; choose 'additive_grid', 'additive_same_lev",
    ),
    ("network.attention.skip={}", r"network\.attention\.skip\.kind is missing; name one"),
    (
        "network.attention.skip={kind: additive_grid, level: [1]}",
        r"network\.attention\.skip\.level is not a setting \(did you mean levels\?\)",
    ),
    (
        "network.attention.skip={kind: additive_grid, levels: [3]}",
        r"network\.attention\.skip\.levels must be from 0 to 2",
    ),
    ("data.normalisation=minmax", r"data\.normalisation\.kind is 'minmax'; choose 'zscore', 'ct'"),
]


@pytest.mark.parametrize(("override", "reason"), REFUSED_VALUES)
def test_a_setting_that_is_wrong_is_refused_by_its_name(
    path: Path, override: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as refusal:
        load_config(path, [override])
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.steps", "expected KEY=VALUE such as train.steps=500, found 'train.steps'"),
        ("=500", "expected KEY=VALUE such as train.steps=500, found '=500'"),
        ("", "expected KEY=VALUE such as train.steps=500, found ''"),
        ("train.steps=[", r"cannot read the value of 'train\.steps=\[' as YAML; quote it"),
        ("name=2024-99-99", "cannot read the value of 'name=2024-99-99' as YAML; quote it"),
    ],
)
def test_a_malformed_override_is_refused(path: Path, override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("before", "override", "reason"),
    [
        ("train.steps=5", "train.steps.more=1", r"train\.steps is a value, not a section"),
        ("data.spacing=[1, 1, 1]", "data.spacing.0=2", r"data\.spacing is a value, not a section"),
        ("train=5", "train.adam.beta=1", "train is a value, not a section"),
    ],
)
def test_an_override_does_not_reach_through_a_value(
    path: Path, before: str, override: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"cannot set {override.partition('=')[0]}: {reason}"):
        load_config(path, [before, override])


def test_every_wrong_setting_is_named_at_once(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.spcing is not a setting .*; train\.lr is not"):
        load_config(path, ["train.lr=1", "data.spcing=[1, 1, 1]"])


def test_a_setting_that_has_no_default_must_be_given(path: Path) -> None:
    path.write_text("data: {folder: scans}\n")
    with pytest.raises(ConfigError, match=r"data\.patch_size is missing; give it a value"):
        load_config(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "expected sections such as 'data:', found NoneType"),
        ("- data\n", "expected sections such as 'data:', found list"),
        ("data: [1, 2\n", "cannot be read as YAML: "),
        ("data:\n\tfolder: scans\n", "cannot be read as YAML: "),
        ("name: 2024-99-99\n", "cannot be read as YAML: month must be in 1..12"),
        (
            "1: 2\n" + SMALLEST,
            "1 is not a setting, because names of settings are text; put it in quotes",
        ),
        (b"\xff\xfe\x00", "cannot be read as YAML: "),
    ],
)
def test_a_file_that_holds_no_sections_is_refused_in_one_sentence(
    path: Path, content: str | bytes, reason: str
) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=reason) as refusal:
        load_config(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file; check the path"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read as YAML: .*directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [{}]", '!!python/object/apply:os.system ["touch {}"]']
)
def test_a_tag_that_would_run_code_is_refused_and_runs_nothing(path: Path, tag: str) -> None:
    trace = path.with_name("trace")
    code = tag.format(trace)
    path.write_text(SMALLEST + f"name: {code}\n")
    with pytest.raises(ConfigError, match="a tag such as !!python asks for code"):
        load_config(path)
    path.write_text(SMALLEST)
    with pytest.raises(ConfigError, match=r"cannot read the value of .* as YAML"):
        load_config(path, [f"name={code}"])
    assert not trace.exists()
    yaml.unsafe_load(code)  # which is what would have happened
    assert trace.exists()


# What it costs


def test_config_and_errors_load_without_torch() -> None:
    program = "import sys, segkit.config.load, segkit.errors; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "segkit.config.training" in loaded
    assert {"torch", "lightning", "monai", "numpy", "nibabel"}.isdisjoint(loaded)


@pytest.mark.parametrize(
    ("attention", "sentence"),
    [
        ({"spatial": 3}, "network.attention.spatial is not a setting"),
        ({"head": {"kind": "gated", "mean": 3}}, "network.attention.head.mean is not a setting"),
        ({"head": {"kind": "mean", "width": 3}}, "network.attention.head.width is not a setting"),
        (
            {"skip": {"kind": "cross_attention", "heads": 0}},
            "network.attention.skip.heads is 0: it should be greater than 0",
        ),
        (
            {"skip": {"kind": "cross_attention", "heads": "many"}},
            "network.attention.skip.heads is 'many': it should be a whole number",
        ),
    ],
)
def test_a_refusal_names_the_written_value_and_not_the_types_that_were_tried(
    attention: dict[str, Any], sentence: str
) -> None:
    tree = {"data": {"folder": "x", "patch_size": [8, 8, 8]}, "network": {"attention": attention}}
    with pytest.raises(ConfigError) as refused:
        validated(Config, tree, "c.yaml")
    message = str(refused.value)
    assert message.startswith(f"c.yaml: {sentence}")
    assert "constrained" not in message and "; " not in message
    assert "did you mean width" not in message


def test_a_setting_that_is_named_like_a_kind_is_named_in_full() -> None:
    normalisation = {"kind": "ct", "mean": "abc"}
    tree = {"data": {"folder": "x", "patch_size": [8, 8, 8], "normalisation": normalisation}}
    with pytest.raises(ConfigError, match=r"^c: data\.normalisation\.mean is 'abc'"):
        validated(Config, tree, "c")


@pytest.mark.parametrize(
    ("channels", "skip", "found"),
    [
        ([16, 8, 4], {"kind": "cross_attention", "levels": [1]}, 4),
        ([16, 8, 4], {"kind": "u_transformer", "levels": [1]}, 4),
        ([4, 8, 16], {"kind": "cross_attention", "levels": [0]}, 4),
        ([4, 8, 16], {"kind": "u_transformer", "levels": [0]}, None),
        ([4, 8, 16], {"kind": "u_transformer"}, None),
    ],
)
def test_attention_that_knows_positions_needs_channels_for_them(
    channels: list[int], skip: dict[str, Any], found: int | None
) -> None:
    tree = {"channels": channels, "attention": {"skip": skip}}
    if found is None:
        assert validated(NetworkConfig, tree, "c").channels == channels
        return
    with pytest.raises(ConfigError, match=f"needs 6 or more network.channels .* found {found};"):
        validated(NetworkConfig, tree, "c")


@pytest.mark.parametrize("kind", ["additive_grid", "cross_attention", "u_transformer"])
def test_attention_without_any_skip_is_refused(kind: str) -> None:
    with pytest.raises(
        ConfigError, match=r"two network.channels has no other skip connection; set levels"
    ):
        validated(NetworkConfig, {"channels": [8, 16], "attention": {"skip": kind}}, "c")


def test_an_override_of_steps_removes_the_limit_of_minutes(tmp_path: Path) -> None:
    path = tmp_path / "timed.yaml"
    path.write_text(
        "data: {folder: x, patch_size: [16, 16, 16]}\ntrain: {steps: 100, minutes: 5}\n"
    )
    assert load_config(path).train.minutes == 5
    assert load_config(path, ["train.steps=7"]).train.minutes is None
    assert load_config(path, ["train.steps=7", "train.minutes=2"]).train.minutes == 2
    assert changed(load_config(path), ["train.steps=7"]).train.minutes is None
