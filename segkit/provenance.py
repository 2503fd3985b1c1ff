"""What made a result, as a JSON file beside it tells.

It names no time, no place and no machine, so that the same work leaves the same bytes.
"""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from segkit.errors import VolumeError
from segkit.io.safe_text import read_json_object

PROVENANCE = "provenance"
"""Its key in a JSON file."""
LIBRARIES = ("segkit", "torch", "numpy", "scipy", "nibabel", "SimpleITK")


def versions(*more: str) -> dict[str, str]:
    """Those of Python, and of what the arithmetic and the files go through, and of `more`."""
    return {"python": python_version(), **{name: version(name) for name in (*LIBRARIES, *more)}}


def check_asked(labels: Path, sidecar: Path, asked: Mapping[str, Any]) -> None:
    """Raise VolumeError unless the sidecar of labels says that the same was asked for them."""
    try:
        told = read_json_object(sidecar)[PROVENANCE]
        same = all(told[key] == value for key, value in asked.items())
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise VolumeError(
            f"{labels}: is there already, and not by this model and these settings, as "
            f"{sidecar.name} has it; pass --overwrite or name another --out"
        )
