"""What a dataset folder holds: a Decathlon-style dataset.json and the volumes it names."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy import ndarray
from pydantic import BaseModel, Field, ValidationError

from segkit.errors import DatasetError
from segkit.volume import Volume, read_volume, stem_of


class _Training(BaseModel):
    image: str | list[str] = []
    label: str


class _DatasetFile(BaseModel):
    """The keys of a Decathlon dataset.json that segkit reads; it has others, which are let be."""

    modality: dict[str, str]
    labels: dict[str, str]
    training: Annotated[list[_Training], Field(min_length=1)]


@dataclass(frozen=True)
class Case:
    """One subject: the files of its channels, and its label.

    A case without images is a label map to synthesise images from.
    """

    name: str
    images: tuple[Path, ...]
    label: Path


@dataclass(frozen=True)
class Dataset:
    """Cases in the order of their names, and what their channels and labels mean."""

    folder: Path
    cases: tuple[Case, ...]
    channels: tuple[str, ...]
    labels: dict[str, int]


def read_dataset(folder: Path) -> Dataset:
    """Read `folder/dataset.json` and see that every file it names is there.

    `modality` names the channels, `labels` the labels 0, 1, 2, …, 0 being the background; each
    entry of `training` gives an image (a list of files where each channel has its own) and a label,
    or a label alone, to synthesise images from.

    Raises DatasetError, in one sentence.
    """
    path = folder / "dataset.json"
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such dataset folder; set data.folder")
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        file = _DatasetFile.model_validate(content)
    except FileNotFoundError:
        raise DatasetError(f"{folder}: expected a dataset.json in it, found none") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as JSON: {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "it"
        raise DatasetError(f"{path}: {where} is wrong: {problem['msg'].lower()}") from None
    numbers = sorted(int(number) for number in file.labels if number.isdecimal())
    if len(numbers) != len(file.labels) or numbers != list(range(len(numbers))) or len(numbers) < 2:
        raise DatasetError(
            f"{path}: labels must be numbered 0 (background), 1, 2, …, found {list(file.labels)}"
        )
    if len(set(file.labels.values())) != len(file.labels):
        raise DatasetError(f"{path}: two labels share a name; give each its own")
    cases = sorted((_case(folder, entry) for entry in file.training), key=lambda case: case.name)
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DatasetError(f"{path}: case {twice} is listed twice in training")
    channels = tuple(file.modality[key] for key in sorted(file.modality, key=_number))
    labels = {file.labels[key]: int(key) for key in sorted(file.labels, key=int)}
    return Dataset(folder, tuple(cases), channels, labels)


def read_case(case: Case, dataset: Dataset) -> tuple[Volume, Volume]:
    """The image (x, y, z, channel) and the label (x, y, z) of a case, on one grid.

    The image of a case without one is zero throughout.

    Raises DatasetError where they do not fit each other or the dataset.json.
    """
    label = read_volume(case.label)
    if not case.images:
        blank = np.zeros((*label.grid.shape, len(dataset.channels)), np.float32)
        return label.like(blank), label.like(_checked_label(case, label, dataset))
    parts = [read_volume(path) for path in case.images]
    for path, part in zip(case.images, parts, strict=True):
        _check_grid(path, part, case.images[0], parts[0])
        if not np.isfinite(part.data).all():
            raise DatasetError(f"{path}: holds voxels that are not numbers; repair it")
    data = np.concatenate([part.data.reshape(*part.grid.shape, -1) for part in parts], axis=3)
    if data.shape[3] != len(dataset.channels):
        raise DatasetError(
            f"{case.images[0]}: expected {len(dataset.channels)} channels "
            f"({', '.join(dataset.channels)}), found {data.shape[3]}"
        )
    _check_grid(case.label, label, case.images[0], parts[0])
    return parts[0].like(data), label.like(_checked_label(case, label, dataset))


def split(
    dataset: Dataset, validation: float | Sequence[str], seed: int
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """The cases to train on and those held out: a share drawn by the seed, or the named ones.

    A share above 0 holds out at least one case. Raises DatasetError where no case is left to train
    on or a name is unknown.
    """
    names = [case.name for case in dataset.cases]
    if isinstance(validation, float | int):
        count = min(max(round(validation * len(names)), 1), len(names)) if validation else 0
        held_out = set(np.random.default_rng(seed).permutation(names)[:count].tolist())
    else:
        held_out = set(validation)
        if unknown := sorted(held_out - set(names)):
            raise DatasetError(
                f"data.validation names {unknown[0]}, which is no case of {dataset.folder}"
            )
    train = tuple(case for case in dataset.cases if case.name not in held_out)
    if not train:
        raise DatasetError(
            f"{dataset.folder}: no case is left to train on; hold out fewer of {len(names)}"
        )
    return train, tuple(case for case in dataset.cases if case.name in held_out)


def fold_of(
    dataset: Dataset, fold: int, *, count: int = 5
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """The cases to train on and those held out of a fold of nnU-Net's cross-validation.

    Cases in the order of their names are shuffled by NumPy's first generator from seed 12345 and
    cut into folds, the first ones larger by one (scikit-learn's KFold, as nnU-Net calls it). Raises
    DatasetError for fewer cases than folds.
    """
    if len(dataset.cases) < count:
        raise DatasetError(
            f"{dataset.folder}: {count} folds need {count} cases or more, found "
            f"{len(dataset.cases)}; give data.validation instead of data.fold"
        )
    order = np.arange(len(dataset.cases))
    np.random.RandomState(12345).shuffle(order)
    held_out = set(np.array_split(order, count)[fold].tolist())
    numbered = list(enumerate(dataset.cases))
    return (
        tuple(case for number, case in numbered if number not in held_out),
        tuple(case for number, case in numbered if number in held_out),
    )


def _case(folder: Path, entry: _Training) -> Case:
    images = [entry.image] if isinstance(entry.image, str) else entry.image
    paths = tuple(folder / image for image in images)
    label = folder / entry.label
    for path in (*paths, label):
        if not path.is_file():
            raise DatasetError(f"{folder}/dataset.json: names {path}, which does not exist")
    return Case(stem_of(label), paths, label)


def _checked_label(case: Case, label: Volume, dataset: Dataset) -> ndarray:
    if label.data.size != math.prod(label.grid.shape):
        raise DatasetError(f"{case.label}: expected one label per voxel, found {label.data.shape}")
    found = np.unique(label.data)
    declared = sorted(dataset.labels.values())
    if not np.isin(found, declared).all():
        strange = found[~np.isin(found, declared)][:5].tolist()
        raise DatasetError(
            f"{case.label}: holds label {', '.join(f'{value:g}' for value in strange)}, which "
            f"dataset.json does not declare (it has {declared[0]} to {declared[-1]})"
        )
    kind = np.min_scalar_type(declared[-1])
    return label.data.reshape(label.grid.shape).astype(kind)


def _check_grid(path: Path, volume: Volume, reference_path: Path, reference: Volume) -> None:
    if not volume.grid.agrees_with(reference.grid):
        raise DatasetError(
            f"{path}: its grid {_described(volume)} is not that of {reference_path.name}, "
            f"{_described(reference)}; resample one onto the other"
        )


def _described(volume: Volume) -> str:
    size = "x".join(str(count) for count in volume.grid.shape)
    spacing = "x".join(f"{value:.3g}" for value in volume.grid.spacing)
    origin = ", ".join(f"{value:.1f}" for value in volume.grid.affine[:3, 3])
    return f"({size} voxels of {spacing} mm, first at {origin})"


def _number(key: str) -> tuple[int, str]:
    return (int(key) if key.isdecimal() else 0, key)
