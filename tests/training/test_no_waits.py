"""No training step makes a GPU wait for the host, and nothing of it is left on the host."""

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from segkit.data.augment_intensity import IntensityVariation
from segkit.data.augment_labels import LabelCorruption
from segkit.data.augment_spatial import SpatialVariation
from segkit.data.synthesis import deform, synthesise
from tests.pretended_device import pretended

PATCH = (16, 16, 16)


@pytest.mark.parametrize(
    "asks",
    [
        lambda held: held.sum().item(),
        lambda held: bool((held > 0).any()),
        lambda held: held.nonzero(),
        lambda held: held[held > 0],
        lambda held: held.cpu(),
        lambda held: held.to("cpu"),
        lambda held: torch.ones(3).to(held.device),
        lambda held: held[torch.tensor([0, 1])],
    ],
)
def test_the_pretended_device_counts_what_a_gpu_would_wait_for(
    asks: Callable[[Tensor], object],
) -> None:
    with pretended() as device:
        asks(device.put(torch.arange(3.0)))
    assert sum(device.waits.values()) == 1


def test_the_pretended_device_waits_for_no_copy_that_need_not_be_waited_for() -> None:
    with pretended() as device:
        held = device.put(torch.arange(3.0))
        held = held + torch.ones(3).to(held.device, non_blocking=True)
    assert not device.waits and not device.mismatches
    assert held.values.tolist() == [1.0, 2.0, 3.0]  # type: ignore[attr-defined]


def test_the_pretended_device_tells_a_tensor_that_was_left_on_the_host() -> None:
    with pretended() as device:
        _ = device.put(torch.arange(3.0)) * torch.ones(3)
    assert sum(device.mismatches.values()) == 1


def test_varying_a_batch_waits_for_nothing() -> None:
    generator = Generator().manual_seed(0)
    spatial = SpatialVariation(
        PATCH, (0, 2), rotation_probability=0.7, scale_probability=0.7, elastic_probability=0.5
    )
    often = {field: 0.6 for field in vars(IntensityVariation()) if field.endswith("probability")}
    intensity = IntensityVariation(**often)
    with pretended() as device:
        for _ in range(4):
            image = device.put(torch.randn(3, 2, *spatial.cut_size))
            label = device.put(torch.randint(0, 3, (3, *spatial.cut_size), dtype=torch.uint8))
            image, label = spatial(image, label, generator)
            intensity(image, generator)
            LabelCorruption(removal_probability=0.8)(label, 2, generator)
    assert not device.waits and not device.mismatches


def test_synthesis_of_a_batch_waits_for_nothing() -> None:
    generator = Generator().manual_seed(0)
    with pretended() as device:
        label = device.put(torch.randint(0, 3, (3, *PATCH), dtype=torch.uint8))
        moved = deform(label, amplitude=2.0, generator=generator)
        synthesise(moved, num_labels=3, intensities=None, generator=generator)
    assert not device.waits and not device.mismatches
