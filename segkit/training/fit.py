"""`segkit train`: from a config to a finished run, and from a stopped run to the same.

Patches, augmentation and noise depend on the seed and the step alone, so that a run that goes on
from its last checkpoint ends with the weights of one that was never stopped.
"""

import logging
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn

from segkit.config.load import dump_yaml, load_config
from segkit.config.model import ModelDescription
from segkit.config.training import Config
from segkit.data.datamodule import SegmentationData
from segkit.data.dataset import Dataset, read_dataset
from segkit.data.normalise import build_normalisers
from segkit.data.patches import PatchDataset
from segkit.data.prepared_cache import store_cases
from segkit.data.variation import build_variation
from segkit.errors import ConfigError
from segkit.inference.postprocess import candidates
from segkit.inference.predictor import segment_prepared
from segkit.io.atomic import sweep, write_json, write_text
from segkit.model.build import build_network, check_windows, wrap_network
from segkit.model.folder import Model, save_model, start_from
from segkit.nn.external import try_out
from segkit.nn.normalisation import channels_last
from segkit.system.progress import Track, untracked
from segkit.system.resources import half_pays
from segkit.system.signals import advising
from segkit.system.workers import loading
from segkit.training.cascade import described, first_models, first_stage_of, label_cases
from segkit.training.final_scores import score
from segkit.training.module import SegmentationModule
from segkit.training.resolve import check_images, describe, split_of
from segkit.training.run_folder import (
    CONFIG,
    LAST,
    SECOND_STAGE,
    WholeCheckpoints,
    check_checkpoint,
    checkpoint_of,
    claimed,
    loggers,
    metrics_of,
    new_run_folder,
    stopped_run,
)
from segkit.training.stop_and_save import Interruption
from segkit.training.time_limit import Pace
from segkit.training.trackers import check_installed, trackers
from segkit.training.validation_pictures import SamplePictures
from segkit.training.weight_average import Averaging

logger = logging.getLogger(__name__)

