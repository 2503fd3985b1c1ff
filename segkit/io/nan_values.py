"""Values of images that are NaN, infinite or too large.

Images that are NaN outside a mask are common in skull-stripped scans.
"""

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

FARTHEST_VALUE = 1e30
"""Largest absolute value of an image; larger ones would overflow sums in single precision."""


def nan_as_zero(
    values: Shaped[ndarray, "x y z *channel"],
) -> Shaped[ndarray, "x y z *channel"]:
    """The values of an image, with 0 in place of NaN and infinite values.

    The array itself is returned if all its values are finite, or if one channel has no finite value
    at all (`value_problem` refuses such images). Otherwise the result is a copy.

    Example:
        >>> nan_as_zero(np.array([[[2.0, np.nan]]])).tolist()
        [[[2.0, 0.0]]]
    """
    if values.dtype.kind != "f":
        return values
    with np.errstate(invalid="ignore"):
        ends = values.min(), values.max()
    if np.isfinite(ends).all():
        return values
    numbers = np.isfinite(values)
    if not numbers.any(axis=(0, 1, 2)).all():
        return values
    filled = values.copy(order="K")
    filled[~numbers] = 0
    return filled


def value_problem(values: ndarray) -> str | None:
    """A phrase 'holds …' that says why the image's values cannot be used, or None if they can."""
    if values.dtype.kind != "f":
        return None
    with np.errstate(invalid="ignore"):
        low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        planes = [np.isfinite(plane).sum(axis=(0, 1)) for plane in np.moveaxis(values, 2, 0)]
        numbers = np.sum(planes, axis=0)  # of each channel
        if not np.all(numbers):
            where = " in one of its channels" if values.ndim > 3 else ""
            return f"holds only NaN or infinite values{where}; make the file again, or leave it out"
        strange = values.size - int(np.sum(numbers))
        return (
            f"holds {strange:,} NaN or infinite values among {values.size:,}; if they lie outside "
            f"a mask, set them to 0 in the file, or train with data.nan: background, which does so"
        )
    if max(-low, high) > FARTHEST_VALUE:
        return (
            f"holds values from {low:g} to {high:g}, expected none beyond {FARTHEST_VALUE:g}; "
            f"rescale them"
        )
    return None
