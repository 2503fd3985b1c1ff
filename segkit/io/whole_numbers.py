"""Labels as whole numbers: rounding errors of label files are removed, and told."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from segkit.errors import counted

ROUNDING, ROUNDING_OF_SIZE, LARGEST_ROUNDING = 1e-3, 5e-7, 0.1
"""Rounding errors that labels may have: always, as a fraction of the number, and at most."""
logger = logging.getLogger(__name__)

_ROUNDED: ContextVar[dict[str, float] | None] = ContextVar("rounded", default=None)


@contextmanager
def noting_rounded_labels() -> Iterator[dict[str, float]]:
    """Note the label files whose values are rounded to whole numbers in this block.

    Yields:
        The largest difference from a whole number, by the path of each such file.
    """
    noted: dict[str, float] = {}
    before = _ROUNDED.set(noted)
    try:
        yield noted
    finally:
        _ROUNDED.reset(before)


def whole_numbers(values: ndarray, path: str | Path) -> ndarray:
    """The values of a label file, with rounding errors removed.

    A file that scales its values, or a program that saves them again, may turn 3 into 2.9999999993.
    Values within 0.001 of a whole number are rounded to it; large numbers may differ by 5e-7 of
    their size, a few last digits of single precision. Other values are not changed, and the caller
    refuses them.

    Args:
        values: the values of the file.
        path: the file, for the log and for `noting_rounded_labels`.
    """
    if values.dtype.kind != "f":
        return values
    whole, farthest = values, 0.0
    for plane in np.ndindex(values.shape[2:]):
        here = (..., *plane)
        with np.errstate(invalid="ignore"):
            nearest = np.rint(values[here])
            off = np.abs(values[here] - nearest)
            near = off <= np.clip(ROUNDING_OF_SIZE * np.abs(nearest), ROUNDING, LARGEST_ROUNDING)
        if not (apart := float(off.max(where=near, initial=0))):
            continue
        if whole is values:
            whole = values.copy(order="F")
        whole[here] = np.where(near, nearest, values[here])
        farthest = max(farthest, apart)
    if farthest:
        logger.info("%s: rounded labels that were up to %.2g off whole numbers", path, farthest)
        if (noted := _ROUNDED.get()) is not None:
            noted[str(path)] = farthest
    return whole


def rounded_in_words(rounded: Mapping[str, float]) -> str | None:
    """A sentence about label files whose values were rounded; None if there are none.

    Args:
        rounded: the largest difference from a whole number, by file.
    """
    if not rounded:
        return None
    worst = max(rounded, key=lambda path: rounded[path])
    return (
        f"rounded the labels of {counted(len(rounded), 'file')} to whole numbers; the largest "
        f"difference was {rounded[worst]:.2g}, in {worst}"
    )


def in_full(value: Any) -> str:
    """A number as text with all its digits; whole numbers have no decimal point."""
    return str(value).removesuffix(".0")
