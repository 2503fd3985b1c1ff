"""Choose the engine that runs a model, by name or by rule."""

import copy
import logging
from collections.abc import Collection
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.errors import ModelError
from segkit.inference.engines.converted import ConversionError, ConvertedEngine, conversion_folder
from segkit.inference.engines.onnx import OnnxRuntime
from segkit.inference.engines.openvino import OpenVino
from segkit.inference.engines.out_of_memory import MemoryFallbackEngine
from segkit.inference.engines.torch_compile import CompiledEngine
from segkit.inference.engines.torch_eager import Engine, TorchEngine
from segkit.model.folder import Model
from segkit.nn.normalisation import order_for
from segkit.system.libraries import warn_of_slow_convolutions
from segkit.system.resources import choose_device

EngineName = Literal["auto", "torch", "compile", "openvino", "onnx"]

logger = logging.getLogger(__name__)


def choose_engine(
    name: EngineName, model: Model, *, device: str = "auto", precision: torch.dtype = torch.float32
) -> Engine:
    """The engine of a name. The rule of `auto` is:

    - On a GPU: PyTorch.
    - On a CPU: OpenVINO, if it is installed and supports the precision, and if the model was read
      from a folder, so that the conversion can be used again. The conversion takes a few seconds,
      once. If OpenVINO cannot run the network, PyTorch runs it, with a warning.
    - Otherwise PyTorch. `torch.compile` is never chosen, because it is no faster on a CPU.

    Args:
        name: 'torch', 'compile', 'openvino', 'onnx' or 'auto'.
        model: the model to run.
        device: 'auto', 'cpu', 'cuda' or another name of PyTorch's.
        precision: data type of the arithmetic.

    Raises:
        ModelError: the engine is not installed, or does not support the device or the precision.
    """
    match name:
        case "openvino":
            _check_cpu(name, device)
            return ConvertedEngine(model, OpenVino(precision))
        case "onnx":
            _check_cpu(name, device)
            if precision != torch.float32:
                raise ModelError(
                    f"onnx: expected the precision float32, found {precision}; use float32, or "
                    f"another engine"
                )
            return ConvertedEngine(model, OnnxRuntime())
        case "compile":
            return _in_torch(CompiledEngine, model, choose_device(device), precision)
        case "torch" | "auto":
            place = choose_device(device)
            eager = _in_torch(TorchEngine, model, place, precision)
            lasting = place.type == "cpu" and conversion_folder(model) is not None
            if name == "torch" or not lasting:
                return eager
            try:
                return ConversionFallbackEngine(ConvertedEngine(model, OpenVino(precision)), eager)
            except ModelError:  # it is not installed, or does not support the precision here
                return eager


class ConversionFallbackEngine:
    """A converted network; PyTorch runs the network instead if it cannot be converted."""

    def __init__(self, converted: ConvertedEngine, eager: Engine) -> None:
        self.chosen: Engine = converted
        self.eager = eager

    def __call__(
        self, windows: Float[Tensor, "batch channel x y z"], keys: Collection[str]
    ) -> dict[str, Tensor]:
        """Logits of the windows and the maps of these keys, in float32 on the CPU."""
        try:
            return self.chosen(windows, keys)
        except ConversionError as error:
            logger.warning("%s", error)
            self.chosen = self.eager
            return self.eager(windows, keys)


def name_of(engine: Engine | None) -> str:
    """Name of the engine that runs a network, with its version if it is not part of PyTorch."""
    match engine:
        case ConversionFallbackEngine(chosen=inner) | MemoryFallbackEngine(engine=inner):
            return name_of(inner)
        case ConvertedEngine(runtime=runtime):
            return f"{runtime.name} {runtime.version}"
        case CompiledEngine():
            return "torch.compile"
        case _:
            return "torch"


def is_converted(engine: Engine) -> bool:
    """Whether OpenVINO or ONNX Runtime runs the network."""
    return isinstance(engine, ConvertedEngine | ConversionFallbackEngine)


def _in_torch(
    kind: type[TorchEngine], model: Model, device: torch.device, precision: torch.dtype
) -> Engine:
    if device.type != "cuda":
        return kind(model.network, device=device, precision=precision)
    warn_of_slow_convolutions()
    network = model.network
    if precision != torch.float32:
        # Tensor cores need channels last. Features take the order of a layer's weights.
        order_for(network, device)

    def make_host_engine() -> Engine:
        # Copied in host memory, because the GPU has no room for a second network.
        copied = copy.deepcopy(network.cpu())
        network.to(device)
        return TorchEngine(copied, device=torch.device("cpu"))

    return MemoryFallbackEngine(kind(network, device=device, precision=precision), make_host_engine)


def _check_cpu(name: str, device: str) -> None:
    if device not in ("auto", "cpu"):
        raise ModelError(
            f"the engine {name} runs only on the CPU, found --device {device}; use --device cpu, "
            f"or another engine"
        )
