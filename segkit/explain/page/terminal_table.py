"""Verdicts as a table for the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from segkit.explain.display import Cell, Verdict
from segkit.explain.verdicts.rule import NAMES

COLUMNS = {
    "Dice": ("mean_change", "+.3f"),
    "p": ("mean_p", ".2g"),
    "AUROC": ("auroc", ".2f"),
    "baseline": ("baseline_auroc", ".2f"),
    "deletion": ("deletion_gain", "+.3f"),
    "ρ": ("randomised", ".2f"),
}
"""The heads of columns, the numbers that are shown, and how."""


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """A row for each of one map or more: the word, and the chief numbers behind it."""
    cases = verdicts[0].numbers[NAMES["cases"]]
    table = Table(
        title=f"What each map is worth over {cases} scans",
        caption="Dice: its change with the map evened out, and Holm's p. Baseline: the best AUROC "
        "of intensity and gradient. Deletion: area over random orders. ρ: with itself under "
        "random weights.",
        box=SIMPLE_HEAD,
    )
    for column in ("map", "verdict"):
        table.add_column(column, no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for verdict in verdicts:
        cells = [_text(verdict.numbers.get(NAMES[name]), how) for name, how in COLUMNS.values()]
        table.add_row(verdict.map, verdict.verdict, *cells)
    return table


def _text(value: Cell, how: str) -> str:
    return format(value, how) if isinstance(value, float) else "–"
