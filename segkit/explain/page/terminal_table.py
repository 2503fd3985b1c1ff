"""Verdicts as a table for the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from segkit.explain.display import Cell, Verdict

COLUMNS = {
    "Dice lost": ("Dice lost without it", "+.3f"),
    "AUROC": ("AUROC", ".2f"),
    "more": ("AUROC: more than the best comparator", "+.2f"),
    "|ρ|": ("|ρ| with untrained networks", ".2f"),
}
"""The heads of columns, the numbers that are shown, and how."""


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """A row for each of one map or more: the word, and the chief numbers behind it."""
    table = Table(
        title=f"What each map is worth over {verdicts[0].numbers['scans']} scans",
        caption="Dice lost: with the map evened out. More: by how much its AUROC exceeds the best "
        "of what it is compared with. |ρ|: with untrained networks.",
        box=SIMPLE_HEAD,
    )
    for column in ("map", "verdict", "structure"):
        table.add_column(column, no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for verdict in verdicts:
        cells = [_text(verdict.numbers.get(name), how) for name, how in COLUMNS.values()]
        table.add_row(verdict.map, verdict.verdict, str(verdict.numbers["structure"]), *cells)
    return table


def _text(value: Cell, how: str) -> str:
    return format(value, how) if isinstance(value, float) else "–"
