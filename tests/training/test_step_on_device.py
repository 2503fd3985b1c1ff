"""A whole training step, and a batch of windows, of every network on a pretended device.

Nothing may wait for the device, and nothing may be left on the host.
"""

from collections.abc import Collection
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from segkit.config.training import TrainConfig
from segkit.data.augment_intensity import IntensityVariation
from segkit.data.augment_spatial import SpatialVariation
from segkit.inference.engines.torch_eager import LOGITS, TorchEngine
from segkit.inference.mirrors import Mirrored
from segkit.inference.model_walk import window_layout
from segkit.inference.source_rows import labels_of
from segkit.inference.windows import stream
from segkit.nn.losses import (
    SummedLoss,
    deep_dice_binary_cross_entropy,
    deep_dice_cross_entropy,
)
from segkit.nn.partly_labelled import PartlyLabelled
from segkit.nn.slicewise import SlicewiseNetwork
from segkit.training.module import SegmentationModule
from segkit.training.optimisers import make_optimiser, make_schedule
from segkit.training.validation import Validation, dice_of_groups
from tests.config.test_attention import KINDS, OPTIONS
from tests.networks import SPACE, network_of
from tests.nn.test_loss_terms import EVERY
from tests.pretended_device import DEVICE, Pretended, pretended

SMALL: dict[str, dict[str, Any]] = {
    "cross_attention": {"heads": 2, "head_channels": 6},
    "u_transformer": {"heads": 2, "head_channels": 6},
    "self_attention": {"heads": 2, "head_channels": 6, "positions": "rotary"},
    "transformer": {"heads": 2, "head_channels": 12, "drop_path": 0.5},
    "epa": {"heads": 2, "projected": 5},
}


def every_place() -> list[dict[str, Any]]:
    """Settings of attention that together have every kind at every place."""
    kinds = {
        place: [{"kind": kind, **SMALL.get(kind, {})} for kind in options]
        for place, options in OPTIONS.items()
    }
    return [
        {
            place: each[(number + 3 * (place == "decoder")) % len(each)]
            for place, each in kinds.items()
        }
        for number in range(max(len(each) for each in kinds.values()))
    ]


SHIFTED = {"kind": "self_attention", "heads": 2, "head_channels": 6, "positions": "relative"}
GATES = {"kind": "additive_grid", "coefficients": "hard", "gates": 2}
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"kinds {number}": (each, {}) for number, each in enumerate(every_place())},
    "hard gates": ({"skip": GATES}, {}),
    "shifted": ({"bottleneck": SHIFTED}, {}),
    "mednext": ({}, {"block": "mednext"}),
    "batch normalisation": ({}, {"normalisation": "batch"}),
    "group normalisation": ({}, {"normalisation": "group", "downsampling": "pool"}),
}


def everywhere(fast: Collection[tuple[str, int]]) -> list[Any]:
    """Every network in two and three dimensions; all but the fast ones are slow tests."""
    return [
        pytest.param(name, dims, marks=[] if (name, dims) in fast else [pytest.mark.slow])
        for name in NETWORKS
        for dims in (2, 3)
    ]


REGIONS = ((1,), (2,), (1, 2))
WAYS: dict[str, dict[str, Any]] = {
    "sgd": {"optimiser": "sgd"},
    "muon": {"optimiser": "muon"},
    "several batches": {"batches": 2},
    "partly labelled": {"partly": PartlyLabelled(3, ((), (1,)), 3)},
    "partly labelled regions": {
        "partly": PartlyLabelled(3, ((), (0,)), 3, REGIONS),
        "loss": partial(
            deep_dice_binary_cross_entropy, regions=REGIONS, pool_batch=True, ignore=None
        ),
    },
    "every term": {
        "loss": SummedLoss(tuple((1.0, term) for term in EVERY.values()), (1.0, 2.0, 3.0))
    },
}


def network_on(device: Pretended, name: str, dims: int) -> Any:
    attention, others = NETWORKS.get(name, ({}, {}))
    if "shift" in name:
        window = {"window": [2] * dims, "shift": True}
        attention = {"bottleneck": {**attention["bottleneck"], **window}}
    inner = network_of(attention, dims, **others)
    network = inner if dims == 3 else SlicewiseNetwork(inner, axis=2)
    return device.put_module(network.train())


def space_of(dims: int) -> tuple[int, int, int]:
    x, y, z = SPACE[3] if dims == 3 else (*SPACE[2], 1)
    return x, y, z


