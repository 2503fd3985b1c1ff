"""Training of a run from its parts, and resuming of a stopped run.

Patches, augmentation and noise depend only on the seed and the step. So a run that is resumed from
its last checkpoint ends with the same weights as a run that was never stopped.
"""

import copy
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from segkit.config.load import dump_yaml, load_config
from segkit.config.training import Config
from segkit.data.datamodule import SegmentationData
from segkit.data.dataset import Dataset
from segkit.data.patches import PatchDataset
from segkit.errors import ConfigError, ModelError, SegkitError, Stopped, counted
from segkit.evaluation.temperature import HeldOutVoxels, Temperature
from segkit.inference.postprocess import candidates
from segkit.io.atomic import remove_leftovers, write_json, write_text
from segkit.model.build import weight_shapes, wrap_network
from segkit.model.checkpoint import BEST, read_checkpoint, weights_of_network
from segkit.model.file_names import CONFIG, DESCRIPTION, FOLD, FOLDS, SPLIT, SUMMARY
from segkit.model.folder import (
    Model,
    load_description,
    save_description,
    save_firsts,
    save_model,
)
from segkit.nn.cost import count_parameters
from segkit.nn.external import try_out
from segkit.nn.network import SegmentationNetwork, weights_of
from segkit.nn.normalisation import order_for
from segkit.provenance import versions
from segkit.system.libraries import training_environment
from segkit.system.progress import Track, untracked
from segkit.system.signals import advice_on_stop
from segkit.training.cascade import first_stage_of
from segkit.training.changed_files import states_of, warn_of_changed_files
from segkit.training.changed_settings import (
    OF_SCHEDULE,
    Change,
    asked_changes,
    changes,
    check_changes,
    check_same_classes,
    in_a_sentence,
    is_one_of,
    settings_of,
    split_is_edited,
)
from segkit.training.final_scores import score
from segkit.training.freezing import Freezing
from segkit.training.held_out_files import HeldOutFiles
from segkit.training.kept_split import (
    SplitNames,
    check_not_moved,
    kept_split,
    read_split,
    with_kept_split,
)
from segkit.training.lightning_private import is_first_process
from segkit.training.module import SegmentationModule
from segkit.training.parts import (
    TrainingParts,
    check_replaced,
    make_parts,
    prepare,
    refuse_replaced,
)
from segkit.training.resolve import on_this_machine
from segkit.training.resume_state import ResumeState
from segkit.training.run_folder import (
    BEGUN,
    LAST,
    check_checkpoint,
    checkpoint_of,
    existing_run,
    locked_folder,
    new_run_folder,
    read_record,
)
from segkit.training.time_budget import Deadline, TimeBudget
from segkit.training.trainer import (
    cases_per_validation,
    determinism_as_before,
    guarded,
    make_trainer,
    steps_between,
)
from segkit.training.weight_average import Averaging

logger = logging.getLogger(__name__)

