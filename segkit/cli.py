"""The `segkit` command. Each command imports what it needs when it runs, so that help is quick."""

import math
import sys
import traceback
from collections.abc import Mapping
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from segkit.errors import ConfigError, SegkitError, Stopped, sentence_of
from segkit.signals import handling
from segkit.terminal import Commands, Json, Quiet, Verbose, console, is_verbose, say_json, start
from segkit.terminal import complain as _complain
from segkit.terminal import hush as _hush
from segkit.terminal import say as _say

if TYPE_CHECKING:
    from segkit.config import Config

app = typer.Typer(
    cls=Commands,
    help="Segment medical images with attention U-Nets, and see where their gates look.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="e.g. train.steps=500")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, or a name such as cuda:1.")]
Inputs = Annotated[
    list[Path],
    typer.Argument(metavar="INPUT...", help="Volumes, DICOM series, or folders of them."),
]
ModelFolder = Annotated[
    Path | None,
    typer.Option(envvar="SEGKIT_MODEL", help="A run or model folder; else the newest run."),
]
ModelFolders = Annotated[
    list[Path] | None,
    typer.Option(
        "--model",
        envvar="SEGKIT_MODEL",
        help="A run or model folder; else the newest run. Several are averaged.",
    ),
]
Overlap = Annotated[
    float, typer.Option(min=0, max=0.9, help="Share of a window that neighbours share.")
]
Series = Annotated[
    str | None,
    typer.Option(metavar="UID", help="Which DICOM series, where a folder holds several."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]


def _version(shown: bool) -> None:
    if shown:
        print(f"segkit {installed_version('segkit')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Segment medical images with attention U-Nets, and see where their gates look."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="A folder for what it writes.")] = Path("segkit_demo"),
    contrast: Annotated[
        Literal["t1", "random"],
        typer.Option(help="Training contrasts: drawn about those of a T1 scan, or wholly random."),
    ] = "t1",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 300,
    overwrite: Overwrite = False,
) -> None:
    """Train on synthesised scans, segment a real one, and write its gate maps; a few minutes."""
    from segkit.demo import run_demo
    from segkit.progress import Tracker
    from segkit.training_progress import TrainingProgress

    _hush()
    run_demo(
        out,
        contrast=contrast,
        steps=steps,
        overwrite=overwrite,
        say=_say,
        callbacks=[TrainingProgress(console)],
        track=Tracker(console),
    )


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Such as hippocampus, or Task04_Hippocampus.")],
    out: Annotated[Path, typer.Option(help="The folder to put it into.")] = Path(),
) -> None:
    """Download a dataset of the Medical Segmentation Decathlon, as MONAI keeps it."""
    from segkit import fetching

    sources = fetching.decathlon()
    whole = fetching.named(name, sources)
    _say(f"fetching {sources[whole].url}")
    folder = fetching.fetch(whole, sources[whole], out)
    _say(f"wrote {folder}")
    _say(f"next: segkit check {folder}, and then segkit train {folder}")


