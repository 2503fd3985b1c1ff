"""The files of each case in a folder without a dataset.json, found by patterns or in a table."""

import csv
import io
import logging
import re
from collections import Counter
from pathlib import Path

from segkit.config.dataset_files import FilesConfig
from segkit.config.labels import Labelling
from segkit.data.dataset_json import DatasetJson, NamedFiles, labelling_of
from segkit.errors import DatasetError, Problems, first_few, printable
from segkit.io.safe_text import read_text
from segkit.io.volume import suffix_of

logger = logging.getLogger(__name__)

ID, IMAGE, LABEL = "id", "image", "label"
NAME = re.compile(r"[^./\\\s][^/\\\n]*")
WILDCARD = re.compile(r"\*\*/|\*|\?")
MATCHES = {"**/": "(?:.*/)?", "*": "([^/]*)", "?": "([^/])"}


def list_files(folder: Path, files: FilesConfig, given: Labelling | None = None) -> DatasetJson:
    """Channels, labels and cases of a folder, by the patterns or the table of a config.

    Args:
        folder: the folder of the dataset.
        files: the patterns or the table.
        given: classes and numbers, instead of those in `files`.

    Raises:
        DatasetError: files are missing, or patterns, table or labels are wrong.
        VolumeError: a file is not a volume.
    """
    if given is None and not files.labels:
        raise DatasetError("data.files: expected names of labels, found none; set data.labels")
    labelling = given or labelling_of(
        "data.files", files.labels, files.regions_class_order, files.codes
    )
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such dataset folder; set data.folder")
    channels, found = _in_table(folder, files) if files.table else _by_patterns(folder, files)
    return DatasetJson(channels, labelling, tuple(found), dict(files.codes))


def _by_patterns(folder: Path, files: FilesConfig) -> tuple[tuple[str, ...], list[NamedFiles]]:
    """All cases that have a label. Images without a label are left out, with a warning."""
    labels = matched(folder, files.label)
    images = [matched(folder, pattern) for pattern in files.images.values()]
    for pattern, found in ((files.label, labels), *zip(files.images.values(), images, strict=True)):
        if not found:
            raise DatasetError(f"{folder}: no file matches {pattern}; correct data.files")
    problems = Problems()
    for pattern, found in zip(files.images.values(), images, strict=True):
        for name in sorted(labels.keys() - found.keys()):
            with problems.noted():
                raise DatasetError(
                    f"{labels[name]}: is the label of case {name!r}, but {pattern} matches no "
                    f"image of this case (it matches {_some(found)}); the wildcards of both "
                    f"patterns must match the same texts"
                )
    problems.refuse()
    if bare := sorted(set[str]().union(*images) - labels.keys()):
        left_out = printable(f"{folder}: left out because they have no label: {first_few(bare)}")
        logger.warning("%s", left_out)
    cases = [(name, tuple(found[name] for found in images), labels[name]) for name in labels]
    return tuple(files.images), cases


def matched(folder: Path, pattern: str) -> dict[str, Path]:
    """The files in a folder that match a pattern, by the texts that its wildcards match.

        sub-*/ses-*/sub-*_T1w.nii.gz  on  sub-01/ses-b/sub-01_T1w.nii.gz  ──▶  "01_b"

    Equal texts are taken once. Hidden files are left out.

    Raises:
        DatasetError: two files would have the same name.
        VolumeError: a file is not a volume.
    """
    expression = re.compile(_expression(pattern))
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(pattern.replace("[", "[[]"))):
        inside = path.relative_to(folder)
        match = expression.fullmatch(inside.as_posix())
        if match is None or not path.is_file() or any(part[0] == "." for part in inside.parts):
            continue
        name = "_".join(dict.fromkeys(match.groups()))
        if name in found:
            raise DatasetError(
                f"{folder}: {pattern} matches {found[name].relative_to(folder)} and {inside}, both "
                f"as case {name!r}; change it to match only one file of each case"
            )
        suffix_of(path)  # raises VolumeError if this is not a volume
        found[name] = path
    return found


def _expression(pattern: str) -> str:
    parts, end = [], 0
    for wildcard in WILDCARD.finditer(pattern):
        parts += [re.escape(pattern[end : wildcard.start()]), MATCHES[wildcard[0]]]
        end = wildcard.end()
    return "".join([*parts, re.escape(pattern[end:])])


def _in_table(folder: Path, files: FilesConfig) -> tuple[tuple[str, ...], list[NamedFiles]]:
    """The case in each row of a CSV file, whose paths are relative to the folder."""
    assert files.table is not None
    path = folder / files.table
    rows, columns = read_csv(path)
    label = files.label or LABEL
    images = files.images or {
        column: column for column in columns if column.strip() and column not in (ID, label)
    }
    for column in (ID, label, *(images.values() or [IMAGE])):
        if column not in columns:
            raise DatasetError(
                f"{path}: expected a column {column}, found {', '.join(columns) or 'none'}; add it "
                f"or correct the name"
            )
    if not rows:
        raise DatasetError(f"{path}: expected a row for each case, found none; add rows")
    problems = Problems()
    for name, count in Counter(row[ID] for row in rows).items():
        with problems.noted():
            if count > 1:
                raise DatasetError(f"{path}: case {name} has several rows; give each case one")
    cases = []
    for number, row in enumerate(rows, start=2):
        with problems.noted():
            if not NAME.fullmatch(row[ID]):
                raise DatasetError(
                    f"{path}: row {number} has the id {row[ID]!r}, which cannot be the name of a "
                    f"file; change it"
                )
        named = [folder / row[column] for column in (*images.values(), label)]
        for column, file in zip((*images.values(), label), named, strict=True):
            with problems.noted():
                if not row[column] or not file.is_file():
                    raise DatasetError(
                        f"{path}: row {number} has {row[column] or 'nothing'} in column {column}, "
                        f"which is not a file in {folder}; correct it, or set data.files.images if "
                        f"{column} is not a column of files"
                    )
                suffix_of(file)
        cases.append((row[ID], tuple(named[:-1]), named[-1]))
    problems.refuse()
    return tuple(images), cases


def read_csv(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of a table, by column, and its columns.

    The separator is a comma, a semicolon or a tab.

    Raises:
        DatasetError: the file cannot be read.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read as CSV: {error}; check the file") from None
    between = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=between, restval="", restkey=""
    )
    try:
        rows = [{key: value for key, value in row.items() if key} for row in reader]
    except csv.Error as error:
        raise DatasetError(f"{path}: cannot be read as CSV: {error}; check the file") from None
    return rows, [column for column in reader.fieldnames or []]


def _some(found: dict[str, Path]) -> str:
    names = [repr(name) for name in sorted(found)]
    return ", ".join([*names[:3], *["…"] * (len(names) > 3)])
