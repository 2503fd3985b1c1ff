"""Results of reading a file, kept as long as the file stays as it is."""

from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import TypeVar

FromFile = TypeVar("FromFile")


def kept_while_unchanged(
    most: int,
) -> Callable[[Callable[[Path], FromFile]], Callable[[Path], FromFile]]:
    """A decorator: a file is read again only if its size or its time of change differs.

    Args:
        most: largest number of results that are kept.
    """

    def decorate(read: Callable[[Path], FromFile]) -> Callable[[Path], FromFile]:
        @lru_cache(maxsize=most)
        def kept(path: Path, size: int, changed: int) -> FromFile:
            return read(path)

        @wraps(read)
        def read_once(path: Path) -> FromFile:
            state = path.stat()
            return kept(path, state.st_size, state.st_mtime_ns)

        return read_once

    return decorate
