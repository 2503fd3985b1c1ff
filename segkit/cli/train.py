"""The commands that make a model: `demo`, `fetch`, `plan` and `train`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from segkit.cli.options import Device, Overrides, Overwrite
from segkit.cli.terminal import JsonOption, console, hush, say, say_json
from segkit.errors import ConfigError

if TYPE_CHECKING:
    from segkit.config.training import Config


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
    from segkit.demo.demo import run_demo
    from segkit.system.progress import Tracker
    from segkit.training.progress_bar import TrainingProgress

    hush()
    run_demo(
        out,
        contrast=contrast,
        steps=steps,
        overwrite=overwrite,
        say=say,
        callbacks=[TrainingProgress(console)],
        track=Tracker(console),
    )


def fetch(
    name: Annotated[str, typer.Argument(help="Such as hippocampus, or Task04_Hippocampus.")],
    out: Annotated[Path, typer.Option(help="The folder to put it into.")] = Path(),
) -> None:
    """Download a dataset of the Medical Segmentation Decathlon, as MONAI keeps it."""
    from segkit.data import fetch as fetching

    sources = fetching.decathlon()
    whole = fetching.named(name, sources)
    say(f"fetching {sources[whole].url}")
    folder = fetching.fetch_dataset(whole, sources[whole], out)
    say(f"wrote {folder}")
    say(f"next: segkit check {folder}, and then segkit train {folder}")


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
    json: JsonOption = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure a dataset and write a config, or two in turn, that says why each value was chosen."""
    from segkit.config.load import dataset_in
    from segkit.io.atomic import refuse_existing, write_text
    from segkit.planning.make_plan import plan_dataset
    from segkit.system.progress import Tracker

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
        say(planned.low.text.rstrip())
        say(f"wrote {low}")
    write_text(target, planned.text)
    say(planned.text.rstrip())
    say(f"wrote {target}")
    before = f"segkit train {low}, and then " if planned.low else ""
    say(f"next: {before}segkit train {target}")
    if json:
        stages = [(low, planned.low), (target, planned)]
        files = [
            {"file": str(file), "config": stage.config.model_dump(mode="json")}
            for file, stage in stages
            if stage is not None
        ]
        say_json({"plans": files})


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
    json: JsonOption = False,
) -> None:
    """Train the network that CONFIG describes, on the dataset that it names, or plan it first."""
    from segkit.config.load import changed, dataset_in, load_config

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
    from segkit.system.progress import Tracker
    from segkit.training import cross_validation, two_stages
    from segkit.training import fit as training
    from segkit.training.progress_bar import TrainingProgress

    if dataset is not None:
        from segkit.planning.make_plan import plan_dataset

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
            say(planned.low.text.rstrip())
        if settings.trainer.devices != 1 or settings.trainer.num_nodes != 1:
            raise ConfigError(
                f"{config}: several processes must train by one plan; "
                f"write it first: segkit plan {config}"
            )
        say(planned.text.rstrip())

    hush()
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
        result = two_stages.train_two_stages(
            low,
            settings,
            runs=runs,
            tell=lambda first: _tell(first.folder, first.summary),
            callbacks=progress,
            track=track,
        )
    elif settings is not None and wanted:
        result = cross_validation.cross_validate(
            settings, wanted, runs=runs, say=say, callbacks=progress, track=track
        )
    elif settings is not None:
        result = training.train(settings, runs=runs, callbacks=progress, track=track)
    else:
        assert resume is not None
        if cross_validation.is_cross_validation(resume):
            result = cross_validation.resume_folds(
                resume, wanted, say=say, callbacks=progress, track=track
            )
        elif wanted:
            raise ConfigError(f"{resume}: is one run, not a cross-validation; leave --folds out")
        else:
            result = two_stages.resume_two_stages(
                resume,
                tell=lambda first: _tell(first.folder, first.summary),
                callbacks=progress,
                track=track,
            )
    if isinstance(result, cross_validation.CrossValidation):
        say(result.post_processing())
    _tell(result.folder, result.summary)
    say(f"next: segkit predict volume.nii.gz --model {result.folder} --maps maps")
    if json:
        say_json({"folder": str(result.folder), **result.summary})


def _tell(folder: Path, summary: Mapping[str, Any]) -> None:
    """Say what became of a run."""
    say(f"{summary['steps']} steps in {summary['seconds_of_training']:.0f} s")
    scores = summary["validation"]
    if scores["cases"]:
        classes = ", ".join(f"{name} {_dice(dice)}" for name, dice in scores["dice"].items())
        mean = _dice(scores["mean_dice"])
        say(f"mean Dice of {scores['cases']} held-out cases: {mean} ({classes})")
    say(f"wrote {folder}")


def _dice(dice: float) -> str:
    """Three digits; or a word, where a class is in neither references nor predictions."""
    return "undefined" if math.isnan(dice) else f"{dice:.3f}"


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
    from segkit.system.progress import Tracker
    from segkit.training.dry_run import dry_run

    stage = low or settings
    if folds:
        stage = stage.model_copy(update={"data": stage.data.model_copy(update={"fold": folds[0]})})
    for line in dry_run(stage, track=Tracker(console)).lines():
        say(line)
    if len(folds) > 1:
        say(f"so it is with each of {len(folds)} folds")
    if low is not None:
        say(f"{settings.name}, the second stage, can be tried once {low.name} is trained")
