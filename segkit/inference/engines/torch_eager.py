"""Engines run a network on batches of windows: logits, and attention maps in the same pass.

torch_eager    the interface of engines, and PyTorch's own engine
torch_compile  torch.compile
converted      OpenVINO and ONNX Runtime, with the cache of `segkit.io.folder_cache`
out_of_memory  an engine that continues in host memory if GPU memory runs out
choose         choice of an engine, by name or by rule
"""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.nn.map_tap import recording
from segkit.nn.network import SegmentationNetwork
from segkit.nn.slicewise import SlicewiseNetwork

LOGITS = "logits"
LARGE_ALONE = 20_480
"""The size above which PyTorch (2.13) convolves one sample on a CPU as fast as several."""
PRESENCE = "presence"
"""Key of the logits of each class's presence in a window, if the network has a presence head."""

logger = logging.getLogger(__name__)


@runtime_checkable
class Engine(Protocol):
    """Runs a network on windows."""

    def __call__(
        self, windows: Float[Tensor, "batch channel x y z"], keys: Collection[str]
    ) -> dict[str, Tensor]:
        """Logits of the windows, and the maps of these keys, each (batch, channel, *cells).

        They are valid until the same thread calls the engine again. If PRESENCE is among the keys,
        its logits are (batch, classes).
        """


def run(
    network: SegmentationNetwork,
    windows: Float[Tensor, "batch channel x y z"],
    keys: Collection[str],
) -> dict[str, Tensor]:
    """Outputs of an engine, computed by PyTorch. All other engines are built from this function."""
    outputs: dict[str, Tensor] = {}
    with recording(network, keys) as recorded:
        if PRESENCE in keys:
            outputs[LOGITS], outputs[PRESENCE] = network.classified(windows)
        else:
            outputs[LOGITS] = network(windows)
    for key in keys:
        if key == PRESENCE:
            continue
        cells = recorded[key]
        if isinstance(network, SlicewiseNetwork):
            cells = network.stack_slices(cells, windows.shape[0])
        outputs[key] = cells
    return outputs


class TorchEngine:
    """PyTorch without compilation, on any device; in mixed precision if `precision` is a half type.

    If the outputs of a batch overflow float16, the batch is computed again in float32. Denormal
    numbers are not flushed to zero: PyTorch could do so only in the calling thread, not in its
    worker threads, and this would also affect NumPy.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        *,
        device: torch.device,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.network = network.to(device).eval()
        self.device = device
        self.precision = precision
        self.overflowed = False
        layers = (layer for layer in network.modules() if isinstance(layer, nn.Conv3d))
        self.first_width = next((layer.out_channels for layer in layers), 0)

    @torch.inference_mode()
    def __call__(
        self, windows: Float[Tensor, "batch channel x y z"], keys: Collection[str]
    ) -> dict[str, Tensor]:
        """Logits of the windows and the maps of these keys, in float32 on the engine's device."""
        if self.device.type == "cuda" and windows.device.type == "cpu":
            windows = windows.pin_memory()  # so that the copy is asynchronous
        windows = windows.to(self.device, non_blocking=True)
        outputs = self._at(self.precision, windows, keys)
        if self.precision == torch.float16 and not _all_finite(outputs):
            if not self.overflowed:
                logger.warning(
                    "the network's outputs overflow float16; such windows are computed in float32"
                )
            self.overflowed = True
            outputs = self._at(torch.float32, windows, keys)
        return {key: output.float() for key, output in outputs.items()}

    def compute(self, windows: Tensor, keys: Collection[str]) -> dict[str, Tensor]:
        """Outputs of `run` for windows on the engine's device."""
        if len(windows) == 1 and self.is_slow_alone(windows.shape[2:]):
            twice = run(self.network, windows.expand(2, -1, -1, -1, -1), keys)
            return {key: output[:1] for key, output in twice.items()}
        return run(self.network, windows, keys)

    def is_slow_alone(self, window: Sequence[int]) -> bool:
        """Whether one window of this size takes longer than two at once.

        PyTorch (2.13) uses a convolution on a CPU that is about four times slower if its input is
        one sample, and the product of its first four sizes, the sample's included, is small.
        """
        size = self.first_width * math.prod(window[:2])
        return self.device.type == "cpu" and 0 < size <= LARGE_ALONE

    def _at(
        self, precision: torch.dtype, windows: Tensor, keys: Collection[str]
    ) -> dict[str, Tensor]:
        half = precision != torch.float32
        with torch.autocast(self.device.type, dtype=precision, enabled=half):
            return self.compute(windows, keys)


def _all_finite(outputs: Mapping[str, Tensor]) -> bool:
    # A sum reads each output once and copies nothing; float32 holds any sum of float16.
    sums = [output.sum(dtype=torch.float32) for output in outputs.values()]
    return bool(torch.stack(sums).isfinite().all())
