"""Validation during training: the held-out cases, and how they are segmented and scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from segkit.data.prepared_cache import StoredCase
from segkit.evaluation.overlap import Overlap, confusion_matrix
from segkit.nn.network import SegmentationNetwork
from segkit.nn.partly_labelled import PartlyLabelled

SegmentPrepared = Callable[[SegmentationNetwork, Tensor], Tensor]
"""A function from a network and a prepared image (channel, x, y, z) to labels (x, y, z)."""
ScoreCase = Callable[[Tensor, Tensor], Tensor]
"""A function from predicted and reference labels, each (x, y, z), to scores: one for each class
except the background, or for each region. Higher is better; undefined scores are NaN."""


@dataclass(frozen=True)
class Validation:
    """The held-out cases, and how they are segmented and scored at each validation.

    The mean score of each class over cases is logged as `validation/<measure>_<class>`. The mean
    over classes is logged as `validation/<measure>` and selects the best checkpoint.
    """

    cases: Sequence[StoredCase]
    segment: SegmentPrepared
    score: ScoreCase
    measure: str = "dice"
    """The name of the score."""


@dataclass(frozen=True)
class PartlyLabelledScore:
    """Scores of a case that may be partly labelled: classes that nobody labelled are NaN."""

    score: ScoreCase
    partly: PartlyLabelled

    def __call__(self, prediction: Tensor, label: Tensor) -> Tensor:
        """A score for each class except the background, or for each region."""
        number = int(label.max()) // self.partly.num_labels
        found = self.score(prediction, label.remainder(self.partly.num_labels)).clone()
        first = 0 if self.partly.regions else 1
        for output in self.partly.unlabelled[number]:
            found[output - first] = torch.nan
        return found


def dice_of_groups(
    prediction: Integer[Tensor, "*space"],
    label: Integer[Tensor, "*space"],
    *,
    groups: Sequence[Sequence[int]],
    ignore: int | None,
) -> Float[Tensor, " classes"]:
    """The Dice of each group of labels. Voxels whose label is `ignore` do not count.

    Args:
        prediction, label: label maps of the same shape.
        groups: the labels of each group.
        ignore: label of voxels that do not count; None if there are none.
    """
    highest = max(ignore or 0, *(number for group in groups for number in group))
    matrix = confusion_matrix(prediction, label.to(prediction.device), highest + 1)
    # One copy to the host; each sum of a group on a GPU would be another wait.
    return Overlap.of_groups(matrix.cpu(), groups, ignore=ignore).dice
