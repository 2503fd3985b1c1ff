"""What runs a batch of windows through a network: logits, and the attention maps beside them."""

from collections.abc import Collection
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.nn.planes import Planes, SegmentationNetwork
from segkit.nn.taps import recording

LOGITS = "logits"
PRESENCE = "presence"
"""Logits of each class's presence in a window, of networks that have a head for it."""


@runtime_checkable
class Engine(Protocol):
    """Runs windows through a network."""

    def __call__(
        self, windows: Float[Tensor, "batch channel x y z"], keys: Collection[str]
    ) -> dict[str, Tensor]:
        """The logits of windows, and the maps of these keys, each (batch, channel, cells …).

        Among the keys may be PRESENCE, (batch, classes).
        """


class TorchEngine:
    """PyTorch as it is, on any device; in mixed precision where `precision` is a half type."""

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

    @torch.inference_mode()
    def __call__(
        self, windows: Float[Tensor, "batch channel x y z"], keys: Collection[str]
    ) -> dict[str, Tensor]:
        """The logits of windows, and the maps of these keys, in float32 on the engine's device."""
        half = self.precision != torch.float32
        windows = windows.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=self.precision, enabled=half):
            if not keys:
                return {LOGITS: self.network(windows)}
            outputs: dict[str, Tensor] = {}
            with recording(self.network, keys) as recorded:
                if PRESENCE in keys:
                    outputs[LOGITS], outputs[PRESENCE] = self.network.classified(windows)
                else:
                    outputs[LOGITS] = self.network(windows)
        for key in keys:
            if key == PRESENCE:
                continue
            cells = recorded[key]
            if isinstance(self.network, Planes):
                cells = self.network.stack(cells, len(windows))
            outputs[key] = cells
        return outputs


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is a CUDA device where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
