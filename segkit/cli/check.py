"""`segkit check`: what segkit understands, or what is wrong."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from segkit.cli.options import Overrides, PixelSizeOption, SeriesOption
from segkit.cli.terminal import JsonOption, console, say, say_json


def check_command(
    path: Annotated[Path, Argument(metavar="CONFIG|DATASET|VOLUME", help="What to look at.")],
    overrides: Overrides = None,
    json: JsonOption = False,
    series: SeriesOption = None,
    pixel_size: PixelSizeOption = None,
) -> None:
    """Say what segkit understands of a config, a dataset or a volume, or what is wrong with it."""
    from segkit.checking import check
    from segkit.io.series_rules import parse_series
    from segkit.system.progress import Tracker

    understood = check(
        path,
        overrides or (),
        series=parse_series(series),
        pixel_size=pixel_size,
        track=Tracker(console),
    )
    say(understood.text)
    if json:
        say_json({"kind": understood.kind, "problems": [], **understood.facts})
