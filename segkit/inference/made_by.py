"""What made a prediction: models, settings, inputs, engines and versions."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from segkit.inference.engines.choose import name_of
from segkit.inference.predictor import Predictor
from segkit.io.checksums import checksums
from segkit.model.folder import Model, checksums_of
from segkit.provenance import versions


def asked_of(predictor: Predictor) -> dict[str, Any]:
    """The models and the settings that decide what a predictor makes of a volume."""
    return {
        "models": [_model(member.model) for member in predictor.members],
        "settings": predictor.settings.told(),
    }


def made_by(
    predictor: Predictor, asked: Mapping[str, Any], inputs: Iterable[Path]
) -> dict[str, Any]:
    """What made a result of these files, as `provenance` in its sidecar file.

    `asked` comes from `asked_of`, which reads whole models: call it once for many inputs.
    """
    return {
        **asked,
        "inputs": checksums(inputs),
        "engines": [name_of(member.engine) for member in predictor.members],
        "versions": versions(),
    }


def _model(model: Model) -> dict[str, Any]:
    first = {"first": [_model(stage) for stage in model.first]} if model.first else {}
    return {"run": model.description.run, **checksums_of(model), **first}
