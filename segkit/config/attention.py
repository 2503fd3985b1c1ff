"""Settings of attention: which kind, at which place of the network.

Each kind is one section, named by its `kind`; a kind alone takes the defaults. docs/attention.md
compares them.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from segkit.config.base import Few, Positive, Section, Width, kind_alone

Levels = list[Annotated[int, Field(ge=0)]]
Scale = Annotated[float, Field(gt=0, le=1)]
MOST_PROJECTED = 2**15
"""Voxels of a patch at a level with paired attention, of which each has weights: 32 x 32 x 32."""
Heads = Width | Annotated[list[Width], Field(min_length=1)]


class AdditiveGridGateConfig(Section):
    """Oktay et al. 2018 as their code runs it: the map is computed on the coarser signal's grid."""

    kind: Literal["additive_grid"] = "additive_grid"
    levels: Levels | None = None
    """Levels that are gated; all but the finest, 0, where not given."""
    coefficients: Literal["sigmoid", "softmax", "mean_flow", "hard"] = "sigmoid"
    """Each voxel on its own; a share of all voxels, by softmax or by height above the lowest; or
    open and shut alone, learned through noise that vanishes in prediction. Shares depend on all of
    a window."""
    gates: Few = 1
    """Gates side by side at each level, for tasks of several classes."""
    initial_bias: float = 3.0
    """Of `sigmoid` and `hard` gates, the bias of the last convolution: they start at sigmoid(3) =
    0.95, nearly open."""
    output_transform: bool = False
    """Whether a 1x1 convolution and a normalisation follow the product, as in their code. Several
    gates always have them."""


class AdditiveSameLevelGateConfig(Section):
    """The variant on the skip's own grid, with the signal brought up first (MONAI's is one)."""

    kind: Literal["additive_same_level"] = "additive_same_level"
    levels: Levels | None = None
    """Levels that are gated; all of them where not given."""
    coefficients: Literal["sigmoid", "softmax", "mean_flow", "hard"] = "sigmoid"
    """As for `additive_grid`."""
    initial_bias: float = 3.0
    """Of `sigmoid` and `hard` gates, the bias of the last convolution: they start at sigmoid(3) =
    0.95, nearly open."""


class CrossAttentionConfig(Section):
    """Vaswani et al. 2017: the decoder's queries take from the skip, and the skip gains it."""

    kind: Literal["cross_attention"] = "cross_attention"
    levels: Levels | None = None
    """Levels with attention; all but the finest, 0, where not given (its cost grows with the
    square of the number of voxels)."""
    heads: Heads | None = None
    """Heads of every level, or a list, one number per level with attention, the finest first. Where
    not given, as many as the level's channels have room for."""
    head_channels: Width = 32
    """The width of each head."""


class UTransformerGateConfig(Section):
    """Petit et al. 2021: cross-attention whose result gates the skip."""

    kind: Literal["u_transformer"] = "u_transformer"
    levels: Levels | None = None
    """Levels that are gated; all but the finest, 0, where not given."""
    heads: Heads | None = None
    """As for `cross_attention`."""
    head_channels: Width = 32
    """The width of each head."""
    initial_bias: float = 3.0
    """The gates start near sigmoid(3) = 0.95, nearly open."""


class SqueezeExcitationConfig(Section):
    """Channel attention of Hu et al. 2018."""

    kind: Literal["se"] = "se"
    reduction: Positive = 2
    """Channels are squeezed by this factor, but to no fewer than 4. The paper has 16 in its
    classifiers, Roy et al. 2 in segmentation."""


class EfficientChannelAttentionConfig(Section):
    """ECA of Wang et al. 2020: a small convolution along the channels."""

    kind: Literal["eca"] = "eca"


class ConvolutionalBlockAttentionConfig(Section):
    """CBAM of Woo et al. 2018: channel attention, then spatial attention."""

    kind: Literal["cbam"] = "cbam"
    reduction: Positive = 16
    """Channels are squeezed by this factor, but to no fewer than 4."""
    kernel_size: Few = 7
    """Size of the spatial convolution along each axis, odd."""


class BottleneckAttentionConfig(Section):
    """BAM of Park et al. 2018: channel and spatial attention, summed; it strengthens alone."""

    kind: Literal["bam"] = "bam"
    reduction: Positive = 16
    """Channels are squeezed by this factor, but to no fewer than 8."""
    dilation: Few = 4
    """Spacing of the spatial convolutions' cells."""


class ConcurrentExcitationConfig(Section):
    """scSE of Roy et al. 2018: `se` and `sse` side by side."""

    kind: Literal["scse"] = "scse"
    reduction: Positive = 2
    """Channels are squeezed by this factor, but to no fewer than 4."""
    aggregation: Literal["max", "add", "concat"] = "max"
    """How the two are joined."""


class PooledSpatialAttentionConfig(Section):
    """The spatial half of CBAM alone."""

    kind: Literal["spatial"] = "spatial"
    kernel_size: Few = 7
    """Size of the convolution along each axis, odd."""


class SpatialExcitationConfig(Section):
    """sSE of Roy et al. 2018: a 1x1 convolution and a sigmoid."""

    kind: Literal["sse"] = "sse"


class GlobalContextConfig(Section):
    """Cao et al. 2019: a context pooled by attention tells the channels what the image holds."""

    kind: Literal["gc"] = "gc"
    reduction: Positive = 16
    """Channels are squeezed by this factor, but to no fewer than 4."""
    fusion: Literal["add", "scale"] = "add"
    """Whether the context is added to the features, or scales their channels as `se` does."""


class LargeKernelAttentionConfig(Section):
    """LKA of Guo et al. 2022: voxels weighed by convolutions that reach ten voxels far and more."""

    kind: Literal["lka"] = "lka"
    levels: Levels | None = None
    """Levels with attention; all of them if not given."""
    layer_scale: Scale = 0.01
    """The first value of the numbers, one a channel, that multiply what is added."""


