"""The `segkit` command. Each command imports what it needs when it runs, so that help is quick."""

import logging
import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from segkit.errors import ConfigError, SegkitError

if TYPE_CHECKING:
    from segkit.config import Config

app = typer.Typer(
    help="Segment medical images with attention U-Nets, and see where their gates look.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="e.g. train.steps=500")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, or a name such as cuda:1.")]
Inputs = Annotated[
    list[Path], typer.Argument(metavar="INPUT...", help="Volumes, or folders of volumes.")
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
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]


def _version(shown: bool) -> None:
    if shown:
        console.print(f"segkit {installed_version('segkit')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
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
def plan(
    dataset: Annotated[Path, typer.Argument(help="A folder with a dataset.json.")],
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
    overwrite: Overwrite = False,
) -> None:
    """Measure a dataset and write a config, or two in turn, that says why each value was chosen."""
    from segkit.files import refuse_existing, write_text
    from segkit.planning import plan_dataset
    from segkit.progress import Tracker

    target = out or Path(f"{dataset.resolve().name}.yaml")
    low = target.with_name(f"{target.stem}_low{target.suffix}")
    refuse_existing([target], overwrite=overwrite)
    planned = plan_dataset(
        dataset,
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
) -> None:
    """Train the network that CONFIG describes, on the dataset that it names, or plan it first."""
    from segkit.config_file import changed, load_config

    if (config is None) == (resume is None):
        raise ConfigError("expected a CONFIG to train, or --resume RUN to go on with; give one")
    if dry_run and resume is not None:
        raise ConfigError("--dry-run is for a CONFIG or DATASET, not for a run to --resume")
    wanted = _folds(folds)
    settings = low = None
    if config is not None and not config.is_dir():
        settings = load_config(config, overrides or ())
    from segkit import cross_validation, training
    from segkit.progress import Tracker
    from segkit.training_progress import TrainingProgress

    if config is not None and config.is_dir():
        from segkit.planning import plan_dataset

        accelerator = {"trainer.accelerator=cpu": "cpu", "trainer.accelerator=gpu": "cuda"}
        device = [accelerator[word] for word in overrides or () if word in accelerator]
        planned = plan_dataset(
            config,
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
        first = training.train(low, runs=runs, callbacks=progress, track=track)
        _tell(first.folder, first.summary)
        settings = training.after(settings, first)
    if settings is not None and wanted:
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
            result = training.resume(resume, callbacks=progress, track=track)
    if isinstance(result, cross_validation.CrossValidation):
        _say(result.post_processing())
    _tell(result.folder, result.summary)
    _say(f"next: segkit predict volume.nii.gz --model {result.folder} --maps maps")


def _tell(folder: Path, summary: Mapping[str, Any]) -> None:
    """Say what became of a run."""
    _say(f"{summary['steps']} steps in {summary['seconds_of_training']:.0f} s")
    scores = summary["validation"]
    if scores["cases"]:
        classes = ", ".join(f"{name} {dice:.3f}" for name, dice in scores["dice"].items())
        _say(
            f"mean Dice of {scores['cases']} held-out cases: {scores['mean_dice']:.3f} ({classes})"
        )
    _say(f"wrote {folder}")


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
    found = find_inputs(inputs, len(predictor.model.description.channels))
    for folder in folders:
        _say(f"model: {folder}")
    if tta and not predictor.mirrors:
        _say("no model was trained on mirror images: --tta changes nothing")
    mine = len(range(number - 1, len(found), count))
    failures = []
    kept = 0
    with CohortProgress(console, "segmenting", mine) as progress:
        outcomes = predict_files(
            predictor,
            found,
            out=out,
            maps=maps,
            probabilities=probabilities,
            uncertainty=uncertainty,
            overwrite=overwrite,
            shard=(number, count),
            track=progress.track,
        )
        for outcome in outcomes:
            progress.done()
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
    device: Device = "auto",
    overlap: Overlap = 0.5,
    overwrite: Overwrite = False,
) -> None:
    """Write attention maps, what they pick out beside chance, and a page that shows them.

    With a reference, measures compare with it, else with the model's own labels. Several volumes
    get a folder each, a table over all, and a page that sums them up.
    """
    from segkit.errors import VolumeError
    from segkit.explain.study import WorthStudy, check_gates
    from segkit.explanation import check_targets, explain_files, explain_heads
    from segkit.inference.predictor import Predictor
    from segkit.model import load_model, model_folder, newest_model
    from segkit.prediction import find_inputs
    from segkit.progress import Tracker

    if heads and reference is None:
        raise VolumeError("--heads compares Dice; give --reference, a label or a folder of them")
    folder = model_folder(model) if model else newest_model(Path("runs"))
    loaded = load_model(folder)
    found = find_inputs(inputs, len(loaded.description.channels))
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
    explanations = explain_files(
        predictor,
        found,
        out,
        references=reference,
        tolerance_mm=tolerance,
        studies=[WorthStudy(track=track)] if verdicts else [],
        overwrite=overwrite,
        track=track,
    )
    for explained in explanations:
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
    _say(f"next: open {out / 'index.html'}")


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
    overwrite: Overwrite = False,
) -> None:
    """Score segmentations against references: Dice, IoU, HD95, ASSD, NSD, volumes."""
    from segkit.errors import VolumeError
    from segkit.evaluation import find_labelling, find_pairs, score_pairs
    from segkit.files import refuse_existing, write_json
    from segkit.metrics.table import summarise, to_json, to_table
    from segkit.progress import Tracker

    if out is not None:
        refuse_existing([out], overwrite=overwrite)
    pairs = find_pairs(predictions, references)
    rows = score_pairs(
        Tracker(console)(pairs, "scoring", len(pairs)),
        find_labelling(references, labels),
        tolerance_mm=tolerance,
    )
    if not rows:
        raise VolumeError(f"{references}: holds background alone; there is nothing to score")
    summary = summarise(rows)
    if out is not None:
        write_json(out, to_json(rows, summary))
    console.print(to_table(summary))


@app.command()
def check(
    path: Annotated[Path, typer.Argument(metavar="CONFIG|DATASET|VOLUME", help="What to look at.")],
    overrides: Overrides = None,
) -> None:
    """Say what segkit understands of a config, a dataset or a volume, or what is wrong with it."""
    from segkit.checking import check as look
    from segkit.progress import Tracker

    _say(look(path, tuple(overrides or ()), track=Tracker(console)))


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


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _complain(sentence: str) -> None:
    print(f"segkit: {sentence}", file=sys.stderr)


def _hush() -> None:
    """Leave the terminal to segkit, once lightning has set up its own logging."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "nibabel.global"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def main() -> NoReturn:
    """Run the command; what a user can cause is one line on stderr and exit code 2."""
    try:
        app()
    except SegkitError as error:
        _complain(str(error))
        sys.exit(2)
    sys.exit(0)
