"""`segkit export`: write a model for another program, and check that it gives the same results."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from segkit.errors import ModelError
from segkit.export.agreement import Agreement, compare_outputs, noise_for
from segkit.export.bundle_check import same_labels, scan_for
from segkit.export.graphs import export_onnx, export_openvino, export_pt2, export_reduced
from segkit.export.monai_bundle import NETWORK, export_bundle
from segkit.export.reduced import ExportPrecision, ReducedCheck, check_reduced
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
GRAPHS = {"openvino": export_openvino, "pt2": export_pt2}
SAME_IN_BUNDLE = 0.999
"""Smallest share of voxels to which a bundle must give segkit's label. Other programs round
differently when they resample, so the label may change if two classes are almost equal."""


@dataclass(frozen=True)
class Export:
    """Files that `export_model` has written, and the result of the check.

    Example:
        exported = segkit.export_model(model, "onnx", "mine.onnx", check=True)
        exported.holds, exported.lines()
    """

    written: tuple[Path, ...]
    """The file, both files of OpenVINO, or the bundle's folder."""
    agreement: Agreement | None = None
    """Agreement of the exported network with PyTorch; None without a check."""
    same_in_bundle: float | None = None
    """Share of a scan's voxels to which MONAI, running the bundle, gives segkit's label. None for
    other forms, and without a check."""

    reduced: ReducedCheck | None = None
    """How well a lower precision predicts a scan; None in float32, or if there was no check."""

    @property
    def holds(self) -> bool:
        """True if the check found no difference beyond rounding, or if there was no check."""
        close = self.agreement is None or self.agreement.holds
        close = close and (self.reduced is None or self.reduced.holds)
        return close and (self.same_in_bundle is None or self.same_in_bundle >= SAME_IN_BUNDLE)

    def content(self) -> dict[str, Any]:
        """Files and check as plain dicts, lists and numbers."""
        content: dict[str, Any] = {"written": [str(path) for path in self.written]}
        if self.agreement is not None:
            content |= {**asdict(self.agreement), "holds": self.holds}
        if self.reduced is not None:
            content |= {**asdict(self.reduced), "holds": self.holds}
        if self.same_in_bundle is not None:
            content["same_in_bundle"] = self.same_in_bundle
        return content

    def lines(self) -> list[str]:
        """The result of the check as lines of text; empty without a check."""
        lines = self.agreement.lines() if self.agreement else []
        lines += self.reduced.lines() if self.reduced else []
        if self.same_in_bundle is not None:
            lines.append(
                f"run by MONAI, same label as segkit's: {self.same_in_bundle:.4%} of voxels"
            )
        return lines


def export_model(
    model: Model,
    form: Form,
    out: str | Path,
    *,
    overlap: float = 0.5,
    check: bool = False,
    scan: Volume | None = None,
    overwrite: bool = False,
    precision: ExportPrecision = "float32",
    calibration: Sequence[Volume] = (),
    reference: Volume | None = None,
    any_size: bool = False,
) -> Export:
    """Write a model for another program, completely or not at all.

    Example:
        model = segkit.load_model("runs/mine")
        segkit.export_model(model, "onnx", "mine.onnx", check=True).lines()

    Args:
        model: a trained model.
        form: 'onnx', 'openvino', 'pt2' (a program of `torch.export`) or 'monai-bundle'.
        out: a file .onnx, .xml (for OpenVINO, with a .bin beside it) or .pt2, or a bundle's folder.
        overlap: share of a window that neighbours have in common, in [0, 1), written to the export
            for the program that runs it.
        check: run the export and compare it with PyTorch.
        scan: the volume for the check. If None, noise is used; a check of float16 or int8 needs a
            scan.
        overwrite: replace an existing file or bundle at `out`.
        precision: 'float32', 'float16' (ONNX, OpenVINO) or 'int8' (ONNX).
        calibration: real scans, on which int8 measures the range of features. Only int8 uses them,
            and it needs at least one.
        reference: labels of `scan`, only for float16 and int8. If given, the check also computes
            the Dice of the labels in float32 and in the lower precision.
        any_size: the file takes windows of any size, not only of the model's patch (ONNX).

    Returns:
        The files that were written, and the result of the check.

    Raises:
        ModelError: the form cannot hold the network, has no such precision or takes no windows of
            any size; `out` has another suffix; `scan` or `calibration` is missing; `scan`,
            `reference` or `calibration` is given but would not be used; a runtime cannot run the
            export; or a package that the form needs is not installed.
        VolumeError: `out` exists already.
    """
    out = Path(out)
    if EXPORT_SUFFIXES[form] and out.suffix != EXPORT_SUFFIXES[form]:
        raise ModelError(
            f"{out}: expected a name that ends in {EXPORT_SUFFIXES[form]} for {form}, found "
            f"{out.name!r}; choose another --out"
        )
    written = (out, out.with_suffix(".bin")) if form == "openvino" else (out,)
    _check_precision(form, precision, check, scan)
    if calibration and precision != "int8":
        raise ModelError(
            f"calibration is only for int8, found {precision}; choose int8, or leave it out"
        )
    if reference is not None and precision == "float32":
        raise ModelError(
            "a reference is only for float16 and int8, found float32; choose one of these "
            "precisions, or leave it out"
        )
    if not check and (scan is not None or reference is not None):
        given = "scan" if scan is not None else "reference"
        raise ModelError(
            f"a {given} is only for the check, which is not asked for; check the export on a scan "
            f"(check=True and scan=, or --scan), or leave the {given} out"
        )
    if any_size and form != "onnx":
        raise ModelError(
            f"windows of any size need ONNX, found {form}; export onnx, or leave out any size"
        )
    refuse_existing(written, overwrite=overwrite)
    if precision != "float32" and (form == "onnx" or form == "openvino"):
        whole, reduced = export_reduced(
            model,
            form,
            out,
            precision,
            calibration=calibration,
            overlap=overlap,
            any_size=any_size,
        )
        if not check or scan is None:
            return Export(written)
        return Export(
            written, reduced=check_reduced(model, whole, reduced, precision, scan, reference)
        )
    if form == "monai-bundle":
        export_bundle(model, out, overlap=overlap, overwrite=overwrite)
        if not check:
            return Export(written)
        network = read_torchscript(out / NETWORK)
        agreement = compare_outputs(model, network, _image(model, scan), names=[LOGITS])
        return Export(written, agreement, same_labels(model, out, scan or scan_for(model)))
    if form == "onnx":
        run = export_onnx(model, out, overlap=overlap, any_size=any_size)
    else:
        run = GRAPHS[form](model, out, overlap=overlap)
    return Export(written, compare_outputs(model, run, _image(model, scan)) if check else None)


def _check_precision(
    form: Form, precision: ExportPrecision, check: bool, scan: Volume | None
) -> None:
    """Raise ModelError if a form has no such precision, or a check of one has no scan."""
    if precision == "float32":
        return
    if form not in ("onnx", "openvino"):
        raise ModelError(f"{form} can only be written in float32, found {precision}; export onnx")
    if form == "openvino" and precision == "int8":
        raise ModelError(
            "int8 can only be written as onnx, because openvino would need the package nncf; "
            "export onnx, which OpenVINO also reads"
        )
    if check and scan is None:
        raise ModelError(
            f"the check of {precision} compares labels, so it needs a real scan instead of noise; "
            "pass one with --scan"
        )


def _image(model: Model, scan: Volume | None) -> Tensor:
    if scan is None:
        return noise_for(model)
    return Predictor(model, device="cpu", engine="torch").prepare(scan).image
