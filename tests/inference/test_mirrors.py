"""Answers to mirror images are turned back before they are averaged, and maps keep their place."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor
from torch.testing import assert_close

from segkit.config.attention import AdditiveGridGateConfig, AttentionConfig
from segkit.config.network import NetworkConfig
from segkit.geometry.grid import Grid
from segkit.inference.engines.torch_eager import LOGITS, PRESENCE
from segkit.inference.mirrors import SPREAD, Mirrored, mirrored_map
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.model.build import build_network
from segkit.model.folder import Model
from segkit.nn.map_tap import taps
from segkit.nn.unet import UNet
from tests.models import (
    constant_gates,
    description,
    headed_model,
    nearest_class,
    noise_volume,
    random_model,
)

AXES = [(), (0,), (2,), (0, 1), (0, 1, 2)]


class Weighing:
    """Logits that depend on where in its window a voxel lies, so that mirror images differ."""

    def __init__(self, space: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(1)
        self.weights = torch.randn(3, *space, generator=generator)
        self.calls: list[int] = []

    def __call__(self, windows: Tensor, keys: Collection[str]) -> dict[str, Tensor]:
        self.calls.append(len(windows))
        outputs = {LOGITS: windows[:, :1] * self.weights}
        if PRESENCE in keys:
            outputs[PRESENCE] = outputs[LOGITS][:, 1:].flatten(2).amax(dim=2)
        for key in set(keys) - {PRESENCE}:
            outputs[key] = outputs[LOGITS][:, :1, ::2, ::2, ::2]
        return outputs


def images(axes: Sequence[int]) -> list[list[int]]:
    """The axes of a window that each mirror image is turned along."""
    chosen = itertools.chain.from_iterable(
        itertools.combinations(axes, count) for count in range(len(axes) + 1)
    )
    return [[axis + 2 for axis in choice] for choice in chosen]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_logits_maps_and_presence_are_means_over_all_mirror_images(
    axes: tuple[int, ...], batch_size: int
) -> None:
    engine = Weighing((4, 6, 8))
    windows = torch.randn(2, 1, 4, 6, 8)
    found = Mirrored(engine, axes, batch_size=batch_size)(windows, ["map", PRESENCE, SPREAD])
    calls, engine.calls = engine.calls, []
    assert sum(calls) == 2 * 2 ** len(axes)
    assert max(calls) <= max(batch_size, 2)
    answers = [engine(windows.flip(turn), ["map", PRESENCE]) for turn in images(axes)]
    logits = torch.stack(
        [answer[LOGITS].flip(turn) for answer, turn in zip(answers, images(axes), strict=True)]
    )
    maps = [answer["map"].flip(turn) for answer, turn in zip(answers, images(axes), strict=True)]
    assert_close(found[LOGITS], logits.mean(dim=0))
    assert_close(found["map"], torch.stack(maps).mean(dim=0))
    assert_close(found[PRESENCE], torch.stack([a[PRESENCE] for a in answers]).mean(dim=0))
    spread = logits.softmax(dim=2).var(dim=0, correction=0).mean(dim=1, keepdim=True)
    assert_close(found[SPREAD], spread)


def test_mirrors_of_regions_differ_by_their_yes_and_no() -> None:
    windows = torch.randn(1, 1, 4, 4, 4)
    engine = Weighing((4, 4, 4))
    found = Mirrored(engine, (0,), regions=True)(windows, [SPREAD])
    shares = torch.stack(
        [
            engine(windows, ())[LOGITS].sigmoid(),
            engine(windows.flip(2), ())[LOGITS].flip(2).sigmoid(),
        ]
    )
    assert_close(found[SPREAD], shares.var(dim=0, correction=0).mean(dim=1, keepdim=True))


def test_outputs_that_do_not_depend_on_the_side_do_not_change_by_mirroring() -> None:
    told = description(classes=5, spacing=(1.0, 1.0, 1.0)).model_copy(
        update={"mirror": ["x", "y", "z"]}
    )
    model = Model(told, nearest_class(5))
    values = np.random.default_rng(0).uniform(0, 4, (11, 9, 20)).astype(np.float32)
    volume = Volume(values, Grid(values.shape, np.eye(4)))
    plain = Predictor(model)(volume, probabilities=True)
    mirrored_too = Predictor(model, tta=True)(volume, probabilities=True, uncertainty=True)
    assert_array_equal(plain.labels.data, mirrored_too.labels.data)
    assert plain.probabilities is not None and mirrored_too.probabilities is not None
    assert_array_equal(plain.probabilities.data, mirrored_too.probabilities.data)
    assert mirrored_too.variance is not None
    assert_array_equal(mirrored_too.variance.data, 0)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_prediction_with_mirroring_is_that_of_the_mean_logits(batch_size: int) -> None:
    model = random_model(NetworkConfig(channels=[4, 4, 4]))
    model = Model(model.description.model_copy(update={"mirror": ["x", "z"]}), model.network)
    volume = noise_volume((8, 8, 8))
    found = Predictor(model, tta=True, batch_size=batch_size)(
        volume, probabilities=True, uncertainty=True
    )
    image = torch.from_numpy(volume.data[None, None])
    with torch.no_grad():
        logits = torch.stack([model.network(image.flip(t)).flip(t) for t in images((0, 2))])
    shares = logits.mean(dim=0).softmax(dim=1)[0].movedim(0, -1)
    assert found.probabilities is not None and found.variance is not None
    assert_allclose(found.probabilities.data, shares.numpy(), atol=1e-3)
    spread = logits.softmax(dim=2).var(dim=0, correction=0).mean(dim=1)[0]
    assert spread.max() > 1e-4
    assert_allclose(found.variance.data, spread.numpy(), rtol=1e-3, atol=1e-7)
    plain = Predictor(model)(volume, probabilities=True).probabilities
    assert plain is not None
    assert np.abs(plain.data.astype(float) - found.probabilities.data).max() > 0.01


class SampledCoordinates(UNet):
    """Maps that hold the image at the centres of their cells, which need not be symmetric."""

    def forward(self, image: Tensor) -> Tensor:
        logits = super().forward(image)
        for tap in taps(self).values():
            assert tap.info is not None and tap.info.placement is not None
            cells = image
            for axis, (step, offset) in enumerate(
                zip(tap.info.placement.stride, tap.info.placement.offset, strict=True), start=2
            ):
                rows = torch.arange(image.shape[axis] // int(step)) * int(step) + int(offset)
                assert float(offset).is_integer()
                cells = cells.index_select(axis, rows)
            tap(cells)
        return logits


@pytest.mark.parametrize("mirror", [[], ["x"], ["y", "z"], ["x", "y", "z"]])
def test_a_coordinate_field_in_maps_of_mirror_images_stays_where_it_is(mirror: list[str]) -> None:
    network = NetworkConfig(
        channels=[2, 2, 2, 2],
        deep_supervision=False,
        attention=AttentionConfig(skip=AdditiveGridGateConfig(levels=[0, 1, 2])),
    )
    told = description(
        channels=3, spacing=(1.0, 1.0, 1.0), patch_size=(16, 16, 16), network=network
    ).model_copy(update={"mirror": mirror})
    built = build_network(told)
    built.__class__ = SampledCoordinates
    for tap in taps(built).values():
        assert tap.info is not None and tap.info.placement is not None
        whole = replace(tap.info.placement, offset=(0.0, 1.0, 0.0))
        tap.info = replace(tap.info, lowest=-1e6, highest=1e6, placement=whole)
    grid = Grid((32, 32, 32), np.diag([1.0, 1.0, 1.0, 1.0]))
    volume = Volume(grid.centres().astype(np.float32) + 1, grid)
    maps = Predictor(Model(told, built), tta=True)(volume, maps=True).maps
    assert len(maps) == 3
    for attention_map in maps.values():
        native = attention_map.volume
        assert native is not None
        assert_allclose(native.data, native.grid.centres() + 1, atol=1e-3)


def test_a_map_over_channels_has_no_place_to_change() -> None:
    info = next(iter(headed_model().network.maps().values()))
    nowhere = replace(info, placement=None)
    assert mirrored_map(nowhere, (0, 1, 2)) is nowhere


def test_constant_gates_stay_constant_when_mirrored() -> None:
    model = constant_gates(0.25)
    model = Model(model.description.model_copy(update={"mirror": ["x", "y"]}), model.network)
    for attention_map in Predictor(model, tta=True)(
        noise_volume((9, 8, 13)), maps=True
    ).maps.values():
        assert attention_map.volume is not None
        assert_allclose(attention_map.volume.data, 0.25, rtol=1e-6)
