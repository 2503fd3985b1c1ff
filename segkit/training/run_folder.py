"""The folder of a run: its files, its lock, its checkpoints and its metrics.

runs/<name>/config.yaml   begun.json   split.json   last.ckpt   best.ckpt   model/   metrics.csv
            samples/      summary.json
"""

import csv
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import nn
from torch.optim import Optimizer

from segkit.errors import ConfigError
from segkit.io.atomic import whole
from segkit.io.safe_text import read_json_object, read_text
from segkit.model.checkpoint import UNREADABLE
from segkit.model.file_names import CONFIG
from segkit.system.signals import advice_on_stop
from segkit.training.csv_logger import MetricsFile

try:
    import fcntl
except ImportError:  # on Windows, folders are not locked
    fcntl = None  # type: ignore[assignment]

BEGUN = "begun.json"
"""The file with the settings that a run began with, to notice edits before its first checkpoint."""
LAST = "last.ckpt"
METRICS_FILE = "metrics.csv"
CHECKPOINT_KEYS = {
    "epoch",
    "global_step",
    "state_dict",
    "optimizer_states",
    "lr_schedulers",
    "loops",
}
SECONDS_BETWEEN_TRIES = 0.2
RECORD_KEY = "segkit"
"""The key in a checkpoint under which the settings and the split of the run are stored."""
SECOND_STAGE = "second_stage.yaml"
"""The file in the run of a first stage with the config of its second stage."""

logger = logging.getLogger(__name__)


def new_run_folder(runs: Path, name: str) -> Path:
    """Make a new folder `runs/<name>`, or `runs/<name>-2`, … if it exists already.

    Raises:
        ConfigError: the folder cannot be made.
    """
    for number in range(1, 1_000_000):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(
                f"{folder}: the folder cannot be made: {error}; choose another"
            ) from None
        return folder
    raise ConfigError(f"{runs}/{name}: a million runs have this name; choose another")


def existing_run(folder: Path) -> Path:
    """The folder, if it is the folder of a run. Raises ConfigError if it is not."""
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder}: expected a run with {CONFIG}, found none; check the path")
    return folder


def read_of_run(path: Path) -> dict[str, Any]:
    """The content of a JSON file of a run. Raises ConfigError if it cannot be read."""
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}; repair it") from None


