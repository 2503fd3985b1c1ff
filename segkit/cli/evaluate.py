"""`segkit evaluate`: score segmentations against references."""

from math import isnan
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from segkit.cli.options import Overwrite, PixelSizeOption
from segkit.cli.terminal import JsonOption, complain, console, raise_failures, say, say_json


def evaluate_command(
    predictions: Annotated[
        Path,
        Argument(metavar="PREDICTIONS", help="A segmentation, or a folder of segmentations."),
    ],
    references: Annotated[
        Path,
        Argument(
            metavar="REFERENCES|DATASET",
            help="The reference, a folder of references, or a dataset.",
        ),
    ],
    out: Annotated[Path | None, Option(help="Write all scores to this JSON file.")] = None,
    labels: Annotated[
        str | None,
        Option(
            metavar="FILE|RUN|MODEL",
            help="A dataset.json, config, run or model with label names, or the address of a "
            "model. The default is the dataset, or a dataset.json beside the references.",
        ),
    ] = None,
    tolerance: Annotated[
        str | None,
        Option(
            metavar="LENGTH",
            help="Tolerance of the normalised surface Dice, such as 1.5 (mm), '0.5 µm' or "
            "'2 pixels'. The default is 1 mm, and 2 pixels for pictures.",
        ),
    ] = None,
    pixel_size: PixelSizeOption = None,
    missing: Annotated[
        Literal["refuse", "skip", "empty"],
        Option(
            help="For references without a prediction: stop with an error (refuse), leave them out "
            "(skip), or score them as if nothing had been found (empty)."
        ),
    ] = "refuse",
    probabilities: Annotated[
        bool, Option(help="Also evaluate the calibration of NAME_prob beside each prediction.")
    ] = False,
    diagram: Annotated[
        Path | None,
        Option(help="Write the reliability diagram to this SVG file (with --probabilities)."),
    ] = None,
    json: JsonOption = False,
    overwrite: Overwrite = False,
) -> None:
    """Score segmentations against references: Dice, IoU, HD95, ASSD, NSD and volumes.

    Files are paired by name; final words such as _seg, _pred and _0000 may differ.
    """
    from segkit.errors import ConfigError, first_few
    from segkit.evaluation.calibration import reliability_diagram, to_calibration_table
    from segkit.evaluation.evaluate import evaluate
    from segkit.evaluation.score_table import to_table
    from segkit.io.atomic import refuse_existing, write_json, write_text
    from segkit.io.whole_numbers import rounded_in_words
    from segkit.system.progress import Tracker

    if diagram is not None and not probabilities:
        raise ConfigError("--diagram needs --probabilities; give both")
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
            say(f"Spearman's correlation of entropy and error over cases: {correlation:.2f}")
        if diagram is not None:
            write_text(diagram, reliability_diagram(scores.calibration))
    if (told := rounded_in_words(scores.rounded)) is not None:
        say(told)
    if scores.missing:
        treated = "left out" if missing == "skip" else "scored as empty"
        say(f"{treated}, because there is no prediction: {first_few(scores.missing)}")
    if scores.extra:
        say(f"left out, because there is no reference: {first_few(scores.extra)}")
    if json:
        say_json(scores.to_json())
    for failure in scores.failures.values():
        complain(failure)
    raise_failures(
        list(scores.failures.values()), len(scores.failures) + scores.summary.num_cases, alone=False
    )
