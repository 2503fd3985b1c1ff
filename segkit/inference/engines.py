"""What runs a batch of windows through a network: logits, and the attention maps beside them."""

from collections.abc import Collection
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.nn.planes import Planes, SegmentationNetwork
from segkit.nn.taps import recording

LOGITS = "logits"


class Engine(Protocol):
    """Runs windows through a network."""

    def __call__(
        self, windows: Float[Tensor, "batch channel x y z"], keys: Collection[str]
    ) -> dict[str, Tensor]:
        """The logits of windows, and the maps of these keys, each (batch, channel, cells …)."""


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
            with recording(self.network) as maps:
                logits = self.network(windows)
        if isinstance(self.network, Planes):
            maps = {key: self.network.stack(maps[key], len(windows)) for key in keys}
        return {LOGITS: logits, **{key: maps[key] for key in keys}}


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is a CUDA device where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