def step(
    device: Pretended,
    network: Any,
    space: tuple[int, ...],
    *,
    optimiser: str = "adamw",
    batches: int = 1,
    **changes: Any,
) -> None:
    """A training step on the device, as Lightning calls it; then the average of weights."""
    settings: dict[str, Any] = {"optimiser": optimiser, "learning_rate": 0.01, "steps": 19}
    config = TrainConfig.model_validate({**settings, "weight_decay": 0.01})
    spatial = SpatialVariation(space, (0,), rotation_probability=1.0, elastic_probability=1.0)
    intensity = IntensityVariation(noise_probability=1.0)
    parts: dict[str, Any] = {
        "loss": partial(deep_dice_cross_entropy, pool_batch=True, ignore=None),
        "optimiser": make_optimiser(config),
        "schedule": make_schedule(config),
        "vary": lambda image, label, generator: (
            intensity((moved := spatial(image, label, generator))[0], generator),
            moved[1],
        ),
        "validation": Validation((), segment=mock.Mock(), score=mock.Mock()),
        "class_names": ("background", "one", "two"),
        "presence_weight": 0.1,
    }
    module = SegmentationModule(network, num_steps=19, seed=1, **{**parts, **changes})
    module._device = DEVICE
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=batches, global_step=3, world_size=1, global_rank=0
    )
    made = module.optimiser(network.parameters())
    schedule = module.schedule(made)
    average = [each.detach().clone() for each in network.parameters()]
    with mock.patch.object(SegmentationModule, "log"):
        for place in range(batches):
            image = torch.randn(2, 2, *spatial.cut_size).half()
            label = torch.randint(0, 3, (2, *spatial.cut_size), dtype=torch.uint8)
            batch = {"image": device.put(image), "label": device.put(label)}
            module.training_step(batch, place).backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
    made.step()
    schedule.step()
    torch._foreach_lerp_(average, [each.detach() for each in network.parameters()], 0.1)


def test_the_networks_have_every_kind_of_attention_at_every_place() -> None:
    found = {(place, each["kind"]) for one in every_place() for place, each in one.items()}
    assert found == set(KINDS)


@pytest.mark.parametrize(
    ("name", "dims"), everywhere([("kinds 0", 2), ("kinds 5", 3), ("mednext", 2), ("shifted", 3)])
)
def test_a_step_of_every_network_waits_for_nothing(name: str, dims: int) -> None:
    with pretended() as device:
        step(device, network_on(device, name, dims), space_of(dims))
    assert not device.waits and not device.mismatches
    assert device.operations > 500


@pytest.mark.parametrize("name", WAYS)
def test_a_step_in_every_way_of_training_waits_for_nothing(name: str) -> None:
    with pretended() as device:
        step(device, network_on(device, "plain", 3), space_of(3), **WAYS[name])
    assert not device.waits and not device.mismatches


@pytest.mark.parametrize(("name", "dims"), everywhere([("kinds 0", 2)]))
def test_windows_of_every_network_and_their_labels_wait_for_nothing(name: str, dims: int) -> None:
    """With all maps that have a position, and on mirror images, as `--maps --tta` asks."""
    # A wrapped tensor cannot be made in inference mode.
    compute = TorchEngine.__call__.__wrapped__  # type: ignore[attr-defined]
    with pretended() as device, torch.no_grad():
        network = network_on(device, name, dims).eval()
        x, y, z = space_of(3)
        image = device.put(torch.randn(2, x, y, z + 1))
        keys = [key for key, info in network.maps().items() if info.placement is not None]
        engine = TorchEngine(network, device=DEVICE)
        mirrored = Mirrored(lambda windows, keys: compute(engine, windows, keys), (0,))
        layout = window_layout(network, space_of(dims), 0.5)
        for slab in stream(image, lambda windows: mirrored(windows, keys), layout, batch_size=4):
            assert set(slab.rows) == {LOGITS, *keys}
            labels_of(slab.rows.pop(LOGITS), None)
    assert not device.waits and not device.mismatches


def test_the_scores_of_a_validation_wait_for_the_device_once_for_all_classes() -> None:
    label = torch.randint(0, 3, (6, 5, 4), dtype=torch.uint8)
    waits = []
    for groups in ([(1, 2)], [(1,), (2,), (1, 2)]):
        with pretended() as device:
            dice_of_groups(device.put(label), label, groups=groups, ignore=None)
        waits.append(sum(device.waits.values()))
        assert not device.mismatches
    assert waits[0] == waits[1] <= 3  # the reference's copy, the counts, and their copy back
