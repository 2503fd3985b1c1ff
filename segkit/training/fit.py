"""Training of a new run from its parts; `resume` continues a run that was stopped."""

import gc
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from segkit.config.load import dump_yaml
from segkit.config.model import ModelDescription
from segkit.config.training import Config
from segkit.data.dataset import Dataset
from segkit.errors import SegkitError, Stopped
from segkit.io.atomic import write_json, write_text
from segkit.model.checkpoint import BEST, read_checkpoint, weights_of_network
from segkit.model.file_names import CONFIG, SPLIT, SUMMARY, WEIGHTS
from segkit.model.folder import Model, load_description, save_description, save_firsts, save_model
from segkit.nn.cost import count_parameters
from segkit.nn.network import SegmentationNetwork
from segkit.nn.normalisation import order_for
from segkit.provenance import versions
from segkit.system.libraries import training_environment
from segkit.system.progress import Track, untracked
from segkit.training.cascade import first_stage_of
from segkit.training.final_scores import scored_model, scores_of_run
from segkit.training.kept_split import split_content
from segkit.training.lightning_private import forget_data, is_first_process
from segkit.training.make_module import deadline_callbacks, make_budget, make_data, make_module
from segkit.training.module import SegmentationModule
from segkit.training.overfitting import fall_of_score
from segkit.training.parts import TrainingParts, check_replaced, prepare, refuse_replaced
from segkit.training.resume_state import ResumeState, record_in, record_of
from segkit.training.run_folder import BEGUN, locked_run, new_run_folder
from segkit.training.trainer import determinism_as_before, guarded, make_trainer, steps_between
from segkit.training.weight_average import Averaging

logger = logging.getLogger(__name__)


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
    """The folder of the run."""
    summary: Mapping[str, Any]
    """Steps, seconds, versions and, under `validation`, the Dice of the held-out cases."""
    model: Model
    """The trained model, on the CPU."""


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
        VolumeError: a file of a case is missing or damaged.
        ModelError: the network or a model that the config names cannot be used.
        TrainingError: the loss is NaN or infinite, or the device's memory is too small.
        WorkerError: a process that prepares cases or loads patches was killed.

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
        ConfigError: the parts do not fit one another or this machine. The run's folder is then
            removed.
        ModelError: a replaced network does not fit the description.
        TrainingError: the loss is NaN or infinite, or the device's memory is too small.
        WorkerError: a process that loads patches was killed.

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
    budget = make_budget(parts, config, spent)
    module, first = make_module(parts, config, budget), is_first_process()
    with ExitStack() as held:
        held.enter_context(determinism_as_before())
        # Only the first process writes; Lightning sends the folder of checkpoints to the others.
        folder = new_run_folder(runs, config.name) if first else runs / config.name
        if first:
            held.enter_context(locked_run(folder))
            for name, text in files.items():
                write_text(folder / name, text)
            write_json(folder / SPLIT, split_content(parts))
            write_json(folder / BEGUN, {"config": config.model_dump(mode="json")})
            write_text(folder / CONFIG, dump_yaml(config))
        try:
            noted = ResumeState(record_of(parts, config), every=steps_between(config))
            trainer = make_trainer(
                parts, config, folder, [*callbacks, *deadline_callbacks(parts, budget), noted]
            )
            return trained(parts, config, module, trainer, folder, None, track)
        except Stopped:
            raise
        except SegkitError:
            # A run that fails before its first step leaves no folder.
            if first and not module.steps_begun:
                shutil.rmtree(folder)
            raise


def trained(
    parts: TrainingParts,
    config: Config,
    module: SegmentationModule,
    trainer: L.Trainer,
    folder: Path,
    checkpoint: Path | None,
    track: Track,
) -> Run:
    """Train, from a checkpoint if there is one, and write the results into the run's folder.

    Args:
        parts: the parts of the training.
        config: the resolved config.
        module: the module that Lightning trains.
        trainer: Lightning's trainer.
        folder: the folder of the run.
        checkpoint: the checkpoint to continue from; None for a new run.
        track: shows the progress over cases.
    """
    split, network = parts.split, module.network
    logger.info("%s: %d training cases, %d held out", folder, len(split.train), len(split.held_out))
    logger.info("%s", config.data.mirrored_because(list(parts.dataset.labels)))
    first_stage = tuple(stage.model for stage in parts.first_stage)
    if is_first_process():
        # Written now, so that checkpoints can be used before the end.
        save_firsts(folder / "model", first_stage)
        save_description(folder / "model", _as_before(folder / "model", parts.description))
    environment = training_environment(trainer.strategy.root_device)
    started = time.perf_counter()
    with guarded(config, trainer.strategy.root_device):
        if config.network.given is None:
            order_for(network, trainer.strategy.root_device)
        trainer.fit(
            module, datamodule=make_data(parts, config), ckpt_path=checkpoint, weights_only=True
        )
    seconds = time.perf_counter() - started
    _free_memory_of_steps(module, trainer)
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
    scores, temperature = scores_of_run(parts, config, read_from, trainer, track, until)
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
    record = record_in(trainer)
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
    if step is None and (fall := fall_of_score(trainer, best)):
        logger.warning("%s", fall)
    network.to("cpu")
    return Run(folder, summary, model)


def _as_before(folder: Path, description: ModelDescription) -> ModelDescription:
    """The description with the temperature and post-processing of the weights in a model folder.

    While a finished run is made longer, these weights are still used.
    """
    if not (folder / WEIGHTS).is_file():
        return description
    former = load_description(folder)
    return description.model_copy(
        update={"temperature": former.temperature, "postprocessing": former.postprocessing}
    )


def _free_memory_of_steps(module: SegmentationModule, trainer: L.Trainer) -> None:
    """Free the memory that only training steps need, for the final scores and for later runs."""
    module.graphed = None
    forget_data(trainer)
    if trainer.strategy.root_device.type == "cuda":
        gc.collect()  # module and trainer refer to each other
        torch.cuda.empty_cache()


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
