"""A stopped run continues from its last checkpoint.

Patches, augmentation and noise depend only on the seed and the step. So a run that is resumed ends
with the same weights as a run that was never stopped.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import nn

from segkit.config.load import dump_yaml, load_config
from segkit.config.training import Config
from segkit.errors import ConfigError, counted
from segkit.io.atomic import remove_leftovers, write_json, write_text
from segkit.model.file_names import CONFIG, DESCRIPTION, FOLD, FOLDS, SPLIT, SUMMARY
from segkit.model.folder import load_description
from segkit.system.progress import Track, untracked
from segkit.training.changed_files import warn_of_changed_files
from segkit.training.changed_settings import (
    OF_SCHEDULE,
    asked_changes,
    changes,
    check_changes,
    check_same_classes,
    in_a_sentence,
    is_one_of,
    settings_of,
    split_is_edited,
)
from segkit.training.fit import Run, trained
from segkit.training.kept_split import (
    SplitNames,
    check_not_moved,
    kept_split,
    read_split,
    split_content,
    with_kept_split,
)
from segkit.training.lightning_private import is_first_process
from segkit.training.make_module import deadline_callbacks, make_budget, make_module
from segkit.training.parts import TrainingParts, check_replaced, make_parts, refuse_replaced
from segkit.training.resolve import on_this_machine
from segkit.training.resume_state import ResumeState, record_of
from segkit.training.run_folder import (
    BEGUN,
    LAST,
    check_checkpoint,
    checkpoint_of,
    existing_run,
    locked_run,
    read_record,
)
from segkit.training.trainer import determinism_as_before, make_trainer, steps_between
from segkit.training.unused_settings import refuse_unused

logger = logging.getLogger(__name__)


def resume(
    run: str | Path,
    parts: TrainingParts | None = None,
    *,
    overrides: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
    network: nn.Module | None = None,
) -> Run:
    """Continue a run from its last checkpoint, as if it had never been stopped.

    The run keeps its split by the names in split.json; new cases are left out. Settings that were
    changed in config.yaml, in `overrides` or in `parts` apply from this step on, if a run may
    change them. If `train.steps` was changed, the learning rate at each step is that of a run with
    this number of steps.

    Args:
        run: the run's folder. A finished run continues only if it is given more steps.
        parts: the parts of the run, if some were replaced; `prepare` makes the others from the
            run's config.yaml.
        overrides: changes of settings such as `train.steps=2000`; not together with `parts`.
        callbacks: Lightning callbacks that are called during training.
        track: shows the progress over cases.
        network: the module of a run that trains a module from Python; it receives the weights of
            the checkpoint.

    Returns:
        The finished run, as `fit` returns it.

    Raises:
        ConfigError: the folder has no run that can be resumed, another process trains in it, other
            parts are replaced, or a setting was changed that must stay.
        SegkitError: the training fails, as `train` describes.

    Example:
        >>> run = segkit.resume("runs/my_dataset")
        >>> run = segkit.resume("runs/my_dataset", overrides=["train.steps=2000"])
    """
    folder = existing_run(Path(run))
    config = load_config(folder / CONFIG, overrides)
    asked = config.model_dump(mode="json")["data"]["validation"]
    if parts is None:
        refuse_replaced(config)
    else:
        check_replaced(parts)
        _check_replaced_alike(folder, config, parts)
        config = parts.config
    with ExitStack() as held:
        held.enter_context(determinism_as_before())
        if is_first_process():
            held.enter_context(locked_run(folder))
            remove_leftovers(folder)
        checkpoint = checkpoint_of(folder)
        record, steps_done = read_record(folder)
        begun = settings_of(record, f"{folder / LAST}: its settings")
        finished = (folder / SUMMARY).is_file()
        if finished:
            _check_more_to_do(folder, config, begun, steps_done)
        source = str(folder / CONFIG)
        wanted = list(asked_changes(begun, config))
        check_changes(source, wanted, steps_done)
        names = _split_of_run(folder, record)
        refuse_unused(source, wanted, config, held_out=names is None or bool(names["held_out"]))
        if drawn_again := checkpoint is None and split_is_edited(folder, config):
            logger.info("%s: nothing is trained yet; the split is drawn again", folder)
            names = None
        if parts is None:
            parts = make_parts(
                on_this_machine(config),
                folder.parent,
                network=network,
                track=track,
                begun=checkpoint is not None,
                kept=partial(kept_split, names=names, source=folder) if names else None,
            )
        elif names:
            parts = with_kept_split(parts, names, folder)
        config = parts.config.model_copy(update={"replaced": parts.replaced})
        now = config.model_dump(mode="json")
        # The value as the user gave it: a missing case is not a change of this setting.
        now["data"]["validation"] = asked
        found = list(changes(begun, now))
        check_changes(source, found, steps_done)
        if checkpoint is not None and (folder / "model" / DESCRIPTION).is_file():
            check_same_classes(folder, load_description(folder / "model"), parts.description)
        anew = not record or any(is_one_of(key, OF_SCHEDULE) for key, *_ in found)
        if found:
            logger.info(
                "%s: continues from step %d with %s", folder, steps_done, in_a_sentence(found)
            )
        budget = make_budget(parts, config)
        module = make_module(parts, config, budget)
        check_checkpoint(folder, module, module.optimiser(module.network.parameters()))
        updated = record_of(parts, config, record, found, steps_done, names)
        warn_of_changed_files(folder, record.get("files", {}), updated["files"])
        noted = ResumeState(
            updated,
            every=steps_between(config),
            anew=anew,
            patience=config.train.patience,
            finished=finished,
        )
        trainer = make_trainer(
            parts, config, folder, [*callbacks, *deadline_callbacks(parts, budget), noted]
        )
        if is_first_process():
            if drawn_again:
                write_json(folder / SPLIT, split_content(parts))
                write_json(folder / BEGUN, {"config": now})
            write_text(folder / CONFIG, dump_yaml(config))
            (folder / SUMMARY).unlink(missing_ok=True)
            _drop_pooled_scores(folder)
        return trained(parts, config, module, trainer, folder, checkpoint, track)


def _drop_pooled_scores(run: Path) -> None:
    """Remove the summary of the cross-validation that a run is a fold of, as it is out of date."""
    folder = run.parent
    if not (run.name.startswith(FOLD) and (folder / FOLDS).is_file()):
        return
    if (folder / SUMMARY).is_file():
        (folder / SUMMARY).unlink()
        logger.warning(
            "%s: its %s was removed, because %s continues; segkit train --resume %s pools the "
            "folds again",
            folder,
            SUMMARY,
            run.name,
            folder,
        )


def _split_of_run(folder: Path, record: Mapping[str, Any]) -> SplitNames | None:
    """The names in split.json, or in the checkpoint if there is no such file.

    Raises:
        ConfigError: an edit of split.json moved a case from one part to the other.
    """
    names, begun = read_split(folder / SPLIT), record.get("split")
    if names is None:
        return begun
    if begun is not None:
        check_not_moved(folder / SPLIT, names, begun)
    return names


def _check_more_to_do(
    folder: Path, config: Config, before: Mapping[str, Any], steps_done: int
) -> None:
    """Raise ConfigError unless a finished run was given more steps.

    Args:
        folder: the folder of the run.
        config: the config now.
        before: the config in the last checkpoint.
        steps_done: number of steps that the run has done.
    """
    given = {
        "train.steps": config.train.steps > steps_done,
        "train.patience": config.train.patience != before.get("train", {}).get("patience"),
        "trainer.max_time": config.trainer.max_time != before.get("trainer", {}).get("max_time"),
    }
    early = steps_done < before.get("train", {}).get("steps", steps_done)
    more = given["train.steps"] and (
        not early
        or config.train.steps != before["train"]["steps"]
        or given["train.patience"]
        or given["trainer.max_time"]
    )
    if not more or not steps_done or config.train.minutes is not None:
        raise ConfigError(
            f"{folder}: the run is finished already, and its model is {folder / 'model'}; to train "
            f"more than its {counted(steps_done, 'step')}: segkit train --resume {folder} "
            f"train.steps=N"
            if config.train.minutes is None
            else f"{folder}: the run is finished already, and its model is {folder / 'model'}; "
            f"because train.minutes limited it, start a new run with train.start_from={folder}"
        )


def _check_replaced_alike(folder: Path, config: Config, parts: TrainingParts) -> None:
    """Raise ConfigError unless the same parts are replaced as in the run."""
    if parts.replaced != config.replaced:
        names = [", ".join(part) or "none" for part in (config.replaced, parts.replaced)]
        raise ConfigError(
            f"{folder}: expected the parts that the run replaced ({names[0]}), found {names[1]}; "
            "replace the same parts"
        )
