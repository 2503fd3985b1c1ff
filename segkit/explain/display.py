"""Tables, plots and verdicts as plain data. A page, a notebook or a file shows them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Cell = str | float | int | None


def rounded(value: Cell) -> Cell:
    """The value of a table cell with four decimals; None if it is NaN."""
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else round(value, 4)


@dataclass(frozen=True)
class Table:
    """Rows of values; None is shown as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a plot, through the points (x, y)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Curve:
    """A plot of lines on shared axes, such as Dice against the share of deleted voxels."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar: a value, its interval if it has one, and the value expected by chance."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    baseline: bool = False
    """Whether the bar is a baseline for the bar above it."""


@dataclass(frozen=True)
class Bars:
    """A bar plot."""

    title: str
    label: str
    """Name and unit of the values."""
    bars: Sequence[Bar]
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """A verdict on a map: a word, a sentence, and the numbers behind them."""

    map: str
    """The name of the map's layer on the page."""
    verdict: str
    """The word, such as 'informative'."""
    reason: str
    """The sentence."""
    numbers: Mapping[str, Cell] = field(default_factory=dict)
