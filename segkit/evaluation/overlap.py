"""Overlap of two label maps, derived from their confusion matrix."""

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

    Matrices of patches can be added: their sum is the matrix of the whole volume. (The mean of the
    patches' Dice is not the Dice of the whole volume.)

    Args:
        prediction: labels of any shape, also of a batch.
        reference: labels of the same shape.
        num_classes: the labels are 0 … num_classes - 1.

    Raises:
        ValueError: if the shapes differ or a label is out of range. This check costs nothing on a
            GPU: such labels fall into one extra bin, and the host knows the number of bins because
            `torch.bincount` waits for it.
    """
    if prediction.shape != reference.shape:
        raise ValueError(
            f"expected prediction and reference of the same shape, got {tuple(prediction.shape)} "
            f"and {tuple(reference.shape)}; resample the prediction to the reference's grid"
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
    """The mean of the scores that are not NaN; NaN if all are."""
    defined = scores[~np.isnan(scores)]
    return float(defined.mean()) if len(defined) else float("nan")


def _span(labels: Int64[Tensor, "voxel"]) -> str:
    return f"{labels.min().item()}..{labels.max().item()}"


@dataclass(frozen=True, eq=False)
class Overlap:
    """True positive, false positive and false negative voxels of each class, and their scores."""

    true_positive: Int64[Tensor, "*classes"]
    false_positive: Int64[Tensor, "*classes"]
    false_negative: Int64[Tensor, "*classes"]

    @classmethod
    def of_groups(
        cls,
        confusion: Int64[Tensor, "num_classes num_classes"],
        groups: Sequence[Sequence[int]],
        *,
        ignore: int | None = None,
    ) -> "Overlap":
        """Overlap of groups of labels, each group as one structure.

        Args:
            confusion: a matrix with reference labels as rows.
            groups: the labels of each group; a label may be in several groups.
            ignore: voxels with this reference label do not count.
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
        """Overlap of groups of labels in two label maps with the labels 0 … `num_labels` - 1.

        Args:
            prediction, reference: label maps of the same shape.
            groups: the labels of each group.
            num_labels: number of labels, the background included.
            ignore: voxels with this reference label do not count.
        """
        found, right = (torch.from_numpy(each.astype(np.int64)) for each in (prediction, reference))
        return cls.of_groups(confusion_matrix(found, right, num_labels), groups, ignore=ignore)

    @property
    def dice(self) -> Float64[Tensor, "*classes"]:
        """2 TP / (2 TP + FP + FN) (Dice 1945, doi:10.2307/1932409).

        It is 0 if a class is only in one of the two label maps. It is NaN (undefined) if the class
        is in neither.
        """
        double = 2 * self.true_positive
        return double.double() / (double + self.false_positive + self.false_negative).double()

    @property
    def iou(self) -> Float64[Tensor, "*classes"]:
        """TP / (TP + FP + FN) (Jaccard 1912); 0 and NaN as for Dice."""
        union = self.true_positive + self.false_positive + self.false_negative
        return self.true_positive.double() / union.double()
