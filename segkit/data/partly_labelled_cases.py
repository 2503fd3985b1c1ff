"""The classes that are labelled in each case, from a table or the config."""

import re
from collections.abc import Mapping, Sequence

from segkit.config.dataset_files import ColumnConfig, DatasetConfig
from segkit.data.case_table import NAMES_SHOWN, column_of, table_of
from segkit.errors import DatasetError, first_few

ALL = "all"


def unlabelled_of(
    data: DatasetConfig, names: Sequence[str], classes: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """The classes or regions that nobody labelled in a case, by the case's name.

    Args:
        data: settings whose `labelled` lists the labelled classes; cases that it does not name are
            labelled completely.
        names: names of the dataset's cases.
        classes: names of the classes without the background, or of the regions.

    Returns:
        Only cases that lack labels of some classes.

    Raises:
        DatasetError: the name of a case or a class is unknown, or a case has no labels.
    """
    if data.labelled is None:
        return {}
    if isinstance(data.labelled, ColumnConfig):
        source = f"{table_of(data)}: column {data.labelled.column}"
        column = column_of(data, data.labelled.column, list(names), "data.labelled")
        by_case: Mapping[str, Sequence[str]] = {
            name: _listed(value, classes) for name, value in column.items()
        }
    else:
        source, by_case = "data.labelled", data.labelled
        if unknown := sorted(by_case.keys() - set(names)):
            raise DatasetError(
                f"{source}: expected only cases of {data.folder}, found "
                f"{first_few(unknown, NAMES_SHOWN)}; correct the name"
            )
    found: dict[str, tuple[str, ...]] = {}
    for name, labelled in by_case.items():
        if unknown := [each for each in labelled if each not in (*classes, ALL)]:
            raise DatasetError(
                f"{source}: expected for {name} some of the classes {', '.join(classes)}, or "
                f"{ALL}, found {unknown[0]!r}; correct the name"
            )
        if not labelled:
            raise DatasetError(
                f"{source}: expected for {name} the classes that are labelled in it, found none; "
                f"list them, or write {ALL}"
            )
        lacking = tuple(each for each in classes if each not in labelled)
        if lacking and ALL not in labelled:
            found[name] = lacking
    return found


def _listed(value: str, classes: Sequence[str]) -> list[str]:
    """The names in a cell of a table, separated by semicolons, commas or bars."""
    if value in classes:
        return [value]
    return [name.strip() for name in re.split(r"[;,|]", value) if name.strip()]
