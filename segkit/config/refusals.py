"""Error messages about wrong settings: the key, the value found, and the value expected.

Pydantic finds the errors; users see only sentences that this module writes.
"""

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from segkit.errors import abridged, first_few

MOST_KEYS = 10
"""A message lists at most so many wrong settings and counts the others."""
MOST_OF_A_VALUE = 80
"""A message shows at most so many characters of a value."""
PATTERNS = {
    r"^[A-Za-z0-9][\w.-]*$": "a name of letters, digits, '_', '-' and '.', as a folder may have",
    r"^\d+:\d\d:\d\d:\d\d$": "days:hours:minutes:seconds, such as 00:08:00:00",
}
"""The meaning of the regular expressions that settings must match."""

WHOLE = "a whole number"
NUMBER = "a number"
TRUTH = "true or false"
TEXT = "text"
LIST = "a list"
SECTION = "a section of names and values"
Expected = str | Callable[[Mapping[str, Any]], str]

EXPECTED: dict[str, Expected] = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), WHOLE),
    **dict.fromkeys(("float_type", "float_parsing"), NUMBER),
    **dict.fromkeys(("bool_type", "bool_parsing"), TRUTH),
    **dict.fromkeys(("string_type", "string_sub_type", "string_unicode"), TEXT),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "iterable_type"), LIST),
    **dict.fromkeys(
        ("model_type", "model_attributes_type", "dict_type", "mapping_type", "dataclass_type"),
        SECTION,
    ),
    "finite_number": "a finite number",
    "path_type": "a path",
    "none_required": "null",
    "literal_error": lambda context: str(context["expected"]),
    "enum": lambda context: str(context["expected"]),
    "greater_than": lambda context: f"greater than {context['gt']:g}",
    "greater_than_equal": lambda context: f"greater than or equal to {context['ge']:g}",
    "less_than": lambda context: f"less than {context['lt']:g}",
    "less_than_equal": lambda context: f"less than or equal to {context['le']:g}",
    "multiple_of": lambda context: f"a multiple of {context['multiple_of']:g}",
    "too_short": lambda context: f"a list of {context['min_length']} or more",
    "too_long": lambda context: f"a list of at most {context['max_length']}",
    "string_too_short": lambda context: f"text of {context['min_length']} or more characters",
    "string_too_long": lambda context: f"text of at most {context['max_length']} characters",
    "string_pattern_mismatch": lambda context: PATTERNS.get(
        context["pattern"], f"text of the form {context['pattern']}"
    ),
}
"""The expected value in words, for each of pydantic's types of error."""


def refusal(error: ValidationError, tree: Any, model: type[BaseModel]) -> str:
    """An error message with a sentence for each of the first ten wrong keys.

    Args:
        error: pydantic's error.
        tree: the values that were checked.
        model: the class of the settings; its names serve to suggest one for a misspelt key.

    Example:
        train.steps is 'many': it should be a whole number; train.lr is not a setting
    """
    by_key: dict[str, list[ErrorDetails]] = defaultdict(list)
    for problem in error.errors(include_url=False):
        kind = problem["type"]
        if kind in EXPECTED and problem["loc"][-1:] == ("[key]",):
            kind = "invalid_key"
        key = _key(problem["loc"], tree, kind)
        by_key[key].append({**problem, "type": kind} if kind != problem["type"] else problem)
    # If an item of a list is wrong, do not also report that another type could replace the list.
    above = {key.rsplit(".", depth)[0] for key in by_key for depth in range(1, key.count(".") + 1)}
    shown = {
        key: problems
        for key, problems in by_key.items()
        if key not in above or any(problem["type"] not in EXPECTED for problem in problems)
    }
    keys = list(shown)
    sentences = [_sentence(key, shown[key], model) for key in keys[:MOST_KEYS]]
    return first_few([*sentences, *keys[MOST_KEYS:]], MOST_KEYS, between="; ")


def _key(location: Sequence[str | int], tree: Any, problem: str) -> str:
    """The dotted key of a problem, as the user wrote it.

    Pydantic's location also names the member of a union that it tried; this is left out.
    """
    parts: list[str] = []
    for part in location:
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, Sequence) and not isinstance(tree, str) and isinstance(part, int):
            tree = tree[part] if part < len(tree) else None
        elif not (problem == "missing" and part is location[-1]):
            continue
        parts.append(abridged(str(part), MOST_OF_A_VALUE))
    return ".".join(parts)


def _sentence(key: str, problems: Sequence[ErrorDetails], model: type[BaseModel]) -> str:
    first = next((each for each in problems if each["type"] not in EXPECTED), problems[0])
    context = first.get("ctx", {})
    match first["type"]:
        case "extra_forbidden":
            return f"{key} is not a setting{_nearest(key, model)}"
        case "invalid_key":
            return f"{key} is not a setting, because names of settings are text; put it in quotes"
        case "missing":
            return f"{key} is missing; give it a value"
        case "union_tag_invalid":
            return f"{key}.kind is {context['tag']!r}; choose {context['expected_tags']}"
        case "union_tag_not_found":
            return f"{key}.kind is missing; name one"
        case "value_error" | "assertion_error":
            reason = str(context["error"])
            name = key.split(".")[-1]
            return reason if not key or (name and name in reason) else f"{key}: {reason}"
    expected = dict.fromkeys(
        words
        for problem in problems
        for words in [EXPECTED.get(problem["type"], "another value")]
        for words in [words if isinstance(words, str) else words(problem.get("ctx", {}))]
    )
    found = abridged(repr(first["input"]), MOST_OF_A_VALUE)
    hint = _choice(first) if first["type"] == "literal_error" else ""
    return f"{key or 'it'} is {found}: it should be {_or(list(expected))}{hint}"


def _or(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _choice(problem: ErrorDetails) -> str:
    """A hint that names the most similar choice, or an empty text if none is similar."""
    choices = problem.get("ctx", {})["expected"].replace(" or ", ", ").split(", ")
    near = difflib.get_close_matches(repr(problem["input"]), choices, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _nearest(key: str, model: type[BaseModel]) -> str:
    """A hint that names a similar setting of the same section, or the same name in another."""
    *section, name = key.split(".")
    known = {path for path in _paths(model) if path[-1] != name or path[:-1] != tuple(section)}
    elsewhere = [path for path in known if path[-1] == name]
    if len(elsewhere) == 1:
        return f" (did you mean {'.'.join(elsewhere[0])}?)"
    beside = sorted({path[-1] for path in known if path[:-1] == tuple(section)})
    near = difflib.get_close_matches(name, beside, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _paths(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The parts of the dotted names of all settings, for every kind of each section."""
    for name, field in model.model_fields.items():
        yield (*above, name)
        for section in set(_models(field.annotation)):
            yield from _paths(section, (*above, name))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
