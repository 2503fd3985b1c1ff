"""`segkit export`: a model in a form that another program runs, and whether it says the same."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from segkit.errors import ModelError
from segkit.export.agreement import Agreement, compare_outputs, noise_for
from segkit.export.bundle_check import same_labels, scan_for
from segkit.export.graphs import export_onnx, export_openvino, export_pt2
from segkit.export.monai_bundle import NETWORK, export_bundle
from segkit.export.torchscript import read_torchscript
from segkit.inference.engines.torch_eager import LOGITS
from segkit.inference.predictor import Predictor
from segkit.io.atomic import refuse_existing
from segkit.io.volume import Volume
from segkit.model.folder import Model

Form = Literal["onnx", "openvino", "pt2", "monai-bundle"]
EXPORT_SUFFIXES: dict[Form, str] = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "pt2": ".pt2",
    "monai-bundle": "",
}
GRAPHS = {"onnx": export_onnx, "openvino": export_openvino, "pt2": export_pt2}
SAME_IN_BUNDLE = 0.999
"""The least share of voxels to which a bundle gives segkit's label. Other programs resample with
other roundings, and where two classes are all but equal either may come out."""


@dataclass(frozen=True)
class Export:
    """What `export_model` has written, and what a check of it found.

    Example:
        exported = segkit.export_model(model, "onnx", "mine.onnx", check=True)
        exported.holds, exported.lines()
    """

    written: tuple[Path, ...]
    """The file, or both files of OpenVINO's, or the bundle's folder."""
    agreement: Agreement | None = None
    """How far its network is from PyTorch; None if there was no check."""
    same_in_bundle: float | None = None
    """Share of a scan's voxels to which MONAI, running the bundle, gives segkit's label."""

    @property
    def holds(self) -> bool:
        """Whether no check found more than rounding."""
        close = self.agreement is None or self.agreement.holds
        return close and (self.same_in_bundle is None or self.same_in_bundle >= SAME_IN_BUNDLE)

    def content(self) -> dict[str, Any]:
        """The same for a script."""
        told: dict[str, Any] = {"written": [str(path) for path in self.written]}
        if self.agreement is not None:
            told |= {**asdict(self.agreement), "holds": self.holds}
        if self.same_in_bundle is not None:
            told["same_in_bundle"] = self.same_in_bundle
        return told

    def lines(self) -> list[str]:
        """What was found, in words."""
        told = self.agreement.lines() if self.agreement else []
        if self.same_in_bundle is not None:
            told.append(
                f"run by MONAI, same label as segkit's: {self.same_in_bundle:.4%} of voxels"
            )
        return told


def export_model(
    model: Model,
    form: Form,
    out: str | Path,
    *,
    overlap: float = 0.5,
    check: bool = False,
    scan: Volume | None = None,
    overwrite: bool = False,
) -> Export:
    """Write a model for another program, whole or not at all.

    Example:
        model = segkit.load_model("runs/mine")
        segkit.export_model(model, "onnx", "mine.onnx", check=True).lines()

    Args:
        model: a trained model.
        form: 'onnx', 'openvino', 'pt2' (a program of `torch.export`) or 'monai-bundle'.
        out: a file .onnx, .xml (OpenVINO's, with its .bin beside it) or .pt2, or a bundle's folder.
        overlap: share of a window that neighbours have in common, as the export tells deployers.
        check: whether to run it and compare it with PyTorch.
        scan: the check is on this volume; on noise if not given.
        overwrite: whether what is at `out` may be replaced.

    Returns:
        The files written, and what the check found.

    Raises:
        ModelError: the form cannot hold the network, `out` has another ending, or what the form
            needs is not installed.
        VolumeError: something is at `out` already.
    """
    out = Path(out)
    if EXPORT_SUFFIXES[form] and out.suffix != EXPORT_SUFFIXES[form]:
        raise ModelError(f"{out}: {form} is written to a file *{EXPORT_SUFFIXES[form]}; name it so")
    written = (out, out.with_suffix(".bin")) if form == "openvino" else (out,)
    refuse_existing(written, overwrite=overwrite)
    if form == "monai-bundle":
        export_bundle(model, out, overlap=overlap, overwrite=overwrite)
        if not check:
            return Export(written)
        network = read_torchscript(out / NETWORK)
        agreement = compare_outputs(model, network, _image(model, scan), names=[LOGITS])
        return Export(written, agreement, same_labels(model, out, scan or scan_for(model)))
    run = GRAPHS[form](model, out, overlap=overlap)
    return Export(written, compare_outputs(model, run, _image(model, scan)) if check else None)


def _image(model: Model, scan: Volume | None) -> Tensor:
    if scan is None:
        return noise_for(model)
    return Predictor(model, device="cpu", engine="torch").prepare(scan).image
