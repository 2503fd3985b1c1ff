"""`segkit export`: write a model for another program."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from segkit.cli.models import find_models
from segkit.cli.options import CheckpointOption, OverlapOption, Overwrite
from segkit.cli.terminal import JsonOption, say, say_json
from segkit.errors import SegkitError

MOST_SCANS = 8
"""Most scans of a folder that int8 measures the range of features on: the first by name."""
ADVICE = {
    "int8": "measure ranges on more scans, or export float16",
    "float16": "export float32",
}
"""What to do if the labels of a precision differ too much."""


def export_command(
    model: Annotated[
        str,
        Argument(
            metavar="RUN|MODEL",
            help="A run, a model folder, hf:OWNER/NAME or hf:OWNER/NAME@REVISION, or the path or "
            "URL of a zip.",
        ),
    ],
    form: Annotated[
        Literal["onnx", "openvino", "pt2", "monai-bundle"],
        Option("--format", help="The file format."),
    ],
    out: Annotated[
        Path,
        Option(help="The file to write (.onnx, .pt2, or .xml with a .bin beside it), or a folder."),
    ],
    check: Annotated[
        bool, Option("--check", help="Run the exported model and compare it with PyTorch.")
    ] = False,
    scan: Annotated[
        Path | None, Option(help="A scan for --check; random noise by default.")
    ] = None,
    precision: Annotated[
        Literal["float32", "float16", "int8"],
        Option(help="Number format of the network: float16 for onnx and openvino, int8 for onnx."),
    ] = "float32",
    calibration: Annotated[
        list[Path] | None,
        Option(metavar="SCANS", help="Real scans, or a folder of them, for --precision int8."),
    ] = None,
    reference: Annotated[
        Path | None, Option(help="Labels of --scan, to score the float16 or int8 network.")
    ] = None,
    any_size: Annotated[
        bool, Option("--any-size", help="Let the network take windows of any size (onnx only).")
    ] = False,
    overlap: OverlapOption = 0.5,
    checkpoint: CheckpointOption = None,
    json: JsonOption = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a model for another program: ONNX, OpenVINO, torch.export, or a MONAI bundle."""
    from segkit.export.export import export_model
    from segkit.io.inputs import find_inputs, read_input
    from segkit.io.volume import read_labels
    from segkit.model.folder import picture_rules_of

    named, *more = find_models([model], checkpoint)[0]
    if more:
        raise SegkitError(
            f"{model}: expected one model, found {1 + len(more)}; choose one, such as "
            f"{named.folder}"
        )
    loaded = named.load()
    description = loaded.description
    rules = picture_rules_of(description)
    found = find_inputs([scan], len(description.channels), rules=rules) if scan else []
    scans = calibration or []
    ranges = find_inputs(scans, len(description.channels), rules=rules) if scans else []
    exported = export_model(
        loaded,
        form,
        out,
        overlap=overlap,
        check=check or bool(found),
        scan=read_input(found[0]) if found else None,
        overwrite=overwrite,
        precision=precision,
        calibration=[read_input(each) for each in ranges[:MOST_SCANS]],
        reference=read_labels(reference) if reference else None,
        any_size=any_size,
    )
    for path in exported.written:
        say(f"wrote {path}")
    for line in exported.lines():
        say(line)
    if json:
        say_json(exported.content())
    if not exported.holds and exported.reduced is not None:
        raise SegkitError(
            f"{out}: {'; '.join(exported.reduced.faults())}; {ADVICE[exported.reduced.precision]}"
        )
    if not exported.holds:
        raise SegkitError(
            f"{out}: differs from PyTorch by more than rounding errors; do not use it, and report "
            f"this to the developers of segkit"
        )
