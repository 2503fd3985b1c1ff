import io

import pytest
from rich.console import Console
from rich.table import Table as Shown

from segkit.explain.display import Table, Verdict
from segkit.explain.page.terminal_table import plain_table, verdict_table

NUMBERS = {
    "scans": 12,
    "structure": "left hippocampus",
    "Dice lost without it": -0.001,
    "AUROC": 0.75,
    "AUROC: more than the best comparator": -0.17,
    "|ρ| with untrained networks": 0.06,
}


def printed(table: Shown, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(table)
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 70, 80, 120])
def test_no_number_of_a_verdict_is_cut_off_in_a_narrow_terminal(width: int) -> None:
    shown = printed(
        verdict_table([Verdict("encoder.0/spatial", "uninformative", "It is.", NUMBERS)]), width
    )
    assert "…" not in shown
    for number in ("-0.001", "0.75", "-0.17", "0.06", "Dice lost", "AUROC", "more", "|ρ|"):
        assert number in shown


@pytest.mark.parametrize("width", [50, 80])
def test_no_number_of_a_plain_table_is_cut_off_in_a_narrow_terminal(width: int) -> None:
    name = "model.1.submodule.1.submodule.attention"
    table = Table("Dice", ["block", "Dice", "lost", "from", "to"], [[name, 0.883, 0.004, 1.0, 12]])
    shown = printed(plain_table(table), width)
    assert "…" not in shown
    assert all(number in shown for number in ("0.883", "0.004", "1.000", "12"))
