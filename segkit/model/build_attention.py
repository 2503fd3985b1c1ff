"""Build attention modules from their settings."""

import math
from collections.abc import Sequence

from torch import nn

from segkit.config import attention as settings
from segkit.config.network import NetworkConfig
from segkit.errors import ConfigError
from segkit.nn import channel_attention as channel
from segkit.nn import cross_attention as cross
from segkit.nn import gates, pooling
from segkit.nn import self_attention as bottleneck
from segkit.nn import spatial_attention as spatial
from segkit.nn.blocks import Modulated
from segkit.nn.unet import BlockFactory, GateFactory

LEAST_SQUEEZED = 4
LEAST_CONVOLVED = 8
MOST_PAIRED = 4096
"""Largest number of cells in a window whose pairs each have a bias: with four heads, these biases
take 268 MB."""


def skip_factory(config: NetworkConfig) -> GateFactory:
    """Function that makes the attention of each skip."""
    setting = config.attention.skip
    levels = config.attention.skip_levels(len(config.channels))

    def make(
        *,
        level: int,
        skip_channels: int,
        coarse_channels: int,
        upsampled_channels: int,
        stride: Sequence[int],
        deepest: bool,
    ) -> nn.Module | None:
        if level not in levels:
            return None
        match setting:
            case None:
                return None
            case settings.AdditiveGridGateConfig():
                return gates.AdditiveGridGate(
                    config.spatial_dims,
                    skip_channels=skip_channels,
                    signal_channels=coarse_channels,
                    stride=stride,
                    deepest=deepest,
                    initial_bias=setting.initial_bias,
                    output_transform=setting.output_transform,
                    coefficients=setting.coefficients,
                    num_gates=setting.gates,
                    norm=config.normalisation,
                )
            case settings.AdditiveSameLevelGateConfig():
                return gates.AdditiveSameLevelGate(
                    config.spatial_dims,
                    skip_channels=skip_channels,
                    signal_channels=upsampled_channels,
                    initial_bias=setting.initial_bias,
                    coefficients=setting.coefficients,
                    norm=config.normalisation,
                )
            case settings.CrossAttentionConfig(heads=heads, head_channels=head_channels):
                return cross.CrossAttention(
                    config.spatial_dims,
                    skip_channels=skip_channels,
                    signal_channels=coarse_channels,
                    stride=stride,
                    heads=_heads(heads, levels.index(level), skip_channels, head_channels),
                    head_channels=head_channels,
                )
            case settings.UTransformerGateConfig(heads=heads, head_channels=head_channels):
                return cross.UTransformerGate(
                    config.spatial_dims,
                    skip_channels=skip_channels,
                    signal_channels=coarse_channels,
                    stride=stride,
                    heads=_heads(heads, levels.index(level), skip_channels, head_channels),
                    head_channels=head_channels,
                    initial_bias=setting.initial_bias,
                    norm=config.normalisation,
                )

    return make


def block_factory(setting: settings.BlockAttentionConfig, config: NetworkConfig) -> BlockFactory:
    """Function that makes the attention after each level's convolutions."""
    dims = config.spatial_dims

    def make(channels: int) -> nn.Module:
        # The networks of the papers have many channels. If a ReLU has only one or two channels, it
        # often outputs 0 for every input, and never learns.
        most = max(channels // LEAST_SQUEEZED, 1)
        match setting:
            case settings.SqueezeExcitationConfig(reduction=reduction):
                return Modulated(
                    channel.SqueezeExcitation(channels, reduction=min(reduction, most))
                )
            case settings.EfficientChannelAttentionConfig():
                return Modulated(channel.EfficientChannelAttention(channels))
            case settings.ConvolutionalBlockAttentionConfig(reduction=reduction, kernel_size=size):
                return spatial.convolutional_block_attention(
                    dims, channels, reduction=min(reduction, most), kernel_size=size
                )
            case settings.BottleneckAttentionConfig(reduction=reduction, dilation=dilation):
                return Modulated(
                    spatial.BottleneckAttention(
                        dims,
                        channels,
                        # Its convolutions take seven times longer with 4 channels than with 8.
                        reduction=min(reduction, max(channels // LEAST_CONVOLVED, 1)),
                        dilation=dilation,
                        norm=config.normalisation,
                    )
                )
            case settings.ConcurrentExcitationConfig(reduction=reduction, aggregation=aggregation):
                return spatial.ConcurrentExcitation(
                    dims, channels, reduction=min(reduction, most), aggregation=aggregation
                )
            case settings.PooledSpatialAttentionConfig(kernel_size=size):
                return Modulated(spatial.PooledSpatialAttention(dims, kernel_size=size))
            case settings.SpatialExcitationConfig():
                return Modulated(spatial.SpatialExcitation(dims, channels))
            case settings.GlobalContextConfig(fusion="add", reduction=reduction):
                return channel.GlobalContext(dims, channels, reduction=min(reduction, most))
            case settings.GlobalContextConfig(reduction=reduction):
                return Modulated(
                    channel.GlobalContextExcitation(dims, channels, reduction=min(reduction, most))
                )

    return make


def token_factory(setting: settings.TokenAttentionConfig, coarsest: Sequence[int]) -> BlockFactory:
    """Function that makes the attention at the bottleneck; `coarsest` is the grid there."""

    def make(channels: int) -> nn.Module:
        match setting:
            case settings.SelfAttentionConfig(heads=heads, head_channels=head_channels):
                window = setting.window
                if window is None and setting.positions == "relative":
                    window = list(coarsest)
                if setting.positions == "relative" and math.prod(window or ()) > MOST_PAIRED:
                    raise ConfigError(
                        f"network.attention.bottleneck: relative positions among "
                        f"{math.prod(window or ())} voxels of the coarsest level need too much "
                        f"memory; set a window of at most {MOST_PAIRED} voxels, or other positions"
                    )
                return bottleneck.SelfAttention(
                    channels,
                    heads=_heads(heads, 0, channels, head_channels),
                    head_channels=head_channels,
                    positions=setting.positions,
                    window=window,
                )
            case settings.AdditiveSelfAttentionConfig(width=width):
                return bottleneck.AdditiveSelfAttention(channels, width=width)

    return make


def pooling_factory(setting: settings.PoolingConfig, num_classes: int) -> BlockFactory:
    """Function that makes the presence head for a number of classes."""

    def make(channels: int) -> nn.Module:
        match setting:
            case settings.MeanPoolingConfig():
                return pooling.MeanPooling(channels, num_classes=num_classes)
            case settings.GatedPoolingConfig(width=width):
                return pooling.GatedPooling(channels, num_classes=num_classes, width=width)
            case settings.LearnedQueryPoolingConfig():
                return pooling.LearnedQueryPooling(channels, num_classes=num_classes)

    return make


def _heads(given: int | list[int] | None, position: int, channels: int, head_channels: int) -> int:
    if isinstance(given, list):
        return given[position]
    return given or heads_that_fit(channels, head_channels)


def heads_that_fit(channels: int, head_channels: int) -> int:
    """Number of heads that fit into the channels, at least 1."""
    return max(channels // head_channels, 1)
