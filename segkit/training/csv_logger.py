"""metrics.csv of a run.

The whole file is replaced every few seconds and before each checkpoint, so it is complete at any
moment.
"""

import csv
import io
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from segkit.io.atomic import write_text

SECONDS_BETWEEN_WRITES = 5.0


class MetricsFile(Logger):
    """A logger that writes metrics to a CSV file, one row per logging call.

    Args:
        path: the CSV file.
        rows: the rows that the file has already.
    """

    def __init__(self, path: Path, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self.path = path
        self.rows = [dict(row) for row in rows]
        self.written_rows, self.written_at = 0, float("-inf")

    @property
    def name(self) -> str:
        """Empty: the file needs no name from Lightning."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the file needs no version from Lightning."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the run."""
        return str(self.path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml holds the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add one row."""
        self.rows.append({**metrics, "step": len(self.rows) if step is None else step})

    def save(self) -> None:
        """Write the table, unless it was written a few seconds ago. Lightning calls this often."""
        if time.monotonic() - self.written_at > SECONDS_BETWEEN_WRITES:
            self.write()

    def finalize(self, status: str) -> None:
        """Write the table."""
        self.write()

    @rank_zero_only
    def write(self) -> None:
        """Write the table if there are new rows."""
        if self.written_rows == len(self.rows):
            return
        text = io.StringIO()
        table = csv.DictWriter(text, sorted(set().union(*self.rows)), lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write_text(self.path, text.getvalue())
        self.written_rows, self.written_at = len(self.rows), time.monotonic()
