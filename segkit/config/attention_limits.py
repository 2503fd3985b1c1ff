"""Which attention fits which network: each combination that cannot be is refused in a sentence."""

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
    """Raise ValueError if there is attention that a network of such levels cannot have."""
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
    """Raise ValueError if there is attention that such grids of a patch, finest first, rule out."""
    _check_levels(attention, "encoder", channels, grids)
    _check_levels(attention, "decoder", channels, grids)
    bottleneck, coarsest = attention.bottleneck, list(grids[-1])
    if isinstance(bottleneck, SelfAttentionConfig) and bottleneck.shift:
        window = bottleneck.window or coarsest
        if not any(1 < size < cells for size, cells in zip(window, coarsest, strict=True)):
            raise ValueError(
                f"network.attention.bottleneck.shift needs windows smaller than the coarsest "
                f"level's {coarsest} voxels of a patch, and of 2 or more along some axis, found "
                f"{window}; give it another window or no shift"
            )
    if isinstance(bottleneck, TransformerConfig) and math.prod(coarsest) > MOST_TOKENS:
        raise ValueError(
            f"network.attention.bottleneck: a transformer among the {math.prod(coarsest):,} voxels "
            f"of the coarsest level takes too long; give network.channels more levels, so that "
            f"there are {MOST_TOKENS:,} at most"
        )


def _check_levels(
    attention: AttentionConfig,
    place: Literal["encoder", "decoder"],
    channels: Sequence[int],
    grids: Sequence[Sequence[int]],
) -> None:
    block = getattr(attention, place)
    if not isinstance(block, LargeKernelAttentionConfig | PairedAttentionConfig):
        return
    levels = attention.block_levels(place, grids)
    if not levels:
        remedy = "set its levels" if block.kind == "lka" else "make the patch smaller or add levels"
        raise ValueError(
            f"network.attention.{place}: {block.kind} needs a level of at most "
            f"{MOST_PROJECTED:,} voxels of a patch, but every level has more; {remedy}"
        )
    if isinstance(block, LargeKernelAttentionConfig):
        return
    for level in levels:
        if math.prod(grids[level]) > MOST_PROJECTED:
            raise ValueError(
                f"network.attention.{place}.levels: epa has a weight for each voxel, and level "
                f"{level} has {math.prod(grids[level]):,} in a patch; take levels of at most "
                f"{MOST_PROJECTED:,}"
            )
        if channels[level] % block.heads or channels[level] % 2:
            raise ValueError(
                f"network.attention.{place}: epa shares channels out to {block.heads} heads and to "
                f"two halves, and level {level} has {channels[level]}; give it heads that divide "
                f"them, and an even number of network.channels"
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
            f"network.attention.skip.heads must be one number or a list of {len(levels)}, "
            f"one for each of the levels {levels}"
            "; give one number, or one for each level"
        )
    if skip is not None and skip.levels is None and not levels:
        raise ValueError(
            "network.attention.skip leaves out level 0 by default, but a network of two "
            "network.channels has no other skip; set levels: [0]"
        )
    placed: list[int] = []
    if isinstance(skip, CrossAttentionConfig):
        placed = [*levels, *(level + 1 for level in levels)]
    elif isinstance(skip, UTransformerGateConfig):
        placed = [level + 1 for level in levels]
    narrowest = min((channels[level] for level in placed), default=2 * spatial_dims)
    if narrowest < 2 * spatial_dims:
        raise ValueError(
            f"network.attention.skip needs network.channels of {2 * spatial_dims} or "
            f"more to encode positions, found {narrowest}"
            "; widen the channels, or choose another attention"
        )


def _check_bottleneck(
    attention: AttentionConfig, channels: Sequence[int], spatial_dims: int
) -> None:
    bottleneck, needed = attention.bottleneck, 2 * spatial_dims
    if isinstance(bottleneck, TransformerConfig) and bottleneck.head_channels % needed:
        raise ValueError(
            f"network.attention.bottleneck.head_channels must be a multiple of {needed}, as pairs "
            f"of channels are turned along each of {spatial_dims} axes, found "
            f"{bottleneck.head_channels}"
            "; choose a multiple, or other positions"
        )
    if not isinstance(bottleneck, SelfAttentionConfig):
        return
    encoding = {"rotary": bottleneck.head_channels, "sincos": channels[-1]}
    if encoding.get(bottleneck.positions, needed) < needed:
        raise ValueError(
            f"network.attention.bottleneck.positions: {bottleneck.positions} needs "
            f"{needed} channels or more (of each head, for rotary), "
            f"found {encoding[bottleneck.positions]}"
            "; widen it, or choose other positions"
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
