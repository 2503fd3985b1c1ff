"""Segment the volume of a layer, in a thread of its own, with progress and a way to stop."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from segkit import Predictor, Volume, label_colour, load_model
from segkit_napari.layers import LayerTuple, labels_layer, map_layers


class Cancelled(Exception):  # noqa: N818 - nothing went wrong
    """The user pressed Cancel."""


@dataclass
class Work:
    """How far a prediction is, and whether it should stop; two threads share it."""

    share: float = 0.0
    stopped: Event = field(default_factory=Event)

    def track(self, slabs: Iterable[Any], count: int) -> Iterator[Any]:
        """Yield the slabs of a volume, and note how many are done.

        Raises:
            Cancelled: it should stop.
        """
        for number, slab in enumerate(slabs, start=1):
            if self.stopped.is_set():
                raise Cancelled
            yield slab
            self.share = number / count
        if self.stopped.is_set():
            raise Cancelled


def channels_of(model: str | Path) -> list[str]:
    """Names of the channels that a model takes, in order.

    Raises:
        ModelError: there is no model.
    """
    return list(load_model(model).description.channels)


def predicted_layers(
    model: str | Path,
    volume: Volume,
    name: str,
    *,
    maps: bool = True,
    mirrors: bool = False,
    device: str = "auto",
    work: Work | None = None,
) -> list[LayerTuple]:
    """The labels of a volume and, below them, its attention maps, each on its own grid.

    Args:
        model: a run, a model folder or a cross-validation, or an address that segkit loads.
        volume: the scan, with the channels of the model.
        name: name of the scan.
        maps: return the attention maps too; they come from the same pass.
        mirrors: average over mirror images.
        device: `auto`, `cpu` or `cuda`.
        work: tells how far it is, and stops it.

    Raises:
        SegkitError: model and volume do not fit together.
        Cancelled: the user stopped it.
    """
    work = work or Work()
    predictor = Predictor.load(model, device=device, tta=mirrors)
    prediction = predictor(volume, maps=maps, track=work.track)
    labelling = predictor.model.description.labelling
    numbers = labelling.numbers_in_files
    colours = {each: label_colour(numbers[each]) for each in labelling.members}
    layers: list[LayerTuple] = []
    placed = [each for each in prediction.maps.values() if each.volume is not None]
    for each in sorted(placed, key=lambda found: found.info.level):
        limits = (each.info.lowest, each.info.highest)
        layers += map_layers(each.volume, each.info.key, limits, visible=False)
    return [*layers, labels_layer(prediction.labels, f"{name} labels", numbers, colours)]
