"""Overlap of two label maps, all of it derived from one confusion matrix."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64, Integer
from numpy import ndarray
from torch import Tensor


def confusion_matrix(
    prediction: Integer[Tensor, "*space"], reference: Integer[Tensor, "..."], num_classes: int
) -> Int64[Tensor, "reference prediction"]:
    """Number of voxels of each (reference label, prediction label) pair, on the labels' device.

    Any shape will do, a batch included; both must have the same. Matrices add: the sum over
    patches is the matrix of the whole, whereas a mean of their Dice is not the Dice of the whole.

    Labels outside [0, num_classes) are an error on every device, at no extra cost: they all fall
    into one bin past the last cell, so the counts come out one longer, and that length is known
    to the host anyway, because `torch.bincount` waits for it.
    """
    if prediction.shape != reference.shape:
        raise ValueError(
            f"expected prediction and reference of one shape, got {tuple(prediction.shape)} and "
            f"{tuple(reference.shape)}; resample the prediction to the reference's grid"
        )
    column, row = prediction.flatten().long(), reference.flatten().long()
    inside = (column >= 0) & (column < num_classes) & (row >= 0) & (row < num_classes)
    num_cells = num_classes * num_classes
    cell = torch.where(inside, row * num_classes + column, num_cells)
    counts = torch.bincount(cell, minlength=num_cells)
    if len(counts) > num_cells:
        raise ValueError(
            f"expected labels in [0, {num_classes}), got {_span(column)} in the prediction and "
            f"{_span(row)} in the reference; map them to 0..{num_classes - 1} or raise num_classes"
        )
    return counts.reshape(num_classes, num_classes)


def mean_of_defined(scores: Float64[ndarray, " scores"]) -> float:
    """The mean of those that are defined; not a number where none is."""
    defined = scores[~np.isnan(scores)]
    return float(defined.mean()) if len(defined) else float("nan")


def _span(labels: Int64[Tensor, "voxel"]) -> str:
    return f"{labels.min().item()}..{labels.max().item()}"


@dataclass(frozen=True, eq=False)
class Overlap:
    """Voxels each class has right, too many and too few, and the scores they give."""

    true_positive: Int64[Tensor, "*classes"]
    false_positive: Int64[Tensor, "*classes"]
    false_negative: Int64[Tensor, "*classes"]

    @classmethod
    def from_confusion(
        cls, confusion: Int64[Tensor, "*batch num_classes num_classes"]
    ) -> "Overlap":
        """Overlap of every class of a matrix with reference labels as rows, or of a stack."""
        true_positive = confusion.diagonal(dim1=-2, dim2=-1)
        return cls(
            true_positive=true_positive,
            false_positive=confusion.sum(dim=-2) - true_positive,
            false_negative=confusion.sum(dim=-1) - true_positive,
        )

    @classmethod
    def of_groups(
        cls,
        confusion: Int64[Tensor, "num_classes num_classes"],
        groups: Sequence[Sequence[int]],
        *,
        ignore: int | None = None,
    ) -> "Overlap":
        """Overlap of groups of labels, each taken as one; they may share labels.

        Of voxels whose reference label is `ignore`, none counts.
        """
        counted = confusion.clone()
        if ignore is not None:
            counted[ignore] = 0
        of_prediction, of_reference = counted.sum(dim=0), counted.sum(dim=1)
        rows = []
        for group in groups:
            members = list(group)
            both = counted[members][:, members].sum()
            rows.append([both, of_prediction[members].sum(), of_reference[members].sum()])
        both, predicted, present = torch.stack([torch.stack(row) for row in rows], dim=1)
        return cls(both, predicted - both, present - both)

    @classmethod
    def of_labels(
        cls,
        prediction: Integer[ndarray, "*space"],
        reference: Integer[ndarray, "..."],
        groups: Sequence[Sequence[int]],
        *,
        num_labels: int,
        ignore: int | None = None,
    ) -> "Overlap":
        """Overlap of groups of labels in two label maps that hold 0 … `num_labels` - 1."""
        found, right = (torch.from_numpy(each.astype(np.int64)) for each in (prediction, reference))
        return cls.of_groups(confusion_matrix(found, right, num_labels), groups, ignore=ignore)

    @property
    def dice(self) -> Float64[Tensor, "*classes"]:
        """2 TP / (2 TP + FP + FN), of Dice (1945, doi:10.2307/1932409).

        0 where a class is in one of the two only; NaN, that is undefined, where it is in neither.
        """
        double = 2 * self.true_positive
        return double.double() / (double + self.false_positive + self.false_negative).double()

    @property
    def iou(self) -> Float64[Tensor, "*classes"]:
        """TP / (TP + FP + FN), of Jaccard (1912); 0 and NaN as for Dice."""
        union = self.true_positive + self.false_positive + self.false_negative
        return self.true_positive.double() / union.double()
