"""Export a network as TorchScript, one file that PyTorch can load without segkit.

Only MONAI bundles use it. PyTorch (2.13) deprecates TorchScript in favour of `torch.export`, but
MONAI (1.6) and its deployment tools can read no other format.
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
"""Name of the metadata inside the file, which MONAI expects."""


DEPRECATED = (
    r"`torch\.jit\.(trace|trace_method|save|load)` is (deprecated|not supported in Python 3\.14)"
)
"""Warning of PyTorch for TorchScript: a DeprecationWarning, from 2.14 on a FutureWarning."""


@contextmanager
def torchscript_allowed() -> Iterator[None]:
    """Within this context, PyTorch does not warn about TorchScript.

    The warnings say that it is deprecated, but bundles need it; and that a trace fixes sizes, but
    all windows have the same size.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", DEPRECATED)
        warnings.simplefilter("ignore", TracerWarning)
        yield


def export_torchscript(model: Model, file: Path, metadata: Mapping[str, Any]) -> None:
    """Write a model's network, which returns only logits.

    It takes any number of windows of the model's patch size, on any device.

    Args:
        model: a trained model.
        file: .ts.
        metadata: the content of MONAI's metadata.json, which is stored in the file.

    Raises:
        ModelError: PyTorch cannot trace the network.
    """
    network = model.network.cpu().eval()
    windows = example_windows(model)
    with exporting_to("TorchScript"), torchscript_allowed(), torch.no_grad():
        traced = torch.jit.trace(network, windows, check_trace=False)
        _follow_the_input(traced)
        with whole(file) as partial:
            torch.jit.save(traced, partial, _extra_files={METADATA: json.dumps(metadata)})


def read_torchscript(file: Path) -> RunGraph:
    """Function that runs the network of a file on the CPU.

    The file can run code, so read only files that you trust.
    """
    with torchscript_allowed():
        network = torch.jit.load(file, map_location="cpu")

    @torch.inference_mode()
    def run(windows: Tensor, names: tuple[str, ...]) -> list[Tensor]:
        assert names == (LOGITS,), "there is one output"
        return [network(windows)]

    return run


def _follow_the_input(traced: torch.jit.ScriptModule) -> None:
    """Let a network create its own tensors, such as positions, on the device of its input.

    A trace stores the device on which it was made as a constant, so it would fail on any other.
    """
    parts: Iterator[Any] = traced.modules()
    for part in parts:
        if not part._c._has_method("forward"):  # a part that is never called, such as a list
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
    """An input of a graph, or else a tensor that it holds, that exists before any computation."""
    given = [value for value in graph.inputs() if value.type().kind() == "TensorType"]
    held = [node.output() for node in graph.findAllNodes("prim::GetAttr", recurse=False)]
    return [*given, *(value for value in held if value.type().kind() == "TensorType")][0]
