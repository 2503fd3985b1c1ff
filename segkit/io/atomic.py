"""Writing of files and folders that are complete or absent."""

import errno
import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from segkit.errors import VolumeError

PARTIAL = ".partial-"
"""Prefix of names of unfinished files; readers of folders skip names that begin with a dot."""
ABANDONED = 3600.0
"""Seconds without a change after which an unfinished file belongs to a process that was killed."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError from the block if the error does not name a file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # NumPy raises such errors
            raise OSError(errno.EIO, str(error), str(path)) from None
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which is renamed to `path` when the block ends.

    Both paths have the same suffixes, because writers choose the format by suffix, and the same
    folder, so that renaming is atomic. If the block raises, the temporary file is removed.

    Example:
        with whole(Path("table.csv")) as partial:
            partial.write_text("a,b")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        with naming(path):
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, which is renamed to `path` when the block ends.

    An existing folder is replaced only if `overwrite` is true. If the block raises, the temporary
    folder is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    partial.mkdir()
    try:
        yield partial
        if overwrite and path.is_dir():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished files that killed processes left in a folder."""
    for partial in folder.glob(f"{PARTIAL}*"):
        try:
            touched = [path.stat().st_mtime for path in (partial, *partial.rglob("*"))]
        except FileNotFoundError:  # another process is just renaming it
            continue
        if time.time() - max(touched) < ABANDONED:
            continue
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or not at all.

    Bytes of file names that are not UTF-8 are escaped.
    """
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON file, complete or not at all; NaN becomes null."""
    write_text(path, json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    """Indented JSON text with a newline at its end; NaN becomes null."""
    return json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """The value as plain dicts and lists, with None in place of each NaN."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def mark_unfinished(first: Path, others: Iterable[Path]) -> None:
    """Write a note beside `first` that these files are unfinished, until `mark_finished`.

    The files belong together. If the run is stopped, the note tells the next run which of them it
    may overwrite.
    """
    write_json(_note(first), {"unfinished": [str(path.absolute()) for path in (first, *others)]})


def mark_finished(first: Path) -> None:
    """Remove the note: all files are complete."""
    _note(first).unlink(missing_ok=True)


def unfinished_files(first: Path) -> frozenset[Path]:
    """The files that the note beside `first` lists as unfinished; empty if there is no note."""
    try:
        content = json.loads(_note(first).read_text(encoding="utf-8"))
        return frozenset(Path(name) for name in content["unfinished"])
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def refuse_existing(paths: Iterable[Path], *, overwrite: bool, left: Collection[Path] = ()) -> None:
    """Raise VolumeError for the first path that exists, unless it may be overwritten.

    Args:
        paths: the files that will be written.
        overwrite: whether all of them may be overwritten.
        left: files of a stopped run, which may always be overwritten.
    """
    for path in paths:
        if path.exists() and not overwrite and path.absolute() not in left:
            raise VolumeError(f"{path}: exists already; pass --overwrite or choose another --out")


def _note(first: Path) -> Path:
    return first.with_name(f".unfinished-{first.name}.json")
