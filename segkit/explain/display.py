"""Tables, plots and verdicts as plain data, for a page, a notebook or a file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Cell = str | float | int | None


def rounded(value: Cell) -> Cell:
    """A cell for a reader: four decimals; None for NaN."""
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else round(value, 4)


@dataclass(frozen=True)
class Table:
    """Rows of figures; None is shown as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a plot through points (x, y)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Curve:
    """A plot of lines that share their axes, such as Dice over the share of voxels deleted."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A figure, its interval if it has one, and what chance alone would give."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    beside: bool = False
    """Whether it stands there for the sake of the bar above, to compare with."""


@dataclass(frozen=True)
class Bars:
    """A plot of figures side by side."""

    title: str
    label: str
    """What the figures are, and their unit."""
    bars: Sequence[Bar]
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a map is worth, in a word, a sentence, and the numbers that decided it."""

    map: str
    """The name of its layer."""
    verdict: str
    """The word."""
    reason: str
    numbers: Mapping[str, Cell] = field(default_factory=dict)
