"""Verdicts as a table for the terminal."""

from collections.abc import Sequence
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from segkit.errors import counted
from segkit.explain import display
from segkit.explain.display import Cell, Verdict

COLUMNS = {
    "Dice lost": ("Dice lost without it", "+.3f"),
    "AUROC": ("AUROC", ".2f"),
    "more": ("AUROC: more than the best comparator", "+.2f"),
    "|ρ|": ("|ρ| with untrained networks", ".2f"),
}
"""For each column heading, the number that is shown and its format."""


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """A table with a row for each verdict: the verdict and its main numbers.

    Args:
        verdicts: at least one.
    """
    scans = verdicts[0].numbers["scans"]
    assert isinstance(scans, int)
    table = Table(
        title=f"Verdicts over {counted(scans, 'scan')}",
        caption="Dice lost: fall if the map is replaced by its mean. More: gain of AUROC over the "
        "best comparator. |ρ|: rank correlation with untrained networks.",
        box=SIMPLE_HEAD,
    )
    for column in ("map", "verdict", "structure"):
        table.add_column(column, overflow="fold")
    numbers = {
        column: [_text(verdict.numbers.get(name), how) for verdict in verdicts]
        for column, (name, how) in COLUMNS.items()
    }
    for column, cells in numbers.items():
        # In a narrow terminal the words are folded, and no number is cut off.
        width = max(len(text) for text in (column, *cells))
        table.add_column(column, justify="right", no_wrap=True, min_width=width)
    for verdict, *cells in zip(verdicts, *numbers.values(), strict=True):
        table.add_row(verdict.map, verdict.verdict, str(verdict.numbers["structure"]), *cells)
    return table


def plain_table(table: display.Table) -> Table:
    """A table of a page for the terminal, with numbers of three decimals and without its note."""
    shown = Table(title=table.title, box=SIMPLE_HEAD)
    numeric = [not isinstance(cell, str) for cell in table.rows[0]]
    for column, right in zip(table.columns, numeric, strict=True):
        justify: Literal["left", "right"] = "right" if right else "left"
        if not right:
            shown.add_column(column, justify=justify, overflow="fold")
            continue
        width = max(len(_cell(row[len(shown.columns)])) for row in table.rows)
        shown.add_column(column, justify=justify, no_wrap=True, min_width=width)
    for row in table.rows:
        shown.add_row(*(_cell(cell) for cell in row))
    return shown


def _cell(value: Cell) -> str:
    if value is None:
        return "–"
    return format(value, ".3f") if isinstance(value, float) else str(value)


def _text(value: Cell, how: str) -> str:
    return format(value, how) if isinstance(value, float) else "–"
