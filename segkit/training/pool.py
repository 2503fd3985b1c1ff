"""Folds that were trained apart, on several machines, put together as one cross-validation."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from segkit.config.load import load_config
from segkit.config.training import Config
from segkit.errors import ConfigError
from segkit.io.atomic import whole_folder, write_json
from segkit.model.file_names import CONFIG, FOLD, FOLDS, SPLIT, SUMMARY, WEIGHTS
from segkit.training.cross_validation import (
    CrossValidation,
    Record,
    is_cross_validation,
    write_pooled,
)
from segkit.training.fold_settings import check_alike
from segkit.training.kept_split import SplitNames, case_names, has_given_folds, read_split


def pool(folders: Sequence[str | Path], out: str | Path) -> CrossValidation:
    """Put folds that were trained apart together as one cross-validation.

    The folds are copied. The result is that of a cross-validation that trained all of them: its
    summary, its post-processing, and a folder that `segkit predict` accepts and that
    `segkit train --resume` continues.

    Args:
        folders: cross-validations (`segkit train --folds 0`), or runs that were trained with
            `data.fold`; all folds of them that are finished are taken.
        out: the folder to write, which must not exist.

    Returns:
        The cross-validation.

    Raises:
        ConfigError: `out` exists, a folder contains no finished fold, a fold occurs twice, or the
            folds do not belong together: they have other settings, were drawn from other cases, or
            hold out the same case.

    Example:
        >>> segkit.pool(["here/runs/kidney", "there/runs/kidney"], "runs/kidney_all")
    """
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out}: exists already; choose another folder for the pooled results")
    runs = _runs_of([Path(folder) for folder in folders])
    configs = {fold: load_config(run / CONFIG) for fold, run in runs.items()}
    check_alike(runs, configs)
    _check_splits(runs, configs)
    first = next(iter(configs.values()))
    data = first.data.model_copy(update={"fold": None})
    config = first.model_copy(update={"name": out.name, "data": data})
    with whole_folder(out) as partial:
        for fold, run in runs.items():
            hidden = shutil.ignore_patterns(".*")
            shutil.copytree(run, partial / f"{FOLD}{fold}", ignore=hidden)
        record = Record(folds=list(runs), config=config)
        write_json(partial / FOLDS, record.model_dump(mode="json"))
        result = write_pooled(partial, list(runs))
        summary = {**result.summary, "run": out.name}
        write_json(partial / SUMMARY, summary)
    return CrossValidation(out, summary)


def _runs_of(folders: Sequence[Path]) -> dict[int, Path]:
    """By fold, in order, the run that trained it."""
    found: dict[int, Path] = {}
    for folder in folders:
        inside = sorted(folder.glob(f"{FOLD}*")) if is_cross_validation(folder) else [folder]
        finished = [
            run
            for run in inside
            if (run / SUMMARY).is_file() and (run / "model" / WEIGHTS).is_file()
        ]
        if not finished:
            raise ConfigError(
                f"{folder}: expected a run or a cross-validation with a finished fold, found none; "
                f"check the path, or train it to its end"
            )
        for run in finished:
            fold = load_config(run / CONFIG).data.fold
            if fold is None:
                raise ConfigError(
                    f"{run}: expected a run of one fold, but its data.fold is null; give runs that "
                    "were trained with --folds N or data.fold=N"
                )
            if fold in found:
                raise ConfigError(
                    f"{found[fold]} and {run} are both fold {fold}; give only one of them"
                )
            found[fold] = run
    return dict(sorted(found.items()))


def _check_splits(runs: Mapping[int, Path], configs: Mapping[int, Config]) -> None:
    """Raise ConfigError unless all folds were drawn from the same cases, and held out others.

    Folds that were given in a file, a column or a list may have other cases, or the same held out.
    """
    splits: dict[int, SplitNames] = {}
    for fold, run in runs.items():
        names = read_split(run / SPLIT)
        if names is None:
            raise ConfigError(f"{run}: expected {SPLIT} in it, found none; train the fold again")
        splits[fold] = names
    first, *others = splits
    known = {*splits[first]["train"], *splits[first]["held_out"]}
    given = {fold: has_given_folds(run / SPLIT, configs[fold].data) for fold, run in runs.items()}
    for fold in others:
        if given[fold] != given[first]:
            one, other = sorted((first, fold), key=lambda each: given[each])
            raise ConfigError(
                f"{runs[one]}: its folds were drawn, but those of {runs[other]} were given in a "
                "file, a column or a list; give folds of the same cross-validation"
            )
    if given[first]:
        return
    seen = {name: first for name in splits[first]["held_out"]}
    for fold in others:
        cases = {*splits[fold]["train"], *splits[fold]["held_out"]}
        if apart := sorted(known ^ cases):
            raise ConfigError(
                f"{runs[fold]}: expected the same cases as in {runs[first]}, but "
                f"{case_names(apart)} is in only one of them; train both on the same dataset"
            )
        for name in splits[fold]["held_out"]:
            if name in seen:
                raise ConfigError(
                    f"{name} is held out by both {runs[seen[name]]} and {runs[fold]}; give folds "
                    "of the same cross-validation"
                )
            seen[name] = fold
