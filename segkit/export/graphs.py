"""Export a network as a graph for other runtimes: ONNX, OpenVINO's IR and `torch.export`.

Each graph has logits and all maps as named outputs, and takes batches of any size. The file also
holds the data of `deployment`, as JSON.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from segkit.errors import ModelError
from segkit.export.agreement import compare_outputs
from segkit.export.deployment import DEPLOYMENT_KEY, deployment
from segkit.export.reduced import ExportPrecision, halved, quantised, windows_of
from segkit.inference.engines.converted import RunGraph, Traced, exported_program
from segkit.inference.engines.onnx import OnnxRuntime
from segkit.inference.engines.openvino import OpenVino
from segkit.inference.model_walk import layout_of
from segkit.inference.windows import WindowLayout
from segkit.io.atomic import whole
from segkit.io.volume import Volume
from segkit.model.folder import Model

FREE_BATCH = {0: "batch"}
FREE_SPACE = {2: "x", 3: "y", 4: "z"}
"""Names of the axes that may have any length, by number."""
WINDOWS = 2
"""Batch size of the example for an export. With a batch of one, the batch size would be fixed."""


def export_onnx(
    model: Model, file: Path, *, overlap: float = 0.5, any_size: bool = False
) -> RunGraph:
    """Write a model as ONNX, and return a function that runs it.

    The JSON of `deployment` is in the file's `metadata_props` under 'segkit'.

    Args:
        model: a trained model.
        file: .onnx.
        overlap: share of a window that neighbours have in common, written to the export.
        any_size: True if the spatial axes may have any length that is a multiple of the network's
            strides. Before the file appears, it is run at another size and compared with PyTorch.

    Raises:
        ModelError: ONNX cannot hold the network, or not for windows of any size, or a package is
            not installed.
    """
    runtime = OnnxRuntime()
    import onnx  # an optional extra; the line above has checked that it is installed

    traced = Traced(model.network.cpu()).eval()
    metadata = json.dumps(deployment(model, overlap=overlap, any_size=any_size))
    with exporting_to("ONNX"):
        with whole(file) as partial:
            free = FREE_BATCH | FREE_SPACE if any_size else FREE_BATCH
            runtime.write(traced, example_windows(model), partial, free=free)
            if any_size:
                _check_other_size(model, runtime.read(partial, traced.names))
            graph = onnx.load(partial)
            onnx.helper.set_model_props(graph, {DEPLOYMENT_KEY: metadata})
            onnx.save(graph, partial)
            onnx.checker.check_model(partial)
        return runtime.read(file, traced.names)


def _check_other_size(model: Model, exported: RunGraph) -> None:
    """Raise ModelError if a graph differs from the network in a larger window of another shape."""
    patch, overlaps, multiple = layout_of(model)
    sizes = zip(patch, multiple, strict=True)
    larger = tuple(size + step * (axis + 1) for axis, (size, step) in enumerate(sizes))
    image = torch.randn(
        (model.description.channels_in, *larger), generator=torch.Generator().manual_seed(0)
    )
    wanted = "the network takes only windows of its patch; export without any size"
    try:
        agreement = compare_outputs(
            model, exported, image, layout=WindowLayout(larger, overlaps, multiple)
        )
    except Exception as error:  # the errors of networks and runtimes have no common base class
        raise ModelError(f"the network fails in windows of {larger} voxels; {wanted}") from error
    if not agreement.holds:
        raise ModelError(
            f"windows of {larger} voxels differ from PyTorch ({'; '.join(agreement.lines())}); "
            f"{wanted}"
        )


def export_openvino(model: Model, file: Path, *, overlap: float = 0.5) -> RunGraph:
    """Write a model as OpenVINO's IR, .xml with .bin beside it; return a function that runs it.

    The JSON of `deployment` is in `rt_info` under 'segkit'.

    Args:
        model: a trained model.
        file: .xml.
        overlap: share of a window that neighbours have in common, written to the export.

    Raises:
        ModelError: OpenVINO cannot hold the network, or is not installed.
    """
    runtime = OpenVino()
    traced = Traced(model.network.cpu()).eval()
    metadata = json.dumps(deployment(model, overlap=overlap))
    numbers = file.with_suffix(".bin")
    with exporting_to("OpenVINO"):
        with whole(file) as partial, whole(numbers) as partial_numbers:
            graph = runtime.graph(traced, example_windows(model), any_number=True)
            graph.set_rt_info(metadata, [DEPLOYMENT_KEY])
            runtime.openvino.serialize(graph, partial, partial_numbers)
        return runtime.read(file, numbers, traced.names)


def export_reduced(
    model: Model,
    form: Literal["onnx", "openvino"],
    file: Path,
    precision: ExportPrecision,
    *,
    calibration: Sequence[Volume] = (),
    overlap: float = 0.5,
    any_size: bool = False,
) -> tuple[RunGraph, RunGraph]:
    """Write a model in lower precision; return runtimes for float32 and for this precision.

    Args:
        model: a trained model.
        form: ONNX, in float16 or int8, or OpenVINO with weights in float16.
        file: .onnx, or .xml with .bin beside it.
        precision: float16 or int8.
        calibration: real scans, on which int8 measures the range of features.
        overlap: share of a window that neighbours have in common, written to the export.
        any_size: True if windows may have any size; only for ONNX.

    Raises:
        ModelError: the form cannot hold the network so, or int8 has no scans.
    """
    names = Traced(model.network).names
    told = deployment(model, overlap=overlap, any_size=any_size)
    metadata = json.dumps({**told, "precision": precision})
    windows = windows_of(model, calibration) if precision == "int8" else []
    with tempfile.TemporaryDirectory(prefix="segkit-") as folder:
        if form == "openvino":
            runtime = OpenVino()
            in_float32 = export_openvino(model, Path(folder) / "float32.xml", overlap=overlap)
            traced = Traced(model.network.cpu()).eval()
            numbers = file.with_suffix(".bin")
            with exporting_to("OpenVINO in float16"):
                with whole(file) as partial, whole(numbers):
                    graph = runtime.graph(traced, example_windows(model), any_number=True)
                    graph.set_rt_info(metadata, [DEPLOYMENT_KEY])
                    # Both partial files share their stem, by which OpenVINO names the numbers.
                    runtime.openvino.save_model(graph, partial, compress_to_fp16=True)
                return in_float32, runtime.read(file, numbers, names)
        in_float32 = export_onnx(
            model, Path(folder) / "float32.onnx", overlap=overlap, any_size=any_size
        )
        import onnx  # an optional extra; the line above has checked that it is installed

        source = Path(folder) / "float32.onnx"
        with exporting_to(f"ONNX in {precision}"):
            if precision == "float16":
                graph = halved(onnx.load(source))
            else:
                graph = quantised(source, windows)
            with whole(file) as partial:
                onnx.helper.set_model_props(graph, {DEPLOYMENT_KEY: metadata})
                onnx.save(graph, partial)
                onnx.checker.check_model(partial)
            return in_float32, OnnxRuntime().read(file, names)


class NamedOutputs(nn.Module):
    """A network that returns its outputs as a dictionary."""

    def __init__(self, network: Traced) -> None:
        super().__init__()
        self.network = network

    def forward(self, windows: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""
        return dict(zip(self.network.names, self.network(windows), strict=True))


def export_pt2(model: Model, file: Path, *, overlap: float = 0.5) -> RunGraph:
    """Write a model as a program of `torch.export`, and return a function that runs it.

    The JSON of `deployment` is the extra file 'segkit'.

    Args:
        model: a trained model.
        file: .pt2.
        overlap: share of a window that neighbours have in common, written to the export.

    Raises:
        ModelError: `torch.export` cannot hold the network.
    """
    network = NamedOutputs(Traced(model.network.cpu())).eval()
    metadata = json.dumps(deployment(model, overlap=overlap))
    with exporting_to("torch.export"):
        program = exported_program(network, example_windows(model), any_number=True)
        with whole(file) as partial:
            torch.export.save(program, partial, extra_files={DEPLOYMENT_KEY: metadata})
        # Such files can run code, so only the file that was just written is read.
        return _run_program(torch.export.load(file))


def _run_program(program: ExportedProgram) -> RunGraph:
    network = program.module()

    @torch.inference_mode()
    def run(windows: Tensor, names: tuple[str, ...]) -> list[Tensor]:
        outputs = network(windows)
        return [outputs[name] for name in names]

    return run


def example_windows(model: Model) -> Tensor:
    """A batch of windows of noise, the example for an export."""
    size = (WINDOWS, model.description.channels_in, *layout_of(model).patch_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


@contextmanager
def exporting_to(form: str) -> Iterator[None]:
    """Within this context, errors of an exporter become ModelErrors; an OSError does not change."""
    try:
        yield
    except (OSError, ModelError):
        raise
    except Exception as error:  # the errors of exporters have no common base class
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{form} cannot hold this network: {reason}; export it in another form"
        ) from error
