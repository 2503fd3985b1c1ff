"""ONNX in float16 or int8, and OpenVINO in float16: smaller files, and how well they predict.

int8 is ONNX Runtime's static quantisation (https://onnxruntime.ai, "Quantize ONNX models"). Kernels
over more than one voxel have one scale per output channel. The range of the features before them
is measured on windows of real scans. Gates, heads and normalisation stay in float32.
"""

import math
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from segkit.data.label_numbers import within
from segkit.errors import ModelError
from segkit.evaluation.dice import dice_of
from segkit.inference.engines.converted import INPUT, RunGraph
from segkit.inference.engines.torch_eager import LOGITS
from segkit.inference.model_walk import layout_of
from segkit.inference.predictor import Predictor
from segkit.inference.windows import slide
from segkit.io.volume import Volume
from segkit.model.folder import Model
from segkit.system.only_errors import only_errors

ExportPrecision = Literal["float32", "float16", "int8"]
LEAST_SAME: dict[ExportPrecision, float] = {"float16": 0.999, "int8": 0.98}
"""The least share of voxels that must have the label of float32."""
LEAST_DICE: dict[ExportPrecision, float] = {"float16": 0.99, "int8": 0.9}
"""The least Dice between both predictions of each class or region."""
MOST_APART = 10
"""A class or region may differ in so many voxels, whatever its Dice: Dice of a tiny structure falls
by a voxel or two."""
MOST_WINDOWS = 24
"""Largest number of windows on which ranges of features are measured."""


@dataclass(frozen=True)
class ReducedCheck:
    """The results of a model on a scan in lower precision, compared with float32."""

    precision: ExportPrecision
    same_labels: float
    """Share of the scan's voxels with the same label."""
    dice_between: Mapping[str, float]
    """Dice of each class or region between both predictions; NaN if it is in neither."""
    seconds: tuple[float, float]
    """Seconds of a prediction in float32 and in this precision, with the same runtime."""
    dice: Mapping[str, tuple[float, float]]
    """With a reference, Dice of each class or region in float32 and in this precision."""
    voxels_apart: Mapping[str, int]
    """Number of voxels in which each class or region differs between both predictions."""

    @property
    def holds(self) -> bool:
        """Whether enough labels are those of float32, over the scan and for each structure."""
        return not self.faults()

    def faults(self) -> list[str]:
        """The reasons for which the check fails, in words; empty if it holds."""
        faults = []
        if self.same_labels < LEAST_SAME[self.precision]:
            faults.append(
                f"only {self.same_labels:.4%} of the voxels have the same label in "
                f"{self.precision} as in float32 (expected {LEAST_SAME[self.precision]:.1%})"
            )
        least = LEAST_DICE[self.precision]
        faults += [
            f"the Dice of {name} between both is {dice:.4f} (expected {least})"
            for name, dice in self.dice_between.items()
            if dice < least and self.voxels_apart[name] > MOST_APART
        ]
        return faults

    def lines(self) -> list[str]:
        """The same in words."""
        between = ", ".join(f"{name} {value:.4f}" for name, value in self.dice_between.items())
        told = [
            f"same label as float32: {self.same_labels:.4%} of the scan's voxels; Dice between "
            f"both: {between}",
            f"prediction: {self.seconds[0]:.2f} s in float32, {self.seconds[1]:.2f} s in "
            f"{self.precision}",
        ]
        for name, (whole, reduced) in self.dice.items():
            told.append(
                f"Dice of {name}: {whole:.4f} in float32, {reduced:.4f} in {self.precision}"
            )
        return told


class GraphEngine:
    """An engine for `Predictor` that runs an exported graph.

    Args:
        run: function that runs the graph.
        window: size of the graph's windows. Smaller windows are padded with zeros at their end, as
            windows of a 2D network are on a scan of few slices.

    Raises:
        ModelError: the runtime cannot run the graph.
    """

    def __init__(self, run: RunGraph, window: Sequence[int]) -> None:
        self.run = run
        self.window = window

    def __call__(
        self, windows: Float[Tensor, "batch channel x y z"], keys: Collection[str]
    ) -> dict[str, Tensor]:
        """Logits of windows, and outputs of these names that have no spatial axes."""
        names = (LOGITS, *sorted(keys))
        size = windows.shape[2:]
        missing = [whole - own for whole, own in zip(self.window, size, strict=True)]
        padded = F.pad(windows.cpu(), [each for more in reversed(missing) for each in (0, more)])
        try:
            found = self.run(padded.contiguous(), names)
        except Exception as error:  # the errors of runtimes have no common base class
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"the exported network cannot be run: {reason}; do not use the file, and export "
                "float32 or another form"
            ) from error
        outputs = {name: output.clone() for name, output in zip(names, found, strict=True)}
        x, y, z = size
        outputs[LOGITS] = outputs[LOGITS][..., :x, :y, :z]
        return outputs


