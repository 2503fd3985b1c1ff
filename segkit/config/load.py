"""Reading of settings from a YAML file and from `KEY=VALUE` overrides.

A YAML file states only the settings that differ from the defaults in `segkit.config`; the overrides
change it further. The file holds plain values and cannot run code.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from segkit.config.base import Section
from segkit.config.data import SplitDatasetConfig
from segkit.config.dataset_files import TABLE_SUFFIXES, DatasetConfig
from segkit.config.refusals import refusal
from segkit.config.training import Config, with_schedules
from segkit.errors import ConfigError
from segkit.io.safe_text import parse_yaml, read_text
from segkit.io.tables import read_csv

ConfigClass = TypeVar("ConfigClass", bound=BaseModel)


OF_SPLITS = ("validation", "fold", "num_folds", "splits", "group_by", "stratify_by")
"""Settings of a split, which may stand beside those of a dataset."""
OF_TABLES = frozenset({"id", "label"})
"""Columns of a table that are not images."""


class DatasetFileConfig(Section):
    """A YAML file that describes a dataset, and settings of its split from the command."""

    data: SplitDatasetConfig


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Checked settings from a YAML file, with dotted `key=value` overrides.

    Args:
        path: the YAML file. A relative `data.folder` in it is relative to the working directory.
        overrides: changes such as `train.steps=500`; their values are YAML.

    Returns:
        The settings, with defaults for those that are not given.

    Raises:
        ConfigError: the file cannot be read, or a setting is wrong; one sentence names its key.

    Example:
        >>> config = segkit.load_config("my_dataset.yaml", ["train.steps=500"])
    """
    tree = read_yaml(Path(path))
    _apply_all(tree, overrides)
    return validated(Config, tree, source=str(path))


def dataset_in(
    path: Path, overrides: Sequence[str] = (), *, minimal: bool = False
) -> SplitDatasetConfig | None:
    """The dataset that a path names, or None if the path is a config for training.

    Args:
        path: a folder, a YAML file that has only settings of a dataset, such as files and labels,
            and of its split; or a table of cases with the columns `id`, `label`, and `image` or one
            for each channel; `overrides` then name labels.
        overrides: `key=value` changes; those that do not change a setting of the dataset or of its
            split are ignored.
        minimal: whether a YAML file that has `data.folder` and a split only is a dataset. It is
            also the shortest config, which trains with defaults.

    Raises:
        ConfigError: the file cannot be read, or a setting is wrong.
        DatasetError: the table cannot be read.
    """
    own = {*DatasetConfig.model_fields, *OF_SPLITS}
    is_table = not path.is_dir() and path.suffix.lower() in TABLE_SUFFIXES
    if is_table:
        tree: dict[str, Any] = {"data": _settings_of_table(path)}
    else:
        tree = {"data": {"folder": str(path)}} if path.is_dir() else read_yaml(path)
    data = tree.get("data")
    if set(tree) != {"data"} or not isinstance(data, dict) or not set(data) <= own:
        return None
    if not (path.is_dir() or is_table or minimal) and set(data) - set(OF_SPLITS) == {"folder"}:
        return None
    for override in overrides:
        if is_of_dataset(override):
            _apply(tree, override)
    return validated(DatasetFileConfig, tree, str(path)).data


def is_of_dataset(override: str) -> bool:
    """Whether a `key=value` change is one of a dataset or of its split."""
    section, *inner = override.partition("=")[0].strip().split(".")
    known = (*DatasetConfig.model_fields, *OF_SPLITS)
    return section == "data" and bool(inner) and inner[0] in known


def _settings_of_table(path: Path) -> dict[str, Any]:
    """The settings that a table has by itself: its images are the column `image`, or all columns
    that name files."""
    rows, columns = read_csv(path)
    named = [
        column
        for column in columns
        if column.strip() and column not in OF_TABLES
        if any(row[column] and (path.parent / row[column]).is_file() for row in rows)
    ]
    images = ["image"] if "image" in columns or not named else named
    files = {"table": path.name, "images": {column: column for column in images}}
    return {"folder": str(path.parent), "files": files}


def changed(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of a config, changed by dotted `key=value` overrides.

    Raises:
        ConfigError: an override is wrong; one sentence names its key.
    """
    tree = config.model_dump(mode="json", exclude_unset=True)
    _apply_all(tree, overrides)
    return validated(Config, tree, source="settings")


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file, by name.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or does not hold sections.
    """
    try:
        tree = parse_yaml(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        advice = "" if ";" in reason else "; correct the file"
        raise ConfigError(f"{path}: cannot be read as YAML: {reason}{advice}") from None
    if not isinstance(tree, dict):
        found = type(tree).__name__
        raise ConfigError(
            f"{path}: expected sections such as 'data:', found {found}; check the file"
        )
    return tree


def validated(model: type[ConfigClass], tree: Mapping[str, Any], source: str) -> ConfigClass:
    """The checked settings of `tree`.

    Args:
        model: the class of the settings.
        tree: the sections, as read from YAML.
        source: file name, or another origin of the settings, for the error.

    Raises:
        ConfigError: settings are wrong; the sentence names the source and each wrong key.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        # The message uses the current names of settings, also if the file uses older names.
        now = {**tree, "train": with_schedules(tree["train"])} if "train" in tree else tree
        raise ConfigError(f"{source}: {refusal(error, now, model)}") from None


def dump_yaml(config: BaseModel) -> str:
    """All settings of a config as YAML text, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_all(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply overrides to `tree`, in order.

    An override of `train.steps` without one of `train.minutes` removes the limit of time.
    """
    for override in overrides:
        _apply(tree, override)
    keys = {override.partition("=")[0].strip() for override in overrides}
    train = tree.get("train")
    if "train.steps" in keys and "train.minutes" not in keys and isinstance(train, dict):
        train["minutes"] = None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not (key and equals):
        raise ConfigError(
            f"expected KEY=VALUE such as train.steps=500, found {override!r}"
            "; write the setting, =, and its value"
        )
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
            above = ".".join(sections[: depth + 1])
            raise ConfigError(f"cannot set {key}: {above} is a value, not a section; set {above}")
        tree = below
    tree[name] = value
