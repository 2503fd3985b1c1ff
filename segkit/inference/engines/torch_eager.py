"""Engines run a network on batches of windows: logits, and attention maps in the same pass.

torch_eager    the interface of engines, and PyTorch's own engine
torch_compile  torch.compile
converted      OpenVINO and ONNX Runtime, with the cache of `segkit.io.folder_cache`
out_of_memory  an engine that continues in host memory if GPU memory runs out
choose         choice of an engine, by name or by rule
"""

import math
from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.geometry.queued_copy import queued_to
from segkit.nn.map_tap import recording
from segkit.nn.network import SegmentationNetwork
from segkit.nn.slicewise import SlicewiseNetwork

LOGITS = "logits"
PRESENCE = "presence"
"""Key of the logits of each class's presence in a window, if the network has a presence head."""
WINDOWS_ON_GPU = 4
"""Windows that a GPU computes at once."""
LARGE_ALONE = 20_480
"""The size above which PyTorch (2.13) convolves one sample on a CPU as fast as several."""


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

    Outputs that overflow float16 are infinite or NaN: the caller checks them, because a check here
    would make the GPU wait for the host at each batch. Denormal numbers are not flushed to zero:
    PyTorch could do so only in the calling thread, not in its worker threads, and this would also
    affect NumPy.
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
        self.first_width = first_width_of(network)

    @torch.inference_mode()
    def __call__(
        self, windows: Float[Tensor, "batch channel x y z"], keys: Collection[str]
    ) -> dict[str, Tensor]:
        """Logits of the windows and the maps of these keys, in float32 on the engine's device."""
        windows = queued_to(windows, self.device)
        half = self.precision != torch.float32
        with torch.autocast(self.device.type, dtype=self.precision, enabled=half):
            outputs = self.compute(windows, keys)
        return {key: output.float() for key, output in outputs.items()}

    def compute(self, windows: Tensor, keys: Collection[str]) -> dict[str, Tensor]:
        """Outputs of `run` for windows on the engine's device."""
        if len(windows) == 1 and is_slow_alone(
            self.first_width, self.device, windows.shape[2:], self.precision
        ):
            twice = run(self.network, windows.expand(2, -1, -1, -1, -1), keys)
            return {key: output[:1] for key, output in twice.items()}
        return run(self.network, windows, keys)


def windows_at_once(
    network: nn.Module,
    device: torch.device,
    window: Sequence[int],
    precision: torch.dtype = torch.float32,
) -> int:
    """The number of windows in each call with which PyTorch segments a volume fastest.

    Args:
        network: the network.
        device: where it runs.
        window: size of a window in voxels.
        precision: data type of the arithmetic.

    Returns:
        4 on a GPU. On a CPU 2 in single precision if windows are small, else 1.
    """
    if device.type == "cuda":
        return WINDOWS_ON_GPU
    return 2 if is_slow_alone(first_width_of(network), device, window, precision) else 1


def first_width_of(network: nn.Module) -> int:
    """Channels that the first 3D convolution computes; 0 if the network has none."""
    layers = (layer for layer in network.modules() if isinstance(layer, nn.Conv3d))
    return next((layer.out_channels for layer in layers), 0)


def is_slow_alone(
    first_width: int, device: torch.device, window: Sequence[int], precision: torch.dtype
) -> bool:
    """Whether one window of this size takes longer than two at once.

    For one small sample PyTorch (2.13) uses a convolution on a CPU that is about four times
    slower: one window of 32 x 40 x 32 voxels takes 0.35 s, but each of two takes 0.10 s. A sample
    is small if the product of its channels and its first two sizes is. In bfloat16, it uses the
    same convolution for any number of samples.
    """
    size = first_width * math.prod(window[:2])
    return device.type == "cpu" and precision == torch.float32 and 0 < size <= LARGE_ALONE
