"""Which classes each case has labels of, by a table or by the config."""

import re
from collections.abc import Mapping, Sequence

from segkit.config.dataset_files import ColumnConfig, DatasetConfig
from segkit.data.case_table import NAMES_SHOWN, column_of, table_of
from segkit.errors import DatasetError, first_few

ALL = "all"


def unlabelled_of(
    data: DatasetConfig, names: Sequence[str], classes: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """For each case that lacks labels of some classes or regions, those that it lacks.

    Args:
        data: says by `labelled` what is labelled; a case that it does not name has all labels.
        names: of the dataset's cases.
        classes: names of its classes but the background, or of its regions.

    Raises:
        DatasetError: a case or a class has another name, or a case has no labels at all.
    """
    if data.labelled is None:
        return {}
    if isinstance(data.labelled, ColumnConfig):
        source = f"{table_of(data)}: column {data.labelled.column}"
        column = column_of(data, data.labelled.column, list(names), "data.labelled")
        told: Mapping[str, Sequence[str]] = {
            name: _listed(value, classes) for name, value in column.items()
        }
    else:
        source, told = "data.labelled", data.labelled
        if unknown := sorted(told.keys() - set(names)):
            raise DatasetError(
                f"{source}: names {first_few(unknown, NAMES_SHOWN)}, no case of {data.folder}"
            )
    found: dict[str, tuple[str, ...]] = {}
    for name, labelled in told.items():
        if unknown := [each for each in labelled if each not in (*classes, ALL)]:
            raise DatasetError(
                f"{source}: says {unknown[0]!r} of {name}, which is none of the classes "
                f"{', '.join(classes)}; name some of these, or {ALL}"
            )
        if not labelled:
            raise DatasetError(
                f"{source}: says nothing of {name}; name the classes that it has labels of, "
                f"or {ALL}"
            )
        lacking = tuple(each for each in classes if each not in labelled)
        if lacking and ALL not in labelled:
            found[name] = lacking
    return found


def _listed(value: str, classes: Sequence[str]) -> list[str]:
    """Names in a cell, apart by a semicolon, a comma or a bar."""
    if value in classes:
        return [value]
    return [name.strip() for name in re.split(r"[;,|]", value) if name.strip()]
