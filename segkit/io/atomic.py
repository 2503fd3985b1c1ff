"""Files appear whole or not at all."""

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
"""How names begin of what is being written; readers of folders pass over names with a dot."""
ABANDONED = 3600.0
"""Seconds after which what nobody went on writing was left behind by a process that was killed."""


def is_file_name(name: str) -> bool:
    """Whether files can be named after a case or a label: no path, and nothing but printable.

    Example:
        >>> [is_file_name(name) for name in ("case 1", "..", "a/b", "")]
        [True, False, False, False]
    """
    return name not in ("", ".", "..") and name.isprintable() and not set("/\\") & set(name)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError that is raised while a file is written say which, where it does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # as NumPy raises it
            raise OSError(errno.EIO, str(error), str(path)) from None
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the name `path` if the block ends well.

    The two share their suffixes, which readers and writers go by, and their folder, so that the
    renaming is atomic. If the block raises, what was written is removed.
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
    """A folder beside `path` to fill; it takes the name `path` if the block ends well.

    It replaces what is there where that may be overwritten. If the block raises, what was written
    is removed.
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


def sweep(folder: Path) -> None:
    """Remove what processes that were killed left half-written in a folder, if there is any."""
    for partial in folder.glob(f"{PARTIAL}*"):
        try:
            touched = [path.stat().st_mtime for path in (partial, *partial.rglob("*"))]
        except FileNotFoundError:  # it is being finished now
            continue
        if time.time() - max(touched) < ABANDONED:
            continue
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole, indented for a reader; not-a-number becomes null."""
    write_text(path, json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    """JSON, indented for a reader and ended by a newline; not-a-number becomes null."""
    return json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """The same as plain dicts and lists; not-a-number becomes None."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def begin(first: Path, others: Iterable[Path]) -> None:
    """Leave a note beside the first of some files that belong together, until `finish`.

    By it the next run knows what a run that was stopped has left of them, and makes it anew.
    """
    write_json(_note(first), {"unfinished": [str(path.absolute()) for path in (first, *others)]})


def finish(first: Path) -> None:
    """Take the note away: all files are there."""
    _note(first).unlink(missing_ok=True)


def left_behind(first: Path) -> frozenset[Path]:
    """Files that a run began and did not finish, by the note beside the first; else none."""
    try:
        content = json.loads(_note(first).read_text(encoding="utf-8"))
        return frozenset(Path(name) for name in content["unfinished"])
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def refuse_existing(paths: Iterable[Path], *, overwrite: bool, left: Collection[Path] = ()) -> None:
    """Raise VolumeError for the first that is there already, unless it may be overwritten.

    So may those that were `left` by a run that was stopped.
    """
    for path in paths:
        if path.exists() and not overwrite and path.absolute() not in left:
            raise VolumeError(f"{path}: exists already; pass --overwrite or name another --out")


def _note(first: Path) -> Path:
    return first.with_name(f".unfinished-{first.name}.json")
