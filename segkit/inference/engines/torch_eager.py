"""What runs a batch of windows through a network: logits, and the attention maps beside them.

torch_eager    what an engine is, and PyTorch itself
torch_compile  torch.compile
converted      OpenVINO and ONNX Runtime, through the cache of `conversion_cache`
out_of_memory  what is done when a device's memory runs out
choose         which of them, by name or by rule
"""

import logging
from collections.abc import Collection, Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.nn.map_tap import recording
from segkit.nn.network import SegmentationNetwork
from segkit.nn.slicewise import SlicewiseNetwork

LOGITS = "logits"
PRESENCE = "presence"
"""Logits of each class's presence in a window, of networks that have a head for it."""

logger = logging.getLogger(__name__)


@runtime_checkable
class Engine(Protocol):
    """Runs windows through a network."""

    def __call__(
        self, windows: Float[Tensor, "batch channel x y z"], keys: Collection[str]
    ) -> dict[str, Tensor]:
        """The logits of windows, and the maps of these keys, each (batch, channel, cells …).

        They hold until the same thread asks again.
        Among the keys may be PRESENCE, (batch, classes).
        """


def run(
    network: SegmentationNetwork,
    windows: Float[Tensor, "batch channel x y z"],
    keys: Collection[str],
) -> dict[str, Tensor]:
    """What an engine returns, computed by PyTorch: the one form that all others are made from."""
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
    """PyTorch as it is, on any device; in mixed precision where `precision` is a half type.

    A batch whose outputs overflow float16 is computed again in float32. Numbers too small to be
    normal are kept: torch can flush them to zero in the calling thread alone, not in those that
    share its work, and numpy would notice.
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

    @torch.inference_mode()
    def __call__(
        self, windows: Float[Tensor, "batch channel x y z"], keys: Collection[str]
    ) -> dict[str, Tensor]:
        """The logits of windows, and the maps of these keys, in float32 on the engine's device."""
        if self.device.type == "cuda" and windows.device.type == "cpu":
            windows = windows.pin_memory()  # else the copy would not be asynchronous
        windows = windows.to(self.device, non_blocking=True)
        outputs = self._at(self.precision, windows, keys)
        if self.precision == torch.float16 and not _all_finite(outputs):
            if not self.overflowed:
                logger.warning("its outputs overflow float16; such windows are computed in float32")
            self.overflowed = True
            outputs = self._at(torch.float32, windows, keys)
        return {key: output.float() for key, output in outputs.items()}

    def compute(self, windows: Tensor, keys: Collection[str]) -> dict[str, Tensor]:
        """The outputs for windows on the engine's device."""
        return run(self.network, windows, keys)

    def _at(
        self, precision: torch.dtype, windows: Tensor, keys: Collection[str]
    ) -> dict[str, Tensor]:
        half = precision != torch.float32
        with torch.autocast(self.device.type, dtype=precision, enabled=half):
            return self.compute(windows, keys)


def _all_finite(outputs: Mapping[str, Tensor]) -> bool:
    return all(bool(output.isfinite().all()) for output in outputs.values())
