"""Options and arguments that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

MODEL_VARIABLE = "SEGKIT_MODEL"
"""The variable that names the model, or several models as in PATH, if --model does not."""

MINUTES = 20.0
"""Default duration of a training that is planned."""

Overrides = Annotated[
    list[str] | None, Argument(metavar="KEY=VALUE", help="Settings, such as train.steps=500.")
]
Device = Annotated[str, Option(help="auto, cpu, cuda, or a name such as cuda:1.")]
Inputs = Annotated[
    list[Path],
    Argument(
        metavar="INPUT",
        help="Volumes, DICOM series, folders of these, or a dataset: a YAML file, a table or a "
        "BIDS folder.",
    ),
]
MODEL = (
    "The folder of a run or model, hf:OWNER/NAME or hf:OWNER/NAME@REVISION, or the path or URL of "
    f"a zip. The default is the variable {MODEL_VARIABLE}, or else the newest run."
)
ModelPlace = Annotated[str | None, Option(metavar="RUN|MODEL", help=MODEL)]
ModelPlaces = Annotated[
    list[str] | None,
    Option("--model", metavar="RUN|MODEL", help=f"{MODEL} Several models are averaged."),
]
CheckpointOption = Annotated[
    Literal["best", "last"] | None,
    Option(
        help="Use the weights of this checkpoint, also while the run is still training. The "
        "default is the model of the finished run."
    ),
]
OverlapOption = Annotated[
    float, Option(min=0, max=0.9, help="Overlap of neighbouring windows, as a share of their size.")
]
SeriesOption = Annotated[
    list[str] | None,
    Option(
        "--series",
        metavar="UID|RULE",
        help="The DICOM series to read: its UID, or a condition such as modality=CT, "
        "description=*thorax*, folder=*/CT or slices=20..400. Repeat it for each condition.",
    ),
]
PixelSizeOption = Annotated[
    list[str] | None,
    Option(
        "--pixel-size",
        metavar="LENGTH",
        help="Pixel size of pictures, such as '4 nm'. If the sizes along x, y and z differ, give "
        "it once for each. 'pixel' means unknown.",
    ),
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace existing files.")]
