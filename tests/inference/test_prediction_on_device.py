"""A whole prediction on a pretended device: what it waits for, and when."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from segkit.geometry.grid import Grid
from segkit.inference.engines.torch_eager import TorchEngine
from segkit.inference.predictor import Prediction, Predictor
from segkit.inference.windows import Slab
from segkit.io.volume import Volume
from segkit.model.folder import Model
from tests.models import headed_model, noise_volume
from tests.pretended_device import DEVICE, Pretended, pretended


@pytest.fixture
def engine_without_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapped tensor cannot be made in inference mode."""
    compute = TorchEngine.__call__.__wrapped__  # type: ignore[attr-defined]
    monkeypatch.setattr(TorchEngine, "__call__", compute)


def predict_on(
    device: Pretended, predictor: Predictor, volume: Volume, **asked: Any
) -> tuple[Prediction, list[int]]:
    """The prediction, and the number of operations when each slab was complete."""
    (member,) = predictor.members
    slabs: list[int] = []

    def track(items: Iterable[Slab], count: int) -> Iterator[Slab]:
        for slab in items:
            slabs.append(device.operations)
            yield slab

    device.put_module(member.model.network)
    member.engine.device = DEVICE  # type: ignore[attr-defined]
    prepared = predictor.prepare(volume)
    images = [replace(prepared, image=device.put(prepared.image))]
    return predictor(volume, images=images, track=track, **asked), slabs


@pytest.mark.parametrize("spacing", [1.0, 1.4])
@pytest.mark.usefixtures("engine_without_inference_mode")
def test_a_slab_is_read_only_when_the_next_one_is_queued(spacing: float) -> None:
    shape = (9, 12, 40)
    volume = Volume(noise_volume(shape).data, Grid(shape, np.diag([spacing, spacing, spacing, 1])))
    expected = Predictor(headed_model(), device="cpu", engine="torch")(volume)
    predictor = Predictor(headed_model(), device="cpu", engine="torch")
    with pretended() as device, torch.no_grad():
        found, slabs = predict_on(device, predictor, volume)
    assert_array_equal(found.labels.data, expected.labels.data)
    assert found.presence == pytest.approx(expected.presence)
    assert len(slabs) > 5 and not device.mismatches
    # The presence logits, one for each batch of windows, are copied when all is queued.
    assert all("predictor.py" in line for line in device.waits)
    # A slab is read twice: for NaN, and for its labels.
    for number, slab in enumerate(slabs):
        assert sum(read < slab for read in device.reads) == 2 * max(number - 1, 0)


@pytest.mark.usefixtures("engine_without_inference_mode")
def test_more_windows_in_a_slab_are_no_more_waits_with_maps_and_mirror_images() -> None:
    waits = []
    for width in (12, 24):
        attention = {"encoder": {"kind": "se"}, "skip": {"kind": "additive_grid"}}
        model = headed_model(attention=attention)
        model = Model(model.description.model_copy(update={"mirror": ["x", "y"]}), model.network)
        predictor = Predictor(model, device="cpu", engine="torch", tta=True)
        volume = noise_volume((width, width, 20))
        with pretended() as device, torch.no_grad():
            predict_on(device, predictor, volume, maps=True, disagreement=True)
        assert not device.mismatches
        # Maps over channels, one vector for each batch of windows, are copied when all is queued.
        waits.append({line: n for line, n in device.waits.items() if "vectors =" not in line})
        assert len(waits[-1]) < len(device.waits)
    assert waits[0] == waits[1]
    (line,) = waits[0]  # the rows of the maps of a slab
    assert "attention_maps.py" in line and "values = rows" in line
