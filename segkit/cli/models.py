"""The models that a command is asked to use: folders, addresses, or the newest run."""

import os
from collections.abc import Sequence
from pathlib import Path

from segkit.cli.options import MODEL_VARIABLE
from segkit.cli.terminal import console, say


def find_models(named: Sequence[str] | None) -> list[Path]:
    """The folders of models that a user has named; by default the newest run under runs/.

    Models at addresses are fetched if they are not in the cache, and their versions are printed.

    Args:
        named: paths and addresses; if there are none, those in the variable SEGKIT_MODEL are used.

    Raises:
        ModelError: there is no model, or it cannot be fetched.
    """
    from segkit.model.addresses import parse_address, split_paths
    from segkit.model.fetch_model import fetch_model, fetched
    from segkit.model.folder import newest_model
    from segkit.system.progress import Tracker

    found = []
    for path in named or split_paths(os.environ.get(MODEL_VARIABLE, "")):
        address = parse_address(path)
        if address is None:
            found.append(fetch_model(path))
            continue
        model = fetched(address, track=Tracker(console))
        say(f"{address}: version {model.version}")
        found.append(model.folder)
    return found or [newest_model(Path("runs"))]
