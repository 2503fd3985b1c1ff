"""Settings of attention: its kind, at each place of the network.

Each kind is one section with its own settings. The name of a kind, in place of a section, selects
its defaults. docs/attention.md compares the kinds.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from segkit.config.base import Few, Positive, Section, Width, section_of_kind

Levels = list[Annotated[int, Field(ge=0)]]
Scale = Annotated[float, Field(gt=0, le=1)]
MOST_PROJECTED = 2**15
"""The most voxels of a patch at a level with paired attention, or by default with large kernels:
32 x 32 x 32."""
Heads = Width | Annotated[list[Width], Field(min_length=1)]


class AdditiveGridGateConfig(Section):
    """Additive gate of Oktay et al. (2018), as in their code.

    The map is computed on the grid of the coarser signal.
    """

    kind: Literal["additive_grid"] = "additive_grid"
    levels: Levels | None = None
    """Levels with a gate. Default: all except the finest, 0."""
    coefficients: Literal["sigmoid", "softmax", "mean_flow", "hard"] = "sigmoid"
    """How scores become a map. `sigmoid` treats each voxel on its own. `softmax` gives each voxel a
    share of the window's total, and `mean_flow` a share by its height above the lowest score; both
    depend on the whole window. `hard` is open or shut, trained with noise that prediction leaves
    out."""
    gates: Few = 1
    """Number of parallel gates at each level, for tasks with several classes."""
    initial_bias: float = 3.0
    """Bias of the last convolution in `sigmoid` and `hard` gates. At 3 they start nearly open:
    sigmoid(3) = 0.95."""
    output_transform: bool = False
    """Whether a 1x1 convolution and a normalisation follow the product, as in the authors' code.
    With several gates they always do."""


class AdditiveSameLevelGateConfig(Section):
    """Additive gate on the grid of the skip; the signal is upsampled first, as in MONAI."""

    kind: Literal["additive_same_level"] = "additive_same_level"
    levels: Levels | None = None
    """Levels with a gate. Default: all."""
    coefficients: Literal["sigmoid", "softmax", "mean_flow", "hard"] = "sigmoid"
    """The same choices as for `additive_grid`."""
    initial_bias: float = 3.0
    """Bias of the last convolution in `sigmoid` and `hard` gates. At 3 they start nearly open:
    sigmoid(3) = 0.95."""


class CrossAttentionConfig(Section):
    """Cross-attention of Vaswani et al. (2017), from the decoder to the skip.

    The decoder gives the queries, and the result is added to the skip.
    """

    kind: Literal["cross_attention"] = "cross_attention"
    levels: Levels | None = None
    """Levels with attention. Default: all except the finest, 0, because the cost grows with the
    square of the number of voxels."""
    heads: Heads | None = None
    """Number of heads at every level, or a list with a number for each level with attention, finest
    first. Default: the level's channels divided by head_channels."""
    head_channels: Width = 32
    """Number of channels of each head."""


class UTransformerGateConfig(Section):
    """Gate of U-Transformer (Petit et al. 2021): cross-attention whose result gates the skip."""

    kind: Literal["u_transformer"] = "u_transformer"
    levels: Levels | None = None
    """Levels with a gate. Default: all except the finest, 0."""
    heads: Heads | None = None
    """The same as for `cross_attention`."""
    head_channels: Width = 32
    """Number of channels of each head."""
    initial_bias: float = 3.0
    """At 3 the gates start nearly open: sigmoid(3) = 0.95."""


class SqueezeExcitationConfig(Section):
    """Squeeze-and-excitation, the channel attention of Hu et al. (2018)."""

    kind: Literal["se"] = "se"
    reduction: Positive = 2
    """The hidden layer has the channels divided by this factor, and at least 4. The paper uses 16
    for classification; Roy et al. use 2 for segmentation."""


class EfficientChannelAttentionConfig(Section):
    """ECA of Wang et al. (2020): channel attention by a small convolution along the channels."""

    kind: Literal["eca"] = "eca"


class ConvolutionalBlockAttentionConfig(Section):
    """CBAM of Woo et al. (2018): channel attention, then spatial attention."""

    kind: Literal["cbam"] = "cbam"
    reduction: Positive = 16
    """The hidden layer has the channels divided by this factor, and at least 4."""
    kernel_size: Few = 7
    """Odd size of the spatial convolution along each axis."""


class BottleneckAttentionConfig(Section):
    """BAM of Park et al. (2018): the sum of channel and spatial attention.

    It can strengthen features but not weaken them.
    """

    kind: Literal["bam"] = "bam"
    reduction: Positive = 16
    """The hidden layer has the channels divided by this factor, and at least 8."""
    dilation: Few = 4
    """Dilation of the spatial convolutions."""


