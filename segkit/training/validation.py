"""Held-out cases, and how what is predicted for them is scored during training."""

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
"""From a network and a prepared image (channel, x, y, z) to labels (x, y, z)."""
ScoreCase = Callable[[Tensor, Tensor], Tensor]
"""From labels as predicted and as they should be, each (x, y, z), to a number for each class but
the background, or for each region: the higher the better, NaN if it is undefined."""


@dataclass(frozen=True)
class Validation:
    """The cases that are held out, and how they are segmented and scored after some steps.

    The mean over cases of each class's score is logged as `validation/<measure>_<class>`, and the
    mean of those as `validation/<measure>`, by which the best checkpoint is kept.
    """

    cases: Sequence[StoredCase]
    segment: SegmentPrepared
    score: ScoreCase
    measure: str = "dice"
    """What the score is called."""


@dataclass(frozen=True)
class PartlyLabelledScore:
    """Scores of a case that may be partly labelled: NaN for what nobody labelled in it."""

    score: ScoreCase
    partly: PartlyLabelled

    def __call__(self, prediction: Tensor, label: Tensor) -> Tensor:
        """A number for each class but the background, or for each region."""
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
    """Dice of each group of labels; voxels whose label is `ignore` do not count."""
    highest = max(ignore or 0, *(number for group in groups for number in group))
    matrix = confusion_matrix(prediction, label.to(prediction.device), highest + 1)
    return Overlap.of_groups(matrix, groups, ignore=ignore).dice
