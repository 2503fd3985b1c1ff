"""`segkit fetch`: download a public dataset."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from segkit.cli.terminal import say


def fetch_command(
    name: Annotated[str, Argument(help="Its name, such as hippocampus or Task04_Hippocampus.")],
    out: Annotated[Path, Option(help="The folder in which the dataset is placed.")] = Path(),
) -> None:
    """Download a dataset of the Medical Segmentation Decathlon from MONAI's server."""
    from segkit.data.fetch import decathlon, fetch_dataset, named

    sources = decathlon()
    whole = named(name, sources)
    say(f"fetching {sources[whole].url}")
    folder = fetch_dataset(whole, sources[whole], out)
    say(f"wrote {folder}")
    say(f"next: segkit check {folder}, then segkit train {folder}")