class ConcurrentExcitationConfig(Section):
    """scSE of Roy et al. (2018): `se` and `sse` in parallel."""

    kind: Literal["scse"] = "scse"
    reduction: Positive = 2
    """The hidden layer has the channels divided by this factor, and at least 4."""
    aggregation: Literal["max", "add", "concat"] = "max"
    """How the two results are combined."""


class PooledSpatialAttentionConfig(Section):
    """The spatial attention of CBAM, without its channel attention."""

    kind: Literal["spatial"] = "spatial"
    kernel_size: Few = 7
    """Odd size of the convolution along each axis."""


class SpatialExcitationConfig(Section):
    """sSE of Roy et al. (2018): spatial attention by a 1x1 convolution and a sigmoid."""

    kind: Literal["sse"] = "sse"


class GlobalContextConfig(Section):
    """Global context of Cao et al. (2019), pooled by attention and given back to all voxels."""

    kind: Literal["gc"] = "gc"
    reduction: Positive = 16
    """The hidden layer has the channels divided by this factor, and at least 4."""
    fusion: Literal["add", "scale"] = "add"
    """`add` adds the context to the features; `scale` scales their channels, as `se` does."""


class LargeKernelAttentionConfig(Section):
    """LKA of Guo et al. (2022): voxels weighted by convolutions over 23 voxels along each axis."""

    kind: Literal["lka"] = "lka"
    levels: Levels | None = None
    """Levels with attention. Default: those of at most 32,768 voxels in a patch, the size of the
    first level in its papers. At finer levels it would take most of the time."""
    layer_scale: Scale = 0.01
    """The first value of the numbers, one for each channel, that multiply the block's output."""


class PairedAttentionConfig(Section):
    """EPA of UNETR++ (Shaker et al. 2022): attention over voxels and attention over channels, with
    the same queries and keys.
    """

    kind: Literal["epa"] = "epa"
    levels: Levels | None = None
    """Levels with attention. Default: those of at most 32,768 voxels in a patch, as in the paper.
    Finer levels are refused, because there is a weight for each voxel and each mixture."""
    heads: Few = 4
    """Number of heads. The channels of each level are divided among them."""
    projected: Width = 64
    """Number of mixtures of voxels to which each voxel attends."""
    layer_scale: Scale = 1e-6
    """The first value of the numbers, one for each channel, that multiply the block's output."""


class SelfAttentionConfig(Section):
    """Multi-head self-attention (Vaswani et al. 2017) among the voxels of the coarsest level."""

    kind: Literal["self_attention"] = "self_attention"
    heads: Width | None = None
    """Number of heads. Default: the level's channels divided by head_channels."""
    head_channels: Width = 32
    """Number of channels of each head."""
    positions: Literal["none", "sincos", "relative", "rotary"] = "relative"
    """How positions are encoded: not at all, by sines and cosines (Vaswani), by a learned bias for
    each offset (Swin), or by rotation of queries and keys along each axis (RoPE)."""
    window: Annotated[list[Width], Field(min_length=2, max_length=3)] | None = None
    """Size of the attention window along each axis, in voxels of the coarsest level. Default: the
    whole patch."""
    shift: bool = False
    """Whether a second attention follows, within windows that are shifted by half their size
    (Swin). So voxels in different windows of the first can share a window of the second."""


class TransformerConfig(Section):
    """Token blocks of Primus (Wald et al. 2025) among the coarsest level's voxels."""

    kind: Literal["transformer"] = "transformer"
    depth: Few = 2
    """Number of blocks, one after another. Primus has 12 to 24."""
    heads: Width | None = None
    """Number of heads. Default: the level's channels divided by head_channels."""
    head_channels: Width = 36
    """Number of channels of each head, a multiple of twice the number of axes, because pairs of
    channels are rotated along each axis."""
    expansion: Annotated[float, Field(gt=0, le=64)] = 8 / 3
    """Width of the perceptron's hidden layer, divided by the level's channels."""
    layer_scale: Scale = 0.1
    """The first value of the numbers, one for each channel, that multiply each half's output."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Probability that a sample skips the last block in training; it grows from 0 at the first."""


class AdditiveSelfAttentionConfig(Section):
    """Additive self-attention (Bahdanau et al. 2015) among the voxels of the coarsest level."""

    kind: Literal["additive_self"] = "additive_self"
    width: Width = 32
    """Width of the hidden layer that compares two voxels."""


