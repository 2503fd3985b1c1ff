"""Models whose answers are known or random, and volumes for them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor

from segkit.config.attention import (
    AdditiveGridGateConfig,
    AttentionConfig,
    GatedPoolingConfig,
)
from segkit.config.data import CtWindowConfig
from segkit.config.model import ModelDescription
from segkit.config.network import NetworkConfig
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume
from segkit.model.build import build_network
from segkit.model.folder import Model, load_model, save_model
from segkit.nn.map_tap import taps
from segkit.nn.slicewise import SlicewiseNetwork
from segkit.nn.unet import UNet
from tests.helpers import linear_field
from tests.networks import FAMILIES, PATCH, network_of, settings

AS_IT_IS = CtWindowConfig(lower=-1e6, upper=1e6, mean=0.0, std=1.0)


def description(
    *,
    channels: int = 1,
    classes: int = 2,
    spacing: tuple[float, float, float],
    patch_size: tuple[int, ...] = (8, 8, 8),
    network: NetworkConfig | None = None,
) -> ModelDescription:
    return ModelDescription(
        segkit="test",
        run="test",
        channels=[f"channel {number}" for number in range(channels)],
        labels={f"label {number}": number for number in range(classes)},
        network=network or NetworkConfig(channels=[2, 2, 2]),
        spacing=spacing,
        normalisation=[AS_IT_IS] * channels,
        slices="axial",
        patch_size=list(patch_size),
    )


class NearestClass(UNet):
    """Logits that are largest for the class whose number is nearest to the voxel's value."""

    def forward(self, image: Tensor) -> Tensor:
        classes = torch.arange(self.heads[0].out_channels, device=image.device)
        return -((image - classes.view(1, -1, 1, 1, 1)) ** 2)


def nearest_class(classes: int) -> NearestClass:
    return NearestClass(3, 1, out_channels=classes, channels=(2, 2, 2))


class PooledCoordinates(UNet):
    """Maps that are the image, averaged over the voxels of each cell."""

    def forward(self, image: Tensor) -> Tensor:
        logits = super().forward(image)
        for tap in taps(self).values():
            assert tap.info is not None and tap.info.placement is not None
            stride = [int(step) for step in tap.info.placement.stride]
            tap(F.avg_pool3d(image, stride))
        return logits


def pooled_coordinates(strides: list[list[int]]) -> Model:
    network = NetworkConfig(
        channels=[2, 2, 2, 2],
        strides=strides,
        downsampling="pool",
        deep_supervision=False,
        attention=AttentionConfig(skip=AdditiveGridGateConfig(levels=[0, 1, 2])),
    )
    told = description(channels=3, spacing=(0.7, 1.3, 4.0), patch_size=(16, 16, 8), network=network)
    built = build_network(told)
    built.__class__ = PooledCoordinates
    for tap in taps(built).values():
        assert tap.info is not None
        tap.info = replace(tap.info, lowest=-1e6, highest=1e6)
    return Model(told, built)


def class_volume(grid: Grid, classes: int) -> Volume:
    """Classes by place in the world, so that a voxel out of place shows."""
    values = np.floor(linear_field(grid.centres()) / 3) % classes
    return Volume(values.astype(np.uint8), grid)


def inside_both(network_grid: Grid, grid: Grid) -> ndarray:
    """Voxels between the outermost centres of the network's grid, where nothing is held constant,
    and whose own neighbours in the network's grid lie between the outermost centres of theirs."""
    index = network_grid.index(grid.centres())
    low = np.ceil(network_edges(network_grid, grid)[0])
    high = np.floor(network_edges(network_grid, grid)[1])
    return ((index >= low - 1e-6) & (index <= high + 1e-6)).all(axis=-1)


def network_edges(network_grid: Grid, grid: Grid) -> tuple[ndarray, ndarray]:
    corners = grid.world(
        np.array(
            [
                [x, y, z]
                for x in (0, grid.shape[0] - 1)
                for y in (0, grid.shape[1] - 1)
                for z in (0, grid.shape[2] - 1)
            ],
            dtype=float,
        )
    )
    index = network_grid.index(corners)
    last = np.array(network_grid.shape) - 1
    return np.maximum(index.min(0), 0), np.minimum(index.max(0), last)


