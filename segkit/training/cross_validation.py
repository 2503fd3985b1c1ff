"""`segkit train --folds`: cross-validation, fold by fold, and a summary of all folds.

runs/<name>/cross_validation.json   fold_0/ … fold_4/   summary.json

Each fold is a run of its own. Each case is held out by one fold. So the folds together give the
Dice of all cases by models that were not trained on them. This Dice decides whether predictions
keep only the largest components.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from lightning.pytorch.callbacks import Callback
from pydantic import Field

from segkit.config.base import Section
from segkit.config.load import changed, load_config, validated
from segkit.config.model import PostprocessingConfig
from segkit.config.training import Config
from segkit.data.dataset import Dataset, dataset_of, grid_of_case
from segkit.data.folds import folds_of
from segkit.data.preprocess import median_spacing
from segkit.data.split import nth_of
from segkit.errors import ConfigError, SegkitError
from segkit.io.atomic import write_json
from segkit.model.file_names import CONFIG, FOLD, FOLDS, SPLIT, SUMMARY
from segkit.model.folder import adopt, load_description
from segkit.system.progress import Track, untracked
from segkit.system.signals import advice_on_stop
from segkit.training.changed_settings import changes, in_a_sentence
from segkit.training.fit import train
from segkit.training.fold_settings import check_new_settings, is_done, tell_differences
from segkit.training.kept_split import case_names, has_given_folds, read_split
from segkit.training.parts import refuse_replaced
from segkit.training.pooled_scores import pool_folds
from segkit.training.resolve import with_absolute_paths
from segkit.training.resume import resume
from segkit.training.run_folder import lock_if_free, locked_folder, new_run_folder, read_of_run

logger = logging.getLogger(__name__)

SECONDS_FOR_ANOTHER = 60.0
"""Seconds to wait for a process that writes the shared files of all folds."""


@dataclass(frozen=True)
class CrossValidation:
    """A cross-validation, with a run for each fold and the results over all folds.

    Example:
        result = segkit.cross_validate(segkit.load_config("my_dataset.yaml"), [0, 1])
        scores = result.summary["validation"]
    """

    folder: Path
    """The folder of the cross-validation, with a run for each fold."""
    summary: Mapping[str, Any]
    """The content of `summary.json`. It is empty while another process trains folds; the last that
    finishes pools them."""

    def post_processing(self) -> str:
        """A sentence about the selected post-processing and its Dice."""
        adopted = self.summary["postprocessing"]
        parts = ["the whole foreground"] if adopted["largest_foreground"] else []
        parts += adopted["largest_of"]
        if not parts:
            return "post-processing: none; keeping only largest components does not raise the Dice"
        dice = adopted["adopted"]["mean_dice"]
        return f"post-processing: largest component of {', '.join(parts)}; mean Dice {dice:.3f}"


class Record(Section):
    """The state from which a stopped cross-validation resumes: `cross_validation.json`."""

    folds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    config: Config
    """The config of all folds, except for `name` and `data.fold`."""
    overrides: list[str] = Field([])
    """Settings that were changed since the first fold began, such as `train.steps=2000`."""


def cross_validate(
    config: Config,
    folds: Sequence[int] | Literal["all"] = "all",
    *,
    runs: str | Path = "runs",
    say: Callable[[str], None] = lambda text: None,
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
) -> CrossValidation:
    """Train several folds, one after the other, in the folder of a new cross-validation.

    All folds use the same spacing: the config's, or the median of all cases.

    Args:
        config: the config of all folds; `data.fold` must not be set.
        folds: numbers of the folds, from 0 on, or "all".
        runs: the folder in which the folder of the cross-validation is made.
        say: receives a line of text before each fold.
        callbacks: Lightning callbacks that are called during each training.
        track: shows the progress over cases.

    Returns:
        The folder and the summary of all folds.

    Raises:
        ConfigError: the config names a fold or several processes, or does not fit the dataset.
        DatasetError: there are fewer cases than folds, or there is no fold of such a number.
        SegkitError: a training fails, as `train` describes.

    Example:
        >>> result = segkit.cross_validate(segkit.load_config("my_dataset.yaml"), range(5))
    """
    runs = Path(runs)
    refuse_replaced(config)
    if config.data.fold is not None:
        raise ConfigError(
            f"data.fold is {config.data.fold}, but --folds also chooses the folds to train; give "
            "only one of the two"
        )
    _check_one_process(config)
    dataset = dataset_of(config.data)
    known = folds_of(dataset, config.data)
    numbers = range(len(known)) if folds == "all" else folds
    for fold in numbers:
        nth_of(dataset, known, fold)
    spacing = config.data.spacing or median_spacing(
        [grid_of_case(case, dataset) for case in dataset.cases]
    )
    shared = {"spacing": spacing, "cache": config.data.cache or runs / ".cache"}
    data = config.data.model_copy(update=shared)
    config = with_absolute_paths(config.model_copy(update={"data": data}))
    record = Record(folds=sorted(set(numbers)), config=config)
    folder = new_run_folder(runs, config.name)
    try:
        with advice_on_stop(_how_to_go_on(folder)):
            return _go_on(folder, record, say=say, callbacks=callbacks, track=track)
    except SegkitError:
        if not any(folder.glob(f"{FOLD}*")):
            shutil.rmtree(folder)
        raise


def _check_one_process(config: Config) -> None:
    devices = config.trainer.devices
    if config.trainer.num_nodes != 1 or not (
        devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)
    ):
        raise ConfigError(
            f"trainer.devices is {devices} and trainer.num_nodes {config.trainer.num_nodes}, but "
            f"--folds trains in one process; set both to 1, or train each fold as a run of its own "
            f"with data.fold"
        )


def resume_folds(
    folder: Path,
    folds: Sequence[int] | Literal["all"] = (),
    *,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
) -> CrossValidation:
    """Train the missing part of a cross-validation, and more folds if they are named.

    Several processes may do so at once: each fold is trained by one of them, and the last that
    finishes pools all folds.

    Args:
        folder: the folder of the cross-validation.
        folds: numbers of folds to train as well, or "all".
        overrides: changes of settings such as `train.steps=2000`, for all folds. With more steps,
            finished folds continue too.
        say: receives a line of text before each fold.
        callbacks: Lightning callbacks that are called during each training.
        track: shows the progress over cases.

    Returns:
        The folder and the summary of all folds.

    Raises:
        ConfigError: nothing is missing, or a setting was changed that must stay.
        SegkitError: a training fails, as `train` describes.
    """
    record = _record_of(folder)
    if overrides:
        record = _with_new_settings(folder, record, overrides)
    if folds == "all":
        data = record.config.data
        folds = range(len(folds_of(dataset_of(data), data)))
    record = record.model_copy(update={"folds": sorted({*record.folds, *folds})})
    if (folder / SUMMARY).is_file() and not _missing(folder, record):
        raise ConfigError(
            f"{folder}: the cross-validation is finished already; add folds with --folds, set more "
            f"train.steps, or read its {SUMMARY}"
        )
    with advice_on_stop(_how_to_go_on(folder)):
        return _go_on(folder, record, say=say, callbacks=callbacks, track=track)


def _with_new_settings(folder: Path, record: Record, overrides: Sequence[str]) -> Record:
    """The record with changed settings, which apply to all folds from now on.

    Raises:
        ConfigError: a setting must not change, or another process trains a fold now.
    """
    config = with_absolute_paths(changed(record.config, overrides))
    _check_one_process(config)
    begun = {fold: run for fold in record.folds if (run := _fold(folder, fold)).is_dir()}
    check_new_settings(folder, record.config, config, begun)
    for fold in begun:
        with lock_if_free(_lock_of(folder, fold)) as free:
            if not free:
                raise ConfigError(
                    f"{folder}: another process trains fold {fold}; stop it, and then resume with "
                    f"{overrides[0]}"
                )
    begun_with = record.config.model_dump(mode="json")
    found = list(changes(begun_with, config.model_dump(mode="json")))
    if found:
        logger.info("%s: continues with %s", folder, in_a_sentence(found))
    new = {key: f"{key}={json.dumps(after)}" for key, _, after in found}
    old = [each for each in record.overrides if each.partition("=")[0] not in new]
    return record.model_copy(update={"config": config, "overrides": [*old, *new.values()]})


def _missing(folder: Path, record: Record) -> list[int]:
    """The folds that are not finished."""
    return [f for f in record.folds if not is_done(_fold(folder, f), record.overrides)]


def is_cross_validation(folder: Path) -> bool:
    """Whether a folder holds a cross-validation, finished or not."""
    return (folder / FOLDS).is_file()


def _go_on(
    folder: Path,
    record: Record,
    *,
    say: Callable[[str], None],
    callbacks: Sequence[Callback],
    track: Track,
) -> CrossValidation:
    """Train the folds that are missing, and pool all folds if none is missing afterwards.

    Args:
        folder: the folder of the cross-validation.
        record: its folds and its config.
        say: receives a line of text before each fold.
        callbacks: Lightning callbacks that are called during each training.
        track: shows the progress over cases.
    """
    with locked_folder(folder, wait=SECONDS_FOR_ANOTHER):
        (folder / SUMMARY).unlink(missing_ok=True)  # it is out of date once a fold is trained
        known = _record_of(folder).folds if (folder / FOLDS).is_file() else []
        record = record.model_copy(update={"folds": sorted({*known, *record.folds})})
        write_json(folder / FOLDS, record.model_dump(mode="json"))
    for number, fold in enumerate(record.folds, start=1):
        with lock_if_free(_lock_of(folder, fold)) as mine:
            run = _fold(folder, fold)
            if not mine or is_done(run, record.overrides):
                continue
            say(f"fold {fold}, {number} of {len(record.folds)}")
            if run.exists():
                resume(run, overrides=record.overrides, callbacks=callbacks, track=track)
            else:
                data = record.config.data.model_copy(update={"fold": fold})
                config = record.config.model_copy(update={"name": run.name, "data": data})
                dataset = _as_begun(folder, record)
                train(config, runs=folder, callbacks=callbacks, track=track, dataset=dataset)
    with locked_folder(folder, wait=SECONDS_FOR_ANOTHER):
        # Another process may have started more folds meanwhile. The last to finish pools all.
        record = _record_of(folder)
        if missing := _missing(folder, record):
            say(
                f"{folder}: not finished yet: {', '.join(f'fold {fold}' for fold in missing)}; "
                f"the process that trains it pools all folds when it ends, or "
                f"{_how_to_go_on(folder)}"
            )
            return CrossValidation(folder, {})
        runs = {fold: _fold(folder, fold) for fold in record.folds}
        tell_differences(folder, {fold: load_config(run / CONFIG) for fold, run in runs.items()})
        return write_pooled(folder, record.folds)


def write_pooled(folder: Path, folds: Sequence[int]) -> CrossValidation:
    """Pool the finished folds of a folder. Their models get the selected post-processing."""
    summaries = {fold: read_of_run(_fold(folder, fold) / SUMMARY) for fold in folds}
    models = [_fold(folder, fold) / "model" for fold in folds]
    summary = pool_folds(folder.name, summaries)
    labels = load_description(models[0]).labels
    adopted = PostprocessingConfig(
        largest_foreground=summary["postprocessing"]["largest_foreground"],
        largest_of=tuple(labels[name] for name in summary["postprocessing"]["largest_of"]),
    )
    for model in models:
        adopt(model, adopted)
    write_json(folder / SUMMARY, summary)
    return CrossValidation(folder, summary)


def _record_of(folder: Path) -> Record:
    """The record that a cross-validation continues from. Raises ConfigError if it is unreadable."""
    return validated(Record, read_of_run(folder / FOLDS), str(folder / FOLDS))


def _as_begun(folder: Path, record: Record) -> Dataset | None:
    """The dataset from which the first folds were drawn; None if no fold has started.

    If folds are drawn, cases that were added later are left out, so that no case is held out twice.
    Folds that were given name their cases themselves.

    Raises:
        ConfigError: a case is gone; the folds would differ without it.
    """
    begun = {path: names for path in folder.glob(f"{FOLD}*/{SPLIT}") if (names := read_split(path))}
    if not begun:
        return None
    known = {name for names in begun.values() for part in names.values() for name in part}
    dataset = dataset_of(record.config.data)
    here = {case.name for case in dataset.cases}
    if gone := sorted(known - here):
        raise ConfigError(
            f"{folder}: its folds contain {case_names(gone)}, but {dataset.folder} no longer does; "
            "put the cases back, or start a new cross-validation"
        )
    if has_given_folds(next(iter(begun)), record.config.data):
        return dataset
    if here - known:
        logger.warning(
            "%s: new cases are left out, because the folds were drawn without them: %s",
            folder,
            case_names(sorted(here - known)),
        )
    return replace(dataset, cases=tuple(case for case in dataset.cases if case.name in known))


def _how_to_go_on(folder: Path) -> str:
    return f"segkit train --resume {folder} continues from there"


def _lock_of(folder: Path, fold: int) -> Path:
    return folder / f".{FOLD}{fold}.lock"


def _fold(folder: Path, fold: int) -> Path:
    return folder / f"{FOLD}{fold}"
