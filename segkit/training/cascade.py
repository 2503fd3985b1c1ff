"""The first stage of a cascade: its models, and the labels that they predict for the second stage.

In nnU-Net's cascade (Isensee et al. 2021) a network at low resolution finds the structures, and a
network at full resolution receives these labels and finds the exact borders.
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
from segkit.inference.predictor import Predictor
from segkit.io.checksums import file_states
from segkit.io.safe_text import read_json_object
from segkit.io.volume import Volume, write_volume
from segkit.model.file_names import DESCRIPTION, SUMMARY, WEIGHTS
from segkit.model.folder import Model, check_first_stage, load_description, load_model, model_folder
from segkit.system.progress import Track, untracked

SegmentVolume = Callable[[Volume], Volume]


@dataclass(frozen=True, eq=False)
class FirstModel:
    """A model of a first stage, and the cases that were held out of its training."""

    folder: Path
    """The model's folder."""
    model: Model
    held_out: frozenset[str]
    """Cases that its run used only for scoring, not for training."""
    digest: str
    """SHA-256 of the model's description and weights."""


def first_models(paths: Sequence[Path], dataset: Dataset) -> tuple[FirstModel, ...]:
    """The first-stage models in runs or model folders.

    Args:
        paths: runs or model folders.
        dataset: the dataset that the second stage is trained on.

    Raises:
        ModelError: a folder has no model, a model takes other channels or needs a first stage
            itself, or the models have different labels.
    """
    found: list[FirstModel] = []
    for path in paths:
        folder = model_folder(path)
        description = load_description(folder)
        if tuple(description.channels) != dataset.channels:
            raise ModelError(
                f"{folder}: expected a first stage with the channels of {dataset.folder}, "
                f"{', '.join(dataset.channels)}, found {', '.join(description.channels)}; choose a "
                "model with these channels"
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
    """Names of the cases that a model's run held out; none if the run has no summary."""
    path = folder.parent / SUMMARY
    try:
        scores = read_json_object(path)["validation"]
        return frozenset(scores.get("held_out", scores["dice_of_cases"]))
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: cannot read the cases that the run held out: {error!r}; repair the file, or "
            f"move the model folder elsewhere to use the model without them"
        ) from None


def described(description: ModelDescription, models: Sequence[FirstModel]) -> ModelDescription:
    """The description of a model that also receives the labels of these models, if any."""
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
    """The file with first-stage labels of each case, by the case's name.

    A case is labelled by the models that held it out of training, or by all models if none did. If
    there are several, each voxel gets the label of the majority. Names of files contain digests of
    the models and the images, so labels of a model that was trained again are never mixed up with
    old ones.

    Args:
        cases: the cases to label.
        dataset: the dataset of these cases.
        models: the models of the first stage.
        cache: the folder in which the files are written.
        device: the device that runs the models.
        segmenter: makes a function that labels a volume, from a model and a device.
        track: shows the progress over cases.

    Returns:
        A label file on the grid of the case, for each case; None if there are no models.
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
        path = cache / "first_stage" / f"{case.file_name}-{digest}.nii.gz"
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
    """For the summary: the models, and how many cases at least one of them held out.

    Args:
        models: the models of the first stage.
        train_cases, held_out: the cases of the second stage.
    """
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
    # Always PyTorch: labels for training must not depend on whether a converted model is cached.
    predictor = Predictor(first.model, device=device, engine="torch")
    return lambda volume: predictor.numbers_of(volume)


def _digest(case: CaseFiles, models: Sequence[str]) -> str:
    content = {
        "models": models,
        "files": file_states(case.images),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
