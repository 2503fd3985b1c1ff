"""Groups of cases that stay together in a split, and strata that all parts share evenly."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from segkit.config.data import PatternConfig, SplitDatasetConfig
from segkit.config.dataset_files import ColumnConfig, DatasetConfig
from segkit.data.case_table import NAMES_SHOWN, column_of, columns_in_use, table_of, unused_columns
from segkit.data.dataset import CaseFiles, Dataset, read_case
from segkit.data.split_settings import SPLITS_FILE, unused_split_settings
from segkit.errors import DatasetError, counted, first_few

SUBJECT = re.compile(r"sub-([A-Za-z0-9]+)")
"""The subject of BIDS in a name or a path."""
ALIKE = r"^(.+?)[ _-](?:ses|visit|time|tp|scan|v|t)?-?[A-Za-z]?[0-9]{0,8}$"
"""Matches names that end with a separator and something like the number of a visit."""
MOST_VISITS = 20


def groups_of(dataset: Dataset, data: SplitDatasetConfig) -> dict[str, list[int]] | None:
    """Numbers of the cases in each group, by the group's name; None without `data.group_by`.

    Raises:
        DatasetError: a case has no group.
    """
    if data.group_by is None:
        return None
    names = [case.name for case in dataset.cases]
    found, wanted = _group_of_each(dataset, data, data.group_by)
    groups: dict[str, list[int]] = defaultdict(list)
    if lacking := [name for name in names if name not in found]:
        raise DatasetError(
            f"{wanted} gives no group for {first_few(lacking, NAMES_SHOWN)}; give each case one "
            "group"
        )
    for number, name in enumerate(names):
        groups[found[name]].append(number)
    return dict(groups)


def told_of_split(dataset: Dataset, data: DatasetConfig) -> list[str]:
    """Hints on a split: groups that the test divides, settings that others turn off, columns that
    no setting uses, and a grouping that the names of cases suggest."""
    own = data if isinstance(data, SplitDatasetConfig) else None
    found = [] if own is None else [*groups_in_test(dataset, own), *unused_split_settings(own)]
    has_folds = own is not None and (own.folder / SPLITS_FILE).is_file()
    advice = None if has_folds else grouping_advice(dataset, own)
    return [*found, *_unused_table(data), *([advice] if advice else [])]


def _unused_table(data: DatasetConfig) -> list[str]:
    """A sentence for each useful column that no setting uses, or else for an unused table."""
    columns = unused_columns(data)
    if columns or data.case_table is None or columns_in_use(data):
        return columns
    return [f"{table_of(data)} is not used, because no setting names one of its columns"]


def groups_in_test(dataset: Dataset, data: SplitDatasetConfig) -> list[str]:
    """A sentence on groups of which the test has only a part of the cases, if there are any."""
    if data.group_by is None or not dataset.test:
        return []
    found, _ = _group_of_each(dataset, data, data.group_by)
    kept = {found[case.name] for case in dataset.test if case.name in found}
    both = sorted({found[case.name] for case in dataset.cases if case.name in found} & kept)
    return [
        f"data.test keeps some cases of these groups of data.group_by and leaves others for "
        f"training: {first_few(both, NAMES_SHOWN)}; keep all or none of a group"
    ] * bool(both)


def _group_of_each(
    dataset: Dataset,
    data: SplitDatasetConfig,
    group_by: PatternConfig | ColumnConfig | Literal["subject"],
) -> tuple[dict[str, str], str]:
    """The group of each case that has one, also of test cases, and the setting for messages."""
    found: dict[str, str | None]
    if isinstance(group_by, PatternConfig):
        wanted = f"data.group_by: pattern {group_by.pattern!r}"
        matches = {name: re.search(group_by.pattern, name) for name in dataset.names_with_test}
        found = {name: match and match[1] for name, match in matches.items()}
    elif group_by == "subject":
        wanted = "data.group_by: subject (sub-… in a name or a path)"
        found = {case.name: subject_of(case, dataset) for case in (*dataset.cases, *dataset.test)}
    else:
        wanted = f"{table_of(data)}: column {group_by.column}"
        found = {**column_of(data, group_by.column, dataset.names_with_test, "data.group_by")}
    return {name: group for name, group in found.items() if group}, wanted


def subject_of(case: CaseFiles, dataset: Dataset) -> str | None:
    """The BIDS subject in a case's name, or else in the path of its label."""
    inside = case.label
    if case.label.is_relative_to(dataset.folder):
        inside = case.label.relative_to(dataset.folder)
    match = SUBJECT.search(case.name) or SUBJECT.search(inside.as_posix())
    return match[1] if match else None


def strata_of(dataset: Dataset, data: SplitDatasetConfig) -> np.ndarray:
    """Whether each case belongs to each stratum: an array (case, stratum) of 0 and 1.

    Raises:
        DatasetError: a column does not fit the dataset, or a label cannot be read.
    """
    if data.stratify_by is None:
        return np.zeros((len(dataset.cases), 0))
    if data.stratify_by == "classes":
        members = list(dataset.labelling.members.values())
        rows = []
        for case in dataset.cases:
            present = set(np.unique(read_case(case, dataset)[1].data).tolist())
            rows.append([bool(present & set(numbers)) for numbers in members])
        return np.array(rows, float)
    column = data.stratify_by.column
    found = column_of(data, column, dataset.names_with_test, "data.stratify_by")
    values = [found.get(case.name, "") for case in dataset.cases]
    kinds = sorted(set(values))
    return np.array([[value == kind for kind in kinds] for value in values], float)


def likely_grouping(dataset: Dataset) -> str | None:
    """A value of `data.group_by`, if names look as if patients had several cases; else None."""
    subjects = [subject_of(case, dataset) for case in dataset.cases]
    if all(subjects):
        several = len(set(subjects)) < len(subjects)
        return "subject" if several and len(set(subjects)) > 1 else None
    match = [re.fullmatch(ALIKE, case.name) for case in dataset.cases]
    stems = [found[1] for found in match if found]
    counts = Counter(stems)
    if len(stems) < len(match) or len(counts) < 2 or len(counts) == len(stems):
        return None
    if max(counts.values()) > MOST_VISITS or 2 * len(counts) > len(stems) + len(counts) // 2:
        return None
    return f"{{pattern: '{ALIKE}'}}"


def grouping_advice(dataset: Dataset, data: SplitDatasetConfig | None) -> str | None:
    """Advice to group cases whose names look alike; None if there are none or a config does it."""
    if data is not None and (data.group_by is not None or data.splits is not None):
        return None
    if data is not None and any("data.group_by=" in told for told in unused_columns(data)):
        return None  # a column of patients is proposed already; it is more certain than names
    setting = likely_grouping(dataset)
    if setting is None:
        return None
    return (
        f"Names look as if patients had several cases ({dataset.cases[0].name}, "
        f"{dataset.cases[1].name}, …): set data.group_by={setting} to keep the cases of a patient "
        f"together, so that no patient is both trained on and held out."
    )


def divided_groups(
    groups: Mapping[str, Sequence[int]], names: Sequence[str], *parts: Sequence[str]
) -> str:
    """The number and names of groups with cases in several parts, as text; empty if none."""
    inside = [set(part) for part in parts]
    found = [
        f"{group} ({', '.join(names[number] for number in numbers[:3])})"
        for group, numbers in groups.items()
        if sum(any(names[number] in part for number in numbers) for part in inside) > 1
    ]
    return f"{counted(len(found), 'group')}, {first_few(found, 3)}" if found else ""
