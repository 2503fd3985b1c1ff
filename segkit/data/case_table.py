"""The table of cases, and the cases that are kept for a last test."""

import logging
from collections.abc import Mapping
from pathlib import Path

from segkit.config.dataset_files import ColumnConfig, DatasetConfig
from segkit.data.file_patterns import ID
from segkit.data.tables import read_csv
from segkit.errors import DatasetError, first_few

logger = logging.getLogger(__name__)

YES_WORDS = frozenset({"test", "yes", "true", "1"})
"""Values that mark test cases in a column."""
NAMES_SHOWN = 5


def table_of(data: DatasetConfig) -> Path | None:
    """The file of the table of cases, if a config names one."""
    table = data.case_table or (data.files.table if data.files else None)
    return None if table is None else data.folder / table


def column_of(data: DatasetConfig, column: str, names: list[str], setting: str) -> dict[str, str]:
    """The values in a column of the table of cases, by the name of the case.

    Cases without a row are left out, with a warning.

    Args:
        data: settings of the dataset, which name the table.
        column: name of the column.
        names: names of the dataset's cases.
        setting: the setting that names the column, for messages.

    Raises:
        DatasetError: there is no table or no such column, a row names an unknown case, or a case
            has several rows.
    """
    path = table_of(data)
    if path is None:
        raise DatasetError(
            f"{setting} names the column {column}, but there is no table; set data.case_table"
        )
    rows, columns = read_csv(path)
    for needed in (ID, column):
        if needed not in columns:
            raise DatasetError(
                f"{path}: expected a column {needed}, found {', '.join(columns) or 'none'}; add it "
                f"or correct the name"
            )
    found: dict[str, str] = {}
    for row in rows:
        if row[ID] in found:
            raise DatasetError(f"{path}: case {row[ID]} has several rows; give each case one")
        found[row[ID]] = row[column].strip()
    if unknown := sorted(found.keys() - set(names)):
        raise DatasetError(
            f"{path}: expected only cases of {data.folder}, found rows for "
            f"{first_few(unknown, NAMES_SHOWN)}; correct the column {ID} or remove the rows"
        )
    if lacking := [name for name in names if name not in found]:
        logger.warning(
            "%s: no row for %s; column %s has no value for them",
            path,
            first_few(lacking, NAMES_SHOWN),
            column,
        )
    return found


def kept_for_test(data: DatasetConfig, names: list[str]) -> frozenset[str]:
    """Names of the cases that are kept for a last test.

    Raises:
        DatasetError: `data.test` names unknown cases, no case, or all cases.
    """
    if data.test is None:
        return frozenset()
    if isinstance(data.test, ColumnConfig):
        column: Mapping[str, str] = column_of(data, data.test.column, names, "data.test")
        kept = frozenset(name for name, value in column.items() if value.lower() in YES_WORDS)
        if not kept:
            raise DatasetError(
                f"{table_of(data)}: expected a test case, marked with "
                f"{', '.join(sorted(YES_WORDS))} in the column {data.test.column}, found none; "
                "correct the column or remove data.test"
            )
    else:
        kept = frozenset(data.test)
        if unknown := sorted(kept - set(names)):
            raise DatasetError(
                f"data.test: expected only cases of {data.folder}, found "
                f"{first_few(unknown, NAMES_SHOWN)}; correct the name"
            )
    if len(kept) == len(names):
        raise DatasetError(
            f"{data.folder}: data.test contains every case, so no case is left to train on; remove "
            "some cases from it"
        )
    return kept
