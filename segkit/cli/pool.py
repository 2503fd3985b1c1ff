"""`segkit pool`: folds that were trained apart, as one cross-validation."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from segkit.cli.terminal import JsonOption, say, say_json


def pool_command(
    folders: Annotated[
        list[Path],
        Argument(metavar="RUN", help="Cross-validations of some folds, or runs with data.fold."),
    ],
    out: Annotated[Path, Option(help="The folder of the cross-validation, such as runs/all.")],
    json: JsonOption = False,
) -> None:
    """Combine folds that were trained separately into one cross-validation."""
    from segkit.cli.train import say_result
    from segkit.training.pool import pool

    result = pool(folders, out)
    say(f"pooled the folds {', '.join(result.summary['folds'])}")
    say_result(result)
    if json:
        say_json({"folder": str(result.folder), **result.summary})
