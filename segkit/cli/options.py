"""Options and arguments that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

Overrides = Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help="e.g. train.steps=500")]
Device = Annotated[str, Option(help="auto, cpu, cuda, or a name such as cuda:1.")]
Inputs = Annotated[
    list[Path],
    Argument(
        metavar="INPUT...",
        help="Volumes, DICOM series, folders of them, or a dataset: YAML, a table, BIDS.",
    ),
]
MODEL = "A run or model folder; else the newest run."
ModelFolder = Annotated[Path | None, Option(envvar="SEGKIT_MODEL", help=MODEL)]
ModelFolders = Annotated[
    list[Path] | None,
    Option("--model", envvar="SEGKIT_MODEL", help=f"{MODEL} Several are averaged."),
]
CheckpointOption = Annotated[
    Literal["best", "last"] | None,
    Option(help="Weights of a checkpoint, also of a run that still trains; else the run's own."),
]
OverlapOption = Annotated[
    float, Option(min=0, max=0.9, help="Share of a window that neighbours share.")
]
SeriesOption = Annotated[
    list[str] | None,
    Option(
        "--series",
        metavar="UID|RULE",
        help="Which DICOM series: a UID, or modality=CT, description=*thorax*, folder=*/CT, "
        "slices=20..400; again for each condition.",
    ),
]
PixelSizeOption = Annotated[
    list[str] | None,
    Option(
        "--pixel-size",
        metavar="LENGTH",
        help="Of pictures, such as '4 nm'; again for rows, and for slices; 'pixel' for none.",
    ),
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace files that exist.")]
