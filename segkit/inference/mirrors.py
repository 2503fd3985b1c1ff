"""Test-time mirroring: average a network's outputs over a window and its mirror images."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.geometry.grid import Placement
from segkit.inference.engines.torch_eager import LOGITS, Engine
from segkit.inference.ensemble import RunningVariance
from segkit.nn.map_tap import MapInfo

SPREAD = "spread"
"""Mean over classes of the variance of probabilities between a window's mirror images."""


class Mirrored:
    """Engine that runs another engine on each window and its mirror images, and averages outputs.

    A window is mirrored along every combination of `axes`. Logits (as in nnU-Net, Isensee et al.
    2021) and maps are mirrored back before they are averaged.

    Args:
        engine: the engine to run.
        axes: spatial axes of a window, 0 to 2, along which the network was trained on mirror
            images.
        batch_size: number of windows and mirror images in each call of the engine.
        regions: True if the outputs are regions, False if they are classes.
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
        """The outputs of an engine, and SPREAD, (batch, 1, x, y, z), if it is among the keys."""
        means: dict[str, Tensor] = {}
        running = RunningVariance(class_axis=1)
        others = [key for key in keys if key != SPREAD]
        for number, outputs in enumerate(self._outputs(windows, others), start=1):
            if SPREAD in keys:
                logits = outputs[LOGITS]
                running.add(logits.sigmoid() if self.regions else logits.softmax(dim=1))
            for key, value in outputs.items():
                # If GPU memory has run out since, this value is on the host.
                mean = means.get(key, value).to(value.device)
                means[key] = mean + (value - mean) / number
        if SPREAD in keys:
            means[SPREAD] = running.variance[:, None]
        return means

    def _outputs(self, windows: Tensor, keys: Collection[str]) -> Iterator[dict[str, Tensor]]:
        step = max(self.batch_size // len(windows), 1)
        for first in range(0, len(self.mirrors), step):
            mirrors = self.mirrors[first : first + step]
            images = torch.cat([windows.flip(axes) if axes else windows for axes in mirrors])
            outputs = self.engine(images, keys)
            parts = {key: output.split(len(windows)) for key, output in outputs.items()}
            for number, axes in enumerate(mirrors):
                yield {
                    key: _mirrored_back(part[number].float(), axes) for key, part in parts.items()
                }


def _mirrored_back(output: Tensor, axes: tuple[int, ...]) -> Tensor:
    """An output of a mirror image, mirrored back, if it has spatial axes (presence has none)."""
    return output.flip(axes) if axes and output.ndim == 5 else output


def mirrored_map(info: MapInfo, axes: Sequence[int]) -> MapInfo:
    """Information about a map that is averaged over mirror images along these axes.

    In a window, cell j lies at `stride * j + offset`, and cell j of the mirror image at
    `stride * j + stride - 1 - offset`. Their mean lies in the middle.
    """
    if info.placement is None:
        return info
    offset = list(info.placement.offset)
    for axis in axes:
        offset[axis] = (info.placement.stride[axis] - 1) / 2
    return replace(info, placement=Placement(info.placement.stride, tuple(offset)))