def world_axes(code: str) -> list[int]:
    letters = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
    return [letters[letter] for letter in code]


def constant_gates(value: float) -> Model:
    network = NetworkConfig(
        channels=[2, 2, 2],
        attention=AttentionConfig(skip=AdditiveGridGateConfig(levels=[0, 1])),
    )
    told = description(spacing=(1.0, 1.0, 1.0), network=network)
    model = Model(told, build_network(told))
    for tap in taps(model.network).values():
        tap.edit = lambda attention_map: torch.full_like(attention_map, value)
    return model


def random_model(network: NetworkConfig, patch_size: tuple[int, ...] = (8, 8, 8)) -> Model:
    torch.manual_seed(0)
    told = description(classes=3, spacing=(1.0, 1.0, 1.0), network=network, patch_size=patch_size)
    return Model(told, build_network(told).eval())


def noise_volume(shape: tuple[int, int, int]) -> Volume:
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return Volume(values, Grid(shape, np.eye(4)))


def headed_model(*, patch_size: tuple[int, ...] = (8, 8, 8), **changes: object) -> Model:
    attention = AttentionConfig(head=GatedPoolingConfig(width=6), skip=AdditiveGridGateConfig())
    settings = {"channels": [4, 4, 4], "attention": attention, **changes}
    return random_model(NetworkConfig.model_validate(settings), patch_size)


FAST: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (3, {}),
    "gated": (3, {"skip": "additive_grid"}),
    "channel and space": (3, {"encoder": "se", "decoder": "cbam"}),
    "self-attention": (
        3,
        FAMILIES["self-attention"]
        | {
            "bottleneck": {
                "kind": "self_attention",
                "heads": 2,
                "head_channels": 6,
                "positions": "rotary",
            }
        },
    ),
    "planes with presence": (2, {"skip": "additive_grid", "head": "gated"}),
}


SLOW: dict[str, tuple[int, dict[str, Any]]] = {
    f"{name} {dims}D": (dims, attention)
    for dims in (2, 3)
    for name, attention in {
        **{family: FAMILIES[family] for family in FAMILIES if family != "self-attention"},
        "softmax gate": {"skip": {"kind": "additive_grid", "coefficients": "softmax"}},
        "mean-flow gate": {"skip": {"kind": "additive_grid", "coefficients": "mean_flow"}},
        "hard grid gate": {"skip": {"kind": "additive_grid", "coefficients": "hard"}},
        "several gates": {"skip": {"kind": "additive_grid", "gates": 2}},
        "self-attention in windows": {
            "bottleneck": {**FAMILIES["self-attention"]["bottleneck"], "window": [2] * dims}
        },
        "self-attention by offsets": {
            "bottleneck": {
                **FAMILIES["self-attention"]["bottleneck"],
                "window": [2] * dims,
                "positions": "relative",
            }
        },
        "self-attention in shifted windows": {
            "bottleneck": {
                **FAMILIES["self-attention"]["bottleneck"],
                "window": [2] * dims,
                "positions": "relative",
                "shift": True,
            }
        },
        "self-attention with sines": {
            "bottleneck": {
                "kind": "self_attention", "heads": 2, "head_channels": 6, "positions": "sincos"
            }
        },
        "mean head": {"head": "mean"},
        "gated head": {"head": "gated"},
    }.items()
}  # fmt: skip


def model_of(attention: dict[str, Any], spatial_dims: int, folder: Path | None = None) -> Model:
    """Anisotropic strides, two channels, three classes; attention far from its start."""
    inner = network_of(attention, spatial_dims)
    network = inner if spatial_dims == 3 else SlicewiseNetwork(inner, axis=2)
    description = ModelDescription(
        segkit="0",
        run="test",
        channels=["a", "b"],
        labels={"background": 0, "one": 1, "two": 2},
        network=settings(attention, spatial_dims),
        spacing=(1.0, 1.0, 1.0),
        normalisation=["zscore", "zscore"],
        slices="axial",
        patch_size=PATCH[spatial_dims],
    )
    return Model(description, network, folder=folder)


def saved(folder: Path, attention: dict[str, Any] | None = None) -> Model:
    save_model(folder, model_of(attention or {"skip": "additive_grid"}, 3))
    return load_model(folder)
