"""Which engine runs a model: the one that was asked for by name, or by rule."""

import copy
import logging
from collections.abc import Collection
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.errors import ModelError
from segkit.inference.engines.converted import ConversionError, ConvertedEngine, lasting_folder
from segkit.inference.engines.onnx import OnnxRuntime
from segkit.inference.engines.openvino import OpenVino
from segkit.inference.engines.out_of_memory import SparingEngine
from segkit.inference.engines.torch_compile import CompiledEngine
from segkit.inference.engines.torch_eager import Engine, TorchEngine
from segkit.model.folder import Model
from segkit.nn.normalisation import order_for
from segkit.system.resources import choose_device

EngineName = Literal["auto", "torch", "compile", "openvino", "onnx"]

logger = logging.getLogger(__name__)


def choose_engine(
    name: EngineName, model: Model, *, device: str = "auto", precision: torch.dtype = torch.float32
) -> Engine:
    """The engine of that name. The rule of `auto`:

    - on a GPU, PyTorch;
    - on a CPU, OpenVINO, if it is installed, if the model was read from a folder, where what is
      converted serves again, and if it can compute in that precision. The conversion takes a few
      seconds, once. A network that OpenVINO cannot run stays in PyTorch, with a warning;
    - else PyTorch. `torch.compile` is never chosen: on a CPU it is no faster.

    Raises ModelError for an engine that is not installed, or that cannot run on that device or in
    that precision.
    """
    match name:
        case "openvino":
            _check_cpu(name, device)
            return ConvertedEngine(model, OpenVino(precision))
        case "onnx":
            _check_cpu(name, device)
            if precision != torch.float32:
                raise ModelError(
                    f"the engine onnx computes in float32, found {precision}; ask for float32, or "
                    f"for another engine"
                )
            return ConvertedEngine(model, OnnxRuntime())
        case "compile":
            return _in_torch(CompiledEngine, model, choose_device(device), precision)
        case "torch" | "auto":
            place = choose_device(device)
            eager = _in_torch(TorchEngine, model, place, precision)
            lasting = place.type == "cpu" and lasting_folder(model) is not None
            if name == "torch" or not lasting:
                return eager
            try:
                return WillingEngine(ConvertedEngine(model, OpenVino(precision)), eager)
            except ModelError:  # it is not installed, or has no such precision here
                return eager


class WillingEngine:
    """A converted network, and the one it was converted from where that cannot be done."""

    def __init__(self, converted: ConvertedEngine, eager: Engine) -> None:
        self.chosen: Engine = converted
        self.eager = eager

    def __call__(
        self, windows: Float[Tensor, "batch channel x y z"], keys: Collection[str]
    ) -> dict[str, Tensor]:
        """The logits of windows, and the maps of these keys, in float32 on the CPU."""
        try:
            return self.chosen(windows, keys)
        except ConversionError as error:
            logger.warning("%s", error)
            self.chosen = self.eager
            return self.eager(windows, keys)


def name_of(engine: Engine | None) -> str:
    """The name of what runs a network, and its version where it is no part of torch."""
    match engine:
        case WillingEngine(chosen=inner) | SparingEngine(engine=inner):
            return name_of(inner)
        case ConvertedEngine(runtime=runtime):
            return f"{runtime.name} {runtime.version}"
        case CompiledEngine():
            return "torch.compile"
        case _:
            return "torch"


def _in_torch(
    kind: type[TorchEngine], model: Model, device: torch.device, precision: torch.dtype
) -> Engine:
    if device.type != "cuda":
        return kind(model.network, device=device, precision=precision)
    network = model.network
    if precision != torch.float32:
        # The order that tensor cores work in. A layer's weights decide for what passes through it.
        order_for(network, device)

    def make_host_engine() -> Engine:
        # By way of the host: on the device there is no room for a second one.
        copied = copy.deepcopy(network.cpu())
        network.to(device)
        return TorchEngine(copied, device=torch.device("cpu"))

    return SparingEngine(kind(network, device=device, precision=precision), make_host_engine)


def _check_cpu(name: str, device: str) -> None:
    if device not in ("auto", "cpu"):
        raise ModelError(
            f"the engine {name} runs on the CPU, found --device {device}; name one of the two only"
        )
