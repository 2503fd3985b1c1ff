"""Concatenation of features along their channels, with full memory speed on a GPU.

PyTorch (2.11) has no kernel of its own to concatenate 3D features that are stored channels last. It
copies each part number by number, in the backward pass too. Here a copy moves 16 bytes at a time,
which makes a training step on an H200 one or two per cent shorter.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from segkit.nn.normalisation import CHANNELS_LAST, is_traced

WIDE = torch.complex128
"""The type with the most bytes. Copies of it are copies of bits."""
WIDE_DEVICE = "cuda"
"""Device on which wide copies are faster."""


def concatenate_channels(
    parts: Sequence[Float[Tensor, "batch _ *space"]],
) -> Float[Tensor, "batch channel *space"]:
    """Features with the channels of all parts, one part after another.

    Args:
        parts: features of one batch on one grid.
    """
    if _can_copy_wide(parts):
        output: Tensor = _Concatenate.apply(*parts)  # type: ignore[no-untyped-call]
        return output
    return torch.cat(tuple(parts), dim=1)


def _can_copy_wide(parts: Sequence[Tensor]) -> bool:
    """True if the parts lie on a GPU, channels last, in whole pieces of 16 bytes."""
    first = parts[0]
    return (
        first.device.type == WIDE_DEVICE
        and first.ndim in CHANNELS_LAST
        and not is_traced()
        and all(
            part.dtype == first.dtype
            and part.numel() > 0
            and part.is_contiguous(memory_format=CHANNELS_LAST[part.ndim])
            and part.shape[1] * part.itemsize % WIDE.itemsize == 0
            and part.storage_offset() * part.itemsize % WIDE.itemsize == 0
            for part in parts
        )
    )


def _wide(features: Tensor) -> Tensor:
    """The memory of features that are stored channels last: (cell, piece of 16 bytes)."""
    return features.movedim(1, -1).view(-1, features.shape[1]).view(WIDE)


class _Concatenate(torch.autograd.Function):
    """Concatenation along the channels, by wide copies in both directions."""

    @staticmethod
    def forward(ctx: FunctionCtx, *parts: Tensor) -> Tensor:
        ctx.widths = [part.shape[1] for part in parts]  # type: ignore[attr-defined]
        batch, _, *space = parts[0].shape
        shape = (batch, sum(part.shape[1] for part in parts), *space)
        order = CHANNELS_LAST[parts[0].ndim]
        output = torch.empty(
            shape, dtype=parts[0].dtype, device=parts[0].device, memory_format=order
        )
        pieces = [part.shape[1] * part.itemsize // WIDE.itemsize for part in parts]
        for place, part in zip(_wide(output).split(pieces, dim=1), parts, strict=True):
            place.copy_(_wide(part))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, ...]:
        widths: list[int] = ctx.widths  # type: ignore[attr-defined]
        gradient = gradients[0].contiguous(memory_format=CHANNELS_LAST[gradients[0].ndim])
        if gradient.storage_offset() * gradient.itemsize % WIDE.itemsize:
            gradient = gradient.clone(memory_format=CHANNELS_LAST[gradient.ndim])
        batch, _, *space = gradient.shape
        pieces = [width * gradient.itemsize // WIDE.itemsize for width in widths]
        found = []
        for width, piece in zip(widths, _wide(gradient).split(pieces, dim=1), strict=True):
            cells = piece.contiguous().view(gradient.dtype).view(batch, *space, width)
            found.append(cells.movedim(-1, 1))
        return tuple(found)
