"""Settings from a YAML file and `KEY=VALUE` words, and the sentence that refuses a wrong one.

A YAML file states what differs from the defaults in `segkit.config`; trailing `KEY=VALUE` words
change it further. The file holds plain values: nothing in it can run.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from segkit.config.base import Section
from segkit.config.dataset_files import DatasetConfig
from segkit.config.training import Config
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
    for override in overrides:
        _apply(tree, override)
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
    for override in overrides:
        _apply(tree, override)
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
        # Of a value that fits no type of a union, the first type's complaint will do.
        problems = {
            key: _sentence(key, dict(problem))
            for problem in reversed(error.errors())
            for key in [_key(problem["loc"], tree, problem["type"])]
        }
        sentences = reversed(problems.values())
        raise ConfigError(f"{source}: " + "; ".join(sentences)) from None


def dump_yaml(config: BaseModel) -> str:
    """The whole config as YAML, defaults and all."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


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


def _key(location: Sequence[str | int], tree: Any, problem: str) -> str:
    """The dotted key of a problem: what the user wrote, without what pydantic puts between.

    Pydantic's location also names the kind or the type of a union that it tried.
    """
    parts: list[str] = []
    for part in location:
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, Sequence) and not isinstance(tree, str) and isinstance(part, int):
            tree = tree[part] if part < len(tree) else None
        elif not (problem == "missing" and part is location[-1]):
            continue
        parts.append(str(part))
    return ".".join(parts)


def _sentence(key: str, problem: dict[str, Any]) -> str:
    match problem["type"]:
        case "extra_forbidden":
            name = key.rpartition(".")[2]
            near = difflib.get_close_matches(name, _names() - {name}, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            return f"{key} is not a setting{hint}"
        case "missing":
            return f"{key} is missing; give it a value"
        case "union_tag_invalid":
            context = problem["ctx"]
            return f"{key}.kind is {context['tag']!r}; choose {context['expected_tags']}"
        case "union_tag_not_found":
            return f"{key}.kind is missing; name one"
        case "value_error":
            return str(problem["ctx"]["error"])
        case _:
            reason = problem["msg"][0].lower() + problem["msg"][1:]
            return f"{key} is {problem['input']!r}: {reason.replace('input should', 'it should')}"


def _names() -> set[str]:
    """Every setting's name, for the nearest to a misspelt one."""
    sections = [Section]
    for section in sections:
        sections += section.__subclasses__()
    return {name for section in sections for name in section.model_fields}
