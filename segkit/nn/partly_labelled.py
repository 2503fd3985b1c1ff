"""Losses for cases in which only some classes are labelled.

Marginal loss of Shi et al. (2021, arXiv:2007.03868, Sec. 3.1): the background of such a case may
hold any class that is not labelled. So the background and the unlabelled classes count as one
class, whose probability is the sum of theirs. Here this works with any loss, because only the
logits are changed before the loss gets them:

    background, unlabelled u, labelled c      z = (1, 2, 0)
    logits that the loss gets                 z = (log(e^1 + e^2), -10000, 0)

After a softmax, u has probability 0. As no voxel has the label u, this is correct, so that neither
Dice nor cross-entropy has a gradient for u. The other classes keep the weights that they have in a
case with all labels. The logit of an unlabelled region is replaced by the correct one, so that it
has no gradient either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from segkit.nn.losses import shrunk, within_group

NEVER = -1e4
"""A logit whose probability is 0 in single precision."""


@dataclass(frozen=True)
class PartlyLabelled:
    """The outputs that are not labelled in each sample of a batch, read from the labels themselves.

    If the unlabelled outputs of a case are set number k, then `k * num_labels` has been added to
    all its labels. So a patch keeps this information through any augmentation.
    """

    num_labels: int
    """Number of different labels in a case with all labels, `ignore` included."""
    unlabelled: tuple[tuple[int, ...], ...]
    """The outputs in each set; set 0 is empty."""
    num_outputs: int
    regions: tuple[tuple[int, ...], ...] = ()
    """The labels in each region; empty if the outputs are classes 0, 1, …."""

    def known(
        self,
        levels: Sequence[Tensor],
        presence: Tensor | None,
        label: Integer[Tensor, "batch *space"],
    ) -> tuple[tuple[Tensor, ...], Tensor | None, Integer[Tensor, "batch *space"]]:
        """Logits and labels for any loss; unlabelled outputs have no gradient.

        Args:
            levels: logits (batch, output, *space) of each supervised level, the finest first.
            presence: logits (batch, output) of each class but the background, or of each region.
            label: labels to which `k * num_labels` has been added.

        Returns:
            The changed `levels` and `presence`, and the labels without the added numbers.
        """
        label = label.long()
        sets = label.div(self.num_labels, rounding_mode="floor").flatten(1).amax(1)
        label = label.remainder(self.num_labels)
        hidden = _table(self.unlabelled, self.num_outputs, label.device)[sets]
        if self.regions:
            return self._known_regions(levels, presence, label, hidden)
        # If a class counts as unlabelled, voxels with its label become background.
        beyond = hidden.new_zeros(len(hidden), self.num_labels - self.num_outputs)
        by_label = torch.cat([hidden, beyond], dim=1)
        label = label.masked_fill(by_label.gather(1, label.flatten(1)).view_as(label), 0)
        merged = tuple(merged_with_background(level, hidden) for level in levels)
        if presence is not None:
            presence = presence.masked_fill(hidden[:, 1:], NEVER)
        return merged, presence, label

    def _known_regions(
        self, levels: Sequence[Tensor], presence: Tensor | None, label: Tensor, hidden: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor]:
        """The result of `known` for regions; `hidden` is True for unlabelled outputs."""
        found = []
        for level in levels:
            small = shrunk(label, level.shape[2:])
            inside = torch.stack([within_group(small, region) for region in self.regions], dim=1)
            mask = hidden.view(*hidden.shape, *[1] * (level.ndim - 2))
            found.append(torch.where(mask, _certain(inside), level.float()))
        if presence is not None:
            voxels = label.flatten(1)
            inside = torch.stack(
                [within_group(voxels, region).any(dim=1) for region in self.regions], dim=1
            )
            presence = torch.where(hidden, _certain(inside), presence.float())
        return tuple(found), presence, label


def merged_with_background(
    logits: Float[Tensor, "batch classes *space"], hidden: Bool[Tensor, "batch classes"]
) -> Float[Tensor, "batch classes *space"]:
    """Logits that add the probability of hidden classes to that of the background, class 0.

    If no class is hidden, they equal the input bit for bit.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        away = hidden.view(*hidden.shape, *[1] * (logits.ndim - 2))
        first = torch.arange(logits.shape[1], device=logits.device) == 0
        together = away | first.view(-1, *[1] * (logits.ndim - 2))
        background = logits.masked_fill(~together, -torch.inf).logsumexp(dim=1, keepdim=True)
        return torch.cat([background, logits.masked_fill(away, NEVER)[:, 1:]], dim=1)


def _certain(inside: Tensor) -> Tensor:
    """Logits that give True probability 1 and False probability 0."""
    return torch.where(inside, -NEVER, NEVER)


@lru_cache(maxsize=64)
def _table(
    unlabelled: tuple[tuple[int, ...], ...], num_outputs: int, device: torch.device
) -> Bool[Tensor, "sets outputs"]:
    """True for each output that a set hides. It is copied once, so that no training step waits."""
    table = torch.tensor(
        [[output in group for output in range(num_outputs)] for group in unlabelled]
    )
    return table.to(device, non_blocking=True)
