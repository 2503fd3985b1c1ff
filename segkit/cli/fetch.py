"""`segkit fetch`: download a public dataset, or a model."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from segkit.cli.terminal import console, say


def fetch_command(
    name: Annotated[
        str,
        Argument(
            metavar="DATASET|MODEL",
            help="A dataset, such as hippocampus or Task04_Hippocampus, or a model: hf:OWNER/NAME, "
            "hf:OWNER/NAME@REVISION or the URL of a zip.",
        ),
    ],
    out: Annotated[
        Path | None,
        Option(
            help="The folder in which the dataset, or a copy of the model, is placed. By default "
            "datasets are placed in the current folder, and models only in the cache."
        ),
    ] = None,
) -> None:
    """Download a dataset of the Medical Segmentation Decathlon, or the newest version of a model.

    A model is kept in the cache: --model finds it there, also without a network.
    """
    from segkit.data.fetch import decathlon, fetch_dataset, named
    from segkit.model.addresses import HubAddress, parse_address
    from segkit.model.fetch_model import copy_model, fetched
    from segkit.system.progress import Tracker

    address = parse_address(name)
    if address is not None:
        say(f"fetching {address}")
        model = fetched(address, refresh=True, track=Tracker(console))
        say(f"{address}: version {model.version}")
        if out is not None:
            copied = out / (address.name if isinstance(address, HubAddress) else address.stem)
            copy_model(model, copied)
            say(f"wrote {copied}")
        say(f"next: segkit predict scan.nii.gz --model {address}")
        return
    sources = decathlon()
    whole = named(name, sources)
    say(f"fetching {sources[whole].url}")
    folder = fetch_dataset(whole, sources[whole], out or Path())
    say(f"wrote {folder}")
    say(f"next: segkit check {folder}, then segkit train {folder}")
