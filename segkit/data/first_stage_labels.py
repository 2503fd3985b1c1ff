"""A first stage's labels of an image, as its last channel: where they come from and how they vary.

They stay whole numbers from the file to the network, which alone spreads them over one channel for
each class: one channel in memory and on disk, whatever the number of classes.
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
    """The image with one more channel: labels of the volume that it was made of, on its grid.

    Raises VolumeError where they are of another volume.
    """
    turned = prepared.orientation.turn_grid(labels.grid)
    holds = all(span.stop <= size for span, size in zip(prepared.box, turned.shape, strict=True))
    if not (holds and cropped(turned, prepared.box).agrees_with(prepared.source)):
        raise VolumeError("the first stage's labels lie on another grid than the volume")
    channel = prepare_label(labels, prepared)
    return replace(prepared, image=torch.cat([prepared.image, channel[None].to(torch.float32)]))


def majority(labels: Sequence[Volume]) -> Volume:
    """The label that most of several segmentations of one volume give each voxel.

    Where labels tie, that of the segmentation that comes first.
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
    """Numbers of the models that held a case out of their training; of all where none did."""
    unseen = [number for number, names in enumerate(held_out) if name in names]
    return unseen or list(range(len(held_out)))


@dataclass(frozen=True)
class VariationWithLabels:
    """Varies a batch whose last channel holds a first stage's labels.

    They are turned and mirrored with the reference, by nearest neighbour, and made worse in places;
    intensities are varied in the other channels alone.
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
