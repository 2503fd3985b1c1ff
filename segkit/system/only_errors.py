"""Hide log messages below errors from a part of a program, for a while."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_errors(name: str | None = None) -> Iterator[None]:
    """Inside `with`, a logger and those below it let only errors through.

    Args:
        name: name of the logger; the root logger by default.
    """
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