class PairedAttentionConfig(Section):
    """EPA of UNETR++ (Shaker et al. 2022): attention over voxels and over channels, paired."""

    kind: Literal["epa"] = "epa"
    levels: Levels | None = None
    """Levels with attention. If not given, those of at most 32,768 voxels in a patch, as in the
    paper: there is a weight for each voxel and each mixture of voxels."""
    heads: Few = 4
    """Attentions side by side; they divide the channels of each level."""
    projected: Width = 64
    """Mixtures of voxels that each voxel attends to."""
    layer_scale: Scale = 1e-6
    """The first value of the numbers, one a channel, that multiply what is added."""


class SelfAttentionConfig(Section):
    """Multi-head self-attention of Vaswani et al. 2017 among the coarsest level's voxels."""

    kind: Literal["self_attention"] = "self_attention"
    heads: Width | None = None
    """As many as the level's channels have room for where not given."""
    head_channels: Width = 32
    """The width of each head."""
    positions: Literal["none", "sincos", "relative", "rotary"] = "relative"
    """What the attention knows of them: nothing, sines and cosines (Vaswani), a learned bias per
    offset (Swin), or queries and keys turned along each axis (RoPE)."""
    window: Annotated[list[Width], Field(min_length=2, max_length=3)] | None = None
    """Voxels of the coarsest level along each axis among which attention is paid; all of a patch's
    where not given."""
    shift: bool = False
    """Whether a second attention follows, within windows that are moved by half their size (Swin):
    what the first keeps apart meets in the second."""


class TransformerConfig(Section):
    """Token blocks of Primus (Wald et al. 2025) among the coarsest level's voxels."""

    kind: Literal["transformer"] = "transformer"
    depth: Few = 2
    """Blocks, one after another. Primus, which is little else, has 12 to 24."""
    heads: Width | None = None
    """As many as the level's channels have room for if not given."""
    head_channels: Width = 36
    """The width of each head, a multiple of twice the axes: pairs of channels are turned along
    each axis."""
    expansion: Annotated[float, Field(gt=0, le=64)] = 8 / 3
    """Width of the perceptron's hidden layer over the level's channels."""
    layer_scale: Scale = 0.1
    """The first value of the numbers, one a channel, that multiply what each half adds."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Probability that a sample skips the last block in training; it grows from 0 at the first."""


class AdditiveSelfAttentionConfig(Section):
    """Additive self-attention (Bahdanau et al. 2015) among the coarsest level's voxels."""

    kind: Literal["additive_self"] = "additive_self"
    width: Width = 32
    """Of the hidden layer that compares two voxels."""


class MeanPoolingConfig(Section):
    """Presence of each class from the mean of the coarsest features."""

    kind: Literal["mean"] = "mean"
    weight: Annotated[float, Field(gt=0)] = 0.1
    """Of presence in the loss, beside 1 for the segmentation."""


class GatedPoolingConfig(Section):
    """Presence of each class from a mean weighted by gated attention (Ilse et al. 2018)."""

    kind: Literal["gated"] = "gated"
    width: Width = 128
    """Of its two hidden layers."""
    weight: Annotated[float, Field(gt=0)] = 0.1
    """Of presence in the loss, beside 1 for the segmentation."""


class LearnedQueryPoolingConfig(Section):
    """Presence of each class from where a query learned for it looks (Lee et al. 2019)."""

    kind: Literal["learned_query"] = "learned_query"
    weight: Annotated[float, Field(gt=0)] = 0.1
    """Of presence in the loss, beside 1 for the segmentation."""


SkipAttentionConfig = Annotated[
    Annotated[
        AdditiveGridGateConfig
        | AdditiveSameLevelGateConfig
        | CrossAttentionConfig
        | UTransformerGateConfig,
        Field(discriminator="kind"),
    ],
    BeforeValidator(kind_alone),
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
    BeforeValidator(kind_alone),
]
TokenAttentionConfig = Annotated[
    Annotated[
        SelfAttentionConfig | AdditiveSelfAttentionConfig | TransformerConfig,
        Field(discriminator="kind"),
    ],
    BeforeValidator(kind_alone),
]
PoolingConfig = Annotated[
    Annotated[
        MeanPoolingConfig | GatedPoolingConfig | LearnedQueryPoolingConfig,
        Field(discriminator="kind"),
    ],
    BeforeValidator(kind_alone),
]


class AttentionConfig(Section):
    """Which attention sits where; none anywhere is the plain U-Net."""

    skip: SkipAttentionConfig | None = None
    """What a skip passes through before it joins the decoder."""
    encoder: BlockAttentionConfig | None = None
    """What follows each encoder level's convolutions."""
    decoder: BlockAttentionConfig | None = None
    """What follows each decoder level's convolutions."""
    bottleneck: TokenAttentionConfig | None = None
    """What follows the coarsest level."""
    head: PoolingConfig | None = None
    """What says of a whole image which classes it holds, trained beside the segmentation."""

    @model_validator(mode="after")
    def _kernels_are_odd(self) -> Self:
        for name in ("encoder", "decoder"):
            block = getattr(self, name)
            kernel_size = getattr(block, "kernel_size", 1)
            if kernel_size % 2 == 0:
                raise ValueError(f"network.attention.{name}.kernel_size must be odd")
        return self

    def skip_levels(self, num_levels: int) -> list[int]:
        """The levels of the skips that attention sits at, of a network of so many levels."""
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
        if not isinstance(block, PairedAttentionConfig):
            return list(range(len(held)))
        return [level for level, grid in enumerate(held) if math.prod(grid) <= MOST_PROJECTED]
