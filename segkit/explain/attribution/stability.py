"""Does an attribution stay the same if the image hardly changes?

All functions take the attribution as a function of the image, and the changed copies of the image.
So they fit every method and every network, and a random generator is used only in `noisy_copies`.
Integers, such as those of a CT scan, are computed in floating point. NaN of the image's
attribution, which was not computed, is left out. If the attribution of a copy has further NaN, the
result is NaN.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray

from segkit.errors import SegkitError

INSTEAD_OF_0 = 1e-6
"""The value by which zeros are replaced before a division."""
Explain = Callable[[ndarray], ndarray]
"""A function from an image to its attribution, of the same shape at each call."""


def noisy_copies(
    image: Shaped[ndarray, "*shape"], *, radius: float, draws: int, seed: int = 0
) -> Iterator[Float[ndarray, "*shape"]]:
    """Copies of an image with uniform noise added to each value.

    Args:
        image: the image.
        radius: the noise is between -radius and radius, in the units of the image.
        draws: number of copies.
        seed: seed of the noise.

    Yields:
        The copies, of the image's data type; of floating point if that is an integer type.

    Raises:
        SegkitError: the radius is negative or not finite. It is raised when the first copy is
            taken.

    Example:
        >>> image = np.linspace(0.0, 1.0, 8)
        >>> copies = list(segkit.noisy_copies(image, radius=0.02, draws=10))
        >>> len(copies), bool(abs(copies[0] - image).max() <= 0.02)
        (10, True)
    """
    if not 0 <= radius < np.inf:
        raise SegkitError(f"radius: expected 0 or more, found {radius}; change it")
    random = np.random.default_rng(seed)
    values = floating(image)
    for _ in range(draws):
        yield values + random.uniform(-radius, radius, image.shape).astype(values.dtype)


def max_sensitivity(
    explain: Explain, image: Shaped[ndarray, "*shape"], copies: Iterable[ndarray]
) -> float:
    """The largest change of an attribution, relative to its length: 0 if it never changes.

    Yeh et al. (2019, arXiv:1901.09392, definition 2), max |A(copy) - A(image)| / |A(image)| with
    Euclidean norms. The division by |A(image)|, as in Captum and Quantus, makes it independent of
    the scale of the attribution.

    Args:
        explain: a function from an image to its attribution.
        image: the image.
        copies: changed copies of it, such as `noisy_copies`.

    Returns:
        The maximum over the copies; NaN if there is none, or if the attribution is 0 everywhere.

    Raises:
        SegkitError: the attribution of a copy has another shape than that of the image.

    Example:
        copies = segkit.noisy_copies(image, radius=0.02, draws=10)
        segkit.max_sensitivity(explain, image, copies)
    """
    own = floating(explain(image))
    length = _length(_known(own))
    change = _largest(_length(_change(explain(copy), own)) for copy in copies)
    return change / length if length > 0 else float("nan")


def relative_input_stability(
    explain: Explain, image: Shaped[ndarray, "*shape"], copies: Iterable[ndarray]
) -> float:
    """The largest relative change of an attribution, divided by the relative change of the image.

    Agarwal et al. (2022, arXiv:2203.06877, Eq. 2): max |(A(x) - A(y)) / A(x)| / |(x - y) / x| over
    the copies y, with element-wise divisions and Euclidean norms. Values of 0 in a denominator are
    replaced by 1e-6. It is low if the attribution is stable. Values of an attribution near 0
    dominate it, so compare it only between attributions of one kind.

    Args:
        explain: a function from an image to its attribution.
        image: the image.
        copies: changed copies of it, such as `noisy_copies`.

    Returns:
        The maximum over the copies; NaN if there is none.

    Raises:
        SegkitError: the attribution of a copy has another shape than that of the image.

    Example:
        copies = segkit.noisy_copies(image, radius=0.02, draws=10)
        segkit.relative_input_stability(explain, image, copies)
    """
    own, values = floating(explain(image)), floating(image)
    return _largest(
        _relative_change(explain(copy), own)
        / _not_0(_length(_known((floating(copy) - values) / _apart_from_0(values))))
        for copy in copies
    )


def relative_output_stability(
    explain: Explain,
    output: Callable[[ndarray], ndarray],
    image: Shaped[ndarray, "*shape"],
    copies: Iterable[ndarray],
) -> float:
    """The largest relative change of an attribution, divided by the change of the output.

    Agarwal et al. (2022, arXiv:2203.06877, Eq. 5): max |(A(x) - A(y)) / A(x)| / |h(x) - h(y)|. An
    attribution may change if the output changes; it should not if the output stays.

    Args:
        explain: a function from an image to its attribution.
        output: a function from an image to the network's output, h.
        image: the image.
        copies: changed copies of it, such as `noisy_copies`.

    Returns:
        The maximum over the copies; NaN if there is none.

    Raises:
        SegkitError: the attribution of a copy has another shape than that of the image.

    Example:
        copies = segkit.noisy_copies(image, radius=0.02, draws=10)
        segkit.relative_output_stability(explain, logits_of, image, copies)
    """
    own, logits = floating(explain(image)), floating(np.asarray(output(image)))
    return _largest(
        _relative_change(explain(copy), own)
        / _not_0(_length(_known(floating(np.asarray(output(copy))) - logits)))
        for copy in copies
    )


def floating(values: Shaped[ndarray, "*shape"]) -> Float[ndarray, "*shape"]:
    """The values in floating point, of their own precision if they have one."""
    if np.issubdtype(values.dtype, np.floating):
        return values
    return values.astype(np.result_type(values, np.float32))


def _largest(values: Iterable[float]) -> float:
    """The largest value; NaN if there is none, or if one is NaN."""
    found = list(values)
    return float(np.max(found)) if found else float("nan")


def _length(values: ndarray) -> float:
    """The Euclidean norm."""
    return float(np.sqrt(np.sum(np.square(values, dtype=np.float64))))


def _relative_change(values: ndarray, own: ndarray) -> float:
    """The length of the change of an attribution, each value relative to its own."""
    return _length(_change(values, own) / _apart_from_0(_known(own)))


def _known(values: ndarray) -> ndarray:
    """The values that are not NaN, in a row."""
    found: ndarray = values[~np.isnan(values)]
    return found


def _apart_from_0(values: ndarray) -> ndarray:
    return np.where(values == 0, INSTEAD_OF_0, values)


def _not_0(length: float) -> float:
    return length if length > 0 else INSTEAD_OF_0


def _change(values: ndarray, own: ndarray) -> ndarray:
    """The change of an attribution where its own value is known, in a row."""
    if values.shape != own.shape:
        raise SegkitError(
            f"expected an attribution of the shape {own.shape} for each copy, found "
            f"{values.shape}; return it on the grid of the image"
        )
    change: ndarray = (floating(values) - own)[~np.isnan(own)]
    return change
