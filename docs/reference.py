"""The pages under Reference, made from the code as the documentation is built.

MkDocs calls `on_files` (`hooks` in mkdocs.yml); nothing of this is kept in the repository.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.main import get_command

import segkit
from segkit.cli.main import app
from segkit.config.training import Config

ROOT = Path(__file__).parents[1]

API = {
    "From data to a model": (
        "check plan_dataset load_config train prepare fit resume cross_validate "
        "Config Planned TrainingParts Run CrossValidation Understood pool"
    ),
    "From a model and a scan to labels and maps": (
        "Predictor load_model map_on_source Model Prediction AttentionMap"
    ),
    "To other programs, and from them": (
        "push_model fetch_model export_model described_model save_model Push Export "
        "ModelDescription WholeVolume"
    ),
    "What it is worth": (
        "explain_volume attribute judge_gates judge_attention attention_blocks as_identity "
        "attention_share gate record evaluate compare Explanation Attribution AttributionSettings "
        "GateVerdict AttentionStudy BlockVerdict AttentionShare Evaluation Comparison"
    ),
    "Measures of attributions": (
        "max_sensitivity relative_input_stability relative_output_stability noisy_copies road "
        "random_logit smooth_mprt"
    ),
    "Volumes": (
        "read_volume read_labels write_volume write_montage label_colour "
        "Volume Grid Orientation Placement"
    ),
    "Data to try things on": "load_template write_dataset demo_config write_hippocampi",
    "Errors": (
        "SegkitError ConfigError DatasetError ModelError TrainingError VolumeError WorkerError"
    ),
}
"""Every public name, under the heading that a reader would look for."""
OPTIONS = {
    "Predictor": "{members: [load, __call__, mirrors, classifies], "
    "docstring_options: {warn_unknown_params: false, warn_missing_types: false}}"
}
"""How a name is shown if not as the others: it has more members than users need, and settings that
stand in its docstring one by one and in its signature together."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the documentation, with the pages that are made here."""
    pages = {
        "reference/cli.md": command_line(),
        "reference/settings.md": settings(),
        "reference/api.md": python_api(),
        "reference/errors.md": errors(),
        "changelog.md": page_of("CHANGELOG.md"),
        "contributing.md": page_of("CONTRIBUTING.md"),
        "security.md": page_of("SECURITY.md"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def page_of(name: str) -> str:
    """A file of the repository's root as a page, with links that start from docs/."""
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")


def command_line() -> str:
    """What each command takes, as `--help` says it."""
    group: Any = get_command(app)
    lines = ["# Command line", "", group.help, ""]
    lines += [
        "Exit code 0 is success. Exit code 2 is a mistake that you can correct, with one sentence "
        "on stderr. Every command takes `--quiet` and `--verbose`, before its name or after it. "
        "Colours and progress bars appear only on a terminal, and there are no colours if "
        "`NO_COLOR` is set. `segkit --install-completion` lets the shell complete commands and "
        "options.",
        "",
    ]
    for name in group.commands:
        command = group.get_command(None, name)
        context = command.make_context(f"segkit {name}", [], resilient_parsing=True)
        usage = " ".join(command.collect_usage_pieces(context))
        lines += [f"## segkit {name}", "", f"`segkit {name} {usage}`", "", command.help, ""]
        lines += ["| argument or option | what it is |", "|---|---|"]
        for parameter in command.params:
            record = parameter.get_help_record(context)
            if record is not None and parameter.name not in ("quiet", "verbose", "help"):
                lines.append(f"| {_cell(f'`{record[0]}`')} | {_cell(record[1])} |")
        lines.append("")
    return "\n".join(lines)


def settings() -> str:
    """Every setting of a config: its type, its default, and what it does."""
    schema = Config.model_json_schema()
    lines = [
        "# Settings",
        "",
        "A config is a YAML file with the values that differ from these defaults. `KEY=VALUE` "
        "words of `segkit train` and `segkit check` change it further, with dotted keys such as "
        "`train.steps=500`. A name that is not a setting is refused.",
        "",
    ]
    return "\n".join([*lines, *_section("", schema, schema["$defs"], set())])


def python_api() -> str:
    """Every public name with its docstring."""
    told = [name for names in API.values() for name in names.split()]
    assert sorted(told) == sorted(segkit.__all__), set(told) ^ set(segkit.__all__)
    lines = ["# Python", "", "::: segkit", "    options: {members: false}", ""]
    for heading, names in API.items():
        lines += [f"## {heading}", ""]
        for name in names.split():
            lines += [f"::: segkit.{name}"]
            if name in OPTIONS:
                lines += [f"    options: {OPTIONS[name]}"]
            lines += [""]
    return "\n".join(lines)


ERRORS = (*API["Errors"].split(), "ValueError", "TooLargeError", "ConversionError")
"""Errors whose sentence a user sees; a ValueError's sentence follows the file or the setting."""


def errors() -> str:
    """The sentence of every error, by the folder of segkit that raises it."""
    lines = [
        "# Errors",
        "",
        "Each error is one sentence: what was found, what was expected, and what to do. `{…}` and "
        "names in braces stand for the file, the number or the name in question. Search this page "
        "for a few words of the message that you see.",
        "",
    ]
    package = Path(segkit.__file__).parent
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        for sentence in messages(path.read_text(encoding="utf-8")):
            found.setdefault(place.parts[0].removesuffix(".py"), {}).setdefault(sentence, place)
    for room, sentences in found.items():
        lines += [f"## {room}", "", "| message | raised in |", "|---|---|"]
        for sentence, place in sorted(sentences.items()):
            lines.append(f"| {_cell(sentence)} | `segkit/{place.as_posix()}` |")
        lines.append("")
    return "\n".join(lines)


def messages(source: str) -> Iterator[str]:
    """The sentence of each error that Python source makes, with braces for what it fills in."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id=name), args=[first, *_]) if name in ERRORS:
                branches = (first.body, first.orelse) if isinstance(first, ast.IfExp) else (first,)
                for branch in branches:
                    sentence = "".join(map(_shown, _parts(branch))).replace("``", "")
                    if re.search(r"[a-z]{3}[,;:]? ", sentence):
                        yield sentence


def _parts(text: ast.expr) -> list[ast.expr]:
    return text.values if isinstance(text, ast.JoinedStr) else [text]


def _shown(part: ast.expr) -> str:
    """Text as Markdown shows it, or braces for what is filled in."""
    if isinstance(part, ast.FormattedValue):
        return f"`{{{part.value.id}}}`" if isinstance(part.value, ast.Name) else "`{…}`"
    text = str(part.value) if isinstance(part, ast.Constant) else ""
    return "".join(f"\\{letter}" if letter in "*_[]<>`" else letter for letter in text)


def _section(
    path: str, schema: Mapping[str, Any], definitions: Mapping[str, Any], seen: set[str]
) -> Iterator[str]:
    """A table of the settings in one section, and the sections inside it after that."""
    if path:
        kind = schema["properties"].get("kind", {}).get("const")
        title = f"### `{path}: {kind}`" if kind else f"## `{path}`"
        yield from (f"{title} {{ #{schema['title']} }}", "", schema["description"], "")
    rows = [(key, value) for key, value in schema["properties"].items() if key != "kind"]
    if rows:
        yield from ("| setting | is | default | what it does |", "|---|---|---|---|")
    for key, value in rows:
        cells = (f"`{key}`", _type(value, definitions), _default(value, schema, key))
        yield f"| {' | '.join(map(_cell, (*cells, value.get('description', ''))))} |"
    yield ""
    for key, value in rows:
        for name in _references(value):
            if name not in seen:
                seen.add(name)
                below = f"{path}.{key}" if path else key
                yield from _section(below, definitions[name], definitions, seen)


def _type(value: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What a setting may be, in words."""
    match value:
        case {"$ref": reference}:
            name = reference.rpartition("/")[2]
            kind = definitions[name]["properties"].get("kind", {}).get("const")
            return f"[{kind or 'section'}](#{name})"
        case {"anyOf": choices} | {"oneOf": choices}:
            return " or ".join(_type(choice, definitions) for choice in choices)
        case {"enum": choices}:
            return ", ".join(f"`{choice}`" for choice in choices)
        case {"const": only}:
            return f"`{only}`"
        case {"type": "array", "prefixItems": items}:
            return f"{len(items)} of: {_type(items[0], definitions)}"
        case {"type": "array", "items": item}:
            return f"list of: {_type(item, definitions)}"
        case {"type": "object", "additionalProperties": item}:
            return f"by name: {_type(item, definitions)}"
        case {"type": "string", "format": form}:
            return form
        case {"type": kind}:
            return f"{kind}{_range(value)}"
    raise AssertionError(f"no words for {value}")


def _range(value: Mapping[str, Any]) -> str:
    signs = (
        ("minimum", "≥"),
        ("exclusiveMinimum", ">"),
        ("maximum", "≤"),
        ("exclusiveMaximum", "<"),
    )
    return "".join(f" {sign} {value[key]:g}" for key, sign in signs if key in value)


def _default(value: Mapping[str, Any], schema: Mapping[str, Any], key: str) -> str:
    if key in schema.get("required", ()):
        return "must be given"
    default = value.get("default")
    is_section = isinstance(default, dict) and default and "additionalProperties" not in value
    if "default" not in value or is_section:
        return ""
    if isinstance(default, bool) or default is None:
        return f"`{str(default).lower()}`".replace("none", "null")
    return f"`{default}`"


def _references(value: Any) -> Iterator[str]:
    """Names of the sections that a setting may be, in order."""
    if isinstance(value, Mapping):
        if "$ref" in value:
            yield value["$ref"].rpartition("/")[2]
        for key, inside in value.items():
            if key != "discriminator":
                yield from _references(inside)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inside in value:
            yield from _references(inside)


def _cell(text: str) -> str:
    """Text in a table's cell, where a bar that is not code would begin another."""
    parts = " ".join(text.split()).split("`")
    return "`".join(
        part if number % 2 else part.replace("|", "&#124;") for number, part in enumerate(parts)
    )
