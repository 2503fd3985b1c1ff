"""Keeping the largest connected component of a segmentation, where evidence says that it helps.

As nnU-Net (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z): first the largest component of the
whole foreground, then the largest of a class, each adopted only where cross-validation has shown
that it raises Dice. Voxels that touch by a face, an edge or a corner are connected, and of
components that are equally large all stay.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float64, Integer
from numpy import ndarray
from scipy import ndimage

from segkit.evaluation.overlap import mean_of_defined

LARGEST_FOREGROUND = "largest_foreground"
CLASSES = "largest_of_each_class"
BOTH = "largest_foreground_then_of_each_class"

Operation: TypeAlias = Callable[[ndarray], ndarray]


def apply(
    labels: Integer[ndarray, "*space"], largest_foreground: bool, largest_of: Collection[int]
) -> Integer[ndarray, "*space"]:
    """The labels without what lies apart from the largest component; `labels` stays as it is.

    `largest_foreground` keeps the largest component of all that is not 0, whatever its classes;
    after that each class whose number is in `largest_of` keeps its own largest. What is removed
    becomes 0. Where nothing is asked for, the array itself comes back. Beside the copy it takes a
    byte a voxel, and six for each voxel of the box that the components lie in.
    """
    if not (largest_foreground or largest_of):
        return labels
    kept = labels.copy(order="K")
    if largest_foreground:
        for box in ndimage.find_objects((kept > 0).view(np.uint8)):
            _remove_the_rest(kept[box], kept[box] > 0)
    for number, box in enumerate(ndimage.find_objects(kept) if largest_of else (), start=1):
        if number in largest_of and box is not None:
            _remove_the_rest(kept[box], kept[box] == number)
    return kept


def largest_component(mask: Bool[ndarray, "*space"]) -> Bool[ndarray, "*space"]:
    """The mask without its smaller components."""
    pieces, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    if count < 2:
        return mask
    sizes = np.zeros(count + 1, np.int64)
    for plane in pieces:  # as NumPy counts in a copy of eight bytes a voxel
        sizes += np.bincount(plane.ravel(), minlength=count + 1)
    sizes[0] = 0
    return (sizes == sizes.max())[pieces]


def candidates(numbers: Sequence[int]) -> dict[str, Operation]:
    """What `decide` wants to know the Dice after, by its name, for classes of these numbers.

    All classes may be treated at once: the largest component of one does not change another's.
    """
    return {
        LARGEST_FOREGROUND: partial(apply, largest_foreground=True, largest_of=()),
        CLASSES: partial(apply, largest_foreground=False, largest_of=numbers),
        BOTH: partial(apply, largest_foreground=True, largest_of=numbers),
    }


@dataclass(frozen=True)
class Decision:
    """What is adopted: the arguments of `apply`, but that classes are columns of the tables."""

    largest_foreground: bool
    largest_of: tuple[int, ...]

    def dice(
        self,
        raw: Float64[ndarray, "case classes"],
        after: Mapping[str, Float64[ndarray, "case classes"]],
    ) -> Float64[ndarray, "case classes"]:
        """The Dice of what was adopted, put together from the tables that it was decided by."""
        chosen = (after[LARGEST_FOREGROUND] if self.largest_foreground else raw).copy()
        alone = after[BOTH if self.largest_foreground else CLASSES]
        chosen[:, list(self.largest_of)] = alone[:, list(self.largest_of)]
        return chosen


def decide(
    raw: Float64[ndarray, "case classes"], after: Mapping[str, Float64[ndarray, "case classes"]]
) -> Decision:
    """What to adopt, by the Dice of cases that the networks had not seen.

    `raw` is of the labels as predicted, `after` of the same after each of the `candidates`, NaN
    where a class is in neither prediction nor reference. The largest component of the foreground
    is adopted if the mean over classes of their means over cases rises and no class's falls; then
    the largest of a class if that class's mean rises. A mean is over the cases where Dice is
    defined, as nnU-Net's.
    """
    before, foreground = class_means(raw), class_means(after[LARGEST_FOREGROUND])
    rises = mean_of_defined(foreground) > mean_of_defined(before)
    adopted = bool(rises and not (foreground < before).any())
    start = foreground if adopted else before
    alone = class_means(after[BOTH if adopted else CLASSES])
    return Decision(adopted, tuple(np.flatnonzero(alone > start).tolist()))


def class_means(table: Float64[ndarray, "case classes"]) -> Float64[ndarray, " classes"]:
    """Each class's mean over the cases where it is defined; NaN where it is in none."""
    return np.array([mean_of_defined(column) for column in table.T])


def _remove_the_rest(labels: Integer[ndarray, "*space"], mask: Bool[ndarray, "*space"]) -> None:
    """Set to 0, in place, what of the mask is not in its largest component."""
    labels[mask & ~largest_component(mask)] = 0
