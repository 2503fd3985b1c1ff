"""What made a result, as a JSON file beside it tells.

It names no time, no place and no machine, so that the same work leaves the same bytes.
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from segkit.errors import VolumeError, first_few
from segkit.io.checksums import checksums
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


def check_made_of(labels: Path, sidecars: Iterable[Path], files: Iterable[Path]) -> None:
    """Raise VolumeError unless each sidecar of labels says that it was made of these files.

    A file may have another name or folder since, but not another content. Raises VolumeError as
    well for a file that cannot be read.
    """
    files = list(files)
    try:
        now = [each["sha256"] for each in checksums(files)]
    except OSError as error:
        raise VolumeError(f"{error.filename}: cannot be read: {error.strerror}") from None
    for sidecar in sidecars:
        try:
            then = [each["sha256"] for each in read_json_object(sidecar)[PROVENANCE]["inputs"]]
        except (OSError, ValueError, KeyError, TypeError):
            then = None
        if then != now:
            raise VolumeError(
                f"{labels}: is there already, but {sidecar.name} was made of another "
                f"{first_few([file.name for file in files], 3)}, which was replaced since; move "
                f"the result away, pass --overwrite or name another --out"
            )
