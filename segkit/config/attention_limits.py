"""Checks that attention fits the network; a combination that is impossible is refused."""

import math
from collections.abc import Sequence
from typing import Literal

from segkit.config.attention import (
    MOST_PROJECTED,
    AttentionConfig,
    CrossAttentionConfig,
    LargeKernelAttentionConfig,
    PairedAttentionConfig,
    SelfAttentionConfig,
    TransformerConfig,
    UTransformerGateConfig,
)

MOST_TOKENS = 2**16
"""Voxels that attend to one another."""


def check_attention(
    attention: AttentionConfig, *, channels: Sequence[int], spatial_dims: int
) -> None:
    """Raise ValueError if there is attention that a network of such levels cannot have.

    Args:
        attention: the attention at each place.
        channels: number of channels of each level, the finest first.
        spatial_dims: 2 or 3.
    """
    _check_skip(attention, channels, spatial_dims)
    for place, deepest in (("encoder", len(channels) - 1), ("decoder", len(channels) - 2)):
        levels = getattr(getattr(attention, place), "levels", None)
        if levels is not None and not (levels and max(levels) <= deepest):
            raise ValueError(
                f"network.attention.{place}.levels must be from 0 to {deepest}, found {levels}"
                "; remove the others"
            )
    _check_bottleneck(attention, channels, spatial_dims)


def check_attention_grids(
    attention: AttentionConfig, *, channels: Sequence[int], grids: Sequence[Sequence[int]]
) -> None:
    """Raise ValueError if there is attention that does not fit the grids of a patch.

    Args:
        attention: the attention at each place.
        channels: number of channels of each level, the finest first.
        grids: number of cells of a patch along each axis, for each level.
    """
    _check_levels(attention, "encoder", channels, grids)
    _check_levels(attention, "decoder", channels, grids)
    bottleneck, coarsest = attention.bottleneck, list(grids[-1])
    if isinstance(bottleneck, SelfAttentionConfig) and bottleneck.shift:
        window = bottleneck.window or coarsest
        if not any(1 < size < cells for size, cells in zip(window, coarsest, strict=True)):
            raise ValueError(
                "network.attention.bottleneck.shift needs windows smaller than the coarsest "
                f"level, which has {coarsest} voxels, and longer than 1 voxel along at least one "
                f"axis, found {window}; change the window, or set shift to false"
            )
    if isinstance(bottleneck, TransformerConfig) and math.prod(coarsest) > MOST_TOKENS:
        raise ValueError(
            f"network.attention.bottleneck: attention among the {math.prod(coarsest):,} voxels of "
            "the coarsest level takes too long; add levels to network.channels until this level "
            f"has at most {MOST_TOKENS:,} voxels"
        )


def _check_levels(
    attention: AttentionConfig,
    place: Literal["encoder", "decoder"],
    channels: Sequence[int],
    grids: Sequence[Sequence[int]],
) -> None:
    """Raise ValueError if large kernels or paired attention do not fit the levels of a place.

    Args:
        attention: the attention at each place.
        place: the encoder or the decoder.
        channels: number of channels of each level, the finest first.
        grids: number of cells of a patch along each axis, for each level.
    """
    block = getattr(attention, place)
    if not isinstance(block, LargeKernelAttentionConfig | PairedAttentionConfig):
        return
    levels = attention.block_levels(place, grids)
    if not levels:
        remedy = "set its levels" if block.kind == "lka" else "make the patch smaller or add levels"
        raise ValueError(
            f"network.attention.{place}: {block.kind} needs a level of at most {MOST_PROJECTED:,} "
            f"voxels, but every level has more; {remedy}"
        )
    if isinstance(block, LargeKernelAttentionConfig):
        return
    for level in levels:
        if math.prod(grids[level]) > MOST_PROJECTED:
            raise ValueError(
                f"network.attention.{place}.levels: epa learns one weight per voxel, so it needs "
                f"levels of at most {MOST_PROJECTED:,} voxels, but level {level} has "
                f"{math.prod(grids[level]):,}; choose other levels"
            )
        if channels[level] % block.heads or channels[level] % 2:
            raise ValueError(
                f"network.attention.{place}: epa needs a number of channels that is even and a "
                f"multiple of its {block.heads} heads, but level {level} has {channels[level]}; "
                "change heads or network.channels"
            )


def _check_skip(attention: AttentionConfig, channels: Sequence[int], spatial_dims: int) -> None:
    deepest_skip = len(channels) - 2
    skip, levels = attention.skip, attention.skip_levels(len(channels))
    if max(levels, default=0) > deepest_skip:
        raise ValueError(
            f"network.attention.skip.levels must be from 0 to {deepest_skip}, found {levels}"
            "; remove the others"
        )
    heads = getattr(skip, "heads", None)
    if isinstance(heads, list) and len(heads) != len(levels):
        raise ValueError(
            f"network.attention.skip.heads must be one number, or a list of {len(levels)} with one "
            f"number for each of the levels {levels}; correct the list"
        )
    if skip is not None and skip.levels is None and not levels:
        raise ValueError(
            "network.attention.skip leaves out level 0 by default, but a network with two "
            "network.channels has no other skip connection; set levels: [0]"
        )
    placed: list[int] = []
    if isinstance(skip, CrossAttentionConfig):
        placed = [*levels, *(level + 1 for level in levels)]
    elif isinstance(skip, UTransformerGateConfig):
        placed = [level + 1 for level in levels]
    narrowest = min((channels[level] for level in placed), default=2 * spatial_dims)
    if narrowest < 2 * spatial_dims:
        raise ValueError(
            f"network.attention.skip needs {2 * spatial_dims} or more network.channels to encode "
            f"positions, found {narrowest}; increase them, or choose another attention"
        )


def _check_bottleneck(
    attention: AttentionConfig, channels: Sequence[int], spatial_dims: int
) -> None:
    bottleneck, needed = attention.bottleneck, 2 * spatial_dims
    if isinstance(bottleneck, TransformerConfig) and bottleneck.head_channels % needed:
        raise ValueError(
            f"network.attention.bottleneck.head_channels must be a multiple of {needed} for rotary "
            f"positions in {spatial_dims} dimensions, found {bottleneck.head_channels}; choose a "
            "multiple, or other positions"
        )
    if not isinstance(bottleneck, SelfAttentionConfig):
        return
    encoding = {"rotary": bottleneck.head_channels, "sincos": channels[-1]}
    if encoding.get(bottleneck.positions, needed) < needed:
        raise ValueError(
            f"network.attention.bottleneck.positions: {bottleneck.positions} needs {needed} or "
            f"more channels (of each head, if rotary), found {encoding[bottleneck.positions]}; "
            "increase them, or choose other positions"
        )
    window = bottleneck.window
    if window is not None and len(window) != spatial_dims:
        raise ValueError(
            f"network.attention.bottleneck.window must have {spatial_dims} numbers, "
            f"because network.spatial_dims is {spatial_dims}"
            "; give one number for each axis"
        )
    if math.prod(window or ()) > MOST_TOKENS:
        raise ValueError(
            f"network.attention.bottleneck.window {window} has more than {MOST_TOKENS:,} "
            f"voxels; make it smaller"
        )
