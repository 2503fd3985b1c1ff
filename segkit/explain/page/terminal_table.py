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
"""For each column heading, the number that is shown and its format."""


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """A table with a row for each verdict: the verdict and its main numbers.

    Args:
        verdicts: at least one.
    """
    table = Table(
        title=f"Verdicts over {verdicts[0].numbers['scans']} scans",
        caption="Dice lost: if the map is replaced by its mean. More: gain of AUROC over the best "
        "comparator. |ρ|: rank correlation with untrained networks.",
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
