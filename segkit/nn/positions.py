"""Three ways to encode the positions of tokens. Without them, attention ignores positions."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

PositionKind = Literal["none", "sincos", "relative", "rotary"]
SINCOS_BASE = 10_000.0
ROTARY_BASE = 100.0


def cells_of(
    shape: Sequence[int], device: torch.device | None = None
) -> Integer[Tensor, "cells axes"]:
    """Index of every cell of a grid; the last axis changes fastest."""
    axes = [torch.arange(size, device=device) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def sincos(
    shape: Sequence[int], channels: int, device: torch.device | None = None
) -> Float[Tensor, "cells channels"]:
    """Sines and cosines of each cell's index; each axis has the same number of channels.

    Vaswani et al. (2017, arXiv:1706.03762, Sec. 3.5) along each axis. Channels that are left over
    stay 0.

    Args:
        shape: size of the grid.
        channels: number of channels of the result.
        device: the device of the result.

    Raises:
        ValueError: there are fewer than two channels for each axis.
    """
    angles = _angles(shape, channels // (2 * len(shape)), SINCOS_BASE, device)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return torch.nn.functional.pad(waves, (0, channels - waves.shape[1]))


def rotate(
    tokens: Float[Tensor, "batch heads cells channels"],
    shape: Sequence[int],
    base: float = ROTARY_BASE,
) -> Float[Tensor, "batch heads cells channels"]:
    """Queries or keys, rotated by angles that grow with the cell's index.

    Axial rotary embedding: Su et al. (2021, arXiv:2104.09864, Eq. 34) for each axis. The axes have
    the same number of pairs of channels; pairs that are left over are not rotated. The base is 100,
    for small grids (Heo et al. 2024, arXiv:2403.13298, Eq. 12). The product of a query and a key
    then depends on positions only by the offset between the two.

    Args:
        tokens: queries or keys of the cells of a grid.
        shape: size of the grid.
        base: base of the angles.

    Raises:
        ValueError: there are fewer than two channels for each axis.
    """
    angles = _angles(shape, tokens.shape[-1] // (2 * len(shape)), base, tokens.device)
    angles = angles.flatten(1)
    half = angles.shape[1]
    cosine, sine = angles.cos().to(tokens.dtype), angles.sin().to(tokens.dtype)
    first, second, rest = tokens.split([half, half, tokens.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine, rest], dim=-1)


class RelativeBias(nn.Module):
    """A learned bias for each head and each offset between two cells of a window.

    Liu et al. (2021, arXiv:2103.14030, Sec. 3.2): a table of prod(2 w - 1) offsets. The output has
    a number for each pair of cells, so windows should be small.
    """

    def __init__(self, window: Sequence[int], *, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(math.prod(2 * size - 1 for size in window), heads))
        nn.init.trunc_normal_(self.table, std=0.02)
        self.window = tuple(window)

    def forward(self) -> Float[Tensor, "heads cells cells"]:
        """The bias of the logit of each pair of cells."""
        cells = cells_of(self.window, self.table.device)
        index = torch.zeros(len(cells), len(cells), dtype=torch.long, device=cells.device)
        for axis, size in enumerate(self.window):
            offset = cells[:, None, axis] - cells[None, :, axis] + size - 1
            index = index * (2 * size - 1) + offset
        return self.table[index].permute(2, 0, 1)


def _angles(
    shape: Sequence[int], per_axis: int, base: float, device: torch.device | None
) -> Float[Tensor, "cells axes frequencies"]:
    if per_axis == 0:
        raise ValueError(
            f"positions along {len(shape)} axes need at least {2 * len(shape)} channels; use more "
            f"channels at this level or in each head"
        )
    exponents = torch.arange(per_axis, device=device, dtype=torch.float32) / per_axis
    frequencies = torch.pow(base, -exponents)
    return cells_of(shape, device)[:, :, None].float() * frequencies
