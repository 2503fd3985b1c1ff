"""ONNX Runtime on the CPU."""

import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.jit import TracerWarning  # type: ignore[attr-defined]

from segkit.errors import ModelError
from segkit.inference.engines.converted import INPUT, RunGraph, Traced
from segkit.inference.engines.torch_eager import PRESENCE

ONNX_FILE = "network.onnx"
OPSET = 18
WANTED = (
    "You are using the legacy TorchScript-based ONNX export",
    "The feature will be removed",
    # Each image's own mean and variance are used, as in PyTorch.
    "ONNX export mode is set to TrainingMode.EVAL, but operator 'instance_norm' is set to",
    # A constant is computed when the graph runs: which cells of a padded window lie on the grid.
    "Constant folding - Only steps=1 can be constant folded",
)
"""Warnings of PyTorch (2.14) at each call of its older exporter, which we use on purpose.

The newer exporter, with `torch.export`, needs the package onnxscript and takes 3 to 15 seconds for
a network that the older one exports in one second.
"""


class OnnxRuntime:
    """The runtime ONNX Runtime, in float32.

    Raises:
        ModelError: it is not installed.
    """

    name = "onnx"

    def __init__(self) -> None:
        self.onnxruntime = _installed()
        self.version = f"{version('onnxruntime')} {version('onnx')} opset {OPSET}"

    def convert(self, network: Traced, window: Tensor, folder: Path) -> None:
        """Write the files of a network for windows of this shape."""
        self.write(network, window, folder / ONNX_FILE)

    def write(
        self,
        network: Traced,
        window: Tensor,
        file: Path,
        *,
        free: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """Write a network for windows of this shape; its outputs have names.

        Args:
            network: the network.
            window: a batch of windows.
            file: the file to write.
            free: names of the axes that may have any length, by number: 0 is the batch, and space
                begins at 2. The others keep the length that they have in `window`.
        """
        of_batch = {axis: name for axis, name in free.items() if axis == 0}
        changing = {
            name: of_batch if name == PRESENCE else dict(free) for name in (INPUT, *network.names)
        }
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
                dynamic_axes=changing,
            )

    def load(self, folder: Path, names: Sequence[str]) -> RunGraph:
        """Function that runs the network of these files; its outputs have these names, in order."""
        return self.read(folder / ONNX_FILE, names)

    def read(self, file: Path, names: Sequence[str]) -> RunGraph:
        """Function that runs the network of a file; its outputs have these names, in order."""
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
            "the engine onnx is not installed; run pip install 'segkit[onnx]', or use "
            "--engine torch"
        ) from None
    onnxruntime.disable_telemetry_events()
    return onnxruntime