LEARNING_RATE = {"adamw": 3e-3, "sgd": 1e-2}
WEIGHT_DECAY = {"adamw": 0.05, "sgd": 3e-5}
HARMLESS = (
    "Experiment logs directory",  # the run's folder holds config.yaml already
    "Checkpoint directory",
    "You're resuming from a checkpoint that ended before the epoch",  # patches go on by the step
    "The '.*_dataloader' does not have many workers",  # a choice: data.workers
    ".isinstance\\(treespec, LeafSpec\\). is deprecated",  # lightning's own call
    "GPU available but not used",  # a choice: trainer.accelerator
    ".ModelCheckpoint.monitor=.validation/dice",  # a resumed run ends its last epoch once more
)


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, what `summary.json` holds, and its model."""

    folder: Path
    summary: Mapping[str, Any]
    model: Model


def train(
    config: Config,
    *,
    runs: Path = Path("runs"),
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
    dataset: Dataset | None = None,
    network: nn.Module | None = None,
    then: Config | None = None,
) -> Run:
    """Train the network that the config describes and write a new run's folder.

    `callbacks` are Lightning's, for progress; `track` may show the progress over cases; a `dataset`
    is taken instead of the one that the config names. `network` is any module that makes logits
    (batch, output, cells …) of (batch, channel, cells …), trained in place of a U-Net, where the
    config has `network.given`. `then` is kept in the folder as what is to be trained after, so that
    a stop does not forget it. Of several processes the first alone writes the folder and returns;
    the others end here.
    Raises SegkitError where the config and the dataset do not fit.
    """
    with ExitStack() as held:
        return _train(
            config,
            runs=runs,
            folder=None,
            callbacks=callbacks,
            track=track,
            dataset=dataset,
            module=network,
            then=then,
            held=held,
        )


def resume(
    folder: Path,
    *,
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
    network: nn.Module | None = None,
) -> Run:
    """Go on with a run that was stopped, from its last checkpoint, as if it never had been.

    `network` is the module of a run that trains one; its weights become the checkpoint's.
    Raises ConfigError where there is no run to go on with, or another process is at it, and
    whatever `train` raises.
    """
    config = load_config(stopped_run(folder) / CONFIG)
    with ExitStack() as held:
        return _train(
            config,
            runs=folder.parent,
            folder=folder,
            callbacks=callbacks,
            track=track,
            module=network,
            held=held,
        )


def _train(
    config: Config,
    *,
    runs: Path,
    folder: Path | None,
    callbacks: Sequence[Callback],
    track: Track,
    held: ExitStack,
    dataset: Dataset | None = None,
    module: nn.Module | None = None,
    then: Config | None = None,
) -> Run:
    """`held` keeps the run's folder for this process until it is closed."""
    check_installed(config.trainer.loggers)
    first = getattr(rank_zero_only, "rank", 0) == 0
    if folder is not None and first:
        _hold(held, folder)
        sweep(folder)
    dataset = dataset or read_dataset(config.data.folder, config.data.files)
    train_cases, held_out = split_of(dataset, config)
    check_images(config, dataset, train_cases, held_out)
    first_stage = first_models(config.data.first_stage or (), dataset)
    description = described(describe(config, dataset, train_cases, track), first_stage)
    config = resolved(config, description)
    if config.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        check_windows(description, (config.data.batch_size, *description.volume_patch))
    resumed = folder is not None
    L.seed_everything(config.train.seed, workers=True, verbose=False)
    if module is None:
        network = build_network(description)
    else:
        network = wrap_network(description, module).cpu()
        try_out(network, torch.zeros(1, len(description.channels), *description.volume_patch))
    if config.train.start_from is not None and not (folder and checkpoint_of(folder)):
        logger.info("%s", start_from(network, config.train.start_from))
    if folder is None:
        # Other processes write nothing; Lightning tells them where checkpoints lie.
        folder = new_run_folder(runs, config.name) if first else runs / config.name
        if first:
            _hold(held, folder)
            if then is not None:
                write_text(folder / SECOND_STAGE, dump_yaml(with_whole_paths(then)))
            write_text(folder / CONFIG, dump_yaml(config))
    logger.info("%s: %d cases to train on, %d held out", folder, len(train_cases), len(held_out))

    patch_size = description.volume_patch
    cache = config.data.cache or runs / ".cache"
    first_labels = label_cases(
        (*train_cases, *held_out),
        dataset,
        first_stage,
        cache=cache,
        device={"gpu": "cuda"}.get(config.trainer.accelerator, config.trainer.accelerator),
        track=track,
    )
    store = partial(
        store_cases,
        dataset=dataset,
        folder=cache,
        spacing=description.spacing,
        normalisers=build_normalisers(description.normalisation),
        order=description.interpolation_order,
        settings=[setting.model_dump() for setting in description.normalisation],
        first_labels=first_labels,
    )
    stored = store(train_cases, track=lambda cases: track(cases, "preparing", len(train_cases)))
    stored_held_out = store(held_out, track=lambda cases: track(cases, "held out", len(held_out)))

    vary, margin = build_variation(
        config.data,
        patch_size,
        spacing=description.spacing,
        labels=dataset.labelling.value_names,
        first_classes=len(description.first_stage.classes) if description.first_stage else 0,
    )
    steps_per_epoch = min(config.train.validate_every, config.train.steps)
    data = SegmentationData(
        PatchDataset(
            stored,
            patch_size=patch_size,
            margin=margin,
            foreground_share=config.data.foreground_share,
            seed=config.train.seed,
        ),
        stored_held_out,
        batch_size=config.data.batch_size,
        steps_per_epoch=steps_per_epoch,
        workers=config.data.workers,
    )
    lightning_module = SegmentationModule(
        network,
        vary=vary,
        segment=partial(
            segment_prepared, patch_size=patch_size, written=description.labelling.written
        ),
        class_names=list(description.labels),
        optimiser=config.train.optimiser,
        learning_rate=config.train.learning_rate or LEARNING_RATE[config.train.optimiser],
        weight_decay=WEIGHT_DECAY[config.train.optimiser]
        if config.train.weight_decay is None
        else config.train.weight_decay,
        num_steps=config.train.steps,
        batch_dice=config.train.batch_dice,
        seed=config.train.seed,
        presence_weight=head.weight if (head := config.network.attention.head) else 0.0,
        regions=list(description.regions.values()),
        ignore=description.ignore,
    )
    if resumed:
        check_checkpoint(folder, lightning_module)
    best = ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor="validation/dice" if held_out else None,
        mode="max",
        enable_version_counter=False,
    )
    last = ModelCheckpoint(
        dirpath=folder,
        filename="last",
        enable_version_counter=False,
        # Where nothing is validated: at an epoch's end Lightning (2.6) would go on in that epoch.
        every_n_train_steps=None if held_out else steps_per_epoch,
    )
    pictures = SamplePictures(
        folder,
        names=[case.name for case in held_out],
        classes=description.labelling.value_names,
        spacing=description.spacing,
        count=config.train.pictures,
    )
    averaging = [Averaging(config.train.averaging)] if config.train.averaging else []
    patience: list[Callback] = []
    if config.train.patience is not None and held_out:
        patience = [
            EarlyStopping(
                "validation/dice",
                mode="max",
                patience=config.train.patience,
                check_on_train_epoch_end=False,
            )
        ]
    metrics = metrics_of(folder)
    try:
        followed = trackers(
            folder, config.trainer.loggers if first else (), config.model_dump(mode="json")
        )
        trainer = L.Trainer(
            **config.trainer.model_dump(exclude={"loggers"}),
            max_steps=config.train.steps,
            max_epochs=-1,
            gradient_clip_val=config.train.gradient_clip,
            check_val_every_n_epoch=1,
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if held_out else 0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            log_every_n_steps=min(10, steps_per_epoch),
            callbacks=[
                *averaging,
                best,
                last,
                *patience,
                pictures,
                Pace(),
                *callbacks,
                Interruption(folder / LAST),
            ],
            plugins=WholeCheckpoints(metrics),
            logger=[*loggers(folder, metrics), *followed] if first else False,
            default_root_dir=folder,
        )
    except (MisconfigurationException, ValueError, ModuleNotFoundError) as error:
        if first and not resumed:
            shutil.rmtree(folder)
        reason = " ".join(str(error).split())
        raise ConfigError(f"trainer: Lightning refuses these settings: {reason}") from None
    except ConfigError:
        if first and not resumed:
            shutil.rmtree(folder)
        raise
    if module is None and trainer.strategy.root_device.type == "cpu":
        channels_last(network)
    started = time.perf_counter()
    with warnings.catch_warnings(), loading(config.data.workers):
        for message in HARMLESS:
            warnings.filterwarnings("ignore", message)
        trainer.fit(
            lightning_module,
            datamodule=data,
            ckpt_path=checkpoint_of(folder) if resumed else None,
            weights_only=True,
        )
    seconds = time.perf_counter() - started
    for average in averaging:
        average.settle(lightning_module)
    if not first:
        sys.exit(0)

    model = Model(description, network.eval(), tuple(stage.model for stage in first_stage))
    save_model(folder / "model", model)
    best_dice = best.best_model_score
    # A fold is a piece of a cross-validation, which may adopt what a single run never does. Regions
    # overlap, so that what is left of one is not its own affair.
    adopts = config.data.fold is not None and not dataset.regions
    operations = candidates(list(description.labels.values())[1:]) if adopts else {}
    summary = {
        "run": folder.name,
        "steps": trainer.global_step,
        "seconds_of_training": round(seconds, 1),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "seed": config.train.seed,
        "training_cases": len(train_cases),
        "validation": {
            "note": "whole held-out volumes, on their own grids, by the final weights",
            **score(
                model,
                dataset,
                held_out,
                track,
                device=str(trainer.strategy.root_device),
                first_labels=first_labels,
                operations=operations,
            ),
            "best_mean_dice_during_training": None if best_dice is None else float(best_dice),
        },
        **first_stage_of(first_stage, train_cases, held_out),
        "versions": versions(),
    }
    write_json(folder / "summary.json", summary)
    network.to("cpu")
    return Run(folder, summary, model)


