"""A run's folder: made once, gone on with after a stop, and logged into.

runs/<name>/config.yaml   split.json   last.ckpt   best.ckpt   model/   metrics.csv   samples/
            summary.json
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
from segkit.io.safe_text import read_text
from segkit.model.checkpoint import UNREADABLE
from segkit.training.csv_logger import MetricsFile

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

CONFIG = "config.yaml"
LAST = "last.ckpt"
SPLIT = "split.json"
"""Names of the cases that train and of those that are held out."""
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
"""In a checkpoint: the settings and the split of the run so far."""
SECOND_STAGE = "second_stage.yaml"
"""In the run of a first stage: the config that is trained after it."""

logger = logging.getLogger(__name__)


def new_run_folder(runs: Path, name: str) -> Path:
    """A folder `runs/<name>` that did not exist before; a number follows where one does."""
    for number in range(1, 1_000_000):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be made: {error}; choose another folder") from None
        return folder
    raise ConfigError(f"{runs}/{name}: a million runs of that name; choose another")


def begun_run(folder: Path) -> Path:
    """The folder of a run. Raises ConfigError if there is none."""
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder}: expected a run with its {CONFIG}, found none; check the path")
    return folder


@contextmanager
def claimed(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """The folder for this process alone, until the block or the process ends.

    Raises ConfigError if another still has it after `wait` seconds. On a file system without locks,
    none has.
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
                    f"{folder}: another process trains in it; wait for its end, or stop it"
                )
            time.sleep(SECONDS_BETWEEN_TRIES)
        yield
    finally:
        os.close(handle)


@contextmanager
def claimed_if_free(path: Path) -> Iterator[bool]:
    """Whether a name is this process's alone, until the block or the process ends.

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


def checkpoint_of(folder: Path) -> Path | None:
    """The last checkpoint of a run; None of one that was stopped before its first."""
    path = folder / LAST
    return path if path.is_file() else None


def check_checkpoint(folder: Path, module: nn.Module, optimiser: Optimizer) -> None:
    """Raise ConfigError unless the last checkpoint of a run, if it has one, is of this module.

    Lightning would go on with whatever it finds, or end in a traceback.

    Args:
        folder: of the run.
        module: that is trained.
        optimiser: of its weights, as the run begins with it.
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
    """What the last checkpoint of a run says of settings and split, and its step; empty without."""
    path = checkpoint_of(folder)
    if path is None:
        return {}, 0
    content = _read_checkpoint(path)
    record = content.get(RECORD_KEY)
    return dict(record) if isinstance(record, dict) else {}, int(content["global_step"])


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, plain data and tensors alone."""
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
        f"{path}: expected a checkpoint of this run, which {why}; delete it to begin the run anew"
    )


def metrics_of(folder: Path) -> MetricsFile:
    """The table of a run; rows of one that is resumed stay, up to its last checkpoint."""
    path, checkpoint = folder / METRICS_FILE, checkpoint_of(folder)
    rows: list[dict[str, str]] = []
    if path.is_file() and checkpoint is not None:
        done = int(_read_checkpoint(checkpoint)["global_step"])
        try:
            table = csv.DictReader(read_text(path).splitlines())
            rows = [row for row in table if int(row["step"]) < done]
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise ConfigError(f"{path}: cannot be gone on with: {error!r}; move it away") from None
    return MetricsFile(path, rows)


def loggers(folder: Path, metrics: MetricsFile) -> list[Logger]:
    """metrics.csv always, TensorBoard events where tensorboard is installed."""
    found: list[Logger] = [metrics]
    if find_spec("tensorboard"):
        found.append(TensorBoardLogger(folder, name="", version="", sub_dir="tensorboard"))
    return found


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and the table of metrics up to there before.

    Lightning (2.6) writes them in the system's folder for temporary files, which may lie on another
    disk: one that is killed while it moves them here would leave half of one.
    """

    def __init__(self, metrics: MetricsFile) -> None:
        self.metrics = metrics

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write one."""
        self.metrics.write()
        with whole(Path(path)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)
