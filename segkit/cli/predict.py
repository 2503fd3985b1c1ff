"""The commands that use a model, and those that look at data and results."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from segkit.cli.options import (
    Device,
    Inputs,
    ModelFolder,
    ModelFolders,
    OverlapOption,
    Overrides,
    Overwrite,
    SeriesOption,
)
from segkit.cli.terminal import JsonOption, complain, console, say, say_json
from segkit.errors import SegkitError


def predict(
    inputs: Inputs,
    models: ModelFolders = None,
    out: Annotated[Path | None, typer.Option(help="A file or a folder for the labels.")] = None,
    maps: Annotated[
        Path | None, typer.Option(help="A folder for every attention map, made in the same pass.")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write each class's probability as well.")
    ] = False,
    uncertainty: Annotated[
        bool,
        typer.Option("--uncertainty", help="Write entropy, and variance of models and mirrors."),
    ] = False,
    statistics: Annotated[
        bool,
        typer.Option("--statistics", help="Write voxels, ml, mean and sd of each class as JSON."),
    ] = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Write a PNG of three planes, labels over them.")
    ] = False,
    dicom_seg: Annotated[
        bool,
        typer.Option("--dicom-seg", help="Write labels of DICOM series as DICOM segmentations."),
    ] = False,
    series: SeriesOption = None,
    tta: Annotated[
        bool, typer.Option("--tta", help="Average over mirror images, as the model was trained on.")
    ] = False,
    device: Device = "auto",
    overlap: OverlapOption = 0.5,
    batch: Annotated[int, typer.Option(min=1, help="Windows per call of the network.")] = 1,
    all_windows: Annotated[
        bool, typer.Option("--all-windows", help="Ask the network even where all is 0.")
    ] = False,
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N", help="The I-th of N jobs that share the volumes; auto under torchrun."
        ),
    ] = "1/1",
    engine: Annotated[
        Literal["auto", "torch", "compile", "openvino", "onnx"],
        typer.Option(help="What runs the network; auto is OpenVINO on a CPU."),
    ] = "auto",
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Of the network's arithmetic; half is faster where there are units."),
    ] = "float32",
    json: JsonOption = False,
    overwrite: Overwrite = False,
) -> None:
    """Segment volumes; without --out the labels go beside each input, as NAME_seg.

    Of a folder, volumes that have their results are left alone: a stopped job goes on where it was.
    """
    import torch

    from segkit.inference.predict_files import predict_files
    from segkit.inference.predictor import Predictor
    from segkit.io.inputs import find_inputs, parse_shard
    from segkit.model.folder import load_model, model_folders, newest_model
    from segkit.system.progress import CohortProgress

    if shard == "auto":
        from segkit.system.launcher import place_of_process

        place = place_of_process()
        number, count = place.number, place.count
        if device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{place.local}"
    else:
        number, count = parse_shard(shard)
    folders = [
        folder for path in models or [newest_model(Path("runs"))] for folder in model_folders(path)
    ]
    predictor = Predictor(
        [load_model(folder) for folder in folders],
        device=device,
        overlap=overlap,
        batch_size=batch,
        tta=tta,
        skip_empty=not all_windows,
        engine=engine,
        precision=getattr(torch, precision),
    )
    found = find_inputs(inputs, len(predictor.model.description.channels), series=series)
    for folder in folders:
        say(f"model: {folder}")
    if tta and not predictor.mirrors:
        say("no model was trained on mirror images: --tta changes nothing")
    mine = len(range(number - 1, len(found), count))
    failures = []
    volumes = []
    kept = 0
    with CohortProgress(console, "segmenting", mine) as progress:
        outcomes = predict_files(
            predictor,
            found,
            out=out,
            maps=maps,
            probabilities=probabilities,
            uncertainty=uncertainty,
            statistics=statistics,
            preview=preview,
            as_dicom=dicom_seg,
            overwrite=overwrite,
            shard=(number, count),
            track=progress.track,
        )
        for outcome in outcomes:
            progress.done()
            volumes.append(outcome.to_json())
            if outcome.kept is not None:
                kept += 1
            elif outcome.error is None:
                more = f" and {len(outcome.written) - 1} more files" * (len(outcome.written) > 1)
                say(f"wrote {outcome.written[0]}{more}")
                if outcome.presence is not None:
                    shares = ", ".join(f"{name} {p:.3f}" for name, p in outcome.presence.items())
                    say(f"probability that it holds: {shares}")
            else:
                failures.append(outcome.error)
                if len(found) > 1:
                    complain(outcome.error)
    if kept:
        say(
            f"left {kept} of {mine} volumes alone, whose results are there; --overwrite redoes them"
        )
    if json:
        say_json({"models": [str(folder) for folder in folders], "volumes": volumes})
    if len(failures) == 1 and len(found) == 1:
        raise SegkitError(failures[0])
    if failures:
        raise SegkitError(f"{len(failures)} of {mine} volumes failed, as told above")


def explain(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="A folder for maps and tables.")],
    model: ModelFolder = None,
    reference: Annotated[
        Path | None, typer.Option(help="The label of INPUT, or a folder of labels of that name.")
    ] = None,
    heads: Annotated[
        bool,
        typer.Option("--heads", help="Say whether several heads of attention beat one here."),
    ] = False,
    verdicts: Annotated[
        bool,
        typer.Option("--verdicts", help="Say whether each gate matters; minutes a scan."),
    ] = False,
    tolerance: Annotated[
        float, typer.Option(min=0, help="How far off a map may point at a structure, in mm.")
    ] = 5.0,
    series: SeriesOption = None,
    device: Device = "auto",
    overlap: OverlapOption = 0.5,
    overwrite: Overwrite = False,
) -> None:
    """Write attention maps, what they pick out beside chance, and a page that shows them.

    With a reference, measures compare with it, else with the model's own labels. Several volumes
    get a folder each, a table over all, and a page that sums them up; one that cannot be read does
    not stop the others.
    """
    from segkit.errors import VolumeError
    from segkit.explain.explain_files import (
        check_targets,
        explain_files,
        explain_heads,
        remove_heads,
    )
    from segkit.explain.page.page import Verdict
    from segkit.explain.page.terminal_table import verdict_table
    from segkit.explain.verdicts.study import WorthStudy, check_gates
    from segkit.inference.predictor import Predictor
    from segkit.io.inputs import find_inputs
    from segkit.model.folder import load_model, model_folder, newest_model
    from segkit.system.progress import Tracker

    if heads and reference is None:
        raise VolumeError("--heads compares Dice; give --reference, a label or a folder of them")
    folder = model_folder(model) if model else newest_model(Path("runs"))
    loaded = load_model(folder)
    found = find_inputs(inputs, len(loaded.description.channels), series=series)
    say(f"model: {folder}")
    # Windows of a map that nobody asked about would count as cells that let nothing through.
    predictor = Predictor(loaded, device=device, overlap=overlap, skip_empty=False)
    track = Tracker(console)
    check_targets(found, out, overwrite=overwrite)
    if verdicts:
        check_gates(predictor)
    if heads and reference is not None:
        figures = explain_heads(predictor, found, reference, out, overwrite=overwrite, track=track)
        for studied in figures:
            say(studied.answer())
        say(f"wrote {out / 'heads.csv'} and {out / 'heads.json'}")
    elif overwrite:
        remove_heads(out)
    over_all: list[Verdict] = []
    explanations = explain_files(
        predictor,
        found,
        out,
        references=reference,
        tolerance_mm=tolerance,
        studies=[WorthStudy(track=track)] if verdicts else [],
        overwrite=overwrite,
        conclude=over_all.extend,
        track=track,
    )
    failures = []
    for explained in explanations:
        if explained.error is not None:
            failures.append(explained.error)
            continue
        say(f"wrote {explained.written[0]} and {len(explained.written) - 1} more files")
        for position, reach in explained.reach.items():
            for number, head in enumerate(reach):
                say(
                    f"{explained.name} {position} head {number}: reaches {head.distance_mm:.1f} mm "
                    f"({head.distance_ratio:.2f} of uniform attention), "
                    f"entropy {head.entropy:.2f} of {head.uniform_entropy:.2f}"
                )
        for verdict in explained.verdicts:
            say(f"{explained.name} {verdict.map} is {verdict.verdict}: {verdict.reason}")
    if over_all:
        console.print(verdict_table(over_all))
    if len(failures) < len(found):
        say(f"next: open {out / 'index.html'}")
    if len(found) == len(failures) == 1:
        raise SegkitError(failures[0])
    for error in failures:
        complain(error)
    if failures:
        raise SegkitError(f"{len(failures)} of {len(found)} volumes failed, as told above")


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="A segmentation, or a folder of them.")],
    references: Annotated[Path, typer.Argument(help="Its reference, or a folder of them.")],
    out: Annotated[Path | None, typer.Option(help="A JSON file for every score.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="A dataset.json with label names; else the nearest one.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Of the normalised surface Dice, in mm.")
    ] = 1.0,
    json: JsonOption = False,
    overwrite: Overwrite = False,
) -> None:
    """Score segmentations against references: Dice, IoU, HD95, ASSD, NSD, volumes."""
    from segkit.evaluation.evaluate import evaluate as score
    from segkit.evaluation.scores import to_table
    from segkit.io.atomic import refuse_existing, write_json
    from segkit.system.progress import Tracker

    if out is not None:
        refuse_existing([out], overwrite=overwrite)
    scores = score(
        predictions, references, labels=labels, tolerance_mm=tolerance, track=Tracker(console)
    )
    if out is not None:
        write_json(out, scores.to_json())
    console.print(to_table(scores.summary))
    if json:
        say_json(scores.to_json())


def check(
    path: Annotated[Path, typer.Argument(metavar="CONFIG|DATASET|VOLUME", help="What to look at.")],
    overrides: Overrides = None,
    json: JsonOption = False,
    series: SeriesOption = None,
) -> None:
    """Say what segkit understands of a config, a dataset or a volume, or what is wrong with it."""
    from segkit.checking import check as look
    from segkit.system.progress import Tracker

    understood = look(path, tuple(overrides or ()), series=series, track=Tracker(console))
    say(understood.text)
    if json:
        say_json({"kind": understood.kind, **understood.facts})


def export(
    model: Annotated[Path, typer.Argument(metavar="RUN|MODEL", help="A run or a model folder.")],
    form: Annotated[
        Literal["onnx", "openvino", "monai-bundle"],
        typer.Option("--format", help="What other programs read."),
    ],
    out: Annotated[
        Path, typer.Option(help="A file .onnx or .xml (with .bin beside it), or a bundle's folder.")
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Run it, and say how far it is from PyTorch.")
    ] = False,
    scan: Annotated[
        Path | None, typer.Option(help="To check it on; noise where not given.")
    ] = None,
    overlap: OverlapOption = 0.5,
    json: JsonOption = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a model for another program: ONNX, OpenVINO, or a MONAI bundle."""
    from segkit.export.export import export_model as write
    from segkit.io.inputs import find_inputs, read_input
    from segkit.model.folder import load_model, model_folders

    folder, *more = model_folders(model)
    if more:
        raise SegkitError(f"{model}: has {1 + len(more)} models; export one, such as {folder}")
    loaded = load_model(folder)
    found = find_inputs([scan], len(loaded.description.channels)) if scan else []
    exported = write(
        loaded,
        form,
        out,
        overlap=overlap,
        check=check or bool(found),
        scan=read_input(found[0]) if found else None,
        overwrite=overwrite,
    )
    for path in exported.written:
        say(f"wrote {path}")
    for line in exported.lines():
        say(line)
    if json:
        say_json(exported.content())
    if not exported.holds:
        raise SegkitError(
            f"{out}: differs from PyTorch by more than rounding; do not use it, and tell its makers"
        )
