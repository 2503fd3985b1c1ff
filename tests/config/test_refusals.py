"""What is wrong with a setting is said in our own words, whatever is wrong."""

import itertools
import re
from typing import Any

import pytest
from pydantic import ValidationError

import segkit.config.model
import segkit.data.dataset_json  # noqa: F401
from segkit.config.base import Section
from segkit.config.load import validated
from segkit.config.model import ModelDescription
from segkit.config.refusals import EXPECTED, MOST_KEYS
from segkit.config.training import Config
from segkit.errors import ConfigError

OTHERS = {
    *("extra_forbidden", "invalid_key", "missing", "value_error"),
    *("union_tag_invalid", "union_tag_not_found"),
}
THEIRS = re.compile(
    r"Input|input should|[Ss]tring should|List should|Field required|not permitted|unable to parse"
    r"|valid (integer|number|string|boolean|list|dict)|Value error|Keys should|pydantic|instance of"
)
WRONG: list[Any] = [
    *(None, True, "", "w", "yes", "x" * 1000, -1, 0, 1.5, 3, 10**12, 1e99, float("nan")),
    *([], [None], [0], ["w"], [-1] * 99, [[]], [[1]], {}, {"kind": "w"}, {"w": 1}, {1: 2}, 10**400),
    *("1e400", {"x": []}, {"x": [-1]}, {"": 1}, {"\x1b[2J": 1}, ["\x1b"], b"\xff", object()),
]


def sections(cls: type[Section] = Section) -> list[type[Section]]:
    below = [each for sub in cls.__subclasses__() for each in sections(sub)]
    return [*below, *[cls for _ in [0] if cls.model_fields]]


def test_each_wrong_value_of_each_setting_is_refused_in_our_own_words() -> None:
    found = set()
    count = 0
    for section in sections():
        kinds = (
            {"kind": section.model_fields["kind"].default}
            if "kind" in (section.model_fields)
            else {}
        )
        for (name, field), value in itertools.product(section.model_fields.items(), WRONG):
            tree = {**kinds, (field.alias or name): value}
            try:
                section.model_validate(tree)
            except ValidationError as error:
                found |= {problem["type"] for problem in error.errors()}
                with pytest.raises(ConfigError) as refusal:
                    validated(section, tree, "c.yaml")
                sentence = str(refusal.value)
                assert sentence.startswith("c.yaml: ") and sentence.isprintable(), sentence
                assert not THEIRS.search(sentence), sentence
                assert "another value" not in sentence, sentence
                assert len(sentence) < 3000, sentence
                count += 1
    assert count > 2000
    assert found <= {*EXPECTED, *OTHERS}
    assert len(found) > 20, "the walk reaches most kinds of problems"


def refused(cls: type[Section], **tree: Any) -> str:
    with pytest.raises(ConfigError) as refusal:
        validated(cls, tree, "c")
    return str(refusal.value)


SMALLEST = {"folder": "x", "patch_size": [8, 8, 8]}


DEVICES = "trainer.devices is 1.5: it should be a whole number, text or a list"
TIME = "trainer.max_time is '1h': it should be days:hours:minutes:seconds, such as 00:08:00:00"
OPTIMISER = (
    "train.optimiser is 'adam': it should be 'adamw', 'sgd' or 'muon' (did you mean 'adamw'?)"
)
BATCH = "train.batch_size is not a setting (did you mean data.batch_size?)"
LEVEL = "network.attention.skip.level is not a setting (did you mean levels?)"
LONG = f"train.steps is '{'x' * 59} … (822 characters more) … {'x' * 19}': it should be a whole"
TWO = (
    "train.steps is 0: it should be greater than 0; train.seed is -1: it should be greater than or"
)
GATES = {"kind": "additive_grid", "level": [0]}


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"trainer": {"devices": 1.5}}, DEVICES),
        ({"trainer": {"max_time": "1h"}}, TIME),
        ({"train": {"optimiser": "adam"}}, OPTIMISER),
        ({"steps": 3}, "steps is not a setting (did you mean train.steps?)"),
        ({"train": {"batch_size": 3}}, BATCH),
        ({"network": {"attention": {"skip": GATES}}}, LEVEL),
        ({"train": 3}, "train is 3: it should be a section of names and values"),
        ({"train": {"steps": "x" * 900}}, LONG),
        ({"train": {"steps": 0, "seed": -1}}, TWO),
    ],
)
def test_a_refusal_says_what_was_expected_and_the_nearest(
    tree: dict[str, Any], sentence: str
) -> None:
    assert refused(Config, data=SMALLEST, **tree).startswith(f"c: {sentence}")


def test_a_name_with_unprintable_characters_is_refused_with_its_key() -> None:
    sentence = refused(ModelDescription, labels={"a\x1b[2J": 0})
    assert "labels" in sentence and r"found 'a\x1b[2J'; give another name" in sentence


def test_many_wrong_settings_are_counted() -> None:
    sentence = refused(Config, data=SMALLEST, **{f"wrong_{number}": 1 for number in range(30_000)})
    assert sentence.count("is not a setting") == MOST_KEYS
    assert sentence.endswith(" and 29,990 more") and len(sentence) < 500


@pytest.mark.parametrize(
    "setting",
    [
        *("train.steps", "train.patience", "train.minutes", "train.freeze.a", "train.averaging"),
        *("train.loss.terms.dice", "train.loss.class_weights.a", "train.loss.level_weights.0"),
        *("trainer.devices", "trainer.accumulate_grad_batches", "data.patch_size.0", "data.fold"),
        *("network.channels.0", "network.spatial_dims", "data.synthesis.deformation"),
    ],
)
@pytest.mark.parametrize("value", [True, False])
def test_true_and_false_are_no_numbers(setting: str, value: bool) -> None:
    tree: Any = value
    for name in reversed(setting.split(".")):
        tree = [tree, 16, 16] if name == "0" else {name: tree}
    shown = str(value).lower()
    with pytest.raises(ConfigError, match=rf"{re.escape(setting)} is {shown}: it should be"):
        validated(Config, tree, "c.yaml")


def test_settings_that_may_be_true_still_are() -> None:
    tree = {"folder": "d", "patch_size": [16, 16, 16], "augment": False}
    train = {"calibrate": True, "sgd": {"nesterov": False}}
    config = validated(
        Config, {"data": tree, "train": train, "trainer": {"deterministic": True}}, "c.yaml"
    )
    assert config.train.calibrate is True and config.train.sgd.nesterov is False
    assert config.trainer.deterministic is True and config.data.augment is False