def _hold(held: ExitStack, folder: Path) -> None:
    held.enter_context(claimed(folder))
    held.enter_context(advising(f"segkit train --resume {folder} goes on from there"))


def after(config: Config, first: Path) -> Config:
    """The config of a second stage, which is given the labels of a run."""
    data = config.data.model_copy(update={"first_stage": [first]})
    return config.model_copy(update={"data": data})


def precision(config: Config) -> str | int:
    """Lightning's precision: `auto` is a half type where the device is faster in it, else single.

    On a CPU that needs matrix units: cores without them take 40 times as long in a half type.
    """
    asked = config.trainer.precision
    if asked != "auto":
        return asked
    if config.trainer.accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "bf16-mixed" if half_pays() else "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def resolved(config: Config, description: ModelDescription) -> Config:
    """The config with spacing and precision settled, so that the run's own says it all."""
    data = config.data.model_copy(update={"spacing": description.spacing})
    trainer = config.trainer.model_copy(update={"precision": precision(config)})
    return with_whole_paths(config.model_copy(update={"data": data, "trainer": trainer}))


def with_whole_paths(config: Config) -> Config:
    """The config with paths that mean the same from any working directory."""
    data = config.data.model_copy(
        update={
            "folder": config.data.folder.resolve(),
            "cache": config.data.cache and config.data.cache.resolve(),
            "first_stage": config.data.first_stage
            and [path.resolve() for path in config.data.first_stage],
        }
    )
    train = config.train.model_copy(
        update={"start_from": config.train.start_from and config.train.start_from.resolve()}
    )
    return config.model_copy(update={"data": data, "train": train})


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("segkit", "torch", "lightning", "numpy")},
    }
