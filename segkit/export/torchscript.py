"""A network as TorchScript: one file that PyTorch loads without the code that made it.

Only bundles hold it. PyTorch (2.13) calls TorchScript old, in favour of `torch.export`, but MONAI
(1.6) and its deployment tools read nothing else.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.jit import TracerWarning  # type: ignore[attr-defined]

from segkit.export.graphs import example_windows, exporting_to
from segkit.inference.engines.converted import RunGraph
from segkit.inference.engines.torch_eager import LOGITS
from segkit.io.atomic import whole
from segkit.model.folder import Model

METADATA = "metadata.json"
"""The name, inside the file, by which MONAI looks for it."""


OLD = r"`torch\.jit\.(trace|trace_method|save|load)` is (deprecated|not supported in Python 3\.14)"
"""What PyTorch says at each call of TorchScript's: DeprecationWarning, since 2.14 FutureWarning."""


@contextmanager
def torchscript_allowed() -> Iterator[None]:
    """Within it, PyTorch does not warn that TorchScript is old, nor that a trace keeps sizes.

    Bundles need the first, and the second is wanted: windows have one size.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", OLD)
        warnings.simplefilter("ignore", TracerWarning)
        yield


def export_torchscript(model: Model, file: Path, metadata: Mapping[str, Any]) -> None:
    """Write a model's network, which gives logits alone.

    It takes any number of windows of the model's patch, on any device. Raises ModelError where
    PyTorch cannot trace it.
    """
    network = model.network.cpu().eval()
    windows = example_windows(model)
    with exporting_to("TorchScript"), torchscript_allowed(), torch.no_grad():
        traced = torch.jit.trace(network, windows, check_trace=False)
        _follow_the_input(traced)
        with whole(file) as partial:
            torch.jit.save(traced, partial, _extra_files={METADATA: json.dumps(metadata)})


def read_torchscript(file: Path) -> RunGraph:
    """What runs the network of a file on the CPU. What is in it runs: it must be one's own."""
    with torchscript_allowed():
        network = torch.jit.load(file, map_location="cpu")

    @torch.inference_mode()
    def run(windows: Tensor, names: tuple[str, ...]) -> list[Tensor]:
        assert names == (LOGITS,), "there is one output"
        return [network(windows)]

    return run


def _follow_the_input(traced: torch.jit.ScriptModule) -> None:
    """Have what a network makes for itself, such as positions, lie on its input's device.

    A trace keeps the device that it was made on as a constant, and would fail on any other.
    """
    parts: Iterator[Any] = traced.modules()
    for part in parts:
        if not part._c._has_method("forward"):  # what was never called, such as a list
            continue
        graph = part.graph
        constants = [
            node
            for node in graph.findAllNodes("prim::Constant", recurse=False)
            if node.output().type().kind() == "DeviceObjType"
        ]
        if not constants:
            continue
        device = graph.create("prim::device", [_first_tensor(graph)], 1)
        device.output().setType(constants[0].output().type())
        device.insertBefore(constants[0])
        for constant in constants:
            constant.output().replaceAllUsesWith(device.output())
            constant.destroy()
        graph.lint()


def _first_tensor(graph: Any) -> Any:
    """A tensor that a graph is given, or else holds, before it computes anything."""
    given = [value for value in graph.inputs() if value.type().kind() == "TensorType"]
    held = [node.output() for node in graph.findAllNodes("prim::GetAttr", recurse=False)]
    return [*given, *(value for value in held if value.type().kind() == "TensorType")][0]
