"""The result of a check, for a reader and for programs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from segkit.errors import first_few

MOST_SHOWN = 40
"""Most labels, cases or maps that one line lists."""


@dataclass(frozen=True)
class Understood:
    """The result of `check`: a description of a config, a dataset, DICOM series or a volume.

    Example:
        understood = segkit.check("my_dataset")
        print(understood.text)
        understood.facts  # the same for programs
    """

    kind: Literal["config", "dataset", "series", "volume"]
    text: str
    """The description for a reader, in lines."""
    facts: Mapping[str, Any]
    """The description for a script, as plain dicts, lists and numbers; lengths are in mm."""

    def __str__(self) -> str:
        return self.text


def listed(items: Iterable[object]) -> str:
    """The first items, and how many more there are."""
    return first_few(items, MOST_SHOWN)
