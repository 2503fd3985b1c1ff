"""What made a result, told beside it, so that it can be made again and held against its making.

It names no time, no place and no machine, so that the same work leaves the same bytes.
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from segkit.errors import VolumeError
from segkit.inference.engines.choose import name_of
from segkit.inference.predictor import Predictor
from segkit.io.atomic import checksum
from segkit.io.safe_text import read_json_object
from segkit.model.folder import Model, checksums_of

PROVENANCE = "provenance"
"""The key under which it stands in a JSON file."""
LIBRARIES = ("segkit", "torch", "numpy", "scipy", "nibabel", "SimpleITK")


def asked_of(predictor: Predictor) -> dict[str, Any]:
    """The models and the settings that decide what a predictor says of a volume."""
    return {
        "models": [_model(member.model) for member in predictor.members],
        "settings": predictor.settings.told(),
    }


def made_by(
    predictor: Predictor, asked: Mapping[str, Any], inputs: Iterable[Path]
) -> dict[str, Any]:
    """What made a result of these files: models, settings, inputs, engines and versions.

    `asked` is what `asked_of` gave, which reads whole models, once for many inputs.
    """
    return {
        **asked,
        "inputs": checksums(inputs),
        "engines": [name_of(member.engine) for member in predictor.members],
        "versions": versions(),
    }


def checksums(files: Iterable[Path]) -> list[dict[str, str]]:
    """The name and SHA-256 of each file; for a folder, those of the files in it, in order."""
    found = []
    for file in files:
        inside = sorted(each for each in file.iterdir() if each.is_file()) if file.is_dir() else ()
        found += [{"file": each.name, "sha256": checksum(each)} for each in inside or (file,)]
    return found


def versions() -> dict[str, str]:
    """Those of Python, and of what the arithmetic and the files go through."""
    return {"python": python_version(), **{name: version(name) for name in LIBRARIES}}


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


def _model(model: Model) -> dict[str, Any]:
    first = {"first": [_model(stage) for stage in model.first]} if model.first else {}
    return {"run": model.description.run, **checksums_of(model), **first}
