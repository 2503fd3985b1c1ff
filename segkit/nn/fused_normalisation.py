"""Instance normalisation and leaky ReLU in one GPU kernel, for features in either memory order.

If features are stored channels last, PyTorch copies them to the other order and back to normalise
them. The kernels here read and write both orders. The forward pass reads the features twice and
writes once; the backward pass reads features and gradient twice and writes once. Statistics and
sums are float32. No sum uses atomic additions, so that the same input gives the same output, bit
for bit.

Forward and backward have two kernels each. The first cuts the space of an image into blocks and
sums over each block. The second merges the sums of the blocks, always in the same order, and then
writes its own block. This module needs triton; only `segkit.nn.normalisation` imports it, and only
if triton is installed.
"""

# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-call"

import math
from functools import lru_cache
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from segkit.nn.normalisation import CHANNELS_LAST

TILE = 2048
"""Number of values that a program holds in registers at once."""
NUMBERS_PER_THREAD = 8
"""Values of a tile for each thread: one read of 16 bytes in half precision, and no kernel needs
more than 64 registers."""
PROGRAMS_PER_PROCESSOR = 4
"""Programs of a launch for each multiprocessor of the GPU; four of 256 threads fit on one."""
WIDTHS = (64, 32, 16)
"""Channels in a tile, if features are channels last: the first that divides their number."""

NOT_SPECIALISED = ("tiles", "num_blocks")
"""Arguments whose values do not make triton compile a kernel again."""

# Checkers of types at run time must not wrap the kernels, because triton reads their source.


@triton.jit
@no_type_check
def _place(
    space,
    channels,
    tiles,
    LAST: tl.constexpr,  # noqa: N803
    BLOCK_SPACE: tl.constexpr,  # noqa: N803
    BLOCK_CHANNELS: tl.constexpr,  # noqa: N803
):
    """Position of a program's block: its corner, the offsets of the values in a tile, and the step
    from tile to tile.

    A block has `tiles` tiles of cells by channels. `left` is the number of cells from its corner to
    the end of the image.
    """
    first = tl.program_id(0) * tiles * BLOCK_SPACE
    channel = tl.program_id(1) * BLOCK_CHANNELS
    image = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, BLOCK_SPACE)
    columns = tl.arange(0, BLOCK_CHANNELS)
    if LAST:
        corner = (image * space + first) * channels + channel
        cells = rows[:, None] * channels + columns[None, :]
        step = channels.to(tl.int64) * BLOCK_SPACE
    else:
        corner = (image * channels + channel) * space + first
        cells = rows[:, None] + columns[None, :] * space
        step = tl.full((), BLOCK_SPACE, tl.int64)
    left = space - first
    channel += columns
    return corner, cells, step, rows, left, channel, channel < channels


@triton.jit(do_not_specialize=NOT_SPECIALISED)
@no_type_check
def _moments(
    features,
    parts,
    space,
    channels,
    tiles,
    num_blocks,
    LAST: tl.constexpr,  # noqa: N803
    BLOCK_SPACE: tl.constexpr,  # noqa: N803
    BLOCK_CHANNELS: tl.constexpr,  # noqa: N803
):
    """For each channel of a block, the mean and the sum of squared distances from the mean.

    The mean of the first tile is subtracted before the sums. So no digits are lost if the mean is
    large. If the first tile differs from the others, at most as many digits are lost as the number
    of tiles has.
    """
    corner, cells, step, rows, left, channel, known = _place(
        space, channels, tiles, LAST, BLOCK_SPACE, BLOCK_CHANNELS
    )
    start = features + corner
    inside = (rows < left)[:, None] & known[None, :]
    values = tl.load(start + cells, mask=inside, other=0.0).to(tl.float32)
    about = tl.sum(values, 0) / tl.minimum(left, BLOCK_SPACE).to(tl.float32)
    values = tl.where(inside, values - about[None, :], 0.0)
    sums = values
    squares = values * values
    # Unrolled, so that each thread has several reads under way; one would leave the memory idle.
    for tile in tl.range(1, tiles, loop_unroll_factor=4):
        inside = (rows < left - tile * BLOCK_SPACE)[:, None] & known[None, :]
        values = tl.load(start + tile * step + cells, mask=inside, other=0.0).to(tl.float32)
        values = tl.where(inside, values - about[None, :], 0.0)
        sums += values
        squares += values * values
    count = tl.minimum(left, tiles * BLOCK_SPACE).to(tl.float32)
    distance = tl.sum(sums, 0) / count
    spread = tl.sum(squares, 0) - distance * distance * count
    part = parts + (tl.program_id(2) * num_blocks + tl.program_id(0)) * 2 * channels + channel
    tl.store(part, about + distance, mask=known)
    tl.store(part + channels, tl.maximum(spread, 0.0), mask=known)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
