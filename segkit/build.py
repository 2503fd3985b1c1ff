"""Settings become objects, here and nowhere else."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from segkit.config import (
    AdditiveGridGate,
    AdditiveSameLevelGate,
    BlockAttention,
    ConvolutionalBlockAttention,
    CtWindow,
    ModelDescription,
    NetworkConfig,
    Normalisation,
    SkipAttention,
    SqueezeExcitation,
    ZScore,
)
from segkit.data import preprocess
from segkit.nn import attention, gates
from segkit.nn.blocks import Modulated
from segkit.nn.planes import Planes, SegmentationNetwork
from segkit.nn.unet import BlockFactory, GateFactory, UNet

ACROSS = {"sagittal": 0, "coronal": 1, "axial": 2}
"""The world axis across each plane."""


def build_network(description: ModelDescription) -> SegmentationNetwork:
    """The network that a model's description asks for, with fresh weights; it takes volumes."""
    config = description.network
    placed = config.attention
    unet = UNet(
        config.spatial_dims,
        len(description.channels),
        out_channels=len(description.labels),
        channels=config.channels,
        strides=config.step_strides,
        kernels=config.level_kernels,
        norm=config.normalisation,
        downsampling=config.downsampling,
        deep_supervision=config.deep_supervision,
        skip_gate=_gate_factory(placed.skip, config) if placed.skip else None,
        encoder_attention=_block_factory(placed.encoder, config) if placed.encoder else None,
        decoder_attention=_block_factory(placed.decoder, config) if placed.decoder else None,
    )
    if config.spatial_dims == 3:
        return unet
    return Planes(unet, axis=ACROSS[description.slices])


def build_normalisers(settings: Sequence[Normalisation]) -> list[Callable[[Tensor], Tensor]]:
    """One function per channel. A CT window must be complete by now."""
    return [_normaliser(setting) for setting in settings]


def volume_patch(description: ModelDescription) -> tuple[int, int, int]:
    """The patch in voxels of a volume: one voxel thick across the planes of a 2D network."""
    patch = list(description.patch_size)
    if description.network.spatial_dims == 2:
        patch.insert(ACROSS[description.slices], 1)
    x, y, z = patch
    return x, y, z


def _normaliser(setting: Normalisation) -> Callable[[Tensor], Tensor]:
    match setting:
        case ZScore(nonzero=nonzero):
            return partial(preprocess.zscore, nonzero=nonzero)
        case CtWindow(lower=lower, upper=upper, mean=mean, std=std):
            assert lower is not None and upper is not None and mean is not None and std is not None
            return partial(preprocess.ct_window, lower=lower, upper=upper, mean=mean, std=std)


def _gate_factory(setting: SkipAttention, config: NetworkConfig) -> GateFactory:
    def make(
        *,
        level: int,
        skip_channels: int,
        coarse_channels: int,
        upsampled_channels: int,
        stride: Sequence[int],
        deepest: bool,
    ) -> nn.Module | None:
        match setting:
            case AdditiveGridGate():
                if level not in (setting.levels or range(1, len(config.channels))):
                    return None
                return gates.AdditiveGridGate(
                    config.spatial_dims,
                    skip_channels=skip_channels,
                    signal_channels=coarse_channels,
                    stride=stride,
                    deepest=deepest,
                    initial_bias=setting.initial_bias,
                    output_transform=setting.output_transform,
                    norm=config.normalisation,
                )
            case AdditiveSameLevelGate():
                if level not in (setting.levels or range(len(config.channels))):
                    return None
                return gates.AdditiveSameLevelGate(
                    config.spatial_dims,
                    skip_channels=skip_channels,
                    signal_channels=upsampled_channels,
                    initial_bias=setting.initial_bias,
                    norm=config.normalisation,
                )

    return make


def _block_factory(setting: BlockAttention, config: NetworkConfig) -> BlockFactory:
    match setting:
        case SqueezeExcitation(reduction=reduction):
            return lambda channels: Modulated(
                attention.SqueezeExcitation(channels, reduction=reduction)
            )
        case ConvolutionalBlockAttention(reduction=reduction, kernel_size=kernel_size):
            return lambda channels: attention.convolutional_block_attention(
                config.spatial_dims, channels, reduction=reduction, kernel_size=kernel_size
            )