class MeanPoolingConfig(Section):
    """A presence head: it predicts from the mean of the coarsest features which classes appear."""

    kind: Literal["mean"] = "mean"
    weight: Annotated[float, Field(gt=0)] = 0.1
    """Weight of the presence loss; the segmentation loss has weight 1."""


class GatedPoolingConfig(Section):
    """A presence head that pools the features by gated attention (Ilse et al. 2018)."""

    kind: Literal["gated"] = "gated"
    width: Width = 128
    """Width of its two hidden layers."""
    weight: Annotated[float, Field(gt=0)] = 0.1
    """Weight of the presence loss; the segmentation loss has weight 1."""


class LearnedQueryPoolingConfig(Section):
    """A presence head that pools the features by a learned query per class (Lee et al. 2019)."""

    kind: Literal["learned_query"] = "learned_query"
    weight: Annotated[float, Field(gt=0)] = 0.1
    """Weight of the presence loss; the segmentation loss has weight 1."""


SkipAttentionConfig = Annotated[
    Annotated[
        AdditiveGridGateConfig
        | AdditiveSameLevelGateConfig
        | CrossAttentionConfig
        | UTransformerGateConfig,
        Field(discriminator="kind"),
    ],
    BeforeValidator(section_of_kind),
]
ModulationConfig = (
    SqueezeExcitationConfig
    | EfficientChannelAttentionConfig
    | ConvolutionalBlockAttentionConfig
    | BottleneckAttentionConfig
    | ConcurrentExcitationConfig
    | PooledSpatialAttentionConfig
    | SpatialExcitationConfig
    | GlobalContextConfig
)
"""Attention that is the same at every level, whatever its grid."""
BlockAttentionConfig = Annotated[
    Annotated[
        ModulationConfig | LargeKernelAttentionConfig | PairedAttentionConfig,
        Field(discriminator="kind"),
    ],
    BeforeValidator(section_of_kind),
]
TokenAttentionConfig = Annotated[
    Annotated[
        SelfAttentionConfig | AdditiveSelfAttentionConfig | TransformerConfig,
        Field(discriminator="kind"),
    ],
    BeforeValidator(section_of_kind),
]
PoolingConfig = Annotated[
    Annotated[
        MeanPoolingConfig | GatedPoolingConfig | LearnedQueryPoolingConfig,
        Field(discriminator="kind"),
    ],
    BeforeValidator(section_of_kind),
]


class AttentionConfig(Section):
    """The attention at each place of the U-Net. Without any, it is a plain U-Net."""

    skip: SkipAttentionConfig | None = None
    """Attention on each skip before it joins the decoder."""
    encoder: BlockAttentionConfig | None = None
    """Attention after the convolutions of each encoder level."""
    decoder: BlockAttentionConfig | None = None
    """Attention after the convolutions of each decoder level."""
    bottleneck: TokenAttentionConfig | None = None
    """Attention after the coarsest level."""
    head: PoolingConfig | None = None
    """A head that predicts which classes a whole image contains, trained beside the segmentation.
    """

    @model_validator(mode="after")
    def _kernels_are_odd(self) -> Self:
        for name in ("encoder", "decoder"):
            block = getattr(self, name)
            kernel_size = getattr(block, "kernel_size", 1)
            if kernel_size % 2 == 0:
                raise ValueError(
                    f"network.attention.{name}.kernel_size must be odd, found {kernel_size}"
                    "; add 1 to it, or subtract 1"
                )
        return self

    def skip_levels(self, num_levels: int) -> list[int]:
        """The levels of the skips with attention, in a network of `num_levels` levels."""
        if self.skip is None:
            return []
        if self.skip.levels is not None:
            return sorted(set(self.skip.levels))
        finest = 0 if isinstance(self.skip, AdditiveSameLevelGateConfig) else 1
        return list(range(finest, num_levels - 1))

    def block_levels(
        self, place: Literal["encoder", "decoder"], grids: Sequence[Sequence[int]]
    ) -> list[int]:
        """The levels with attention after their convolutions, given the grid of a patch at each."""
        block = getattr(self, place)
        if block is None:
            return []
        held = grids if place == "encoder" else grids[:-1]
        given: list[int] | None = getattr(block, "levels", None)
        if given is not None:
            return sorted(set(given))
        if not isinstance(block, LargeKernelAttentionConfig | PairedAttentionConfig):
            return list(range(len(held)))
        return [level for level, grid in enumerate(held) if math.prod(grid) <= MOST_PROJECTED]
