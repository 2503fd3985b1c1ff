"""`segkit predict`: segment volumes."""

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from segkit.cli.models import find_models
from segkit.cli.options import (
    CheckpointOption,
    Device,
    Inputs,
    ModelPlaces,
    OverlapOption,
    Overwrite,
    PixelSizeOption,
    SeriesOption,
)
from segkit.cli.terminal import JsonOption, complain, console, raise_failures, say, say_json
from segkit.errors import counted

if TYPE_CHECKING:
    from segkit.inference.result_files import Outcome


def predict_command(
    inputs: Inputs,
    models: ModelPlaces = None,
    out: Annotated[Path | None, Option(help="The file or folder for the labels.")] = None,
    maps: Annotated[
        Path | None, Option(help="Also write all attention maps, to this folder.")
    ] = None,
    probabilities: Annotated[
        bool, Option("--probabilities", help="Also write the probability of each class.")
    ] = False,
    uncertainty: Annotated[
        bool,
        Option(
            "--uncertainty", help="Also write entropy, and variance over models and mirror images."
        ),
    ] = False,
    statistics: Annotated[
        bool,
        Option(
            "--statistics", help="Also write the volume and the intensity of each class as JSON."
        ),
    ] = False,
    preview: Annotated[
        bool, Option("--preview", help="Also write a PNG of the middle slices with labels.")
    ] = False,
    layout: Annotated[
        Literal["flat", "bids"],
        Option(
            help="flat names results after their inputs; bids writes BIDS derivatives to --out."
        ),
    ] = "flat",
    dicom_seg: Annotated[
        bool, Option("--dicom-seg", help="Write labels of DICOM series as DICOM segmentations.")
    ] = False,
    series: SeriesOption = None,
    pixel_size: PixelSizeOption = None,
    tta: Annotated[
        bool,
        Option("--tta", help="Average over mirror images, along the axes that training mirrored."),
    ] = False,
    checkpoint: CheckpointOption = None,
    device: Device = "auto",
    overlap: OverlapOption = 0.5,
    batch: Annotated[
        int | None,
        Option(
            min=1,
            help="Windows per call of the network. The default is 4 on a GPU, and 1 on a CPU (2 if "
            "PyTorch runs the network and windows are small).",
        ),
    ] = None,
    all_windows: Annotated[
        bool, Option("--all-windows", help="Do not skip windows in which all voxels are 0.")
    ] = False,
    shard: Annotated[
        str,
        Option(
            metavar="I/N",
            help="Process the I-th of N shares of the volumes; auto if torchrun or srun starts the "
            "jobs.",
        ),
    ] = "1/1",
    engine: Annotated[
        Literal["auto", "torch", "compile", "openvino", "onnx"],
        Option(help="The inference engine; auto is OpenVINO on a CPU if installed, else PyTorch."),
    ] = "auto",
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        Option(
            help="Number format of the network. The default is float32 on a CPU and float16 on "
            "a GPU."
        ),
    ] = None,
    json: JsonOption = False,
    progress: Annotated[
        bool,
        Option("--progress", help="Print progress to stderr as lines of JSON, for other programs."),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Segment volumes. Without --out, labels are written beside each input as NAME_seg.

    Volumes with complete results are skipped, so that a stopped job can continue. Existing results
    of another model, or of an older version of a scan, are not replaced and count as failures.
    """
    import torch

    from segkit.data.case_inputs import inputs_in
    from segkit.inference.predict_files import predict_files
    from segkit.inference.predictor import Predictor
    from segkit.io.picture_summary import picture_lines
    from segkit.io.series_rules import parse_series
    from segkit.model.folder import picture_rules_of
    from segkit.system.progress import CohortProgress

    number, count, device = _share(shard, device)
    named = [model for each in find_models(models, checkpoint) for model in each]
    predictor = Predictor(
        [model.load() for model in named],
        device=device,
        overlap=overlap,
        batch_size=batch,
        tta=tta,
        skip_empty=not all_windows,
        engine=engine,
        precision=None if precision is None else getattr(torch, precision),
    )
    description = predictor.model.description
    rules = picture_rules_of(description, pixel_size)
    found = inputs_in(
        inputs,
        description.channels,
        series=parse_series(series),
        rules=rules,
        sized=bool(pixel_size),
        but=out,
    )
    for model in named:
        say(f"model: {model}")
    if tta and not predictor.mirrors:
        say("--tta has no effect, because no model was trained on mirror images")
    for line in picture_lines((source.files[0], source.rules) for source in found):
        say(line)
    mine = len(range(number - 1, len(found), count))
    failures, volumes, kept = [], [], 0
    reports = sys.stderr if progress else None
    # Closed at once if Ctrl-C ends the loop, so that no further volume is read.
    with (
        CohortProgress(console, "segmenting", mine, reports=reports) as shown,
        closing(
            predict_files(
                predictor,
                found,
                out=out,
                maps=maps,
                probabilities=probabilities,
                uncertainty=uncertainty,
                statistics=statistics,
                preview=preview,
                as_dicom=dicom_seg,
                layout=layout,
                overwrite=overwrite,
                shard=(number, count),
                track=shown.track,
            )
        ) as outcomes,
    ):
        for outcome in outcomes:
            shown.done()
            volumes.append(outcome.to_json())
            if outcome.kept is not None:
                kept += 1
            _tell(outcome)
            if outcome.error is not None:
                failures.append(outcome.error)
                if len(found) > 1:
                    complain(outcome.error)
    if kept:
        say(
            f"skipped {kept} of {counted(mine, 'volume')} with results; pass --overwrite to "
            f"segment them again"
        )
    if json:
        say_json({"models": [str(model.folder) for model in named], "volumes": volumes})
    raise_failures(failures, mine, alone=len(found) == 1)


def _tell(outcome: "Outcome") -> None:
    """Print the files that were written for one volume."""
    if not outcome.written:
        return
    more = f" and {counted(len(outcome.written) - 1, 'more file')}" * (len(outcome.written) > 1)
    say(f"wrote {outcome.written[0]}{more}")
    if outcome.presence is not None:
        shares = ", ".join(f"{name} {p:.3f}" for name, p in outcome.presence.items())
        say(f"probability that the image contains: {shares}")


def _share(shard: str, device: str) -> tuple[int, int, str]:
    """The number of this process's share of the volumes, the number of shares, and the device."""
    import torch

    from segkit.io.inputs import parse_shard
    from segkit.system.launcher import place_of_process

    if shard != "auto":
        return (*parse_shard(shard), device)
    place = place_of_process()
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{place.local}"
    return place.number, place.count, device
