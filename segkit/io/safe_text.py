"""Safe reading of untrusted text, JSON and YAML: plain data only, and of limited size.

All faults of a file are raised as OSError or ValueError, from which the caller makes its message.
"""

import codecs
import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 2**26
"""Largest size of a text file. A dataset.json of 100,000 cases takes a third of it."""


def read_text(path: Path) -> str:
    """The text of a file, without the byte order mark at its start.

    Raises OSError if the file cannot be read, and ValueError if it is not text or is too long.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe would block
        raise ValueError("it is not a plain file")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES // 2**20} MiB")
    try:
        return content.decode(_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text, from byte {error.start:,} on") from None


def _encoding(content: bytes) -> str:
    """UTF-16 if its byte order mark is at the start, which some editors write; otherwise UTF-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig"  # drops the mark of UTF-8


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises OSError or ValueError."""
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_unique_names)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        if not text[error.pos :].strip() or error.msg.startswith("Unterminated"):
            raise ValueError(f"it is incomplete and ends at {place}") from None
        raise ValueError(f"{place}: {error.msg[0].lower()}{error.msg[1:]}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object of these pairs. Raises ValueError for a repeated name."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(name for name, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} occurs twice in one object; rename or remove one")
    return content


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that is an object. Raises OSError or ValueError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, found {type(content).__name__}")
    return content


def parse_yaml(text: str) -> Any:
    """The content of YAML text, as plain values only. Raises ValueError."""
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(_in_a_sentence(error)) from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


WHAT_TO_DO = {
    "mapping values are not allowed": "a second ': ' stands in one line, or the line is indented "
    "further than the one above; put the value into quotes, or correct the indentation",
    "'\\t'": "a tab indents the line; indent with spaces",
    "cannot start any token": "a value begins with a character that YAML keeps for itself; put the "
    "value into quotes",
    "expected ',' or": "a bracket that was opened is not closed; close it, or put a comma between "
    "its values",
    "unexpected end of stream": "a quotation mark is not closed; close it",
    "expected <block end>": "the line is indented unlike those beside it; indent lines of one "
    "section alike",
    "could not find expected ':'": "a line has no ':' behind its name; write NAME: VALUE",
    "unknown escape character": "a backslash stands within double quotes; use single quotes",
    "sequence entries are not allowed": "a list begins behind a name; begin it on the next line",
    "could not determine a constructor": "a tag such as !!python asks for code; write a plain "
    "value",
    "found another document": "a second document begins with '---'; keep one document",
}
"""For a part of PyYAML's words, the error and advice."""


def _in_a_sentence(error: yaml.MarkedYAMLError) -> str:
    """The place of an error in YAML, and advice; the words of PyYAML if they are not known here."""
    problem = " ".join(str(error.problem or error.context).split())
    found = next((told for part, told in WHAT_TO_DO.items() if part in problem), problem)
    mark = error.problem_mark or error.context_mark
    return found if mark is None else f"line {mark.line + 1}: {found}"


class _PlainLoader(yaml.SafeLoader):
    """A YAML loader without Python classes and without aliases, which can expand to terabytes."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a section. A name that occurs twice is an error."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            line = node.start_mark.line + 1
            raise ValueError(
                f"{twice!r} occurs twice in the section that begins at line {line}; remove one"
            )
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            name = self.peek_event().anchor  # type: ignore[no-untyped-call]
            raise ValueError(f"*{name} is an alias, which is not allowed; write its value out")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node
