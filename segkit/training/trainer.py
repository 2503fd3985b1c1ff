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
from segkit.errors import ConfigError, TrainingError
from segkit.system.workers import loading
from segkit.training.csv_logger import MetricsFile
from segkit.training.lightning_private import is_first_process
from segkit.training.parts import TrainingParts
from segkit.training.run_folder import LAST, WholeCheckpoints, loggers, metrics_of
from segkit.training.stop_and_save import Interruption
from segkit.training.time_budget import UNLIMITED
from segkit.training.time_limit import Pace
from segkit.training.trackers import trackers
from segkit.training.validation_pictures import SamplePictures
from segkit.training.weight_average import Averaging

HARMLESS = (
    "Experiment logs directory",  # the run's folder holds config.yaml already
    "Checkpoint directory",
    "You're resuming from a checkpoint that ended before the epoch",  # patches go on by the step
    "The '.*_dataloader' does not have many workers",  # a choice: data.workers
    ".isinstance\\(treespec, LeafSpec\\). is deprecated",  # lightning's own call
    "GPU available but not used",  # a choice: trainer.accelerator
    ".ModelCheckpoint.monitor=.validation/",  # a resumed run ends its last epoch once more
)


NOT_DETERMINISTIC = " does not have a deterministic implementation"
"""In what PyTorch says of an operation that it was told not to use."""
LOGGED_ON_GPU = 50
"""Steps between two lines of metrics on a GPU."""


def steps_between(config: Config) -> int:
    """Steps between validations, or all steps if they are fewer."""
    return min(config.train.validate_every, config.train.steps)


def looked_at(parts: TrainingParts, config: Config) -> int:
    """Held-out cases that each validation looks at, or each of several processes does."""
    count, most = len(parts.validation.cases), config.train.validation_cases
    return count if most is None else min(most, count)


def make_trainer(
    parts: TrainingParts, config: Config, folder: Path, callbacks: Sequence[Callback]
) -> L.Trainer:
    """The trainer of a run that is written to a folder; only the first process logs there.

    Raises ConfigError if Lightning refuses the settings, or a tracker's server does, or if there
    are fewer held-out cases than processes.
    """
    validated, every = bool(len(parts.validation.cases)), steps_between(config)
    metrics, looked = metrics_of(folder), looked_at(parts, config)
    try:
        trainer = L.Trainer(
            **config.trainer.model_dump(exclude={"loggers", "deterministic"}),
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
            # Shapes never change, so that the fastest kernels are worth finding.
            benchmark=not config.trainer.deterministic,
            callbacks=[
                *_callbacks(parts, config, folder, validated),
                *callbacks,
                Interruption(folder / LAST),
            ],
            plugins=WholeCheckpoints(metrics),
            logger=_loggers(folder, config, metrics) if is_first_process() else False,
            default_root_dir=folder,
        )
    except (MisconfigurationException, ValueError, ModuleNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"trainer: Lightning refuses these settings: {reason}") from None
    held_out, processes = len(parts.validation.cases), trainer.world_size
    if 0 < held_out < processes:
        raise ConfigError(
            f"{held_out} held-out cases cannot be shared out to {processes} processes, as each "
            f"looks at some; hold out {processes} or more (data.validation), or none, or use fewer "
            f"processes (trainer.devices, trainer.num_nodes)"
        )
    if trainer.strategy.root_device.type == "cuda":
        # A GPU has to be waited for to be logged, and takes more steps in the same time.
        trainer.log_every_n_steps = min(LOGGED_ON_GPU, every)  # type: ignore[attr-defined]
    return trainer


@contextmanager
def determinism_as_before() -> Iterator[None]:
    """Leave behind what PyTorch was told of deterministic operations before."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


@contextmanager
def guarded(config: Config, device: torch.device) -> Iterator[None]:
    """Hide warnings that mean nothing here, and tell in a sentence what ends a training.

    Raises WorkerError if a loader's process is killed, and TrainingError if the device's memory
    runs out or an operation has no deterministic form and must have one.
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
                f"{device}: its memory holds no step of {config.data.batch_size} patches of "
                f"{voxels} voxels with network.channels {config.network.channels}; lower "
                f"data.batch_size or data.patch_size, or plan for less with segkit plan --memory"
            ) from None
        except RuntimeError as error:
            operation, refused, _ = str(error).partition(NOT_DETERMINISTIC)
            if not refused:
                raise
            raise TrainingError(
                f"trainer.deterministic is true, and {operation} gives other bits each time on "
                f"{device}; set trainer.deterministic to warn, or to false"
            ) from None


def _callbacks(
    parts: TrainingParts, config: Config, folder: Path, validated: bool
) -> list[Callback]:
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
            # If nothing is validated, at an epoch's end Lightning (2.6) would go on in that epoch.
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
    return [*found, Pace()]


def _loggers(folder: Path, config: Config, metrics: MetricsFile) -> list[Logger]:
    followed = trackers(folder, config.trainer.loggers, config.model_dump(mode="json"))
    return [*loggers(folder, metrics), *followed]
