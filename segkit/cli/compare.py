"""`segkit compare`: compare two models on the same cases."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from segkit.cli.options import Overwrite
from segkit.cli.terminal import JsonOption, console, say, say_json

SCORES = "Scores from segkit evaluate --out, or the folder of a run or cross-validation."


def compare_command(
    a: Annotated[Path, Argument(metavar="A", help=SCORES)],
    b: Annotated[
        Path, Argument(metavar="B", help="The scores to compare with A, in the same form.")
    ],
    metric: Annotated[
        list[str] | None,
        Option(help="dice, iou, hd95_mm (or _um, _px), assd_mm or nsd. Repeat it for each metric."),
    ] = None,
    strata: Annotated[
        tuple[Path, str] | None,
        Option(
            metavar="FILE COLUMN",
            help="A CSV file, and the name of its column with each case's group.",
        ),
    ] = None,
    out: Annotated[Path | None, Option(help="Write all results to this JSON file.")] = None,
    json: JsonOption = False,
    overwrite: Overwrite = False,
) -> None:
    """Test if B is better than A: differences for each class, with intervals and p values."""
    from segkit.errors import first_few
    from segkit.evaluation.compare import compare, read_strata, to_comparison_table
    from segkit.io.atomic import refuse_existing, write_json

    if out is not None:
        refuse_existing([out], overwrite=overwrite)
    groups = read_strata(*strata) if strata else None
    comparison = compare(a, b, metrics=metric or ["dice"], strata=groups)
    if out is not None:
        write_json(out, comparison.to_json())
    console.print(to_comparison_table(comparison))
    for name, left_out in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        if left_out:
            say(f"cases left out, because only {name} has scores: {first_few(left_out)}")
    if json:
        say_json(comparison.to_json())