LONG_SCORING = 60.0
"""If a timed run's final scores would take so many seconds in PyTorch, another engine pays."""
RECORDED = {"network", "loss", "presence_loss"}
"""Parts that a recorded CUDA step contains."""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the content of `summary.json`, and its model.

    If several processes train, only the first one writes the folder and scores the model; in the
    others `summary` is empty.

    Example:
        run = segkit.train(segkit.load_config("my_dataset.yaml"))
        run.summary["validation"]["mean_dice"]
        prediction = segkit.Predictor(run.model)(scan)
    """

    folder: Path
    summary: Mapping[str, Any]
    model: Model


def train(
    config: Config,
    *,
    runs: str | Path = "runs",
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
    dataset: Dataset | None = None,
    network: nn.Module | None = None,
    spent: float = 0.0,
) -> Run:
    """Train the network that a config describes: `fit(prepare(config))`.

    Args:
        config: the config of the training.
        runs: the folder in which the run's folder is made.
        callbacks: Lightning callbacks that are called during training.
        track: shows the progress over cases.
        dataset: a dataset that replaces the one in the config.
        network: any module from (batch, channel, *space) to logits (batch, output, *space). It is
            trained instead of a U-Net; the config must have `network.given`.
        spent: seconds of `train.minutes` that are used already, for example by planning.

    Returns:
        The finished run, as `fit` returns it.

    Raises:
        ConfigError: the config does not fit the dataset or this machine, or it was trained with
            parts that were replaced from Python.
        DatasetError: a case cannot be read or used.
        ModelError: the network or a model that the config names cannot be used.
        TrainingError: the loss is NaN or infinite, or the device's memory is too small.

    Example:
        >>> run = segkit.train(segkit.load_config("my_dataset.yaml"))
    """
    refuse_replaced(config)
    parts = prepare(config, runs=runs, dataset=dataset, network=network, track=track)
    return fit_with_files({}, parts, runs=Path(runs), callbacks=callbacks, track=track, spent=spent)


def fit(
    parts: TrainingParts,
    *,
    runs: str | Path = "runs",
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
) -> Run:
    """Train with these parts, and write the folder of a new run.

    Args:
        parts: the parts of the training, as `prepare` makes them; some may be replaced.
        runs: the folder in which the run's folder is made.
        callbacks: Lightning callbacks that are called during training.
        track: shows the progress over cases.

    Returns:
        The finished run. If several processes train, all of them return the same folder and the
        same weights, and only the first one has a summary.

    Raises:
        ConfigError: the parts do not fit one another or this machine; no folder is left then.
        ModelError: a replaced network does not fit the description.
        TrainingError: the loss is NaN or infinite, or the device's memory is too small.

    Example:
        >>> parts = segkit.prepare(config)
        >>> run = segkit.fit(dataclasses.replace(parts, loss=my_loss))
    """
    return fit_with_files({}, parts, runs=Path(runs), callbacks=callbacks, track=track)


def fit_with_files(
    files: Mapping[str, str],
    parts: TrainingParts,
    *,
    runs: Path,
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
    spent: float = 0.0,
) -> Run:
    """Train as `fit` does, in a run's folder that contains more files from its beginning.

    Args:
        files: the text of each file, by its name.
        parts: the parts of the training.
        runs: the folder in which the run's folder is made.
        callbacks: Lightning callbacks that are called during training.
        track: shows the progress over cases.
        spent: seconds of `train.minutes` that are used already.
    """
    check_replaced(parts)
    config = parts.config.model_copy(update={"replaced": parts.replaced})
    budget = _budget_of(parts, config, spent)
    module, first = _module_of(parts, config, budget), is_first_process()
    with ExitStack() as held:
        held.enter_context(determinism_as_before())
        # Only the first process writes; Lightning sends the folder of checkpoints to the others.
        folder = new_run_folder(runs, config.name) if first else runs / config.name
        if first:
            _hold(held, folder)
            for name, text in files.items():
                write_text(folder / name, text)
            write_json(folder / SPLIT, _names_of(parts))
            write_json(folder / BEGUN, {"config": config.model_dump(mode="json")})
            write_text(folder / CONFIG, dump_yaml(config))
        try:
            noted = ResumeState(_record_of(parts, config), every=steps_between(config))
            trainer = make_trainer(
                parts, config, folder, [*callbacks, *_deadline(parts, budget), noted]
            )
            return _trained(parts, config, module, trainer, folder, None, track)
        except Stopped:
            raise
        except SegkitError:
            # A run that fails before its first step leaves no folder.
            if first and not module.steps_begun:
                shutil.rmtree(folder)
            raise


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
            _hold(held, folder)
            remove_leftovers(folder)
        checkpoint = checkpoint_of(folder)
        record, steps_done = read_record(folder)
        begun = settings_of(record, f"{folder / LAST}: its settings")
        finished = (folder / SUMMARY).is_file()
        if finished:
            _check_more_to_do(folder, config, begun, steps_done)
        source = str(folder / CONFIG)
        check_changes(source, asked_changes(begun, config), steps_done)
        names = _split_of_run(folder, record)
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
        budget = _budget_of(parts, config)
        module = _module_of(parts, config, budget)
        check_checkpoint(folder, module, module.optimiser(module.network.parameters()))
        updated = _record_of(parts, config, record, found, steps_done, names)
        warn_of_changed_files(folder, record.get("files", {}), updated["files"])
        noted = ResumeState(
            updated,
            every=steps_between(config),
            anew=anew,
            patience=config.train.patience,
            finished=finished,
        )
        trainer = make_trainer(
            parts, config, folder, [*callbacks, *_deadline(parts, budget), noted]
        )
        if is_first_process():
            if drawn_again:
                write_json(folder / SPLIT, _names_of(parts))
                write_json(folder / BEGUN, {"config": now})
            write_text(folder / CONFIG, dump_yaml(config))
            (folder / SUMMARY).unlink(missing_ok=True)
            _drop_pooled_scores(folder)
        return _trained(parts, config, module, trainer, folder, checkpoint, track)


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
    """Raise ConfigError unless a finished run was given more steps."""
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


def _names_of(parts: TrainingParts) -> dict[str, list[str]]:
    return {part: [case.name for case in cases] for part, cases in parts.split._asdict().items()}


def _record_of(
    parts: TrainingParts,
    config: Config,
    before: Mapping[str, Any] = MappingProxyType({}),
    found: Sequence[Change] = (),
    step: int = 0,
    names: SplitNames | None = None,
) -> dict[str, Any]:
    """The record of a run for its checkpoints: settings, split, and settings that were changed."""
    changed = [
        {"step": step, "setting": key, "before": old, "after": new} for key, old, new in found
    ]
    split = names or _names_of(parts)
    begun_from = parts.taken_over.as_json() if parts.taken_over else before.get("start_from")
    return {
        "config": config.model_dump(mode="json"),
        "split": {part: list(split[part]) for part in ("train", "held_out")},
        "changes": [*before.get("changes", []), *changed],
        "files": states_of((*parts.split.train, *parts.split.held_out)),
        **({"start_from": begun_from} if begun_from else {}),
    }


def _hold(held: ExitStack, folder: Path) -> None:
    """Lock the run's folder for this process until `held` is closed."""
    held.enter_context(locked_folder(folder))
    held.enter_context(advice_on_stop(f"segkit train --resume {folder} continues from there"))


