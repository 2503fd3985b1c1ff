"""ONNX Runtime, on the CPU."""

import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.jit import TracerWarning  # type: ignore[attr-defined]

from segkit.errors import ModelError
from segkit.inference.engines.converted import INPUT, RunGraph, Traced

ONNX_FILE = "network.onnx"
OPSET = 18
WANTED = (
    "You are using the legacy TorchScript-based ONNX export",
    "The feature will be removed",
    # Each image's own moments, as in PyTorch.
    "ONNX export mode is set to TrainingMode.EVAL, but operator 'instance_norm' is set to",
)
"""What PyTorch (2.14) says of its older exporter at each call.

The newer one, by `torch.export`, needs the package onnxscript and takes 3 to 15 seconds for a
network that this one exports in one.
"""


class OnnxRuntime:
    """The runtime, in float32. Raises ModelError where it is not installed."""

    name = "onnx"

    def __init__(self) -> None:
        self.onnxruntime = _installed()
        self.version = f"{version('onnxruntime')} {version('onnx')} opset {OPSET}"

    def convert(self, network: Traced, window: Tensor, folder: Path) -> None:
        """Write the files of a network for windows like this one."""
        self.write(network, window, folder / ONNX_FILE)

    def write(self, network: Traced, window: Tensor, file: Path, *, batch: str = "") -> None:
        """Write a network for windows like these, its outputs by their names.

        Where `batch` has a name, the file takes as many windows as there are, else so many.
        """
        names = (INPUT, *network.names)
        with warnings.catch_warnings():
            for message in WANTED:
                warnings.filterwarnings("ignore", message)
            warnings.simplefilter("ignore", TracerWarning)  # the window's size is kept
            torch.onnx.export(
                network,
                (window,),
                file,
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=network.names,
                dynamic_axes={name: {0: batch} for name in names} if batch else {},
            )

    def load(self, folder: Path, names: Sequence[str]) -> RunGraph:
        """What runs the network of these files, whose outputs have these names, in order."""
        return self.read(folder / ONNX_FILE, names)

    def read(self, file: Path, names: Sequence[str]) -> RunGraph:
        """What runs the network of a file, whose outputs have these names, in order."""
        options = self.onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = self.onnxruntime.InferenceSession(
            file.read_bytes(), options, providers=["CPUExecutionProvider"]
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
