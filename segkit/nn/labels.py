"""Labels as a network takes them in: one channel of 0 and 1 for each foreground class."""

import torch
from jaxtyping import Float
from torch import Tensor


def spread_labels(
    image: Float[Tensor, "batch channel *space"], num_classes: int
) -> Float[Tensor, "batch wider *space"]:
    """The image with the labels of its last channel spread over `num_classes` channels.

    Each is 1 where the label is its own, of 1, 2, …, and 0 elsewhere. Spread here, patch by patch,
    a volume's labels take up one channel wherever else they are kept.
    """
    numbers = torch.arange(1, num_classes + 1, device=image.device, dtype=image.dtype)
    is_class = image[:, -1:] == numbers.view(-1, *[1] * (image.ndim - 2))
    return torch.cat([image[:, :-1], is_class.to(image.dtype)], dim=1)