def _check_replaced_alike(folder: Path, config: Config, parts: TrainingParts) -> None:
    """Raise ConfigError unless the same parts are replaced as in the run."""
    if parts.replaced != config.replaced:
        names = [", ".join(part) or "none" for part in (config.replaced, parts.replaced)]
        raise ConfigError(
            f"{folder}: expected the parts that the run replaced ({names[0]}), found {names[1]}; "
            "replace the same parts"
        )


def _network_of(parts: TrainingParts) -> SegmentationNetwork:
    """The network to train. Raises ModelError if a replaced one does not fit the description."""
    network, description = parts.network, parts.description
    if "network" not in parts.replaced:
        assert isinstance(network, SegmentationNetwork)
        # A copy, so that the same parts can be trained again from the same weights.
        return network if description.network.given else copy.deepcopy(network)
    if not isinstance(network, SegmentationNetwork):
        network = wrap_network(description, network).cpu()
    weights = weights_of(network)
    if description.network.given is not None:
        try_out(network, torch.zeros(1, len(description.channels), *description.volume_patch))
    elif {name: tuple(value.shape) for name, value in weights.state_dict().items()} != (
        weight_shapes(description)
    ):
        raise ModelError(
            f"{description.run}: the weights of parts.network do not fit the network of the "
            f"config; change the config, or set network.given to train any module"
        )
    return network


def _budget_of(parts: TrainingParts, config: Config, spent: float = 0.0) -> TimeBudget | None:
    """The run's time budget, of which preparing has used a part; None if the time has no limit."""
    if config.train.minutes is None:
        return None
    return TimeBudget(
        60 * config.train.minutes,
        before=parts.seconds + spent,
        planned_steps=config.train.steps,
        held_out=len(parts.split.held_out),
        validated=cases_per_validation(parts, config),
        validate_every=steps_between(config),
    )


def _deadline(parts: TrainingParts, budget: TimeBudget | None) -> list[Callback]:
    if budget is None:
        return []
    return [Deadline(budget, parts.validation.cases, parts.description.volume_patch)]


