"""A run's folder: made once, gone on with after a stop, and logged into.

runs/<name>/config.yaml   last.ckpt   best.ckpt   model/   metrics.csv   samples/   summary.json
"""

import csv
import io
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from segkit.errors import ConfigError
from segkit.files import write_text
from segkit.model import SUMMARY

CONFIG = "config.yaml"
LAST = "last.ckpt"
METRICS = "metrics.csv"


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


def stopped_run(folder: Path) -> Path:
    """The folder of a run that can be resumed. Raises ConfigError where it cannot."""
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder}: expected a run with its {CONFIG}, found none; check the path")
    if (folder / SUMMARY).is_file():
        raise ConfigError(f"{folder}: is finished already; its model is {folder / 'model'}")
    return folder


def checkpoint_of(folder: Path) -> Path | None:
    """The last checkpoint of a run; None of one that was stopped before its first."""
    path = folder / LAST
    return path if path.is_file() else None


def loggers(folder: Path) -> list[Logger]:
    """metrics.csv always, TensorBoard events where tensorboard is installed.

    Rows of a run that is resumed stay, up to its last checkpoint.
    """
    found: list[Logger] = [_continued(folder)]
    if find_spec("tensorboard"):
        found.append(TensorBoardLogger(folder, name="", version="", sub_dir="tensorboard"))
    return found


def _continued(folder: Path) -> CSVLogger:
    path, checkpoint = folder / METRICS, checkpoint_of(folder)
    rows: list[dict[str, str]] = []
    if path.is_file() and checkpoint is not None:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        done = int(content["global_step"])
        table = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
        rows = [row for row in table if int(row["step"]) < done]
    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=10)
    if rows:
        with warnings.catch_warnings(action="ignore"):
            writer = logger.experiment  # which deletes what was there
        writer.metrics_keys = list(rows[0])
        text = io.StringIO()
        kept = csv.DictWriter(text, writer.metrics_keys)
        kept.writeheader()
        kept.writerows(rows)
        write_text(path, text.getvalue())
    return logger
