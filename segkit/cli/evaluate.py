"""`segkit evaluate`: segmentations scored against references."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from segkit.cli.options import Overwrite
from segkit.cli.terminal import JsonOption, complain, console, raise_failures, say_json


def evaluate_command(
    predictions: Annotated[Path, Argument(help="A segmentation, or a folder of them.")],
    references: Annotated[Path, Argument(help="Its reference, or a folder of them.")],
    out: Annotated[Path | None, Option(help="A JSON file for every score.")] = None,
    labels: Annotated[
        Path | None,
        Option(help="A dataset.json, config, run or model with label names; else the nearest."),
    ] = None,
    tolerance: Annotated[float, Option(min=0, help="Of the normalised surface Dice, in mm.")] = 1.0,
    json: JsonOption = False,
    overwrite: Overwrite = False,
) -> None:
    """Score segmentations against references: Dice, IoU, HD95, ASSD, NSD, volumes."""
    from segkit.evaluation.evaluate import evaluate
    from segkit.evaluation.scores import to_table
    from segkit.io.atomic import refuse_existing, write_json
    from segkit.system.progress import Tracker

    if out is not None:
        refuse_existing([out], overwrite=overwrite)
    scores = evaluate(
        predictions, references, labels=labels, tolerance_mm=tolerance, track=Tracker(console)
    )
    if out is not None:
        write_json(out, scores.to_json())
    console.print(to_table(scores.summary))
    if json:
        say_json(scores.to_json())
    for failure in scores.failures.values():
        complain(failure)
    raise_failures(
        list(scores.failures.values()), len(scores.failures) + scores.summary.num_cases, alone=False
    )
