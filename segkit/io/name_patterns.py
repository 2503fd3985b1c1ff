"""Patterns of names that people type: `*` and `?`, upper and lower case alike."""

from collections.abc import Sequence
from fnmatch import fnmatchcase


def matches(text: str, pattern: str) -> bool:
    """Whether a text matches a pattern of `*` and `?`; case and outer spaces do not matter."""
    return fnmatchcase(_plain(text), _plain(pattern).replace("[", "[[]"))


def matches_any(text: str, patterns: Sequence[str]) -> bool:
    """Whether a text matches one of several patterns, or there are none."""
    return not patterns or any(matches(text, pattern) for pattern in patterns)


def is_exactly(text: str, patterns: Sequence[str]) -> bool:
    """Whether a text is one of several patterns without any wildcard."""
    return _plain(text) in map(_plain, patterns)


def _plain(text: str) -> str:
    return text.strip().lower()
