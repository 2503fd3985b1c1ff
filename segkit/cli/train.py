"""`segkit train`: a network from a config, a dataset, or a run that was stopped."""

import math
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Exit, Option

from segkit.cli.options import Overrides
from segkit.cli.terminal import JsonOption, console, hush, say, say_json
from segkit.config.load import dataset_in
from segkit.errors import ConfigError, Stopped, first_few
from segkit.system.allocator import keep_freed_memory

MOST_PICTURES = 200
"""Whose headers are looked at before training."""

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from segkit.config.training import Config
    from segkit.system.progress import Tracker
    from segkit.training.cross_validation import CrossValidation
    from segkit.training.fit import Run

MINUTES = 20.0
"""For a dataset, if nothing else is asked for."""


def _first_tells(command: Callable[..., None]) -> Callable[..., None]:
    """The command; if several processes train, the first alone says that they were stopped."""

    @wraps(command)
    def run(**given: Any) -> None:
        try:
            command(**given)
        except Stopped as stopped:
            from segkit.training.lightning_private import is_first_process

            if is_first_process():
                raise
            raise Exit(128 + stopped.signum) from None

    return run


@_first_tells
def train_command(
    config: Annotated[
        Path | None,
        Argument(
            metavar="CONFIG|DATASET",
            help="YAML, e.g. configs/attention_unet_3d.yaml, or a dataset, which is planned first.",
        ),
    ] = None,
    overrides: Overrides = None,
    runs: Annotated[Path, Option(help="The folder that runs are written to.")] = Path("runs"),
    resume: Annotated[
        Path | None, Option(metavar="RUN", help="Go on with a run, with KEY=VALUE changed.")
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Say what it will be and take, by a step; leave no run.")
    ] = False,
    folds: Annotated[
        str | None,
        Option(metavar="all|0,2,…", help="Cross-validate: train all folds, or those named."),
    ] = None,
    minutes: Annotated[
        float | None,
        Option(min=0.1, help="Wall time for a DATASET, planning and scoring included; 20."),
    ] = None,
    no_race: Annotated[
        bool, Option("--no-race", help="Plan a DATASET by the rule, without trying candidates.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Train the network that CONFIG describes, on the dataset that it names, or plan it first."""
    if resume is not None and config is not None and "=" in str(config):
        # The first word after --resume RUN is a setting.
        config, overrides = None, [str(config), *(overrides or [])]
    if (config is None) == (resume is None):
        raise ConfigError("expected a CONFIG to train, or --resume RUN to go on with; give one")
    if dry_run and resume is not None:
        raise ConfigError("--dry-run is for a CONFIG or DATASET, not for a run to --resume")
    if dry_run and json:
        raise ConfigError("--json tells of a finished run, and --dry-run leaves none; drop one")
    if minutes is not None and (config is None or dataset_in(config) is None):
        raise ConfigError("--minutes is for a DATASET to plan; a CONFIG has train.minutes=5")
    started = time.monotonic()
    wanted = _folds(folds)
    keep_freed_memory()
    result: Run | CrossValidation
    if config is None:
        assert resume is not None
        result = _resumed(resume, wanted, overrides or [])
    else:
        settings, low = _settings(
            config, overrides or [], runs, minutes or MINUTES, _races(overrides or [], no_race)
        )
        _tell_of_pictures(settings)
        if dry_run:
            return _rehearse(settings, low, wanted)
        result = _trained(config, settings, low, wanted, runs, started)
    if not result.summary:  # in all processes of a run but the first, and of folds but the last
        if json and wanted:
            say_json({"folder": str(result.folder), "finished": False})
        return
    tell_of_run(result)
    say(f"next: segkit predict volume.nii.gz --model {result.folder} --maps maps")
    if json:
        say_json({"folder": str(result.folder), **result.summary})


def _settings(
    config: Path, overrides: Sequence[str], runs: Path, minutes: float, race: bool
) -> tuple["Config", "Config | None"]:
    """What to train, and the first stage if a dataset is planned in two."""
    from segkit.config.load import changed, load_config

    dataset = dataset_in(config, overrides)
    if dataset is None:
        return load_config(config, overrides), None
    from segkit.planning.make_plan import plan_dataset
    from segkit.racing import plan_by_race
    from segkit.system.progress import Tracker

    accelerator = {"trainer.accelerator=cpu": "cpu", "trainer.accelerator=gpu": "cuda"}
    device = [accelerator[word] for word in overrides if word in accelerator]
    hush()  # Lightning has set up its logging as it was imported
    make = plan_by_race if race else plan_dataset
    planned = make(
        dataset,
        cache=runs / ".cache",
        device=(device or ["auto"])[-1],
        minutes=minutes,
        runs=runs,
        track=Tracker(console),
    )
    settings, low = changed(planned.config, overrides), None
    if planned.low and settings.data.first_stage == planned.config.data.first_stage:
        low = changed(planned.low.config, [*overrides, f"name={settings.name}_low"])
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
    return settings, low


def _races(overrides: Sequence[str], no_race: bool) -> bool:
    """Whether plans race: not if steps are asked for, which are no time to share."""
    return not no_race and not any(word.startswith("train.steps=") for word in overrides)


def _trained(
    config: Path,
    settings: "Config",
    low: "Config | None",
    folds: tuple[int, ...] | Literal["all"],
    runs: Path,
    started: float,
) -> "Run | CrossValidation":
    """A new run, in one stage or two, or a new cross-validation."""
    from segkit.training.cross_validation import cross_validate
    from segkit.training.fit import train
    from segkit.training.two_stages import train_two_stages

    callbacks, track = _shown()
    if low is not None:
        if folds:
            raise ConfigError(
                f"{config}: is planned in two stages, and --folds trains one; write the plan first "
                f"and give each stage its folds: segkit plan {config}"
            )
        return train_two_stages(
            low,
            settings,
            runs=runs,
            tell=tell_of_run,
            callbacks=callbacks,
            track=track,
            spent=time.monotonic() - started,
        )
    if folds:
        return cross_validate(settings, folds, runs=runs, say=say, callbacks=callbacks, track=track)
    return train(
        settings, runs=runs, callbacks=callbacks, track=track, spent=time.monotonic() - started
    )


def _resumed(
    run: Path, folds: tuple[int, ...] | Literal["all"], overrides: Sequence[str]
) -> "Run | CrossValidation":
    """A run or a cross-validation that was stopped, or that is given more to do."""
    from segkit.training.cross_validation import is_cross_validation, resume_folds
    from segkit.training.two_stages import resume_two_stages

    callbacks, track = _shown()
    if is_cross_validation(run):
        if overrides:
            raise ConfigError(
                f"{run}: is a cross-validation, whose folds share their settings, found "
                f"{overrides[0]}; resume it without, or one of its folds with it"
            )
        return resume_folds(run, folds, say=say, callbacks=callbacks, track=track)
    if folds:
        raise ConfigError(f"{run}: is one run, not a cross-validation; leave --folds out")
    return resume_two_stages(run, overrides, tell=tell_of_run, callbacks=callbacks, track=track)


def _tell_of_pictures(settings: "Config") -> None:
    """Say what pixel size was taken, if the dataset is one of pictures."""
    from segkit.data.dataset import read_dataset
    from segkit.io.picture_summary import told_of_pictures

    data = settings.data
    dataset = read_dataset(data.folder, data.files, data.pictures)
    first = [(*case.images, case.label)[0] for case in dataset.cases[:MOST_PICTURES]]
    for line in told_of_pictures(first, dataset.rules):
        say(line)


def _shown() -> tuple[list["Callback"], "Tracker"]:
    """What shows the progress of training, and of the work around it."""
    from segkit.system.progress import Tracker
    from segkit.training.progress_bar import TrainingProgress

    hush()  # Lightning has set up its logging as it was imported
    return [TrainingProgress(console)], Tracker(console)


def tell_of_run(result: "Run | CrossValidation") -> None:
    """Say what became of a run, or of several folds."""
    from segkit.training.cross_validation import CrossValidation

    if isinstance(result, CrossValidation):
        say(result.post_processing())
    summary = result.summary
    say(f"{summary['steps']} steps in {summary['seconds_of_training']:.0f} s")
    if (limit := summary.get("minutes")) is not None:
        say(f"{limit['taken']:.1f} of {limit['given']:g} minutes, from preparing to scoring")
    scores = summary["validation"]
    if scores["cases"]:
        classes = first_few([f"{name} {_dice(dice)}" for name, dice in scores["dice"].items()], 20)
        mean = _dice(scores["mean_dice"])
        say(
            f"mean Dice of {scores['cases']} held-out cases, each on its scan's grid: "
            f"{mean} ({classes})"
        )
    for name in ("temperature", "start_from", "freeze"):
        if name in summary:
            say(summary[name]["told"])
    say(f"wrote {result.folder}")


def _dice(dice: float) -> str:
    """Three digits; or a word, where a class is in neither references nor predictions."""
    return "undefined" if math.isnan(dice) else f"{dice:.3f}"


def _folds(text: str | None) -> tuple[int, ...] | Literal["all"]:
    """The numbers of folds that were named; none if nothing was."""
    if text is None:
        return ()
    if text == "all":
        return "all"
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 7 for word in words):
        raise ConfigError(f"--folds is {text!r}; expected all, or numbers from 0 on such as 0,2")
    return tuple(int(word) for word in words)


def _rehearse(
    settings: "Config", low: "Config | None", folds: tuple[int, ...] | Literal["all"]
) -> None:
    """Say what a training will be and take, in one stage or in the first of two."""
    from segkit.system.progress import Tracker
    from segkit.training.dry_run import dry_run

    hush()
    stage = low or settings
    if folds:
        first = 0 if folds == "all" else folds[0]
        stage = stage.model_copy(update={"data": stage.data.model_copy(update={"fold": first})})
    for line in dry_run(stage, track=Tracker(console)).lines():
        say(line)
    if len(folds) > 1:
        say("so it is with every fold" if folds == "all" else f"so it is with {len(folds)} folds")
    if low is not None:
        say(f"{settings.name}, the second stage, can be tried once {low.name} is trained")
