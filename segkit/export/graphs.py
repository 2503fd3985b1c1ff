"""A network as a graph that other runtimes read: ONNX, OpenVINO's IR, and PyTorch's own programs.

Each has the logits and every map as named outputs and takes any number of windows at once. What a
deployer must know beside it stands in the file itself, as JSON.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from segkit.errors import ModelError
from segkit.export.deployment import DEPLOYMENT_KEY, deployment
from segkit.inference.engines.converted import RunGraph, Traced, exported_program
from segkit.inference.engines.onnx import OnnxRuntime
from segkit.inference.engines.openvino import OpenVino
from segkit.inference.model_walk import layout_of
from segkit.io.atomic import whole
from segkit.model.folder import Model

WINDOWS = 2
"""In the batch that networks are exported with; of one, an export would keep that it was one."""


def export_onnx(model: Model, file: Path, *, overlap: float = 0.5) -> RunGraph:
    """Write a model as ONNX, and give what runs it. Raises ModelError if that cannot be done.

    Its `metadata_props` hold the JSON of `deployment` as 'segkit'.
    """
    runtime = OnnxRuntime()
    import onnx  # an optional extra, which the runtime has just asked for

    traced = Traced(model.network.cpu()).eval()
    told = json.dumps(deployment(model, overlap=overlap))
    with exporting_to("ONNX"):
        with whole(file) as partial:
            runtime.write(traced, example_windows(model), partial, batch="batch")
            graph = onnx.load(partial)
            onnx.helper.set_model_props(graph, {DEPLOYMENT_KEY: told})
            onnx.save(graph, partial)
            onnx.checker.check_model(partial)
        return runtime.read(file, traced.names)


def export_openvino(model: Model, file: Path, *, overlap: float = 0.5) -> RunGraph:
    """Write a model as OpenVINO's IR, and give what runs it: `file`.xml, and .bin beside it.

    Its `rt_info` holds the JSON of `deployment` as 'segkit'. Raises ModelError if that cannot be
    done.
    """
    runtime = OpenVino()
    traced = Traced(model.network.cpu()).eval()
    told = json.dumps(deployment(model, overlap=overlap))
    numbers = file.with_suffix(".bin")
    with exporting_to("OpenVINO"):
        with whole(file) as partial, whole(numbers) as partial_numbers:
            graph = runtime.graph(traced, example_windows(model), any_number=True)
            graph.set_rt_info(told, [DEPLOYMENT_KEY])
            runtime.openvino.serialize(graph, partial, partial_numbers)
        return runtime.read(file, numbers, traced.names)


class NamedOutputs(nn.Module):
    """A network whose outputs come as a dictionary, by their names."""

    def __init__(self, network: Traced) -> None:
        super().__init__()
        self.network = network

    def forward(self, windows: Tensor) -> dict[str, Tensor]:
        """The outputs by the network's names."""
        return dict(zip(self.network.names, self.network(windows), strict=True))


def export_pt2(model: Model, file: Path, *, overlap: float = 0.5) -> RunGraph:
    """Write a model as a program of `torch.export`, and give what runs it.

    Its extra file 'segkit' is the JSON of `deployment`. Raises ModelError if that cannot be done.
    """
    network = NamedOutputs(Traced(model.network.cpu())).eval()
    told = json.dumps(deployment(model, overlap=overlap))
    with exporting_to("torch.export"):
        program = exported_program(network, example_windows(model), any_number=True)
        with whole(file) as partial:
            torch.export.save(program, partial, extra_files={DEPLOYMENT_KEY: told})
        # Only what was just written here is read: such files can run code.
        return _run_program(torch.export.load(file))


def _run_program(program: ExportedProgram) -> RunGraph:
    network = program.module()

    @torch.inference_mode()
    def run(windows: Tensor, names: tuple[str, ...]) -> list[Tensor]:
        outputs = network(windows)
        return [outputs[name] for name in names]

    return run


def example_windows(model: Model) -> Tensor:
    """Noise in the form of a batch of windows: what networks are exported with."""
    size = (WINDOWS, model.description.channels_in, *layout_of(model).patch_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


@contextmanager
def exporting_to(form: str) -> Iterator[None]:
    """Within it, what an exporter raises becomes a ModelError; an OSError stays one."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # what exporters raise has nothing in common
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{form} cannot hold this network: {reason}; export it in another form"
        ) from error
