"""From logits of regions, which may overlap, to one label per voxel."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor


def written_regions(
    blocks: Iterable[Float[Tensor, "_ *space"]], numbers: Sequence[int]
) -> Integer[Tensor, "*space"]:
    """Each region's number wherever its logit is above 0, its probability above one half.

    Later regions are written over earlier ones; what is in none is 0. The logits of all regions
    come in their order, in blocks, one of which is looked at at a time.
    """
    labels: Tensor | None = None
    written = iter(numbers)
    for block in blocks:
        if labels is None:
            labels = torch.zeros(block.shape[1:], dtype=torch.long, device=block.device)
        for logits in block:
            labels.masked_fill_(logits > 0, next(written))
    assert labels is not None and next(written, None) is None, "one number per region"
    return labels