def _module_of(
    parts: TrainingParts, config: Config, budget: TimeBudget | None = None
) -> SegmentationModule:
    settings = config.network
    head = None if settings.given else settings.attention.head
    network, patterns = _network_of(parts), config.train.freeze
    freezing = Freezing(weights_of(network), patterns) if patterns else None
    notes = [each.told for each in (parts.taken_over, freezing) if each is not None]
    return SegmentationModule(
        network,
        loss=parts.loss,
        optimiser=parts.optimiser,
        schedule=parts.schedule,
        vary=parts.augmentation.vary,
        validation=parts.validation,
        class_names=list(parts.description.labels),
        num_steps=config.train.steps,
        seed=config.train.seed,
        presence_loss=parts.presence_loss,
        partly=parts.partly,
        presence_weight=head.weight if head else 0.0,
        # Code from outside segkit may do things that a recording would not repeat.
        recorded=config.network.given is None and not RECORDED & set(parts.replaced),
        budget=budget,
        freezing=freezing,
        notes=notes,
        compiled=config.trainer.compile,
    )


def _data_of(parts: TrainingParts, config: Config) -> SegmentationData:
    return SegmentationData(
        PatchDataset(
            parts.cases,
            patch_size=parts.description.volume_patch,
            margin=parts.augmentation.margin,
            sampler=parts.sampler,
            seed=config.train.seed,
        ),
        parts.validation.cases,
        batch_size=config.data.batch_size,
        steps_per_epoch=steps_between(config),
        workers=config.data.workers,
        batches_per_step=config.trainer.accumulate_grad_batches,
    )


def _trained(
    parts: TrainingParts,
    config: Config,
    module: SegmentationModule,
    trainer: L.Trainer,
    folder: Path,
    checkpoint: Path | None,
    track: Track,
) -> Run:
    """Train, from a checkpoint if there is one, and write the results into the run's folder."""
    split, network = parts.split, module.network
    logger.info("%s: %d training cases, %d held out", folder, len(split.train), len(split.held_out))
    logger.info("%s", config.data.mirrored_because(list(parts.dataset.labels)))
    if config.network.given is None:
        order_for(network, trainer.strategy.root_device)
    first_stage = tuple(stage.model for stage in parts.first_stage)
    if is_first_process():
        # Written now, so that checkpoints can be used before the end.
        save_firsts(folder / "model", first_stage)
        save_description(folder / "model", parts.description)
    environment = training_environment(trainer.strategy.root_device)
    started = time.perf_counter()
    with guarded(config, trainer.strategy.root_device):
        trainer.fit(
            module, datamodule=_data_of(parts, config), ckpt_path=checkpoint, weights_only=True
        )
    seconds = time.perf_counter() - started
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Averaging):
            callback.keep_average(module)
    best = trainer.checkpoint_callback
    assert isinstance(best, ModelCheckpoint) and best.dirpath is not None
    step = _keep_best(config, best, network)
    model = Model(parts.description, network.eval(), first_stage)
    if not is_first_process():
        network.to("cpu")
        return Run(Path(best.dirpath), MappingProxyType({}), model)
    save_model(folder / "model", model)
    budget = module.budget
    until = math.inf if budget is None else budget.until
    read_from = scored_model(model, folder / "model", budget)
    scores, temperature = _scores(parts, config, read_from, trainer, track, until)
    if temperature is not None:
        told = parts.description.model_copy(update={"temperature": temperature.value})
        model = replace(model, description=told)
        save_description(folder / "model", told)
    summary = {
        "run": folder.name,
        "steps": trainer.global_step,
        "seconds_of_training": round(seconds, 1),
        "parameters": count_parameters(network),
        "seed": config.train.seed,
        "training_cases": len(split.train),
        "weights": {"of": "last" if step is None else "best", "step": step or trainer.global_step},
        "validation": scores,
        **first_stage_of(parts.first_stage, split.train, split.held_out),
        "versions": versions("lightning"),
        "environment": environment,
    }
    record = _record_in(trainer)
    if record["changes"]:
        summary["changed_settings"] = record["changes"]
    if "start_from" in record:
        summary["start_from"] = record["start_from"]
    if module.freezing is not None:
        summary["freeze"] = module.freezing.as_json()
    if budget is not None:
        summary["minutes"] = {
            "given": config.train.minutes,
            "taken": round(budget.elapsed / 60, 2),
            "planned_steps": config.train.steps,
            "seconds_per_step": round(budget.per_step, 4),
        }
    if temperature is not None:
        summary["temperature"] = temperature.as_json()
    write_json(folder / SUMMARY, summary)
    network.to("cpu")
    return Run(folder, summary, model)