def check_reduced(
    model: Model,
    whole: RunGraph,
    reduced: RunGraph,
    precision: ExportPrecision,
    scan: Volume,
    reference: Volume | None = None,
) -> ReducedCheck:
    """Predict a scan with both graphs, and compare the labels and the times.

    Args:
        model: the model of both graphs.
        whole: the graph in float32.
        reduced: the graph in the lower precision.
        precision: precision of the second graph.
        scan: a real scan.
        reference: labels of the scan, as files hold them.

    Raises:
        ModelError: the runtime cannot run a graph.
        VolumeError: the scan does not fit the model, or the reference does not fit the scan.
    """
    labelling, window = model.description.labelling, layout_of(model).patch_size
    found, seconds = [], []
    for run in (whole, reduced):
        predictor = Predictor(model, device="cpu", engine="torch")
        engine = GraphEngine(run, window)
        predictor.members[0].engine = engine
        engine(torch.zeros(1, model.description.channels_in, *window), ())
        started = time.perf_counter()
        found.append(within(predictor(scan).labels.data, labelling))
        seconds.append(time.perf_counter() - started)

    def dice(one: ndarray, other: ndarray) -> dict[str, float]:
        return dict(zip(labelling.members, dice_of(one, other, labelling), strict=True))

    scores: dict[str, tuple[float, float]] = {}
    if reference is not None:
        onto = reference.measured_as(scan).onto(scan.grid, what="the reference", whose="the scan")
        truth = within(onto.data, labelling)
        each = [dice(labels, truth) for labels in found]
        scores = {name: (each[0][name], each[1][name]) for name in labelling.members}
    return ReducedCheck(
        precision,
        float((found[0] == found[1]).mean()),
        dice(found[1], found[0]),
        (seconds[0], seconds[1]),
        scores,
        {
            name: int((np.isin(found[0], group) != np.isin(found[1], group)).sum())
            for name, group in labelling.members.items()
        },
    )


def halved(graph: Any) -> Any:
    """An ONNX graph with weights and arithmetic in float16; input and outputs stay in float32.

    Instance normalisation stays in float32: sums of squares overflow float16.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers import float16

    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, "InstanceNormalization", "Resize"]
    with only_errors():
        half = float16.convert_float_to_float16(graph, keep_io_types=True, op_block_list=blocked)
        # The converter puts the casts of inputs last, after the nodes that use them.
        sorted_nodes = ONNXModel(half)
        sorted_nodes.topological_sort()
        return sorted_nodes.model


def quantised(file: Path, windows: Sequence[Tensor]) -> Any:
    """The ONNX graph of a file in int8, with ranges of features measured on windows.

    Raises ModelError without windows.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    if not windows:
        raise ModelError(
            "int8 needs real scans to measure the range of the features; pass some, such as "
            "--calibration imagesTr"
        )

    class Windows(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(windows)

        def get_next(self) -> dict[str, ndarray] | None:
            window = next(self.left, None)
            return None if window is None else {INPUT: window[None].numpy()}

    graph = onnx.load(file)
    kernels = {each.name for each in graph.graph.initializer if math.prod(each.dims[2:]) > 1}
    chosen = [
        node.name
        for node in graph.graph.node
        if node.op_type == "Conv" and node.input[1] in kernels
    ]
    with tempfile.TemporaryDirectory(prefix="segkit-") as folder, only_errors():
        out = Path(folder) / "int8.onnx"
        quantize_static(
            file,
            out,
            Windows(),
            nodes_to_quantize=chosen,
            per_channel=True,
            reduce_range=True,  # CPUs without VNNI add pairs of products in 16 bits
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(out)


def windows_of(model: Model, scans: Sequence[Volume]) -> list[Tensor]:
    """Windows of real scans, evenly from all that are not empty, 24 at most."""
    found: list[Tensor] = []
    predictor = Predictor(model, device="cpu", engine="torch")
    outputs = len(model.description.labelling.outputs)

    def keep(windows: Tensor) -> dict[str, Tensor]:
        found.extend(window.clone() for window in windows if float(window.std()) > 0)
        return {LOGITS: torch.zeros(len(windows), outputs, *windows.shape[2:])}

    for scan in scans:
        slide(predictor.prepare(scan).image, keep, layout_of(model), batch_size=1)
    places = np.linspace(0, len(found) - 1, min(MOST_WINDOWS, len(found))).round().astype(int)
    return [found[place] for place in places]
