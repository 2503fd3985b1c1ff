"""Settings of the folds of one cross-validation: those that may differ, and those that may change.

Folds are pooled because each was trained in the same way. So settings that decide how a fold is
trained are the same for all of them, and only change for all of them.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from segkit.config.load import changed, load_config
from segkit.config.training import Config
from segkit.errors import ConfigError, first_few
from segkit.model.file_names import CONFIG, SUMMARY
from segkit.training.changed_settings import (
    OF_FOLDER,
    Change,
    changes,
    check_changes,
    is_one_of,
)
from segkit.training.run_folder import checkpoint_of, read_record
from segkit.training.unused_settings import refuse_unused

logger = logging.getLogger(__name__)

SHOWN = {
    "name",
    "data.folder",
    "data.cache",
    "data.workers",
    "data.fold",
    "train.keep_held_out",
    "train.pictures",
    "trainer.loggers",
}
"""Settings that may differ between folds, as they do not change what a fold learns."""
OF_THE_MACHINE = {
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.precision",
    "trainer.deterministic",
    "trainer.compile",
    "train.validation_cases",
}
"""Settings that may differ between folds that were trained on different machines."""
ANYWHERE = {"data.first_stage", "train.start_from"}
"""Models that may lie in another folder on another machine, but are given to all folds or none."""
OF_THE_FOLD = {"data.spacing", "data.normalisation"}
"""Settings that each fold measures on its own cases, unless they were given."""


def settings_that_differ(config: Config, other: Config) -> Iterator[Change]:
    """The settings that differ between two folds, except for those that are only shown."""
    expected: dict[str, Any] = config.model_dump(mode="json")
    for change in changes(expected, other.model_dump(mode="json")):
        if not is_one_of(change[0], SHOWN):
            yield change


def may_differ(change: Change) -> bool:
    """Whether folds of one cross-validation may differ in this setting."""
    key, before, after = change
    if is_one_of(key, ANYWHERE):
        return before is not None and after is not None
    if key == "data.normalisation":
        return _kinds(before) == _kinds(after)
    return is_one_of(key, OF_THE_MACHINE | OF_THE_FOLD)


def _kinds(normalisation: Any) -> list[tuple[Any, ...]]:
    """The normalisation of each channel, without values that are measured."""
    channels = normalisation if isinstance(normalisation, list) else [normalisation]
    return [(each and each.get("kind"), each and each.get("nonzero")) for each in channels]


def check_alike(runs: Mapping[int, Path], configs: Mapping[int, Config]) -> None:
    """Check that folds share their settings, and warn of those that may differ and do.

    Args:
        runs: the run of each fold.
        configs: the config of each fold.

    Raises:
        ConfigError: a setting differs that must not.
    """
    first = next(iter(configs))
    for fold, change in _differences(configs):
        key, before, after = change
        if not may_differ(change):
            raise ConfigError(
                f"{runs[fold]}: expected the {key} of {runs[first]}, {before}, found {after}; "
                f"give folds that were trained with the same settings"
            )
    tell_differences(runs[first].parent, configs)


def tell_differences(folder: Path, configs: Mapping[int, Config]) -> None:
    """Warn if folds of a cross-validation do not share their settings."""
    told: dict[str, Change] = {}
    for _, change in _differences(configs):
        told.setdefault(change[0], change)
    if told:
        different = [f"{key} ({before} and {after})" for key, before, after in told.values()]
        logger.warning(
            "%s: the folds were not all trained in the same way, as they differ in %s; their "
            "pooled scores are those of different trainings",
            folder,
            first_few(different, 3),
        )


def _differences(configs: Mapping[int, Config]) -> Iterator[tuple[int, Change]]:
    """Each fold, with each setting in which it differs from the first."""
    (_, config), *others = configs.items()
    for fold, other in others:
        for change in settings_that_differ(config, other):
            yield fold, change


def check_new_settings(
    folder: Path, before: Config, after: Config, begun: Mapping[int, Path]
) -> None:
    """Check that a cross-validation may continue with changed settings.

    If no fold has a checkpoint yet, nothing is trained, and all settings but the name may change.

    Args:
        folder: the folder of the cross-validation.
        before: its settings.
        after: the settings with which it would continue.
        begun: the run of each fold that was started.

    Raises:
        ConfigError: a setting must not change, or only if all folds are trained further.
    """
    found = list(changes(before.model_dump(mode="json"), after.model_dump(mode="json")))
    source = str(folder)
    check_changes(source, [each for each in found if each[0] in OF_FOLDER], 0)
    trained = {fold: run for fold, run in begun.items() if checkpoint_of(run) is not None}
    finished = {fold: run for fold, run in begun.items() if (run / SUMMARY).is_file()}
    if not trained and not finished:
        return
    done = [read_record(run)[1] for run in trained.values()]
    check_changes(source, found, max(done, default=0))
    refuse_unused(source, found, after, held_out=True)
    others = [each for each in found if not is_one_of(each[0], SHOWN | OF_THE_MACHINE)]
    if not others or not finished:
        return
    names = first_few([f"fold {fold}" for fold in finished], 5)
    if before.train.minutes is not None:
        raise ConfigError(
            f"{folder}: {others[0][0]} was changed, but {names} finished with the earlier value, "
            f"and train.minutes limits a run; change it back, or train a new cross-validation"
        )
    if after.train.steps <= before.train.steps:
        raise ConfigError(
            f"{folder}: {others[0][0]} was changed, but {names} finished with the earlier value, "
            f"and folds of one cross-validation share their settings; change it back, also set "
            f"more train.steps (then all folds continue), or train a new cross-validation"
        )


def is_done(run: Path, overrides: Sequence[str]) -> bool:
    """Whether a fold is finished, with all steps that settings of the cross-validation give it."""
    if not (run / SUMMARY).is_file():
        return False
    if not any(override.startswith("train.steps=") for override in overrides):
        return True
    config = load_config(run / CONFIG)
    return changed(config, overrides).train.steps <= config.train.steps
