"""OpenVINO on the CPU, about twice as fast as PyTorch for 3D networks."""

import functools
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export.decomp_utils import CustomDecompTable

from segkit.errors import ModelError
from segkit.inference.engines.converted import (
    INPUT,
    RunGraph,
    Traced,
    export_quietly,
    exported_program,
)
from segkit.inference.engines.torch_eager import LOGITS

OPENVINO_FILE = "network.xml"
NUMBERS = "network.bin"
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class OpenVino:
    """The runtime OpenVINO.

    Args:
        precision: data type of the arithmetic. By default OpenVINO uses bfloat16 if the CPU has
            AMX; segkit uses it only if requested.

    Raises:
        ModelError: OpenVINO is not installed, or cannot compute in this precision on this CPU.
    """

    name = "openvino"

    def __init__(self, precision: torch.dtype = torch.float32) -> None:
        self.openvino = _installed()
        self.version = version("openvino")
        self.core = _core()
        able = self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision not in PRECISIONS or PRECISIONS[precision].upper() not in ("F32", *able):
            raise ModelError(
                f"openvino: expected the precision float32 on this CPU, found {precision}; use "
                f"float32, or another engine"
            )
        # One window at a time, on as many threads as PyTorch uses. They are not pinned to cores,
        # because OpenVINO would pin the threads of several processes to the same cores.
        self.settings = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,
        }

    def convert(self, network: Traced, window: Tensor, folder: Path) -> None:
        """Write the files of a network for windows of this shape."""
        graph = self.graph(network, window, any_number=False)
        self.openvino.serialize(graph, folder / OPENVINO_FILE, folder / NUMBERS)

    def graph(self, network: Traced, window: Tensor, *, any_number: bool) -> Any:
        """OpenVINO's graph of a network for windows of this shape; its outputs have names.

        It takes batches of the same size as `window`, or of any size if `any_number`.
        """
        from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

        program = exported_program(network, window, any_number=any_number)
        with export_quietly():
            program = program.run_decompositions(_decompositions())
            decoder = TorchFXPythonDecoder(program.module(), dynamic_shapes=True)
        batch = -1 if any_number else len(window)
        graph = self.openvino.convert_model(decoder, input=[[batch, *window.shape[1:]]])
        graph.inputs[0].get_tensor().set_names({INPUT})
        for output, name in zip(graph.outputs, network.names, strict=True):
            output.get_tensor().set_names({name})
        return graph

    def load(self, folder: Path, names: Sequence[str]) -> RunGraph:
        """Function that runs the network of these files; its outputs have these names, in order.

        It is compiled for each set of outputs that is requested, in about a second. OpenVINO's own
        cache of compiled networks would save little of this time.
        """
        return self.read(folder / OPENVINO_FILE, folder / NUMBERS, names)

    def read(self, file: Path, numbers: Path, names: Sequence[str]) -> RunGraph:
        """Function that runs the network of two files; its outputs have these names, in order."""
        graph = self.core.read_model(file, numbers)
        compiled: dict[tuple[str, ...], Any] = {}
        requests: dict[tuple[int, tuple[str, ...]], Any] = {}

        def run(window: Tensor, wanted: tuple[str, ...]) -> list[Tensor]:
            if wanted not in compiled:
                outputs = {name: graph.outputs[names.index(name)] for name in wanted}
                outputs[LOGITS] = self._classes_last(outputs[LOGITS])
                part = self.openvino.Model(list(outputs.values()), graph.get_parameters())
                compiled[wanted] = self.core.compile_model(part, "CPU", self.settings)
            # Each thread has its own request, because outputs are not copied.
            own = (threading.get_ident(), wanted)
            if own not in requests:
                requests[own] = compiled[wanted].create_infer_request()
            request = requests[own]
            # Without `share_outputs` it would copy all outputs, which are large with many classes.
            request.infer([window.numpy()], share_inputs=True, share_outputs=True)
            tensors = (request.get_output_tensor(number) for number in range(len(wanted)))
            found = dict(zip(wanted, (torch.from_numpy(one.data) for one in tensors), strict=True))
            found[LOGITS] = found[LOGITS].movedim(-1, 1)
            return list(found.values())

        return run

    def _classes_last(self, logits: Any) -> Any:
        """Logits with the classes of a voxel side by side, the order in which they are blended.

        The kernels of newer CPUs compute them in this order, so nothing has to be moved. Moving
        them took twice as long as a small network itself.
        """
        turn = self.openvino.opset13.transpose
        return turn(logits.get_node().input_value(0), np.array([0, 2, 3, 4, 1])).output(0)


def _installed() -> Any:
    # OpenVINO sends usage data to its vendor if this package is installed. Nothing about the
    # segmentation of patients may leave the machine.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError:
        raise ModelError(
            "the engine openvino is not installed; run pip install 'segkit[openvino]', or use "
            "--engine torch"
        ) from None
    return openvino


def _decompositions() -> CustomDecompTable:
    """Decompositions of operations that OpenVINO does not know into operations that it knows.

    This is OpenVINO's own table without instance normalisation. OpenVINO (2026.4) decomposes it
    into three means and six other operations per layer, and its compiler does not fuse these again,
    although OpenVINO knows instance normalisation as one operation.
    """
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose

    table = CustomDecompTable()
    for operation in (*ops_to_not_decompose(), torch.ops.aten.instance_norm.default):
        table.pop(operation, None)
    return table


@functools.cache
def _core() -> Any:
    # One core for the whole process, never deleted: OpenVINO (2026.4) gives the thread that creates
    # the core a stack for signals, and removes it when the core is deleted, in whichever thread.
    # The next signal, such as Ctrl-C, would then be a segmentation fault.
    return _installed().Core()
