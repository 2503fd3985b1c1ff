"""Small networks of every kind of attention, and images for them."""

from typing import Any

import torch
from torch import Tensor, nn

from segkit.config.load import validated
from segkit.config.model import ModelDescription
from segkit.config.network import NetworkConfig
from segkit.model.build import build_network
from segkit.nn.slicewise import SlicewiseNetwork
from segkit.nn.transformer import LayerScale
from segkit.nn.unet import UNet

# Anisotropic strides, and sizes that are odd multiples of their product.
STRIDES = {2: [[2, 2], [2, 1]], 3: [[2, 2, 1], [2, 1, 2]]}


SPACE = {2: (12, 10), 3: (12, 6, 6)}


PATCH = {2: [16, 12], 3: [16, 8, 8]}


def settings(attention: dict[str, Any], spatial_dims: int, **others: Any) -> NetworkConfig:
    return validated(
        NetworkConfig,
        {
            "spatial_dims": spatial_dims,
            "channels": [6, 8, 12],
            "strides": STRIDES[spatial_dims],
            "attention": attention,
            **others,
        },
        "test",
    )


def network_of(attention: dict[str, Any], spatial_dims: int, **others: Any) -> UNet:
    """A network whose attention is far from its start, where many kinds do nothing."""
    torch.manual_seed(0)
    description = ModelDescription(
        segkit="0",
        run="test",
        channels=["a", "b"],
        labels={"background": 0, "one": 1, "two": 2},
        network=settings(attention, spatial_dims, **others),
        spacing=(1.0, 1.0, 2.0),
        normalisation=["zscore", "zscore"],
        slices="axial",
        patch_size=PATCH[spatial_dims],
    )
    network = build_network(description)
    inner = network.network if isinstance(network, SlicewiseNetwork) else network
    for module in inner.modules():
        if isinstance(module, LayerScale):
            nn.init.constant_(module.weight, 0.5)
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear) and name == "weight" and not parameter.any():
                nn.init.normal_(parameter, std=0.3)
            if name == "weight" and parameter.shape[0] == 1 and parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return inner.eval()


def image_of(spatial_dims: int, batch_size: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, 2, *SPACE[spatial_dims], generator=generator)


FAMILIES: dict[str, dict[str, Any]] = {
    "additive gate": {"skip": "additive_grid"},
    "hard gate": {"skip": {"kind": "additive_same_level", "coefficients": "hard"}},
    "attention at a skip": {"skip": {"kind": "cross_attention", "heads": 2, "head_channels": 6}},
    "attention that gates": {"skip": {"kind": "u_transformer", "heads": 2, "head_channels": 6}},
    "channel": {"encoder": "cbam", "decoder": "gc"},
    "mixed": {"encoder": "scse", "decoder": "bam"},
    "self-attention": {
        "bottleneck": {"kind": "self_attention", "heads": 2, "head_channels": 6, "window": [2, 2]}
    },
    "additive self-attention": {"bottleneck": "additive_self"},
    "transformer": {
        "bottleneck": {"kind": "transformer", "heads": 2, "head_channels": 12, "drop_path": 0.0}
    },
    "large kernels": {"encoder": "lka"},
    "paired": {"encoder": {"kind": "epa", "heads": 2, "projected": 5}},
    "head": {"head": "learned_query"},
}
