"""Keep only the largest connected component of a segmentation, if this raises Dice.

As in nnU-Net (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z): first for the whole foreground,
then for each class; each step is used only if it raised Dice in cross-validation. Voxels that touch
by a face, an edge or a corner are connected. If several components are the largest, all are kept.
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
    """The labels with only the largest components; removed voxels are 0.

    This needs memory for a copy of the labels, one byte for each voxel, and six bytes for each
    voxel of the box around the components.

    Args:
        labels: labels of each voxel; they do not change.
        largest_foreground: keep only the largest component of all voxels that are not 0.
        largest_of: numbers of classes; after that, keep only the largest component of each.

    Returns:
        A new array, or `labels` itself if both steps are off.
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
    for plane in pieces:  # one at once, because NumPy makes a copy of eight bytes for each voxel
        sizes += np.bincount(plane.ravel(), minlength=count + 1)
    sizes[0] = 0
    return (sizes == sizes.max())[pieces]


def candidates(numbers: Sequence[int]) -> dict[str, Operation]:
    """Operations, by name, for which `decide` needs the Dice.

    All classes are treated at once, because the largest component of a class does not change
    another class.

    Args:
        numbers: the numbers of the classes.
    """
    return {
        LARGEST_FOREGROUND: partial(apply, largest_foreground=True, largest_of=()),
        CLASSES: partial(apply, largest_foreground=False, largest_of=numbers),
        BOTH: partial(apply, largest_foreground=True, largest_of=numbers),
    }


@dataclass(frozen=True)
class Decision:
    """Steps of post-processing that are used.

    They are the arguments of `apply`, except that `largest_of` holds columns of the Dice tables.
    """

    largest_foreground: bool
    largest_of: tuple[int, ...]

    def dice(
        self,
        raw: Float64[ndarray, "case classes"],
        after: Mapping[str, Float64[ndarray, "case classes"]],
    ) -> Float64[ndarray, "case classes"]:
        """Dice after these steps, from the tables that `decide` was given."""
        table = (after[LARGEST_FOREGROUND] if self.largest_foreground else raw).copy()
        of_classes = after[BOTH if self.largest_foreground else CLASSES]
        table[:, list(self.largest_of)] = of_classes[:, list(self.largest_of)]
        return table


def decide(
    raw: Float64[ndarray, "case classes"], after: Mapping[str, Float64[ndarray, "case classes"]]
) -> Decision:
    """Choose the steps of post-processing by the Dice of cases that the networks had not seen.

    The foreground step is used if the mean Dice over classes rises and no class's Dice falls. Then
    the step of each class is used if the Dice of this class rises. The Dice of a class is its mean
    over the cases in which it is defined, as in nnU-Net.

    Args:
        raw: Dice of the predicted labels; NaN if a class is in neither prediction nor reference.
        after: the same after each of the `candidates`.
    """
    before, foreground = class_means(raw), class_means(after[LARGEST_FOREGROUND])
    rises = mean_of_defined(foreground) > mean_of_defined(before)
    adopted = bool(rises and not (foreground < before).any())
    start = foreground if adopted else before
    of_classes = class_means(after[BOTH if adopted else CLASSES])
    return Decision(adopted, tuple(np.flatnonzero(of_classes > start).tolist()))


def class_means(table: Float64[ndarray, "case classes"]) -> Float64[ndarray, " classes"]:
    """Mean of each class over the cases in which it is defined; NaN if there are none."""
    return np.array([mean_of_defined(column) for column in table.T])


def _remove_the_rest(labels: Integer[ndarray, "*space"], mask: Bool[ndarray, "*space"]) -> None:
    """Set labels to 0, in place, at voxels of the mask outside its largest component."""
    labels[mask & ~largest_component(mask)] = 0
