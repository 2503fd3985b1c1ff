"""Test-time mirroring: a network's answers to a window and its mirror images, made one."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.geometry.grid import Placement
from segkit.inference.engines.torch_eager import LOGITS, Engine
from segkit.inference.ensemble import Moments
from segkit.nn.map_tap import MapInfo

SPREAD = "spread"
"""Mean over classes of the variance of probabilities between a window's mirror images."""


class Mirrored:
    """Asks an engine about each window and its mirror images, and averages the answers.

    Over every combination of `axes`, the answers turned back first: logits, as nnU-Net does
    (Isensee et al. 2021), and maps. A network is asked about mirror images alone that it was
    trained on.

    Args:
        engine: what is asked.
        axes: spatial axes of a window, 0 to 2.
        batch_size: windows and mirror images per call of the engine.
        regions: whether outputs are regions, each yes or no, and not classes.
    """

    def __init__(
        self, engine: Engine, axes: Sequence[int], *, batch_size: int = 1, regions: bool = False
    ) -> None:
        self.engine = engine
        self.regions = regions
        self.batch_size = batch_size
        self.mirrors = [
            tuple(axis + 2 for axis, turned in zip(axes, choice, strict=True) if turned)
            for choice in itertools.product((False, True), repeat=len(axes))
        ]

    def __call__(
        self, windows: Float[Tensor, "batch channel x y z"], keys: Collection[str]
    ) -> dict[str, Tensor]:
        """As an engine's; among the keys may be SPREAD, (batch, 1, x, y, z)."""
        means: dict[str, Tensor] = {}
        shares = Moments(class_axis=1)
        asked = [key for key in keys if key != SPREAD]
        for number, answer in enumerate(self._answers(windows, asked), start=1):
            if SPREAD in keys:
                logits = answer[LOGITS]
                shares.add(logits.sigmoid() if self.regions else logits.softmax(dim=1))
            for key, value in answer.items():
                mean = means.get(key, value)
                means[key] = mean + (value - mean) / number
        if SPREAD in keys:
            means[SPREAD] = shares.variance[:, None]
        return means

    def _answers(self, windows: Tensor, keys: Collection[str]) -> Iterator[dict[str, Tensor]]:
        step = max(self.batch_size // len(windows), 1)
        for first in range(0, len(self.mirrors), step):
            mirrors = self.mirrors[first : first + step]
            images = torch.cat([windows.flip(axes) if axes else windows for axes in mirrors])
            outputs = self.engine(images, keys)
            parts = {key: output.split(len(windows)) for key, output in outputs.items()}
            for number, axes in enumerate(mirrors):
                yield {key: _turned(part[number].float(), axes) for key, part in parts.items()}


def _turned(answer: Tensor, axes: tuple[int, ...]) -> Tensor:
    """An answer turned back; what has no space, such as presence, has nothing to turn."""
    return answer.flip(axes) if axes and answer.ndim == 5 else answer


def mirrored_map(info: MapInfo, axes: Sequence[int]) -> MapInfo:
    """Where the cells of a map lie that is averaged over mirror images along these axes.

    Of a window of n strides, cell j lies at `stride * j + offset`, and its mirror image's at
    `stride * j + stride - 1 - offset`; what both say together lies in the middle.
    """
    if info.placement is None:
        return info
    offset = list(info.placement.offset)
    for axis in axes:
        offset[axis] = (info.placement.stride[axis] - 1) / 2
    return replace(info, placement=Placement(info.placement.stride, tuple(offset)))
