"""The table of cases, and the cases that are kept for a last test."""

import logging
from collections.abc import Mapping
from pathlib import Path

from segkit.config.dataset_files import ColumnConfig, DatasetConfig
from segkit.data.file_patterns import ID, LABEL
from segkit.errors import DatasetError, first_few
from segkit.io.tables import read_csv

logger = logging.getLogger(__name__)

YES_WORDS = frozenset({"test", "yes", "true", "1"})
"""Values that mark test cases in a column."""
NAMES_SHOWN = 5
OF_PATIENTS = frozenset(
    [
        "patient",
        "patientid",
        "subject",
        "subjectid",
        "participant",
        "participantid",
        "person",
        "group",
    ]
)
OF_FOLDS = frozenset(["fold", "folds", "foldid", "cvfold"])
OF_PARTS = frozenset(["split", "set", "subset", "partition", "part", "phase"])
OF_TEST = frozenset(["test", "istest", "testset", "holdout"])
OF_LABELLED = frozenset(["labelled", "labeled"])
"""Names of columns, without capitals and separators, whose values a setting can use."""
HELD_OUT_WORDS = frozenset(["val", "valid", "validation", "dev"])


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


def columns_in_use(data: DatasetConfig) -> set[str]:
    """Names of the columns that settings such as `data.test={column: NAME}` name."""
    settings = [getattr(data, name) for name in type(data).model_fields]
    return {setting.column for setting in settings if isinstance(setting, ColumnConfig)}


def unused_columns(data: DatasetConfig) -> list[str]:
    """A sentence for each column of the table of cases that no setting uses, but one could.

    They are columns with the names of patients, folds, parts of a split or labelled classes.

    Raises:
        DatasetError: the table cannot be read.
    """
    path = table_of(data)
    if path is None or not path.is_file():
        return []
    used = columns_in_use(data) | {ID}
    if data.files is not None and data.files.table is not None:
        used |= {data.files.label or LABEL, *data.files.images.values()}
    rows, columns = read_csv(path)
    sentences = []
    for column in columns:
        values = {row[ID]: row[column].strip() for row in rows} if ID in columns else {}
        if column in used or not any(values.values()):
            continue
        if advice := _use_of(column, values, data):
            sentences.append(f"{path}: column {column} is not used; {advice}")
    return sentences


def _use_of(column: str, values: Mapping[str, str], data: DatasetConfig) -> str | None:
    """The setting that can use a column of this name; None for other names.

    None also if a setting of the same purpose is given already.

    Args:
        column: name of the column.
        values: its values.
        data: settings of the dataset.
    """
    word = "".join(character for character in column.lower() if character.isalnum())
    setting = f"{{column: {column}}}"
    splits = getattr(data, "splits", None)
    filled = [value for value in values.values() if value]
    numbered = all(value.isdecimal() for value in filled)
    if word in OF_PATIENTS:
        several = len(set(filled)) < len(filled)
        if several and splits is None and getattr(data, "group_by", None) is None:
            return f"data.group_by={setting} keeps the cases of each {column} together"
    elif word in OF_FOLDS or (word in OF_PARTS and numbered):
        return None if splits else f"data.splits={setting} uses these folds"
    elif word in OF_PARTS or word in OF_TEST:
        return _use_of_parts(setting, values, data)
    elif word in OF_LABELLED and data.labelled is None:
        return f"data.labelled={setting} says which classes each case has labels of"
    return None


def _use_of_parts(setting: str, values: Mapping[str, str], data: DatasetConfig) -> str | None:
    """The setting that can use a column that marks test cases and held-out cases."""
    uses = []
    if data.test is None and any(value.lower() in YES_WORDS for value in values.values()):
        uses.append(f"data.test={setting} keeps its test cases for a last test")
    held_out = [name for name, value in values.items() if value.lower() in HELD_OUT_WORDS]
    given = isinstance(getattr(data, "validation", None), list) or getattr(data, "splits", None)
    if held_out and not given:
        few = len(held_out) <= NAMES_SHOWN
        names = f"=[{', '.join(held_out)}]" if few else f", a list of {len(held_out)} names,"
        uses.append(f"data.validation{names} holds out its validation cases")
    return ", and ".join(uses) or None
