"""The first of two stages: its models, and the labels that they give the cases of the second.

nnU-Net's cascade (Isensee et al. 2021): a network at low resolution sees where things are, and one
at full resolution, given its labels, sees how exactly they run.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segkit.config.model import FirstStageConfig, ModelDescription
from segkit.data.dataset import CaseFiles, Dataset, read_case
from segkit.data.first_stage_labels import majority, out_of_fold
from segkit.errors import ModelError
from segkit.inference.model_walk import PredictionOptions
from segkit.inference.predictor import WINDOWS_IN_TRAINING, Predictor
from segkit.io.checksums import file_states
from segkit.io.safe_text import read_json_object
from segkit.io.volume import Volume, write_volume
from segkit.model.folder import (
    DESCRIPTION,
    SUMMARY,
    WEIGHTS,
    Model,
    check_first_stage,
    load_description,
    load_model,
    model_folder,
)
from segkit.system.progress import Track, untracked

SegmentVolume = Callable[[Volume], Volume]


@dataclass(frozen=True, eq=False)
class FirstModel:
    """A model of a first stage, and what is known of how it was trained."""

    folder: Path
    """The model's."""
    model: Model
    held_out: frozenset[str]
    """Cases that its run scored it on, and did not train it on."""
    digest: str
    """Of its description and weights."""


def first_models(paths: Sequence[Path], dataset: Dataset) -> tuple[FirstModel, ...]:
    """The models of runs or model folders, as the first stage of a model of the dataset.

    Raises ModelError where there is none, where one takes other channels or a first stage itself,
    or where their labels differ.
    """
    found: list[FirstModel] = []
    for path in paths:
        folder = model_folder(path)
        description = load_description(folder)
        if tuple(description.channels) != dataset.channels:
            raise ModelError(
                f"{folder}: takes the channels {', '.join(description.channels)}, and "
                f"{dataset.folder} has {', '.join(dataset.channels)}; name a model of these"
            )
        labels = found[0].model.description.labels if found else description.labels
        check_first_stage(folder, description, list(labels)[1:])
        digest = hashlib.sha256()
        for name in (DESCRIPTION, WEIGHTS):
            if (folder / name).is_file():
                digest.update((folder / name).read_bytes())
        held_out = held_out_of(folder)
        found.append(FirstModel(folder, load_model(folder), held_out, digest.hexdigest()))
    return tuple(found)


def held_out_of(folder: Path) -> frozenset[str]:
    """Names of the cases that the run of a model held out, by its summary; none without one."""
    path = folder.parent / SUMMARY
    try:
        scores = read_json_object(path)["validation"]
        return frozenset(scores.get("held_out", scores["dice_of_cases"]))
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: expected the cases that the run held out, cannot read them: {error!r}; "
            f"move the model folder away from it to do without"
        ) from None


def described(description: ModelDescription, models: Sequence[FirstModel]) -> ModelDescription:
    """The description of a model that takes the labels of these, if there are any."""
    if not models:
        return description
    classes = list(models[0].model.description.labels)[1:]
    stage = FirstStageConfig(models=len(models), classes=classes)
    return description.model_copy(update={"first_stage": stage})


def label_cases(
    cases: Sequence[CaseFiles],
    dataset: Dataset,
    models: Sequence[FirstModel],
    *,
    cache: Path,
    device: str = "auto",
    segmenter: Callable[[FirstModel, str], SegmentVolume] | None = None,
    track: Track = untracked,
) -> Mapping[str, Path] | None:
    """For each case the file with its first-stage labels, on its own grid; None without models.

    A case is labelled by the models that held it out of their training, or by all where none did;
    of several, the majority decides. Files lie in `cache`, their names digests of the models and
    the images, so that a first stage that was trained anew meets no labels of the old one.
    `segmenter(model, device)` makes what labels a volume.
    """
    if not models:
        return None
    segmenter = segmenter or _segmenter
    made: dict[int, SegmentVolume] = {}
    files: dict[str, Path] = {}
    held_out = [first.held_out for first in models]
    for case in track(cases, "first stage", len(cases)):
        chosen = out_of_fold(case.name, held_out)
        digest = _digest(case, [models[number].digest for number in chosen])
        path = cache / "first_stage" / f"{case.name}-{digest}.nii.gz"
        files[case.name] = path
        if path.is_file():
            continue
        image, _ = read_case(case, dataset)
        for number in chosen:
            if number not in made:
                made[number] = segmenter(models[number], device)
        write_volume(path, majority([made[number](image) for number in chosen]))
    for first in models:
        first.model.network.cpu()
    return files


def first_stage_of(
    models: Sequence[FirstModel], train_cases: Sequence[CaseFiles], held_out: Sequence[CaseFiles]
) -> dict[str, Any]:
    """For the summary: the models, and how many cases one of them held out of its training."""
    if not models:
        return {}
    unseen = frozenset[str]().union(*(first.held_out for first in models))
    return {
        "first_stage": {
            "models": [str(first.folder) for first in models],
            "training_cases_held_out": sum(case.name in unseen for case in train_cases),
            "validation_cases_held_out": sum(case.name in unseen for case in held_out),
        }
    }


def _segmenter(first: FirstModel, device: str) -> SegmentVolume:
    # Whether a conversion lies in the cache must not decide what is trained on.
    options: PredictionOptions = {"device": device, "engine": "torch"}
    if device == "cpu":
        options["batch_size"] = WINDOWS_IN_TRAINING
    predictor = Predictor(first.model, **options)
    return lambda volume: predictor.numbers_of(volume)


def _digest(case: CaseFiles, models: Sequence[str]) -> str:
    content = {
        "models": models,
        "files": file_states(case.images),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
