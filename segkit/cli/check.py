"""`segkit check`: describe a config, a dataset or a volume, or report its errors."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from segkit.cli.options import Overrides, PixelSizeOption, SeriesOption
from segkit.cli.terminal import JsonOption, console, say, say_json


def check_command(
    path: Annotated[
        Path, Argument(metavar="CONFIG|DATASET|VOLUME", help="The file or folder to check.")
    ],
    overrides: Overrides = None,
    json: JsonOption = False,
    series: SeriesOption = None,
    pixel_size: PixelSizeOption = None,
    runs: Annotated[
        Path, Option(help="The folder of runs; its cache stores the results of a long check.")
    ] = Path("runs"),
) -> None:
    """Check a config, a dataset or a volume: show how segkit reads it, or report its errors."""
    from segkit.checking.check import check
    from segkit.io.series_rules import parse_series
    from segkit.system.progress import Tracker

    understood = check(
        path,
        overrides or (),
        series=parse_series(series),
        pixel_size=pixel_size,
        cache=runs / ".cache",
        track=Tracker(console),
    )
    say(understood.text)
    if json:
        say_json({"kind": understood.kind, "problems": [], **understood.facts})
