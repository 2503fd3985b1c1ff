"""Settings from a YAML file and `KEY=VALUE` words, and the sentence that refuses a wrong one.

A YAML file states what differs from the defaults in `segkit.config`; trailing `KEY=VALUE` words
change it further. The file holds plain values: nothing in it can run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from segkit.config.base import Section
from segkit.config.dataset_files import DatasetConfig
from segkit.config.refusals import refusal
from segkit.config.training import Config, with_schedules
from segkit.errors import ConfigError
from segkit.io.safe_text import parse_yaml, read_text

ConfigClass = TypeVar("ConfigClass", bound=BaseModel)


class DatasetFileConfig(Section):
    """A YAML file that names a dataset, and nothing of how to train on it."""

    data: DatasetConfig


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings in a YAML file, with dotted `key=value` overrides, checked as a whole.

        config = segkit.load_config("my_dataset.yaml", ["train.steps=500"])

    Args:
        path: the file. A relative `data.folder` in it counts from the working directory.
        overrides: changes such as `train.steps=500`, whose values are YAML.

    Raises:
        ConfigError: the file cannot be read, or holds a wrong setting; one sentence names its key.
    """
    tree = read_yaml(Path(path))
    _apply_all(tree, overrides)
    return validated(Config, tree, source=str(path))


def dataset_in(path: Path, overrides: Sequence[str] = ()) -> DatasetConfig | None:
    """The dataset that a path names: a folder, or YAML that says only which files and labels.

    Of `key=value` overrides those count that change a dataset, such as `data.labels`. None for a
    file that says more, which is a config to train by. Raises ConfigError.
    """
    own = set(DatasetConfig.model_fields)
    tree = {"data": {"folder": str(path)}} if path.is_dir() else read_yaml(path)
    data = tree.get("data")
    if set(tree) != {"data"} or not isinstance(data, dict) or not set(data) <= own:
        return None
    if not path.is_dir() and set(data) == {"folder"}:
        return None
    for override in overrides:
        if override.partition("=")[0].split(".")[:2] in [["data", name] for name in own]:
            _apply(tree, override)
    return validated(DatasetFileConfig, tree, str(path)).data


def changed(config: Config, overrides: Sequence[str]) -> Config:
    """A config with dotted `key=value` overrides. Raises ConfigError as `load_config` does."""
    tree = config.model_dump(mode="json", exclude_unset=True)
    _apply_all(tree, overrides)
    return validated(Config, tree, source="settings")


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file. Raises ConfigError where it holds anything else."""
    try:
        tree = parse_yaml(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read as YAML: {reason}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as 'data:', found {type(tree).__name__}")
    return tree


def validated(model: type[ConfigClass], tree: Mapping[str, Any], source: str) -> ConfigClass:
    """The settings in `tree`, checked. Raises ConfigError, naming each wrong key and the source."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        # Named as they are called now, also in a file that calls them as they were called before.
        now = {**tree, "train": with_schedules(tree["train"])} if "train" in tree else tree
        raise ConfigError(f"{source}: {refusal(error, now, model)}") from None


def dump_yaml(config: BaseModel) -> str:
    """The whole config as YAML, defaults and all."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_all(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply overrides in order; who asks for `train.steps` wants these, however long they take."""
    for override in overrides:
        _apply(tree, override)
    keys = {override.partition("=")[0].strip() for override in overrides}
    train = tree.get("train")
    if "train.steps" in keys and "train.minutes" not in keys and isinstance(train, dict):
        train["minutes"] = None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not (key and equals):
        raise ConfigError(f"expected KEY=VALUE such as train.steps=500, found {override!r}")
    try:
        value = parse_yaml(text)
    except ValueError:
        raise ConfigError(f"cannot read the value of {override!r} as YAML; quote it") from None
    *sections, name = key.split(".")
    for depth, section in enumerate(sections):
        below = tree.setdefault(section, {})
        if isinstance(below, str):
            below = tree[section] = {"kind": below}
        if below is None:
            below = tree[section] = {}
        if not isinstance(below, dict):
            where = ".".join(sections[: depth + 1])
            raise ConfigError(f"cannot set {key}: {where} is a value, not a section")
        tree = below
    tree[name] = value