@app.command()
def plan(
    dataset: Annotated[
        Path, typer.Argument(help="A folder with a dataset.json, or YAML with data.files.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The config to write; NAME.yaml where not given.")
    ] = None,
    memory: Annotated[float, typer.Option(min=0.5, help="GB to plan for, on a GPU.")] = 8.0,
    minutes: Annotated[float, typer.Option(min=0.1, help="To plan for, on a CPU.")] = 20.0,
    dims: Annotated[int, typer.Option(min=2, max=3, help="2 for slices, 3 for volumes.")] = 3,
    preset: Annotated[
        Literal["auto", "nnunet"],
        typer.Option(help="nnunet: its own plan and schedule, wherever it runs."),
    ] = "auto",
    device: Device = "auto",
    runs: Annotated[Path, typer.Option(help="The folder whose cache keeps measurements.")] = Path(
        "runs"
    ),
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure a dataset and write a config, or two in turn, that says why each value was chosen."""
    from segkit.config_file import dataset_in
    from segkit.files import refuse_existing, write_text
    from segkit.planning import plan_dataset
    from segkit.progress import Tracker

    source = dataset_in(dataset)
    if source is None:
        raise ConfigError(f"{dataset}: says how to train already; plan from data.files alone")
    target = out or Path(f"{source.folder.resolve().name}.yaml")
    low = target.with_name(f"{target.stem}_low{target.suffix}")
    refuse_existing([target], overwrite=overwrite)
    planned = plan_dataset(
        source.folder,
        source.files,
        cache=runs / ".cache",
        device=device,
        spatial_dims=dims,
        gigabytes=memory,
        minutes=minutes,
        preset=preset,
        runs=runs,
        track=Tracker(console),
    )
    if planned.low is not None:
        refuse_existing([low], overwrite=overwrite)
        write_text(low, planned.low.text)
        _say(planned.low.text.rstrip())
        _say(f"wrote {low}")
    write_text(target, planned.text)
    _say(planned.text.rstrip())
    _say(f"wrote {target}")
    before = f"segkit train {low}, and then " if planned.low else ""
    _say(f"next: {before}segkit train {target}")
    if json:
        stages = [(low, planned.low), (target, planned)]
        files = [
            {"file": str(file), "config": stage.config.model_dump(mode="json")}
            for file, stage in stages
            if stage is not None
        ]
        say_json({"plans": files})


@app.command()
def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG|DATASET",
            help="YAML, e.g. configs/attention_unet_3d.yaml, or a dataset, which is planned first.",
        ),
    ] = None,
    overrides: Overrides = None,
    runs: Annotated[Path, typer.Option(help="The folder that runs are written to.")] = Path("runs"),
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with a run that was stopped.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what it will be and take, by a step; leave no run."),
    ] = False,
    folds: Annotated[
        str | None,
        typer.Option(
            metavar="all|0,2,…", help="Cross-validate: train nnU-Net's five folds, or those named."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Train the network that CONFIG describes, on the dataset that it names, or plan it first."""
    from segkit.config_file import changed, dataset_in, load_config

    if (config is None) == (resume is None):
        raise ConfigError("expected a CONFIG to train, or --resume RUN to go on with; give one")
    if dry_run and resume is not None:
        raise ConfigError("--dry-run is for a CONFIG or DATASET, not for a run to --resume")
    if dry_run and json:
        raise ConfigError("--json tells of a finished run, and --dry-run leaves none; drop one")
    wanted = _folds(folds)
    settings = low = None
    dataset = None if config is None else dataset_in(config)
    if config is not None and dataset is None:
        settings = load_config(config, overrides or ())
    from segkit import cross_validation, training, two_stages
    from segkit.progress import Tracker
    from segkit.training_progress import TrainingProgress

    if dataset is not None:
        from segkit.planning import plan_dataset

        accelerator = {"trainer.accelerator=cpu": "cpu", "trainer.accelerator=gpu": "cuda"}
        device = [accelerator[word] for word in overrides or () if word in accelerator]
        planned = plan_dataset(
            dataset.folder,
            dataset.files,
            cache=runs / ".cache",
            device=(device or ["auto"])[-1],
            runs=runs,
            track=Tracker(console),
        )
        settings = changed(planned.config, overrides or ())
        if planned.low and settings.data.first_stage == planned.config.data.first_stage:
            low = changed(planned.low.config, [*(overrides or ()), f"name={settings.name}_low"])
            if low.data.spacing == settings.data.spacing:
                raise ConfigError(
                    f"{config}: two stages cannot share data.spacing; write their configs first: "
                    f"segkit plan {config}; or train one with data.first_stage=null"
                )
            _say(planned.low.text.rstrip())
        if settings.trainer.devices != 1 or settings.trainer.num_nodes != 1:
            raise ConfigError(
                f"{config}: several processes must train by one plan; "
                f"write it first: segkit plan {config}"
            )
        _say(planned.text.rstrip())

    _hush()
    if dry_run:
        assert settings is not None
        _rehearse(settings, low, wanted)
        return
    progress, track = [TrainingProgress(console)], Tracker(console)
    result: training.Run | cross_validation.CrossValidation
    if settings is not None and low is not None:
        if wanted:
            raise ConfigError(
                f"{config}: is planned in two stages, and --folds trains one; write the plan first "
                f"and give each stage its folds: segkit plan {config}"
            )
        result = two_stages.train(
            low,
            settings,
            runs=runs,
            tell=lambda first: _tell(first.folder, first.summary),
            callbacks=progress,
            track=track,
        )
    elif settings is not None and wanted:
        result = cross_validation.cross_validate(
            settings, wanted, runs=runs, say=_say, callbacks=progress, track=track
        )
    elif settings is not None:
        result = training.train(settings, runs=runs, callbacks=progress, track=track)
    else:
        assert resume is not None
        if cross_validation.is_cross_validation(resume):
            result = cross_validation.resume(
                resume, wanted, say=_say, callbacks=progress, track=track
            )
        elif wanted:
            raise ConfigError(f"{resume}: is one run, not a cross-validation; leave --folds out")
        else:
            result = two_stages.resume(
                resume,
                tell=lambda first: _tell(first.folder, first.summary),
                callbacks=progress,
                track=track,
            )
    if isinstance(result, cross_validation.CrossValidation):
        _say(result.post_processing())
    _tell(result.folder, result.summary)
    _say(f"next: segkit predict volume.nii.gz --model {result.folder} --maps maps")
    if json:
        say_json({"folder": str(result.folder), **result.summary})


def _tell(folder: Path, summary: Mapping[str, Any]) -> None:
    """Say what became of a run."""
    _say(f"{summary['steps']} steps in {summary['seconds_of_training']:.0f} s")
    scores = summary["validation"]
    if scores["cases"]:
        classes = ", ".join(f"{name} {_dice(dice)}" for name, dice in scores["dice"].items())
        mean = _dice(scores["mean_dice"])
        _say(f"mean Dice of {scores['cases']} held-out cases: {mean} ({classes})")
    _say(f"wrote {folder}")


def _dice(dice: float) -> str:
    """Three digits; or a word, where a class is in neither references nor predictions."""
    return "undefined" if math.isnan(dice) else f"{dice:.3f}"


@app.command()
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
    series: Series = None,
    tta: Annotated[
        bool, typer.Option("--tta", help="Average over mirror images, as the model was trained on.")
    ] = False,
    device: Device = "auto",
    overlap: Overlap = 0.5,
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
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Segment volumes; without --out the labels go beside each input, as NAME_seg.

    Of a folder, volumes that have their results are left alone: a stopped job goes on where it was.
    """
    import torch

    from segkit.inference.predictor import Predictor
    from segkit.model import load_model, model_folders, newest_model
    from segkit.prediction import find_inputs, parse_shard, predict_files
    from segkit.progress import CohortProgress

    if shard == "auto":
        from segkit.launcher import place_of_process

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
        _say(f"model: {folder}")
    if tta and not predictor.mirrors:
        _say("no model was trained on mirror images: --tta changes nothing")
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
                _say(f"wrote {outcome.written[0]}{more}")
                if outcome.presence is not None:
                    shares = ", ".join(f"{name} {p:.3f}" for name, p in outcome.presence.items())
                    _say(f"probability that it holds: {shares}")
            else:
                failures.append(outcome.error)
                if len(found) > 1:
                    _complain(outcome.error)
    if kept:
        _say(
            f"left {kept} of {mine} volumes alone, whose results are there; --overwrite redoes them"
        )
    if json:
        say_json({"models": [str(folder) for folder in folders], "volumes": volumes})
    if len(failures) == 1 and len(found) == 1:
        raise SegkitError(failures[0])
    if failures:
        raise SegkitError(f"{len(failures)} of {mine} volumes failed, as told above")


@app.command()
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
    series: Series = None,
    device: Device = "auto",
    overlap: Overlap = 0.5,
    overwrite: Overwrite = False,
) -> None:
    """Write attention maps, what they pick out beside chance, and a page that shows them.

    With a reference, measures compare with it, else with the model's own labels. Several volumes
    get a folder each, a table over all, and a page that sums them up; one that cannot be read does
    not stop the others.
    """
    from segkit.errors import VolumeError
    from segkit.explain.page import Verdict
    from segkit.explain.study import WorthStudy, check_gates
    from segkit.explain.verdict_table import verdict_table
    from segkit.explanation import check_targets, explain_files, explain_heads
    from segkit.inference.predictor import Predictor
    from segkit.model import load_model, model_folder, newest_model
    from segkit.prediction import find_inputs
    from segkit.progress import Tracker

    if heads and reference is None:
        raise VolumeError("--heads compares Dice; give --reference, a label or a folder of them")
    folder = model_folder(model) if model else newest_model(Path("runs"))
    loaded = load_model(folder)
    found = find_inputs(inputs, len(loaded.description.channels), series=series)
    _say(f"model: {folder}")
    # Windows of a map that nobody asked about would count as cells that let nothing through.
    predictor = Predictor(loaded, device=device, overlap=overlap, skip_empty=False)
    track = Tracker(console)
    check_targets(found, out, overwrite=overwrite)
    if verdicts:
        check_gates(predictor)
    if heads and reference is not None:
        figures = explain_heads(predictor, found, reference, out, overwrite=overwrite, track=track)
        for studied in figures:
            _say(studied.answer())
        _say(f"wrote {out / 'heads.csv'} and {out / 'heads.json'}")
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
        _say(f"wrote {explained.written[0]} and {len(explained.written) - 1} more files")
        for position, reach in explained.reach.items():
            for number, head in enumerate(reach):
                _say(
                    f"{explained.name} {position} head {number}: reaches {head.distance_mm:.1f} mm "
                    f"({head.distance_ratio:.2f} of uniform attention), "
                    f"entropy {head.entropy:.2f} of {head.uniform_entropy:.2f}"
                )
        for verdict in explained.verdicts:
            _say(f"{explained.name} {verdict.map} is {verdict.verdict}: {verdict.reason}")
    if over_all:
        console.print(verdict_table(over_all))
    if len(failures) < len(found):
        _say(f"next: open {out / 'index.html'}")
    if len(found) == len(failures) == 1:
        raise SegkitError(failures[0])
    for error in failures:
        _complain(error)
    if failures:
        raise SegkitError(f"{len(failures)} of {len(found)} volumes failed, as told above")


@app.command()
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
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Score segmentations against references: Dice, IoU, HD95, ASSD, NSD, volumes."""
    from segkit.evaluation import evaluate as score
    from segkit.files import refuse_existing, write_json
    from segkit.metrics.table import to_table
    from segkit.progress import Tracker

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


@app.command()
def check(
    path: Annotated[Path, typer.Argument(metavar="CONFIG|DATASET|VOLUME", help="What to look at.")],
    overrides: Overrides = None,
    json: Json = False,
    series: Series = None,
) -> None:
    """Say what segkit understands of a config, a dataset or a volume, or what is wrong with it."""
    from segkit.checking import check as look
    from segkit.progress import Tracker

    understood = look(path, tuple(overrides or ()), series=series, track=Tracker(console))
    _say(understood.text)
    if json:
        say_json({"kind": understood.kind, **understood.facts})


@app.command()
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
    overlap: Overlap = 0.5,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a model for another program: ONNX, OpenVINO, or a MONAI bundle."""
    from segkit.export.verb import export as write
    from segkit.inputs import find_inputs, read_input
    from segkit.model import load_model, model_folders

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
        _say(f"wrote {path}")
    for line in exported.lines():
        _say(line)
    if json:
        say_json(exported.content())
    if not exported.holds:
        raise SegkitError(
            f"{out}: differs from PyTorch by more than rounding; do not use it, and tell its makers"
        )


def _folds(text: str | None) -> tuple[int, ...]:
    """The numbers of folds that were named; none where nothing was."""
    if text is None:
        return ()
    words = ["0", "1", "2", "3", "4"] if text == "all" else text.split(",")
    if not all(word.strip() in {"0", "1", "2", "3", "4"} for word in words):
        raise ConfigError(f"--folds is {text!r}; expected all, or numbers from 0 to 4 such as 0,2")
    return tuple(int(word) for word in words)


def _rehearse(settings: "Config", low: "Config | None", folds: tuple[int, ...]) -> None:
    """Say what a training will be and take, in one stage or in the first of two."""
    from segkit.progress import Tracker
    from segkit.rehearsal import rehearse

    stage = low or settings
    if folds:
        stage = stage.model_copy(update={"data": stage.data.model_copy(update={"fold": folds[0]})})
    for line in rehearse(stage, track=Tracker(console)).lines():
        _say(line)
    if len(folds) > 1:
        _say(f"so it is with each of {len(folds)} folds")
    if low is not None:
        _say(f"{settings.name}, the second stage, can be tried once {low.name} is trained")


def main() -> NoReturn:
    """Run the command; what a user can cause is one line on stderr and exit code 2.

    Stopped by a signal, the exit code is the shell's for it: 130 for Ctrl-C, 143 for SIGTERM.
    """
    start()
    try:
        with handling():
            app()
    except SegkitError as error:
        if is_verbose():
            traceback.print_exc()
        _complain(str(error))
        sys.exit(2)
    except OSError as error:
        _complain(sentence_of(error))
        sys.exit(2)
    except Stopped as stopped:
        _complain(str(stopped))
        sys.exit(128 + stopped.signum)
    sys.exit(0)
