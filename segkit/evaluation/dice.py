"""Dice of two label maps, for the classes or regions of a labelling."""

from jaxtyping import Integer
from numpy import ndarray

from segkit.config.labels import Labelling
from segkit.evaluation.overlap import Overlap


def dice_of(
    prediction: Integer[ndarray, "*space"],
    reference: Integer[ndarray, "*space"],
    labelling: Labelling,
) -> list[float]:
    """The Dice of each class except the background, or of each region.

    It is NaN for a class that is in neither prediction nor reference. Voxels that the reference
    ignores do not count.

    Args:
        prediction, reference: labels with the labelling's numbers 0, 1, 2, ….
        labelling: the classes or regions.
    """
    overlap = Overlap.of_labels(
        prediction,
        reference,
        list(labelling.members.values()),
        num_labels=len(labelling.value_names),
        ignore=labelling.ignore,
    )
    dice: list[float] = overlap.dice.tolist()
    return dice
