"""Provenance of a result, as written to the JSON file beside it.

It contains no time, path or machine name, so that the same work writes the same bytes.
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
"""Key of the provenance in a JSON file."""
LIBRARIES = ("segkit", "torch", "numpy", "scipy", "nibabel", "SimpleITK")


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, of the libraries that compute and read files, and of `more` packages."""
    return {"python": python_version(), **{name: version(name) for name in (*LIBRARIES, *more)}}


def check_asked(labels: Path, sidecar: Path, asked: Mapping[str, Any]) -> None:
    """Raise VolumeError unless the sidecar file says that the labels were made with `asked`.

    Args:
        labels: the existing result, for the error.
        sidecar: the JSON file beside it.
        asked: the values that its provenance must hold, by key.
    """
    try:
        told = read_json_object(sidecar)[PROVENANCE]
        same = all(told[key] == value for key, value in asked.items())
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise VolumeError(
            f"{labels}: exists already, but {sidecar.name} does not say that this model and these "
            f"settings made it; pass --overwrite or choose another --out"
        )


def check_made_of(labels: Path, sidecars: Iterable[Path], files: Iterable[Path]) -> None:
    """Raise VolumeError unless each sidecar file says that the labels were made from these files.

    The files may have been renamed or moved, but their content must be the same. A file that
    cannot be read raises VolumeError too.

    Args:
        labels: the existing result, for the error.
        sidecars: the JSON files of the result.
        files: the input files as they are now.
    """
    files = list(files)
    try:
        now = [each["sha256"] for each in checksums(files)]
    except OSError as error:
        raise VolumeError(
            f"{error.filename}: cannot be read: {error.strerror}; check the file and its "
            f"permissions"
        ) from None
    for sidecar in sidecars:
        try:
            then = [each["sha256"] for each in read_json_object(sidecar)[PROVENANCE]["inputs"]]
        except (OSError, ValueError, KeyError, TypeError):
            then = None
        if then != now:
            raise VolumeError(
                f"{labels}: exists already, but {sidecar.name} says that it was made from another "
                f"version of {first_few([file.name for file in files], 3)}; move the result away, "
                f"pass --overwrite or choose another --out"
            )
