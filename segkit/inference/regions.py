"""From logits of regions, which may overlap, to one label per voxel."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor


def written_regions(
    logits: Float[Tensor, "regions *space"], numbers: Sequence[int]
) -> Integer[Tensor, "*space"]:
    """Each region's number wherever its logit is above 0, its probability above one half.

    Later regions are written over earlier ones; what is in none is 0.
    """
    labels = torch.zeros(logits.shape[1:], dtype=torch.long, device=logits.device)
    for region, number in zip(logits, numbers, strict=True):
        labels.masked_fill_(region > 0, number)
    return labels
