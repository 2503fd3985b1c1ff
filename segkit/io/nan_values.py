"""Images that are NaN outside a mask, which is common in skull-stripped scans."""

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray


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
