"""The labels of a first stage, as the last channel of an image.

They are whole numbers in one channel on disk and in memory. Only the network turns them into one
channel for each class.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Generator, Tensor

from segkit.data.preprocess import Prepared, cropped, prepare_label
from segkit.errors import VolumeError
from segkit.io.volume import Volume


def with_labels(prepared: Prepared, labels: Volume) -> Prepared:
    """The prepared image with labels of its volume as one more channel, on its grid.

    Args:
        prepared: the prepared image.
        labels: labels on the grid of the original volume.

    Raises:
        VolumeError: the labels lie on another grid than the volume.
    """
    turned = prepared.orientation.turn_grid(labels.grid)
    holds = all(span.stop <= size for span, size in zip(prepared.box, turned.shape, strict=True))
    if not (holds and cropped(turned, prepared.box).agrees_with(prepared.source)):
        raise VolumeError(
            "expected labels of the first stage on the grid of the volume, found another grid; "
            "pass the labels of this volume"
        )
    channel = prepare_label(labels, prepared)
    return replace(prepared, image=torch.cat([prepared.image, channel[None].to(prepared.image)]))


def majority(labels: Sequence[Volume]) -> Volume:
    """The most frequent label of each voxel among several segmentations of a volume.

    If there is a tie, the first segmentation with one of these labels decides.
    """
    best, winner = np.zeros(labels[0].data.shape, np.uint8), labels[0].data.copy()
    for own in labels:
        votes = np.zeros_like(best)
        for other in labels:
            votes += other.data == own.data
        better = votes > best
        winner[better], best[better] = own.data[better], votes[better]
    return labels[0].like(winner)


def out_of_fold(name: str, held_out: Sequence[Collection[str]]) -> list[int]:
    """Numbers of the models that held a case out of their training; all models if none did.

    Args:
        name: the name of the case.
        held_out: for each model, the names of the cases that it held out.

    Example:
        >>> out_of_fold("a", [{"a"}, {"b"}])
        [0]
    """
    unseen = [number for number, names in enumerate(held_out) if name in names]
    return unseen or list(range(len(held_out)))


@dataclass(frozen=True)
class VariationWithLabels:
    """Augmentation of a batch whose last channel holds the labels of a first stage.

    These labels are rotated and mirrored together with the reference, by nearest neighbour, and
    some are corrupted. Intensities are varied only in the other channels.
    """

    num_classes: int
    spatial: Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor]]
    intensity: Callable[[Tensor, Generator], Tensor]
    corrupt: Callable[[Tensor, int, Generator], Tensor]

    def __call__(
        self,
        image: Float[Tensor, "batch channel *cut"],
        label: Integer[Tensor, "batch *cut"],
        generator: Generator,
    ) -> tuple[Float[Tensor, "batch channel *space"], Integer[Tensor, "batch *space"]]:
        """The augmented batch."""
        # Both labels are combined in one number, so that they are sampled at the same positions.
        base = self.num_classes + 1
        both = label.int() * base + image[:, -1].int()
        seen, both = self.spatial(image[:, :-1], both, generator)
        first = self.corrupt(both.remainder(base), self.num_classes, generator)
        reference = both.div(base, rounding_mode="floor").to(label.dtype)
        varied = self.intensity(seen, generator)
        return torch.cat([varied, first[:, None].to(varied.dtype)], dim=1), reference
