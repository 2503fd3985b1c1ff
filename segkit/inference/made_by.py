"""Provenance of a prediction: models, settings, inputs, engines and versions."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from segkit.inference.engines.choose import name_of
from segkit.inference.model_walk import ModelWalk
from segkit.inference.predictor import Predictor
from segkit.io.checksums import checksums
from segkit.model.folder import Model, checksums_of
from segkit.provenance import versions


def models_and_settings(predictor: Predictor) -> dict[str, Any]:
    """The models and the settings on which the result of a predictor depends."""
    return {
        "models": [_model(member.model) for member in predictor.members],
        "settings": predictor.settings.to_json(),
    }


def made_by(
    predictor: Predictor, asked: Mapping[str, Any], inputs: Iterable[Path]
) -> dict[str, Any]:
    """Provenance of a result, as written under `provenance` to its sidecar file.

    Args:
        predictor: the predictor that made the result.
        asked: the output of `models_and_settings`. That function reads whole models, so call it
            once for many inputs.
        inputs: the files that were segmented.
    """
    return {
        **asked,
        "inputs": checksums(inputs),
        "engines": [_engine_of(member) for member in predictor.members],
        "versions": versions(),
    }


def _engine_of(member: ModelWalk) -> str:
    name = name_of(member.engine)
    overflowed = member.precision != member.settings.precision
    return f"{name}, in float32 because float16 overflowed" if overflowed else name


def _model(model: Model) -> dict[str, Any]:
    first = {"first": [_model(stage) for stage in model.first]} if model.first else {}
    return {"run": model.description.run, **checksums_of(model), **first}