@contextmanager
def locked_folder(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Lock a folder for this process, until the block or the process ends.

    On a file system without locks, nothing is locked.

    Args:
        folder: the folder to lock.
        wait: seconds to wait for another process that has locked it.

    Raises:
        ConfigError: another process has locked the folder.
    """
    if fcntl is None:
        yield
        return
    until = time.monotonic() + wait
    handle = os.open(folder, os.O_RDONLY)
    try:
        while not _lock(handle, folder):
            if time.monotonic() >= until:
                raise ConfigError(
                    f"{folder}: another process is training this run; wait until it ends, or stop "
                    f"it"
                )
            time.sleep(SECONDS_BETWEEN_TRIES)
        yield
    finally:
        os.close(handle)


@contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Whether only this process has a name, until the block or the process ends.

    A file of that name is made, and removed at the end. Without locks, every name is free.
    """
    if fcntl is None:
        yield True
        return
    handle = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        mine = _lock(handle, path)
        if mine and not _is_still(path, handle):  # it was removed before it was locked
            os.close(handle)
            handle = os.open(path, os.O_CREAT | os.O_RDWR)
            mine = _lock(handle, path) and _is_still(path, handle)
        try:
            yield mine
        finally:
            if mine:
                path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _lock(handle: int, path: Path) -> bool:
    """Lock an open file or folder for this process; False if another process has locked it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.info("%s cannot be locked: %s", path, error)
    return True


def _is_still(path: Path, handle: int) -> bool:
    """Whether a path still names the file that is open."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(handle))


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Lock a run's folder for this process; a stop says how to continue the run."""
    with (
        locked_folder(folder),
        advice_on_stop(f"segkit train --resume {folder} continues from there"),
    ):
        yield


def checkpoint_of(folder: Path) -> Path | None:
    """The last checkpoint of a run; None if the run has no checkpoint yet."""
    path = folder / LAST
    return path if path.is_file() else None


def check_checkpoint(folder: Path, module: nn.Module, optimiser: Optimizer) -> None:
    """Check that the last checkpoint of a run, if it has one, fits this module.

    Without this check, Lightning might use a wrong checkpoint, or end with a traceback.

    Args:
        folder: the folder of the run.
        module: the module that is trained.
        optimiser: the optimiser of its weights, as at the start of the run.

    Raises:
        ConfigError: the checkpoint is damaged or does not fit.
    """
    path = checkpoint_of(folder)
    if path is None:
        return
    content = _read_checkpoint(path)
    expected = {name: value.shape for name, value in module.state_dict().items()}
    groups = [group["params"] for group in optimiser.param_groups]
    weights = [parameter.shape for group in groups for parameter in group]
    try:
        fits = {name: value.shape for name, value in content["state_dict"].items()} == expected
        for state in content["optimizer_states"]:
            found = [len(group["params"]) for group in state["param_groups"]]
            fits &= found == [len(group) for group in groups]
            for number, moments in state["state"].items():
                shapes = {value.shape for value in moments.values() if getattr(value, "ndim", 0)}
                fits &= shapes <= {weights[number]}
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise _no_checkpoint(path, f"lacks {error}") from None
    if not fits:
        raise _no_checkpoint(path, f"does not fit the network of {folder / CONFIG}")


def read_record(folder: Path) -> tuple[dict[str, Any], int]:
    """The record of settings and split in the last checkpoint of a run, and its step.

    Without a checkpoint, the record is empty and the step 0.
    """
    path = checkpoint_of(folder)
    if path is None:
        return {}, 0
    content = _read_checkpoint(path)
    record = content.get(RECORD_KEY)
    return dict(record) if isinstance(record, dict) else {}, int(content["global_step"])


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint. Only plain data and tensors are read, never code."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise _no_checkpoint(path, f"cannot be read as plain data: {reason}") from None
    lacking = CHECKPOINT_KEYS - set(content if isinstance(content, dict) else ())
    if lacking:
        raise _no_checkpoint(path, f"lacks {', '.join(sorted(lacking))}")
    return dict(content)


def _no_checkpoint(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path}: expected a checkpoint of this run, but it {why}; delete it to start the run again"
    )


def metrics_of(folder: Path) -> MetricsFile:
    """The metrics file of a run. If the run is resumed, rows before its last checkpoint are kept.

    Raises:
        ConfigError: the file is damaged.
    """
    path, checkpoint = folder / METRICS_FILE, checkpoint_of(folder)
    rows: list[dict[str, str]] = []
    if path.is_file() and checkpoint is not None:
        done = int(_read_checkpoint(checkpoint)["global_step"])
        try:
            table = csv.DictReader(read_text(path).splitlines())
            rows = [row for row in table if int(row["step"]) < done]
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise ConfigError(
                f"{path}: cannot be read: {error!r}; move the file elsewhere to resume without it"
            ) from None
    return MetricsFile(path, rows)


def loggers(folder: Path, metrics: MetricsFile) -> list[Logger]:
    """The loggers of a run: metrics.csv, and TensorBoard events if tensorboard is installed."""
    found: list[Logger] = [metrics]
    if find_spec("tensorboard"):
        found.append(TensorBoardLogger(folder, name="", version="", sub_dir="tensorboard"))
    return found


class WholeCheckpoints(TorchCheckpointIO):
    """Writes each checkpoint completely or not at all, after the metrics up to its step.

    Lightning (2.6) writes a checkpoint to the system's temporary folder and moves it. This folder
    may be on another disk; then a process that is killed during the move leaves half a file.
    """

    def __init__(self, metrics: MetricsFile) -> None:
        self.metrics = metrics

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the metrics, then the checkpoint."""
        self.metrics.write()
        with whole(Path(path)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)
