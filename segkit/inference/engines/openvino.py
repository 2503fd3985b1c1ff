"""OpenVINO, on the CPU: about twice as fast as PyTorch for three-dimensional networks."""

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
    """The runtime. Raises ModelError where it is not installed, or cannot compute so precisely.

    Args:
        precision: of the arithmetic. Left to itself OpenVINO takes bfloat16 where the CPU has AMX;
            here it must be asked for.
    """

    name = "openvino"

    def __init__(self, precision: torch.dtype = torch.float32) -> None:
        self.openvino = _installed()
        self.version = version("openvino")
        self.core = _core()
        able = self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision not in PRECISIONS or PRECISIONS[precision].upper() not in ("F32", *able):
            raise ModelError(
                f"openvino computes in float32 here, found {precision}; ask for float32, or for "
                f"another engine"
            )
        # One window at a time on all of torch's threads, which are not tied to cores: processes
        # beside one another would be tied to the same ones.
        self.settings = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,
        }

    def convert(self, network: Traced, window: Tensor, folder: Path) -> None:
        """Write the files of a network for windows like this one."""
        graph = self.graph(network, window, any_number=False)
        self.openvino.serialize(graph, folder / OPENVINO_FILE, folder / NUMBERS)

    def graph(self, network: Traced, window: Tensor, *, any_number: bool) -> Any:
        """OpenVINO's own form of a network for windows like these, its outputs by their names.

        It takes so many windows at once, or any number.
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
        """What runs the network of these files, whose outputs have these names, in order.

        It is compiled for each set of outputs that is asked for, in a second or so; OpenVINO's own
        cache of what is compiled would save little of that.
        """
        return self.read(folder / OPENVINO_FILE, folder / NUMBERS, names)

    def read(self, file: Path, numbers: Path, names: Sequence[str]) -> RunGraph:
        """What runs the network of these two files, whose outputs have these names, in order."""
        graph = self.core.read_model(file, numbers)
        compiled: dict[tuple[str, ...], Any] = {}
        requests: dict[tuple[int, tuple[str, ...]], Any] = {}

        def run(window: Tensor, wanted: tuple[str, ...]) -> list[Tensor]:
            if wanted not in compiled:
                outputs = {name: graph.outputs[names.index(name)] for name in wanted}
                outputs[LOGITS] = self._classes_last(outputs[LOGITS])
                part = self.openvino.Model(list(outputs.values()), graph.get_parameters())
                compiled[wanted] = self.core.compile_model(part, "CPU", self.settings)
            # A thread's own, as their outputs are not copied.
            own = (threading.get_ident(), wanted)
            if own not in requests:
                requests[own] = compiled[wanted].create_infer_request()
            request = requests[own]
            # Without the latter it copies all outputs, of many classes the largest thing there is.
            request.infer([window.numpy()], share_inputs=True, share_outputs=True)
            tensors = (request.get_output_tensor(number) for number in range(len(wanted)))
            found = dict(zip(wanted, (torch.from_numpy(one.data) for one in tensors), strict=True))
            found[LOGITS] = found[LOGITS].movedim(-1, 1)
            return list(found.values())

        return run

    def _classes_last(self, logits: Any) -> Any:
        """Logits with the classes of a voxel side by side, as they are blended.

        So the kernels of newer CPUs leave them, and nothing moves: to turn them took twice as long
        as a small network.
        """
        turn = self.openvino.opset13.transpose
        return turn(logits.get_node().input_value(0), np.array([0, 2, 3, 4, 1])).output(0)


def _installed() -> Any:
    # OpenVINO reports its use to its makers unless this package of theirs is missing. Who segments
    # patients tells nobody.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError:
        raise ModelError(
            "the engine openvino is not installed; pip install 'segkit[openvino]', or use "
            "--engine torch"
        ) from None
    return openvino


def _decompositions() -> CustomDecompTable:
    """How operations that OpenVINO does not know are made of those that it knows.

    These are its own but for one: it (2026.4) has instance normalisation in pieces, whose three
    means and six more operations per layer its compiler does not put together again. It knows the
    whole.
    """
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose

    table = CustomDecompTable()
    for operation in (*ops_to_not_decompose(), torch.ops.aten.instance_norm.default):
        table.pop(operation, None)
    return table


@functools.cache
def _core() -> Any:
    # One for the process, and never let go of: OpenVINO (2026.4) lends the thread that asks first
    # its stack for signals and takes it back with the core, from whatever thread that happens. The
    # next signal, so Ctrl-C, would then be a segmentation fault.
    return _installed().Core()
