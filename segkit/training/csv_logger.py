"""metrics.csv of a run, whole at every moment: written anew now and then, and with a checkpoint."""

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
    """Rows of numbers by step, in a table that opens anywhere.

    Args:
        path: of the table.
        rows: those that are there already.
    """

    def __init__(self, path: Path, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self.path = path
        self.rows = [dict(row) for row in rows]
        self.written_rows, self.written_at = 0, float("-inf")

    @property
    def name(self) -> str:
        """It has none."""
        return ""

    @property
    def version(self) -> str:
        """It has none."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row more."""
        self.rows.append({**metrics, "step": len(self.rows) if step is None else step})

    def save(self) -> None:
        """Write the table, as Lightning asks after each row, unless that was done just now."""
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
