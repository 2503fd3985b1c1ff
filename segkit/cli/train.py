"""`segkit train`: train a network from a config or a dataset, or resume a run."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Exit, Option

from segkit.cli.options import MINUTES, Overrides
from segkit.cli.terminal import JsonOption, console, hush, say, say_json
from segkit.config.load import dataset_in
from segkit.errors import ConfigError, Stopped, counted, first_few, printable
from segkit.system.allocator import keep_freed_memory

logger = logging.getLogger(__name__)

MOST_PICTURES = 200
"""Largest number of pictures whose headers are read before training."""

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from segkit.config.training import Config
    from segkit.system.progress import Tracker
    from segkit.training.cross_validation import CrossValidation
    from segkit.training.fit import Run


def _only_first_reports(command: Callable[..., None]) -> Callable[..., None]:
    """The command; if several processes train, only the first reports that they were stopped."""

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


@_only_first_reports
def train_command(
    config: Annotated[
        Path | None,
        Argument(
            metavar="CONFIG|DATASET",
            help="A YAML file such as configs/attention_unet_3d.yaml, or a dataset, which is "
            "planned first.",
        ),
    ] = None,
    overrides: Overrides = None,
    runs: Annotated[Path, Option(help="The folder for runs.")] = Path("runs"),
    resume: Annotated[
        Path | None,
        Option(metavar="RUN", help="Continue this run. KEY=VALUE changes its settings."),
    ] = None,
    dry_run: Annotated[
        bool,
        Option(
            "--dry-run",
            help="Take some steps, estimate time and memory of the whole training, and stop.",
        ),
    ] = False,
    folds: Annotated[
        str | None,
        Option(metavar="all|0,2,…", help="Cross-validate: train all folds, or only these."),
    ] = None,
    minutes: Annotated[
        float | None,
        Option(
            min=0.1,
            help="Total minutes for a DATASET, including planning and scoring. With --folds, the "
            "minutes of each fold, without planning. The default is 20.",
        ),
    ] = None,
    no_race: Annotated[
        bool,
        Option(
            "--no-race",
            help="Plan a DATASET by rules only, without short trainings of candidates. With "
            "--folds there are none, because all cases score.",
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Train the network of a CONFIG. For a DATASET, plan the config first."""
    if resume is not None and config is not None and "=" in str(config):
        # The first word after --resume RUN is a setting.
        config, overrides = None, [str(config), *(overrides or [])]
    if (config is None) == (resume is None):
        raise ConfigError(
            "expected either a CONFIG or --resume RUN, found both or neither; give one of them"
        )
    if dry_run and resume is not None:
        raise ConfigError("--dry-run does not work with --resume; give a CONFIG or DATASET")
    if dry_run and json:
        raise ConfigError(
            "--json needs a finished run, but --dry-run makes none; leave out one of them"
        )
    if minutes is not None and (config is None or dataset_in(config) is None):
        raise ConfigError("--minutes is only for a DATASET; for a CONFIG set train.minutes=5")
    started = time.monotonic()
    wanted = _folds(folds)
    keep_freed_memory()
    result: Run | CrossValidation
    if config is None:
        assert resume is not None
        result = _resumed(resume, wanted, overrides or [])
    else:
        minutes, overrides = minutes_to_plan(config, minutes, overrides or [])
        settings, low = _settings(
            config,
            overrides,
            runs,
            minutes,
            race=not no_race and not wanted and _are_for_time(overrides),
            began=None if wanted else started,
        )
        _warn_of_unused(overrides, settings)
        _say_picture_facts(settings)
        if dry_run:
            return _dry_run(settings, low, wanted)
        result = _trained(config, settings, low, wanted, runs, started)
    if not result.summary:  # another process writes it
        if json and wanted:
            say_json({"folder": str(result.folder), "finished": False})
        return
    say_result(result)
    say(f"next: segkit predict volume.nii.gz --model {result.folder} --maps maps")
    if json:
        say_json({"folder": str(result.folder), **result.summary})


