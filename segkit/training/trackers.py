"""Trackers that also record a training: Weights & Biases and MLflow.

Both use Lightning's loggers and obey their environment variables: `WANDB_MODE=offline`,
`WANDB_PROJECT`, `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`. Without a server, MLflow writes to
the folder `mlruns` of the run. A resumed run continues its earlier record.
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
"""The file in a run's folder with the id of the record of each tracker."""
PROJECT = "segkit"


class FinishingWandbLogger(WandbLogger):
    """A W&B logger that ends its record with the training.

    Otherwise the next training in this process would continue the same record.
    """

    def finalize(self, status: str) -> None:
        """Upload the rest of the record and end it; offline, it is left for `wandb sync`."""
        super().finalize(status)
        end_record(self, status)


def trackers(folder: Path, names: Sequence[str], settings: Mapping[str, Any]) -> list[Logger]:
    """A logger for each name. A new record starts with the settings; an existing one is continued.

    Args:
        folder: the run's folder.
        names: names of the trackers.
        settings: the settings that a new record starts with.

    Raises:
        ConfigError: a package is missing, or a server refuses.
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
        # A folder of that name, such as wandb makes in the working directory, is not a package.
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
            f"trainer.loggers: wandb reports an error: {reason}; run wandb login, or set "
            f"WANDB_MODE=offline"
        ) from None
    return logger


def _mlflow(folder: Path, record: str | None) -> Logger:
    from mlflow.exceptions import MlflowException

    server = os.environ.get("MLFLOW_TRACKING_URI")
    if not server:
        # MLflow (3.7 and later) writes to files only if this variable allows it.
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
            f"trainer.loggers: mlflow reports an error: {reason}; check MLFLOW_TRACKING_URI"
        ) from None
    if not server:
        # MLflow has set this variable; the next run in this process must not use it.
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    return logger


OPEN = {"wandb": _wandb, "mlflow": _mlflow}
