"""Lightning's trainer for a run: its checkpoints, pictures, loggers and other callbacks."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger

from segkit.config.training import Config
from segkit.data.datamodule import workers_for
from segkit.errors import ConfigError, TrainingError, counted
from segkit.system.workers import loading
from segkit.training.csv_logger import MetricsFile
from segkit.training.lightning_private import is_first_process
from segkit.training.parts import TrainingParts
from segkit.training.run_folder import LAST, WholeCheckpoints, loggers, metrics_of
from segkit.training.stop_and_save import StopAndSave
from segkit.training.time_budget import UNLIMITED
from segkit.training.time_limit import TimeLimitWarning
from segkit.training.trackers import trackers
from segkit.training.validation_pictures import SamplePictures
from segkit.training.weight_average import Averaging

HARMLESS = (
    "Experiment logs directory",  # the run's folder already contains config.yaml
    "Checkpoint directory",
    "You're resuming from a checkpoint that ended before the epoch",  # patches depend on the step
    "The '.*_dataloader' does not have many workers",  # the user chooses data.workers
    ".isinstance\\(treespec, LeafSpec\\). is deprecated",  # Lightning's own call
    "GPU available but not used",  # the user chooses trainer.accelerator
    ".ModelCheckpoint.monitor=.validation/",  # a resumed run ends its last epoch again
)
"""Warnings of Lightning that are hidden during training, each with the reason."""


NOT_DETERMINISTIC = " does not have a deterministic implementation"
"""This text is in PyTorch's error about an operation that is not deterministic."""
LOGGED_ON_GPU = 50
"""Number of steps between two rows of metrics on a GPU."""


def steps_between(config: Config) -> int:
    """Number of steps between validations, at most the number of all steps."""
    return min(config.train.validate_every, config.train.steps)


def cases_per_validation(parts: TrainingParts, config: Config) -> int:
    """Number of held-out cases that each validation uses, in each process."""
    count, most = len(parts.validation.cases), config.train.validation_cases
    return count if most is None else min(most, count)


def make_trainer(
    parts: TrainingParts, config: Config, folder: Path, callbacks: Sequence[Callback]
) -> L.Trainer:
    """Lightning's trainer for a run. Only the first process writes logs.

    Args:
        parts: the parts of the training.
        config: the resolved config.
        folder: the run's folder.
        callbacks: more callbacks of Lightning.

    Raises:
        ConfigError: Lightning or the server of a tracker refuses the settings, or there are fewer
            held-out cases than processes.
    """
    metrics, every = metrics_of(folder), steps_between(config)
    looked = cases_per_validation(parts, config)
    validated = looked > 0
    if config.train.patience is not None and not parts.validation.cases:
        raise ConfigError(
            f"train.patience is {config.train.patience}, but no case is held out, so there is no "
            f"validation that it could count; hold out a case (data.validation), or remove "
            f"train.patience"
        )
    try:
        trainer = L.Trainer(
            **config.trainer.model_dump(exclude={"loggers", "deterministic", "compile"}),
            deterministic=config.trainer.deterministic or None,
            max_steps=config.train.steps if config.train.minutes is None else UNLIMITED,
            max_epochs=-1,
            gradient_clip_val=config.train.gradient_clip,
            check_val_every_n_epoch=1,
            num_sanity_val_steps=0,
            limit_val_batches=looked if looked < len(parts.validation.cases) else float(validated),
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            log_every_n_steps=min(10, every),
            # Shapes never change, so cuDNN can search for the fastest kernels.
            benchmark=not config.trainer.deterministic,
            callbacks=[
                *_callbacks(parts, config, folder, validated),
                *callbacks,
                StopAndSave(folder / LAST),
            ],
            plugins=WholeCheckpoints(metrics),
            logger=_loggers(folder, config, metrics) if is_first_process() else False,
            default_root_dir=folder,
        )
    except (MisconfigurationException, ValueError, ModuleNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"trainer: Lightning refuses these settings: {reason}; correct them"
        ) from None
    held_out, processes = len(parts.validation.cases), trainer.world_size
    if 0 < held_out < processes:
        raise ConfigError(
            f"each of the {processes} processes needs a held-out case, but only "
            f"{counted(held_out, 'case')} {'is' if held_out == 1 else 'are'} held out; hold out "
            f"{processes} or more (data.validation), or none, or use fewer "
            f"processes (trainer.devices, trainer.num_nodes)"
        )
    if trainer.strategy.root_device.type == "cuda":
        # Logging waits for the GPU, and a GPU does more steps in the same time.
        trainer.log_every_n_steps = min(LOGGED_ON_GPU, every)  # type: ignore[attr-defined]
    return trainer


@contextmanager
def determinism_as_before() -> Iterator[None]:
    """Restore PyTorch's setting of deterministic operations after the block."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


@contextmanager
def guarded(config: Config, device: torch.device) -> Iterator[None]:
    """Hide harmless warnings, and turn known failures of a training into errors of one sentence.

    Raises:
        WorkerError: a process that loads patches was killed.
        TrainingError: the device's memory is too small, or an operation must be deterministic but
            has no deterministic form.
    """
    workers = config.data.workers
    count = workers_for(device) if workers == "auto" else workers
    with warnings.catch_warnings(), loading(count):
        for message in HARMLESS:
            warnings.filterwarnings("ignore", message)
        try:
            yield
        except torch.OutOfMemoryError:
            voxels = "x".join(str(size) for size in config.data.patch_size)
            raise TrainingError(
                f"{device}: its memory is too small for a step of "
                f"{counted(config.data.batch_size, 'patch')} of {voxels} voxels with "
                f"network.channels {config.network.channels}; lower "
                f"data.batch_size or data.patch_size, or make a smaller plan with segkit plan "
                f"--memory"
            ) from None
        except RuntimeError as error:
            operation, refused, _ = str(error).partition(NOT_DETERMINISTIC)
            if not refused:
                raise
            raise TrainingError(
                f"trainer.deterministic is true, but {operation} is not deterministic on {device}; "
                f"set trainer.deterministic to warn or false"
            ) from None


def _callbacks(
    parts: TrainingParts, config: Config, folder: Path, validated: bool
) -> list[Callback]:
    """The callbacks of a training, in their order."""
    watched = f"validation/{parts.validation.measure}"
    average = config.train.averaging
    found: list[Callback] = [
        *([Averaging(average)] if average is not None else []),
        ModelCheckpoint(
            dirpath=folder,
            filename="best",
            monitor=watched if validated else None,
            mode="max",
            enable_version_counter=False,
        ),
        ModelCheckpoint(
            dirpath=folder,
            filename="last",
            enable_version_counter=False,
            # Without validation, a checkpoint at the end of an epoch would make Lightning (2.6)
            # resume inside this epoch.
            every_n_train_steps=None if validated else steps_between(config),
        ),
    ]
    if config.train.patience is not None and validated:
        found.append(
            EarlyStopping(
                watched,
                mode="max",
                patience=config.train.patience,
                check_on_train_epoch_end=False,
            )
        )
    found.append(
        SamplePictures(
            folder,
            names=[case.name for case in parts.validation.cases],
            classes=parts.description.labelling.value_names,
            spacing=parts.description.spacing,
            count=config.train.pictures,
        )
    )
    return [*found, TimeLimitWarning()]


def _loggers(folder: Path, config: Config, metrics: MetricsFile) -> list[Logger]:
    followed = trackers(folder, config.trainer.loggers, config.model_dump(mode="json"))
    return [*loggers(folder, metrics), *followed]
