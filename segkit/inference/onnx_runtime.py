"""ONNX Runtime, on the CPU."""

import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.errors import ModelError
from segkit.inference.converted import Run, Traced

GRAPH = "network.onnx"
OPSET = 18


class OnnxRuntime:
    """The runtime, in float32. Raises ModelError where it is not installed."""

    name = "onnx"

    def __init__(self) -> None:
        self.onnxruntime = _installed()
        self.version = f"{version('onnxruntime')} {version('onnx')} opset {OPSET}"

    def convert(self, network: Traced, window: Tensor, folder: Path) -> None:
        """Write the files of a network for windows like this one."""
        with warnings.catch_warnings():
            # torch's older exporter, which needs no package beside onnx, says that it is old, that
            # the window's size becomes a part of the graph, and that instance normalisation uses
            # each image's own moments.
            warnings.simplefilter("ignore")
            torch.onnx.export(network, (window,), folder / GRAPH, dynamo=False, opset_version=OPSET)

    def load(self, folder: Path, names: Sequence[str]) -> Run:
        """What runs the network of these files, whose outputs have these names, in order."""
        options = self.onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = self.onnxruntime.InferenceSession(
            (folder / GRAPH).read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        (image,) = [given.name for given in session.get_inputs()]
        own_names = [output.name for output in session.get_outputs()]
        only = self.onnxruntime.RunOptions()
        only.only_execute_path_to_fetches = True

        def run(window: Tensor, wanted: tuple[str, ...]) -> list[Tensor]:
            outputs = [own_names[names.index(name)] for name in wanted]
            found = session.run(outputs, {image: window.numpy()}, only)
            return [torch.from_numpy(output) for output in found]

        return run


def _installed() -> Any:
    try:
        import onnx  # noqa: F401  (the exporter's)
        import onnxruntime
    except ImportError:
        raise ModelError(
            "the engine onnx is not installed; pip install 'segkit[onnx]', or use --engine torch"
        ) from None
    onnxruntime.disable_telemetry_events()
    return onnxruntime
