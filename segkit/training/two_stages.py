"""`segkit train DATASET` in two stages: a run of low resolution, then a run that uses its labels.

Both can be stopped and resumed.

runs/NAME_low/second_stage.yaml   the config of the second stage, beside the files of a run
runs/NAME/                        the second stage, which receives the labels of NAME_low
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from segkit.config.load import dump_yaml, load_config
from segkit.config.training import Config
from segkit.errors import ConfigError
from segkit.model.file_names import CONFIG, SUMMARY
from segkit.system.progress import Track, untracked
from segkit.training.fit import Run, fit_with_files, train
from segkit.training.parts import prepare
from segkit.training.resolve import with_absolute_paths
from segkit.training.resume import resume
from segkit.training.run_folder import SECOND_STAGE, read_of_run


def train_two_stages(
    low: Config,
    full: Config,
    *,
    runs: Path,
    tell: Callable[[Run], None] = lambda run: None,
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
    spent: float = 0.0,
) -> Run:
    """Train a first stage, then a second stage that receives its labels.

    If the first stage took longer than its `train.minutes`, the second has less time, so that both
    end within their minutes together. Time that was used before counts half for each.

    Args:
        low: the config of the first stage.
        full: the config of the second stage.
        runs: the folder in which the folders of both runs are made.
        tell: receives the first run when it is finished.
        callbacks: Lightning callbacks that are called during both trainings.
        track: shows the progress over cases.
        spent: seconds of the `train.minutes` of both stages that are used already.

    Returns:
        The run of the second stage.

    Raises:
        SegkitError: a training fails, as `train` describes.
    """
    full = _shorter(full, spent / 2)
    first = train_first(low, full, runs=runs, callbacks=callbacks, track=track, spent=spent / 2)
    tell(first)
    return train(
        second_stage_config(full, first.folder),
        runs=runs,
        callbacks=callbacks,
        track=track,
        spent=overrun(first.summary),
    )


def _shorter(config: Config, seconds: float) -> Config:
    """The config with so much less time, but half of its time at least."""
    minutes = config.train.minutes
    if minutes is None:
        return config
    rest = max(minutes - seconds / 60, minutes / 2)
    return config.model_copy(update={"train": config.train.model_copy(update={"minutes": rest})})


def overrun(summary: Mapping[str, Any]) -> float:
    """Seconds that a run took longer than its `train.minutes`; 0 if its time has no limit.

    Args:
        summary: the content of the run's `summary.json`.
    """
    minutes = summary.get("minutes")
    return 0.0 if minutes is None else max(60 * (minutes["taken"] - minutes["given"]), 0.0)


def train_first(
    low: Config,
    full: Config,
    *,
    runs: Path,
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
    spent: float = 0.0,
) -> Run:
    """Train a first stage, with the config of the second in its folder, for a later resume.

    Args:
        low: the config of the first stage.
        full: the config of the second stage.
        runs: the folder in which the run's folder is made.
        callbacks: Lightning callbacks that are called during training.
        track: shows the progress over cases.
        spent: seconds of `train.minutes` that are used already.
    """
    return fit_with_files(
        {SECOND_STAGE: dump_yaml(with_absolute_paths(full))},
        prepare(low, runs=runs, track=track),
        runs=runs,
        callbacks=callbacks,
        track=track,
        spent=spent,
    )


def second_stage_config(config: Config, first: Path) -> Config:
    """The config of a second stage, with `first` as the run of its first stage."""
    data = config.data.model_copy(update={"first_stage": [first]})
    return config.model_copy(update={"data": data})


def resume_two_stages(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    tell: Callable[[Run], None] = lambda run: None,
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
) -> Run:
    """Continue a run, and then train its second stage if it is the first of two stages.

    If the second stage has started already, it is resumed.

    Args:
        folder: the run's folder.
        overrides: changes of settings; only for a run that is not a first stage.
        tell: receives the first run when it is finished.
        callbacks: Lightning callbacks that are called during training.
        track: shows the progress over cases.

    Returns:
        The last run.

    Raises:
        ConfigError: nothing is left to do, or overrides were given for a first stage.
        SegkitError: a training fails, as `resume` describes.
    """
    if not (folder / SECOND_STAGE).is_file():
        return resume(folder, overrides=overrides, callbacks=callbacks, track=track)
    if overrides:
        raise ConfigError(
            f"{folder}: is the first of two stages, so {overrides[0]} would change only this "
            f"stage; resume without settings, or edit its {CONFIG} or {SECOND_STAGE} first"
        )
    if not (folder / SUMMARY).is_file():
        first = resume(folder, callbacks=callbacks, track=track)
        tell(first)
        summary = first.summary
    else:
        summary = read_of_run(folder / SUMMARY)
    begun = second_stage_of(folder)
    if begun is not None:
        return resume(begun, callbacks=callbacks, track=track)
    config = second_stage_config(load_config(folder / SECOND_STAGE), folder)
    spent = overrun(summary)
    return train(config, runs=folder.parent, callbacks=callbacks, track=track, spent=spent)


def second_stage_of(folder: Path) -> Path | None:
    """The run beside this one that has it as its only first stage, if there is such a run."""
    for config in sorted(folder.parent.glob(f"*/{CONFIG}")):
        try:
            first_stage = load_config(config).data.first_stage
        except ConfigError:  # written by another version of segkit
            continue
        if first_stage == [folder.resolve()]:
            return config.parent
    return None
