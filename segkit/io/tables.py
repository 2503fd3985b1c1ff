"""Tables in text files: rows by the names of their columns."""

import csv
import io
from pathlib import Path

from segkit.errors import DatasetError
from segkit.io.safe_text import read_text


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
