"""Does an attribution stay the same if the image hardly changes?

All functions take the attribution as a function of the image, and the changed copies of the image.
So they fit every method and every network, and a random generator is used only in `noisy_copies`.
NaN of an attribution, which was not computed, is left out.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from segkit.errors import SegkitError

INSTEAD_OF_0 = 1e-6
"""The value by which zeros are replaced before a division."""
Explain = Callable[[ndarray], ndarray]
"""A function from an image to its attribution, of the same shape at each call."""


def noisy_copies(
    image: Float[ndarray, "*shape"], *, radius: float, draws: int, seed: int = 0
) -> Iterator[Float[ndarray, "*shape"]]:
    """Copies of an image with uniform noise added to each value.

    Args:
        image: the image.
        radius: the noise is between -radius and radius, in the units of the image.
        draws: number of copies.
        seed: seed of the noise.

    Yields:
        The copies, of the image's data type.

    Raises:
        SegkitError: the radius is negative. It is raised when the first copy is taken.

    Example:
        >>> image = np.linspace(0.0, 1.0, 8)
        >>> copies = list(segkit.noisy_copies(image, radius=0.02, draws=10))
        >>> len(copies), bool(abs(copies[0] - image).max() <= 0.02)
        (10, True)
    """
    if not radius >= 0:
        raise SegkitError(f"radius: expected 0 or more, found {radius}; raise it")
    random = np.random.default_rng(seed)
    for _ in range(draws):
        yield image + random.uniform(-radius, radius, image.shape).astype(image.dtype)


def max_sensitivity(
    explain: Explain, image: Float[ndarray, "*shape"], copies: Iterable[ndarray]
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
    own = explain(image)
    length = _length(own)
    changes = [_length(_same(explain(copy), own) - own) for copy in copies]
    return max(changes) / length if changes and length > 0 else float("nan")


def relative_input_stability(
    explain: Explain, image: Float[ndarray, "*shape"], copies: Iterable[ndarray]
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
    own = explain(image)
    return _largest(
        _relative_change(explain(copy), own)
        / _not_0(_length((image - copy) / _apart_from_0(image)))
        for copy in copies
    )


def relative_output_stability(
    explain: Explain,
    output: Callable[[ndarray], ndarray],
    image: Float[ndarray, "*shape"],
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
    own, logits = explain(image), output(image)
    return _largest(
        _relative_change(explain(copy), own) / _not_0(_length(logits - output(copy)))
        for copy in copies
    )


def _largest(values: Iterable[float]) -> float:
    found = list(values)
    return max(found) if found else float("nan")


def _length(values: ndarray) -> float:
    """The Euclidean norm of the values that are not NaN."""
    return float(np.sqrt(np.nansum(np.square(values, dtype=np.float64))))


def _relative_change(values: ndarray, own: ndarray) -> float:
    """The length of the change of an attribution, each value relative to its own."""
    return _length((own - _same(values, own)) / _apart_from_0(own))


def _apart_from_0(values: ndarray) -> ndarray:
    return np.where(values == 0, INSTEAD_OF_0, values)


def _not_0(length: float) -> float:
    return length if length > 0 else INSTEAD_OF_0


def _same(values: ndarray, own: ndarray) -> ndarray:
    if values.shape != own.shape:
        raise SegkitError(
            f"expected an attribution of the shape {own.shape} for each copy, found "
            f"{values.shape}; return it on the grid of the image"
        )
    return values
