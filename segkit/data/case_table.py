"""What a table says of each case, and the cases that are kept for a last test."""

import logging
from collections.abc import Mapping
from pathlib import Path

from segkit.config.dataset_files import ColumnConfig, DatasetConfig
from segkit.data.file_patterns import ID
from segkit.data.tables import read_csv
from segkit.errors import DatasetError, first_few

logger = logging.getLogger(__name__)

YES_WORDS = frozenset({"test", "yes", "true", "1"})
"""Of cases for the test, in a column."""
NAMES_SHOWN = 5


def table_of(data: DatasetConfig) -> Path | None:
    """The file of the table of cases, if a config names one."""
    table = data.case_table or (data.files.table if data.files else None)
    return None if table is None else data.folder / table


def column_of(data: DatasetConfig, column: str, names: list[str], setting: str) -> dict[str, str]:
    """What a column of the table of cases says of each case that has a row, by its name.

    Args:
        data: names the table.
        column: of the table.
        names: of the dataset's cases.
        setting: that asks for the column, for errors.

    Raises:
        DatasetError: there is no table or no such column, or a row is of no case or not the only
            one of its case.
    """
    path = table_of(data)
    if path is None:
        raise DatasetError(
            f"{setting} names the column {column}, and there is no table; give data.case_table"
        )
    rows, columns = read_csv(path)
    for needed in (ID, column):
        if needed not in columns:
            raise DatasetError(
                f"{path}: expected a column {needed}, found {', '.join(columns) or 'none'}"
            )
    found: dict[str, str] = {}
    for row in rows:
        if row[ID] in found:
            raise DatasetError(f"{path}: case {row[ID]} has several rows; give each case one")
        found[row[ID]] = row[column].strip()
    if unknown := sorted(found.keys() - set(names)):
        raise DatasetError(
            f"{path}: has rows of {first_few(unknown, NAMES_SHOWN)}, no cases of {data.folder}; "
            f"correct the column {ID} or remove them"
        )
    if lacking := [name for name in names if name not in found]:
        logger.warning(
            "%s: has no row of %s; column %s says nothing of them",
            path,
            first_few(lacking, NAMES_SHOWN),
            column,
        )
    return found


def kept_for_test(data: DatasetConfig, names: list[str]) -> frozenset[str]:
    """Names of the cases that are kept for a last test. Raises DatasetError."""
    if data.test is None:
        return frozenset()
    if isinstance(data.test, ColumnConfig):
        column: Mapping[str, str] = column_of(data, data.test.column, names, "data.test")
        kept = frozenset(name for name, value in column.items() if value.lower() in YES_WORDS)
        if not kept:
            raise DatasetError(
                f"{table_of(data)}: column {data.test.column} marks no case for the test by "
                f"{', '.join(sorted(YES_WORDS))}; correct it or leave data.test out"
            )
    else:
        kept = frozenset(data.test)
        if unknown := sorted(kept - set(names)):
            raise DatasetError(
                f"data.test names {first_few(unknown, NAMES_SHOWN)}, no case of {data.folder}"
            )
    if len(kept) == len(names):
        raise DatasetError(f"{data.folder}: data.test keeps every case; none is left to train on")
    return kept