def scored_model(model: Model, folder: Path, budget: TimeBudget | None) -> Model:
    """The model as the final scores use it.

    Only a model that lies in a folder is converted by OpenVINO (`choose_engine`), which takes up to
    half a minute and then needs half the time of PyTorch. So a timed run names the folder if its
    scores take longer than two such conversions. A run with a fixed number of steps never does, so
    that its scores are the same bit for bit everywhere.
    """
    if budget is None or budget.held_out * budget.per_case < LONG_SCORING:
        return model
    return replace(model, folder=folder)


def _record_in(trainer: L.Trainer) -> Mapping[str, Any]:
    """The record that checkpoints of a training contain."""
    noted = next(each for each in trainer.callbacks if isinstance(each, ResumeState))  # type: ignore[attr-defined]
    return noted.record


def _keep_best(config: Config, best: ModelCheckpoint, network: SegmentationNetwork) -> int | None:
    """Load the weights with the best score, if `train.patience` is set; their step, or None.

    With patience, training ends only after several validations that were not better.
    """
    path = Path(best.dirpath or "") / BEST
    if config.train.patience is None or best.best_model_score is None or not path.is_file():
        return None
    content = read_checkpoint(path)
    network.load_state_dict(weights_of_network(content))
    step = int(content["global_step"])
    logger.info("kept the weights of step %d, which had the best score", step)
    return step


def _scores(
    parts: TrainingParts,
    config: Config,
    model: Model,
    trainer: L.Trainer,
    track: Track,
    until: float,
) -> tuple[dict[str, Any], Temperature | None]:
    """The scores of the run on its held-out cases, and the best score during training.

    With `train.calibrate`, also the temperature of its probabilities.
    """
    # Only a cross-validation selects post-processing, so only a fold measures it. Regions overlap:
    # removing a component of one would change others.
    adopts = config.data.fold is not None and not parts.dataset.regions
    best = trainer.checkpoint_callback
    assert isinstance(best, ModelCheckpoint)
    highest = best.best_model_score
    assert best.dirpath is not None
    labelling, keep = model.description.labelling, config.train.keep_held_out
    voxels = None
    if config.train.calibrate:
        background = {} if labelling.regions else {next(iter(labelling.numbers)): (0,)}
        voxels = HeldOutVoxels(
            {**background, **labelling.members},
            bool(labelling.regions),
            len(parts.split.held_out),
            labelling.ignore,
        )
    scores = {
        "note": "Dice of whole held-out volumes on their own grids, by the weights in model/",
        **score(
            model,
            parts.dataset,
            parts.split.held_out,
            track,
            device=str(trainer.strategy.root_device),
            first_labels=parts.first_labels,
            operations=candidates(list(model.description.labels.values())[1:]) if adopts else {},
            # A cross-validation needs all cases of a fold.
            until=until if config.data.fold is None else math.inf,
            files=None if keep == "nothing" else HeldOutFiles(Path(best.dirpath), keep),
            voxels=voxels,
        ),
        f"best_mean_{parts.validation.measure}_during_training": (
            None if highest is None else float(highest)
        ),
    }
    temperature = voxels.fit() if voxels is not None else None
    if temperature is None and voxels is not None:
        logger.warning(
            "train.calibrate: no held-out case is completely labelled, so no temperature is stored"
        )
    if temperature is not None and temperature.at_limit:
        logger.warning("train.calibrate: %s", temperature.told)
    return scores, temperature
