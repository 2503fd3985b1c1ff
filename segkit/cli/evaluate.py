"""`segkit evaluate`: segmentations scored against references."""

from math import isnan
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from segkit.cli.options import Overwrite, PixelSizeOption
from segkit.cli.terminal import JsonOption, complain, console, raise_failures, say, say_json


def evaluate_command(
    predictions: Annotated[Path, Argument(help="A segmentation, or a folder of them.")],
    references: Annotated[
        Path,
        Argument(
            metavar="REFERENCES|DATASET", help="Its reference, a folder of them, or a dataset."
        ),
    ],
    out: Annotated[Path | None, Option(help="A JSON file for every score.")] = None,
    labels: Annotated[
        Path | None,
        Option(help="A dataset.json, config, run or model with label names; else the nearest."),
    ] = None,
    tolerance: Annotated[
        str | None,
        Option(
            metavar="LENGTH",
            help="Of the normalised surface Dice: 1.5 (mm), '0.5 µm' or '2 pixels'; 1 mm, and of "
            "pictures 2 pixels if not given.",
        ),
    ] = None,
    pixel_size: PixelSizeOption = None,
    missing: Annotated[
        Literal["refuse", "skip", "empty"],
        Option(help="References without a prediction: refuse, skip them, or score as empty."),
    ] = "refuse",
    probabilities: Annotated[
        bool, Option(help="Hold NAME_prob beside each prediction against its reference too.")
    ] = False,
    diagram: Annotated[
        Path | None, Option(help="An SVG file for the reliability diagram (--probabilities).")
    ] = None,
    json: JsonOption = False,
    overwrite: Overwrite = False,
) -> None:
    """Score segmentations against references: Dice, IoU, HD95, ASSD, NSD, volumes.

    Files pair by name; endings such as _seg, _pred and _0000 may differ.
    """
    from segkit.errors import ConfigError, first_few
    from segkit.evaluation.calibration import reliability_diagram, to_calibration_table
    from segkit.evaluation.evaluate import evaluate
    from segkit.evaluation.scores import to_table
    from segkit.io.atomic import refuse_existing, write_json, write_text
    from segkit.system.progress import Tracker

    if diagram is not None and not probabilities:
        raise ConfigError("--diagram is of probabilities; give --probabilities as well")
    refuse_existing([path for path in (out, diagram) if path is not None], overwrite=overwrite)
    scores = evaluate(
        predictions,
        references,
        labels=labels,
        tolerance=tolerance,
        pixel_size=pixel_size,
        missing=missing,
        probabilities=probabilities,
        track=Tracker(console),
    )
    if out is not None:
        write_json(out, scores.to_json())
    console.print(to_table(scores.summary))
    if scores.calibration is not None:
        console.print(to_calibration_table(scores.calibration))
        correlation = scores.calibration.correlation(scores.dice_of_cases)
        if not isnan(correlation):
            say(f"doubt and error of cases: Spearman's correlation {correlation:.2f}")
        if diagram is not None:
            write_text(diagram, reliability_diagram(scores.calibration))
    if scores.missing:
        what = "left out" if missing == "skip" else "scored as empty"
        say(f"{what}, without a prediction: {first_few(scores.missing)}")
    if scores.extra:
        say(f"left out, without a reference: {first_few(scores.extra)}")
    if json:
        say_json(scores.to_json())
    for failure in scores.failures.values():
        complain(failure)
    raise_failures(
        list(scores.failures.values()), len(scores.failures) + scores.summary.num_cases, alone=False
    )
