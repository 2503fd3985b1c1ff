"""Where a training is followed beside its own folder: Weights & Biases and MLflow.

Both by Lightning's loggers, so both obey their own environment: `WANDB_MODE=offline`,
`WANDB_PROJECT`, `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`. Without a server, MLflow writes to
the folder `mlruns` of the run. A run that is resumed goes on in the record it began.
"""

import os
import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from segkit.errors import ConfigError
from segkit.io.atomic import write_json
from segkit.io.safe_text import read_json_object
from segkit.training.lightning_private import end_record

RECORDS = "trackers.json"
"""In a run's folder: by tracker, the identity of its record."""
PROJECT = "segkit"


class FinishingWandbLogger(WandbLogger):
    """Ends its record with the training, or the next one in this process would go on in it."""

    def finalize(self, status: str) -> None:
        """Upload what is left, or leave it for `wandb sync`."""
        super().finalize(status)
        end_record(self, status)


def trackers(folder: Path, names: Sequence[str], settings: Mapping[str, Any]) -> list[Logger]:
    """A logger for each name, its record begun with the settings, or gone on with.

    Raises ConfigError where a package is missing or a server refuses.
    """
    check_installed(names)
    path = folder / RECORDS
    known = _records(path) if path.is_file() else {}
    found: list[Logger] = []
    for name in dict.fromkeys(names):
        logger = OPEN[name](folder, known.get(name))
        found.append(logger)
        if name not in known:
            logger.log_hyperparams(dict(settings))
            known[name] = logger.version
            write_json(path, known)
    return found


def _records(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}; delete it") from None


def check_installed(names: Sequence[str]) -> None:
    """Raise ConfigError for the first tracker whose package is missing."""
    for name in names:
        spec = find_spec(name)
        # A folder of that name, such as wandb makes where it runs, is no package.
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"trainer.loggers: {name} is not installed; run pip install 'segkit[loggers]'"
            )


def _wandb(folder: Path, record: str | None) -> Logger:
    from wandb.errors import Error

    logger = FinishingWandbLogger(
        name=folder.name,
        save_dir=folder,
        id=record or uuid.uuid4().hex[:12],
        project=os.environ.get("WANDB_PROJECT", PROJECT),
    )
    try:
        _ = logger.experiment
    except Error as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"trainer.loggers: wandb refuses: {reason}; run wandb login, or set WANDB_MODE=offline"
        ) from None
    return logger


def _mlflow(folder: Path, record: str | None) -> Logger:
    from mlflow.exceptions import MlflowException

    server = os.environ.get("MLFLOW_TRACKING_URI")
    if not server:
        # MLflow (3.7 and later) writes to files only where this says that files are meant.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    try:
        logger = MLFlowLogger(
            experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
            run_name=folder.name,
            tracking_uri=server or (folder / "mlruns").resolve().as_uri(),
            run_id=record,
        )
        _ = logger.experiment
    except MlflowException as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"trainer.loggers: mlflow refuses: {reason}; look at MLFLOW_TRACKING_URI"
        ) from None
    if not server:
        # MLflow has put the address here, where the next run of this process would find it.
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    return logger


OPEN = {"wandb": _wandb, "mlflow": _mlflow}