def minutes_to_plan(
    config: Path, minutes: float | None, overrides: Sequence[str]
) -> tuple[float, list[str]]:
    """The minutes to plan a dataset for, and the other settings.

    For a dataset, `train.minutes=5` means `--minutes 5`: two planned stages share the minutes. With
    `train.steps`, it only limits the training.
    """
    given = [word for word in overrides if word.startswith("train.minutes=")]
    number = _positive(given[-1].partition("=")[2]) if given else None
    if number is None or not _are_for_time(overrides) or dataset_in(config, overrides) is None:
        return minutes or MINUTES, list(overrides)
    if minutes is not None:
        raise ConfigError(
            f"--minutes: expected one number of minutes, found {minutes:g} and {given[-1]}; leave "
            f"out one of them"
        )
    return number, [word for word in overrides if word not in given]


def _positive(text: str) -> float | None:
    """The number above 0 that a text gives; None for any other text."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 < number < math.inf else None


def _warn_of_unused(overrides: Sequence[str], settings: "Config") -> None:
    from segkit.training.unused_settings import told_of_unused

    for sentence in told_of_unused(overrides, settings):
        logger.warning("%s", printable(sentence))


def _settings(
    config: Path,
    overrides: Sequence[str],
    runs: Path,
    minutes: float,
    *,
    race: bool,
    began: float | None,
) -> tuple["Config", "Config | None"]:
    """The config to train, and that of the first stage if a dataset is planned in two stages.

    Args:
        config: the config or the dataset.
        overrides: settings.
        runs: the folder of runs.
        minutes: the minutes to plan a dataset for.
        race: whether several plans are tried.
        began: when the minutes began; None if they begin with training.
    """
    from segkit.config.load import changed, load_config

    dataset = dataset_in(config, overrides)
    if dataset is None:
        return load_config(config, overrides), None
    import torch

    from segkit.planning.make_plan import plan_dataset
    from segkit.racing import plan_by_race
    from segkit.system.progress import Tracker

    accelerator = {"trainer.accelerator=cpu": "cpu", "trainer.accelerator=gpu": "cuda"}
    device = [accelerator[word] for word in overrides if word in accelerator]
    on_gpu, mac = device[-1:] == ["cuda"], torch.backends.mps.is_available()
    if on_gpu and not mac and not torch.cuda.is_available():
        raise ConfigError(
            "trainer.accelerator is gpu, but PyTorch finds no GPU on this machine; remove it, or "
            "plan for another machine with segkit plan --device cuda"
        )
    hush()  # Lightning set up its logging when it was imported
    make = partial(plan_by_race, settings=overrides) if race else plan_dataset
    planned = make(
        dataset,
        cache=runs / ".cache",
        device=(device or ["auto"])[-1],
        spatial_dims=dims_of(overrides),
        minutes=minutes,
        runs=runs,
        track=Tracker(console),
        began=began,
    )
    settings, low = changed(planned.config, overrides), None
    if planned.low and settings.data.first_stage == planned.config.data.first_stage:
        low = changed(planned.low.config, [*overrides, f"name={settings.name}_low"])
        if low.data.spacing == settings.data.spacing:
            raise ConfigError(
                f"{config}: expected a different data.spacing for each of the two planned stages, "
                f"found one for both; write their configs with segkit plan {config}, or train one "
                f"stage with data.first_stage=null"
            )
        say(planned.low.text.rstrip())
    if settings.trainer.devices != 1 or settings.trainer.num_nodes != 1:
        raise ConfigError(
            f"{config}: expected a config, because several processes train, found a dataset; "
            f"write the config first with segkit plan {config}"
        )
    say(planned.text.rstrip())
    return settings, low


def dims_of(overrides: Sequence[str]) -> int | None:
    """The number of spatial dimensions that overrides of a plan need; None if any number fits."""
    dims = None
    for word in overrides:
        key, _, value = word.partition("=")
        if key == "network.spatial_dims" and value in ("2", "3"):
            dims = int(value)
        elif key == "data.patch_size":
            count = len(value.split(","))
            dims = count if count in (2, 3) else dims
    return dims


def _are_for_time(overrides: Sequence[str]) -> bool:
    """Whether the training is limited by time, because the settings do not give its steps."""
    return not any(word.startswith("train.steps=") for word in overrides)


def _trained(
    config: Path,
    settings: "Config",
    low: "Config | None",
    folds: tuple[int, ...] | Literal["all"],
    runs: Path,
    started: float,
) -> "Run | CrossValidation":
    """Train a new run, in one stage or two, or a new cross-validation."""
    from segkit.training.cross_validation import cross_validate
    from segkit.training.fit import train
    from segkit.training.two_stages import train_two_stages

    callbacks, track = _shown()
    if low is not None:
        if folds:
            raise ConfigError(
                f"{config}: is planned in two stages, but --folds works with one; write the "
                f"configs with segkit plan {config}, and train each with --folds"
            )
        return train_two_stages(
            low,
            settings,
            runs=runs,
            tell=say_result,
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
    """Resume a run or a cross-validation that was stopped or has new settings."""
    from segkit.training.cross_validation import is_cross_validation, resume_folds
    from segkit.training.two_stages import resume_two_stages

    callbacks, track = _shown()
    if is_cross_validation(run):
        return resume_folds(
            run, folds, overrides=overrides, say=say, callbacks=callbacks, track=track
        )
    if folds:
        raise ConfigError(
            f"{run}: --folds needs a cross-validation, found a single run; leave --folds out"
        )
    return resume_two_stages(run, overrides, tell=say_result, callbacks=callbacks, track=track)


def _say_picture_facts(settings: "Config") -> None:
    """Print the pixel size if the dataset contains pictures."""
    from segkit.data.dataset import dataset_of
    from segkit.io.picture_summary import picture_lines

    dataset = dataset_of(settings.data)
    first = [(*case.images, case.label)[0] for case in dataset.cases[:MOST_PICTURES]]
    for line in picture_lines((file, dataset.rules) for file in first):
        say(line)


def _shown() -> tuple[list["Callback"], "Tracker"]:
    """The displays of progress in training and in other work."""
    from segkit.system.progress import Tracker
    from segkit.training.progress_bar import TrainingProgress

    hush()  # Lightning set up its logging when it was imported
    return [TrainingProgress(console)], Tracker(console)


def say_result(result: "Run | CrossValidation") -> None:
    """Print the result of a run or a cross-validation."""
    from segkit.training.cross_validation import CrossValidation

    if isinstance(result, CrossValidation):
        say(result.post_processing())
    summary = result.summary
    say(f"{counted(summary['steps'], 'step')} in {summary['seconds_of_training']:.0f} s")
    if (limit := summary.get("minutes")) is not None:
        say(
            f"{limit['taken']:.1f} of {counted(limit['given'], 'minute', form='g')}, including "
            f"preparation and scoring"
        )
    scores = summary["validation"]
    if scores["cases"]:
        classes = first_few([f"{name} {_dice(dice)}" for name, dice in scores["dice"].items()], 20)
        mean = _dice(scores["mean_dice"])
        say(
            f"mean Dice of {counted(scores['cases'], 'held-out case')}, on the grids of their "
            f"scans: "
            f"{mean} ({classes})"
        )
    for name in ("temperature", "start_from", "freeze"):
        if name in summary:
            say(summary[name]["told"])
    say(f"wrote {result.folder}")


def _dice(dice: float) -> str:
    """A Dice with three digits; 'undefined' if the class is in no reference and prediction."""
    return "undefined" if math.isnan(dice) else f"{dice:.3f}"


def _folds(text: str | None) -> tuple[int, ...] | Literal["all"]:
    """The folds in the option --folds; empty if it is not given."""
    if text is None:
        return ()
    if text == "all":
        return "all"
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 7 for word in words):
        raise ConfigError(f"--folds: expected all, or numbers from 0 such as 0,2; found {text!r}")
    return tuple(int(word) for word in words)


def _dry_run(
    settings: "Config", low: "Config | None", folds: tuple[int, ...] | Literal["all"]
) -> None:
    """Print the network, time and memory of a training with one stage, or of the first of two."""
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
        say(
            "the same for every fold"
            if folds == "all"
            else f"the same for each of {len(folds)} folds"
        )
    if low is not None:
        say(f"the second stage, {settings.name}, needs the trained first stage, {low.name}")
