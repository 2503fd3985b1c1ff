"""A first stage's labels of an image, as its last channel.

They stay whole numbers from the file to the network, which spreads them over one channel for each
class. So they take one channel in memory and on disk, whatever the number of classes.
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
    """The image with the labels of its volume as one more channel, on its grid.

    Raises VolumeError if the labels lie on another grid than the volume.
    """
    turned = prepared.orientation.turn_grid(labels.grid)
    holds = all(span.stop <= size for span, size in zip(prepared.box, turned.shape, strict=True))
    if not (holds and cropped(turned, prepared.box).agrees_with(prepared.source)):
        raise VolumeError("the first stage's labels lie on another grid than the volume")
    channel = prepare_label(labels, prepared)
    return replace(prepared, image=torch.cat([prepared.image, channel[None].to(prepared.image)]))


def majority(labels: Sequence[Volume]) -> Volume:
    """The label that most of several segmentations of a volume give each voxel.

    If labels tie, the label of the first segmentation counts.
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
    """Numbers of the models that held a case out of their training; all of them if none did."""
    unseen = [number for number, names in enumerate(held_out) if name in names]
    return unseen or list(range(len(held_out)))


@dataclass(frozen=True)
class VariationWithLabels:
    """Varies a batch whose last channel holds a first stage's labels.

    They are turned and mirrored with the reference, by nearest neighbour, and corrupted in places.
    Intensities are varied only in the other channels.
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
        """The batch that is trained on."""
        # Both labels in one number, so that both are read at the same places.
        base = self.num_classes + 1
        both = label.int() * base + image[:, -1].int()
        seen, both = self.spatial(image[:, :-1], both, generator)
        first = self.corrupt(both.remainder(base), self.num_classes, generator)
        reference = both.div(base, rounding_mode="floor").to(label.dtype)
        varied = self.intensity(seen, generator)
        return torch.cat([varied, first[:, None].to(varied.dtype)], dim=1), reference
