"""Losses of cases in which only some classes are labelled: what nobody labelled may be anything.

Marginal loss of Shi et al. (2021, arXiv:2007.03868, Sec. 3.1): where a case has no labels of some
classes, these and its background are one class, whose probability is the sum of theirs. It is had
here for any loss, by the logits that the loss is given:

    background, unlabelled u, labelled c      z = (1, 2, 0)
    what the loss sees                        z = (log(e^1 + e^2), -10000, 0)

In a softmax, u then has probability 0, and is right: neither term of it has a gradient. Each of the
other classes keeps the weight that it has in a case with all labels. A region that nobody labelled
is given the logit that makes it right, so that it has no gradient either.
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
    """Which outputs nobody labelled in each sample of a batch, by its labels themselves.

    A case whose unlabelled outputs are set number k has `k * num_labels` added to all its labels:
    a patch carries what is known of it through any augmentation.
    """

    num_labels: int
    """Numbers that labels have in a case with all labels, `ignore` among them."""
    unlabelled: tuple[tuple[int, ...], ...]
    """The outputs of each set, that of number 0 empty."""
    num_outputs: int
    regions: tuple[tuple[int, ...], ...] = ()
    """The labels in each region, or none, for classes 0, 1, …."""

    def known(
        self,
        levels: Sequence[Tensor],
        presence: Tensor | None,
        label: Integer[Tensor, "batch *space"],
    ) -> tuple[tuple[Tensor, ...], Tensor | None, Integer[Tensor, "batch *space"]]:
        """Logits and labels that any loss may be given.

        Args:
            levels: logits (batch, output, cells …) of each supervised level, finest first.
            presence: logits (batch, output) of each class but the background or of each region.
            label: with the sets added.
        """
        label = label.long()
        sets = label.div(self.num_labels, rounding_mode="floor").flatten(1).amax(1)
        label = label.remainder(self.num_labels)
        hidden = _table(self.unlabelled, self.num_outputs, label.device)[sets]
        if self.regions:
            return self._known_regions(levels, presence, label, hidden)
        # Labels of a class that is said to have none are background.
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
    """Logits in which hidden classes have lent their probability to the background, class 0.

    Where none is hidden they are the logits themselves, bit for bit.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        away = hidden.view(*hidden.shape, *[1] * (logits.ndim - 2))
        first = torch.arange(logits.shape[1], device=logits.device) == 0
        together = away | first.view(-1, *[1] * (logits.ndim - 2))
        background = logits.masked_fill(~together, -torch.inf).logsumexp(dim=1, keepdim=True)
        return torch.cat([background, logits.masked_fill(away, NEVER)[:, 1:]], dim=1)


def _certain(inside: Tensor) -> Tensor:
    """Logits of what is certainly so."""
    return torch.where(inside, -NEVER, NEVER)


@lru_cache(maxsize=64)
def _table(
    unlabelled: tuple[tuple[int, ...], ...], num_outputs: int, device: torch.device
) -> Bool[Tensor, "sets outputs"]:
    """Which outputs each set hides; brought to a device once, so that no step waits for it."""
    table = torch.tensor(
        [[output in group for output in range(num_outputs)] for group in unlabelled]
    )
    return table.to(device, non_blocking=True)