@no_type_check
def _normalised(
    features,
    output,
    parts,
    moments,
    weight,
    bias,
    space,
    channels,
    tiles,
    num_blocks,
    eps,
    slope,
    LAST: tl.constexpr,  # noqa: N803
    BLOCK_SPACE: tl.constexpr,  # noqa: N803
    BLOCK_CHANNELS: tl.constexpr,  # noqa: N803
):
    """Merge the statistics of all blocks (Chan et al. 1979), then normalise a block."""
    corner, cells, step, rows, left, channel, known = _place(
        space, channels, tiles, LAST, BLOCK_SPACE, BLOCK_CHANNELS
    )
    image = tl.program_id(2)
    part = parts + image * num_blocks * 2 * channels + channel
    there = (rows < num_blocks)[:, None] & known[None, :]
    means = tl.load(part[None, :] + rows[:, None] * 2 * channels, mask=there, other=0.0)
    about = tl.sum(means, 0) / tl.minimum(num_blocks, BLOCK_SPACE).to(tl.float32)
    sums = tl.zeros([BLOCK_SPACE, BLOCK_CHANNELS], tl.float32)
    squares = tl.zeros([BLOCK_SPACE, BLOCK_CHANNELS], tl.float32)
    for first in range(0, num_blocks, BLOCK_SPACE):
        block = first + rows
        there = (block < num_blocks)[:, None] & known[None, :]
        of_block = part[None, :] + block[:, None] * 2 * channels
        distances = tl.load(of_block, mask=there, other=0.0) - about[None, :]
        count = tl.minimum(space - block * tiles * BLOCK_SPACE, tiles * BLOCK_SPACE)
        count = tl.where(there, count[:, None], 0).to(tl.float32)
        sums += count * distances
        squares += tl.load(of_block + channels, mask=there, other=0.0)
        squares += count * distances * distances
    count = space.to(tl.float32)
    distance = tl.sum(sums, 0) / count
    variance = tl.sum(squares, 0) / count - distance * distance
    mean = about + distance
    inverse = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    if tl.program_id(0) == 0:
        kept = moments + image * 2 * channels + channel
        tl.store(kept, mean, mask=known)
        tl.store(kept + channels, inverse, mask=known)
    scale = inverse * tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    # From the last tile to the first: the first kernel read the last tile last, so the cache still
    # holds it.
    for done in range(tiles):
        tile = tiles - 1 - done
        inside = (rows < left - tile * BLOCK_SPACE)[:, None] & known[None, :]
        start = corner + tile * step
        values = tl.load(features + start + cells, mask=inside, other=0.0).to(tl.float32)
        values = (values - mean[None, :]) * scale[None, :] + offset[None, :]
        values = tl.where(values > 0, values, values * slope)
        tl.store(output + start + cells, values.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
@no_type_check
def _gradient_sums(
    features,
    gradient,
    parts,
    moments,
    weight,
    bias,
    space,
    channels,
    tiles,
    num_blocks,
    slope,
    LAST: tl.constexpr,  # noqa: N803
    BLOCK_SPACE: tl.constexpr,  # noqa: N803
    BLOCK_CHANNELS: tl.constexpr,  # noqa: N803
):
    """For each channel of a block, the sum of the gradient g and of g times the normalised x."""
    corner, cells, step, rows, left, channel, known = _place(
        space, channels, tiles, LAST, BLOCK_SPACE, BLOCK_CHANNELS
    )
    kept = moments + tl.program_id(2) * 2 * channels + channel
    mean = tl.load(kept, mask=known, other=0.0)
    scale = tl.load(kept + channels, mask=known, other=0.0)
    scale *= tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK_SPACE, BLOCK_CHANNELS], tl.float32)
    products = tl.zeros([BLOCK_SPACE, BLOCK_CHANNELS], tl.float32)
    for tile in range(tiles):
        inside = (rows < left - tile * BLOCK_SPACE)[:, None] & known[None, :]
        start = corner + tile * step
        slopes = tl.load(gradient + start + cells, mask=inside, other=0.0).to(tl.float32)
        values = (
            tl.load(features + start + cells, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        )
        slopes = tl.where(values * scale[None, :] + offset[None, :] > 0, slopes, slopes * slope)
        sums += slopes
        products += slopes * values
    part = parts + (tl.program_id(2) * num_blocks + tl.program_id(0)) * 2 * channels + channel
    tl.store(part, tl.sum(sums, 0), mask=known)
    inverse = tl.load(kept + channels, mask=known, other=0.0)
    tl.store(part + channels, tl.sum(products, 0) * inverse, mask=known)


@triton.jit
@no_type_check
def _merged_sums(
    parts,
    image,
    channel,
    known,
    channels,
    num_blocks,
    rows,
    BLOCK_SPACE: tl.constexpr,  # noqa: N803
    BLOCK_CHANNELS: tl.constexpr,  # noqa: N803
):
    """The two sums of `_gradient_sums`, over all blocks of an image."""
    sums = tl.zeros([BLOCK_SPACE, BLOCK_CHANNELS], tl.float32)
    products = tl.zeros([BLOCK_SPACE, BLOCK_CHANNELS], tl.float32)
    part = parts + image * num_blocks * 2 * channels + channel
    for first in range(0, num_blocks, BLOCK_SPACE):
        block = first + rows
        there = (block < num_blocks)[:, None] & known[None, :]
        of_block = part[None, :] + block[:, None] * 2 * channels
        sums += tl.load(of_block, mask=there, other=0.0)
        products += tl.load(of_block + channels, mask=there, other=0.0)
    return tl.sum(sums, 0), tl.sum(products, 0)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
@no_type_check
def _gradients(
    features,
    gradient,
    for_features,
    for_weight,
    for_bias,
    parts,
    moments,
    weight,
    bias,
    space,
    channels,
    tiles,
    num_blocks,
    slope,
    LAST: tl.constexpr,  # noqa: N803
    BLOCK_SPACE: tl.constexpr,  # noqa: N803
    BLOCK_CHANNELS: tl.constexpr,  # noqa: N803
):
    """Merge the sums of all blocks, then write the gradient of a block.

    With n cells, normalised features y and inverse deviation r, the gradient at x is
    w·r·(g - Σg/n - y·Σ(g·y)/n). The first program of a channel also adds the sums of all images:
    Σ(g·y) is the gradient of the channel's weight, and Σg is that of its bias.
    """
    corner, cells, step, rows, left, channel, known = _place(
        space, channels, tiles, LAST, BLOCK_SPACE, BLOCK_CHANNELS
    )
    image = tl.program_id(2)
    if (tl.program_id(0) == 0) & (image == 0):
        all_sums = tl.zeros([BLOCK_CHANNELS], tl.float32)
        all_products = tl.zeros([BLOCK_CHANNELS], tl.float32)
        for other in range(tl.num_programs(2)):
            sums, products = _merged_sums(
                parts,
                other,
                channel,
                known,
                channels,
                num_blocks,
                rows,
                BLOCK_SPACE,
                BLOCK_CHANNELS,
            )
            all_sums += sums
            all_products += products
        tl.store(for_bias + channel, all_sums.to(for_bias.dtype.element_ty), mask=known)
        tl.store(for_weight + channel, all_products.to(for_weight.dtype.element_ty), mask=known)
    sums, products = _merged_sums(
        parts, image, channel, known, channels, num_blocks, rows, BLOCK_SPACE, BLOCK_CHANNELS
    )
    kept = moments + image * 2 * channels + channel
    mean = tl.load(kept, mask=known, other=0.0)
    inverse = tl.load(kept + channels, mask=known, other=0.0)
    scale = inverse * tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    count = space.to(tl.float32)
    constant = sums / count
    factor = inverse * products / count
    for done in range(tiles):
        tile = tiles - 1 - done
        inside = (rows < left - tile * BLOCK_SPACE)[:, None] & known[None, :]
        start = corner + tile * step
        slopes = tl.load(gradient + start + cells, mask=inside, other=0.0).to(tl.float32)
        values = (
            tl.load(features + start + cells, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        )
        slopes = tl.where(values * scale[None, :] + offset[None, :] > 0, slopes, slopes * slope)
        slopes = scale[None, :] * (slopes - constant[None, :] - values * factor[None, :])
        tl.store(
            for_features + start + cells, slopes.to(for_features.dtype.element_ty), mask=inside
        )


class Launch(NamedTuple):
    """Number of programs that run a kernel, and the size of the block of each."""

    grid: tuple[int, int, int]
    """Number of blocks in an image's space, of tiles of channels, and of images."""
    space: int
    channels: int
    tiles: int
    """Number of tiles in a block, along space."""
    settings: dict[str, Any]
    """Compile-time arguments of the kernels."""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Arguments of every kernel: space, channels, tiles in a block, number of blocks."""
        return self.space, self.channels, self.tiles, self.grid[0]


@lru_cache(maxsize=1024)
def launch(shape: tuple[int, ...], last: bool, processors: int) -> Launch:
    """The launch of a kernel, with as many programs as fill the GPU if the features are large.

    Args:
        shape: shape of the features, (batch, channel, *space).
        last: True if they are stored channels last.
        processors: number of the GPU's multiprocessors.
    """
    batch, channels, *sizes = shape
    space = math.prod(sizes)
    width = 1
    if last:
        fitting = [size for size in WIDTHS if channels % size == 0]
        width = [*fitting, min(WIDTHS[0], triton.next_power_of_2(channels))][0]
    height = min(TILE // width, triton.next_power_of_2(space))
    tiles_of_channels = triton.cdiv(channels, width)
    tiles = triton.cdiv(space, height)
    wanted = max(1, PROGRAMS_PER_PROCESSOR * processors // (batch * tiles_of_channels))
    tiles_of_block = triton.cdiv(tiles, wanted)
    threads = triton.next_power_of_2(triton.cdiv(height * width, NUMBERS_PER_THREAD))
    return Launch(
        grid=(triton.cdiv(tiles, tiles_of_block), tiles_of_channels, batch),
        space=space,
        channels=channels,
        tiles=tiles_of_block,
        settings={
            "LAST": last,
            "BLOCK_SPACE": height,
            "BLOCK_CHANNELS": width,
            "num_warps": min(8, max(1, threads // 32)),
        },
    )


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


class _NormaliseAndActivate(torch.autograd.Function):
    """Leaky ReLU of the instance normalisation. There is no second derivative."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, features: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
    ) -> Tensor:
        last = not features.is_contiguous()
        if last and not features.is_contiguous(memory_format=CHANNELS_LAST[features.ndim]):
            features, last = features.contiguous(), False
        plan = launch(tuple(features.shape), last, _processors(features.device))
        blocks, _, batch = plan.grid
        output = torch.empty_like(features)
        parts = features.new_empty((batch, blocks, 2, plan.channels), dtype=torch.float32)
        moments = features.new_empty((batch, 2, plan.channels), dtype=torch.float32)
        with torch.cuda.device_of(features):
            _moments[plan.grid](features, parts, *plan.sizes, **plan.settings)
            _normalised[plan.grid](
                features,
                output,
                parts,
                moments,
                weight,
                bias,
                *plan.sizes,
                eps,
                slope,
                **plan.settings,
            )
        ctx.save_for_backward(features, weight, bias, moments)
        ctx.plan, ctx.slope = plan, slope  # type: ignore[attr-defined]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, bias, moments = ctx.saved_tensors  # type: ignore[attr-defined]
        plan, slope = ctx.plan, ctx.slope  # type: ignore[attr-defined]
        (gradient,) = gradients
        order = CHANNELS_LAST[features.ndim] if plan.settings["LAST"] else torch.contiguous_format
        gradient = gradient.contiguous(memory_format=order)
        blocks, _, batch = plan.grid
        parts = moments.new_empty((batch, blocks, 2, plan.channels))
        for_features = torch.empty_like(features)
        for_weight, for_bias = torch.empty_like(weight), torch.empty_like(bias)
        with torch.cuda.device_of(features):
            _gradient_sums[plan.grid](
                features,
                gradient,
                parts,
                moments,
                weight,
                bias,
                *plan.sizes,
                slope,
                **plan.settings,
            )
            _gradients[plan.grid](
                features,
                gradient,
                for_features,
                for_weight,
                for_bias,
                parts,
                moments,
                weight,
                bias,
                *plan.sizes,
                slope,
                **plan.settings,
            )
        return for_features, for_weight, for_bias, None, None


def normalise_and_leak(
    features: Float[Tensor, "batch channel *space"],
    weight: Float[Tensor, "channel"],
    bias: Float[Tensor, "channel"],
    *,
    eps: float,
    slope: float,
) -> Float[Tensor, "batch channel *space"]:
    """Leaky ReLU of the instance normalisation of features, in their data type and memory order.

    Args:
        features: float32, float16 or bfloat16, with more than one cell; contiguous or channels
            last. Features in any other order are copied to be contiguous.
        weight, bias: scale and offset of each channel.
        eps: number that is added to the variance.
        slope: slope of the leaky ReLU below zero; 1 gives only the normalisation.
    """
    output: Tensor = _NormaliseAndActivate.apply(features, weight, bias, eps, slope)
    return output
