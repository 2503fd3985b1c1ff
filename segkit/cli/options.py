"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="e.g. train.steps=500")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, or a name such as cuda:1.")]
Inputs = Annotated[
    list[Path],
    typer.Argument(metavar="INPUT...", help="Volumes, DICOM series, or folders of them."),
]
ModelFolder = Annotated[
    Path | None,
    typer.Option(envvar="SEGKIT_MODEL", help="A run or model folder; else the newest run."),
]
ModelFolders = Annotated[
    list[Path] | None,
    typer.Option(
        "--model",
        envvar="SEGKIT_MODEL",
        help="A run or model folder; else the newest run. Several are averaged.",
    ),
]
OverlapOption = Annotated[
    float, typer.Option(min=0, max=0.9, help="Share of a window that neighbours share.")
]
SeriesOption = Annotated[
    str | None,
    typer.Option(metavar="UID", help="Which DICOM series, where a folder holds several."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
