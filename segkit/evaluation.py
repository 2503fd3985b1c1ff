"""`segkit evaluate`: predictions against references, file by file."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from segkit.errors import VolumeError
from segkit.metrics.table import CaseScores, score_case
from segkit.volume import SUFFIXES, read_labels, stem_of


def find_pairs(predictions: Path, references: Path) -> list[tuple[str, Path, Path]]:
    """Name, prediction and reference of every case: two files, or two folders paired by name.

    A prediction called `CASE_seg` pairs with a reference called `CASE`. Raises VolumeError where a
    reference has no prediction, or where there is nothing to pair.
    """
    if predictions.is_file() and references.is_file():
        return [(stem_of(references), predictions, references)]
    for folder in (predictions, references):
        if not folder.is_dir():
            raise VolumeError(f"{folder}: expected two files or two folders; check the path")
    by_name = {stem_of(path).removesuffix("_seg"): path for path in _volumes(predictions)}
    pairs = [(stem_of(path), by_name.get(stem_of(path)), path) for path in _volumes(references)]
    found = [(name, prediction, reference) for name, prediction, reference in pairs if prediction]
    if not found:
        raise VolumeError(f"{predictions}: holds no volume named as one in {references}")
    missing = [name for name, prediction, _ in pairs if not prediction]
    if missing:
        raise VolumeError(
            f"{predictions}: lacks a prediction for {len(missing)} of {len(pairs)} references, "
            f"the first {missing[0]}; predict it or leave it out of {references}"
        )
    return found


def label_names(references: Path, labels: Path | None) -> dict[int, str] | None:
    """Names of the labels by number, from a dataset.json: the one given, or one beside or above."""
    folder = references if references.is_dir() else references.parent
    candidates = [labels] if labels else [folder / "dataset.json", folder.parent / "dataset.json"]
    for path in candidates:
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))["labels"]
                return {int(number): str(name) for number, name in content.items()}
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise VolumeError(f"{path}: cannot be read for label names: {error}") from None
    if labels:
        raise VolumeError(f"{labels}: no such file; check the path")
    return None


def score_pairs(
    pairs: Iterable[tuple[str, Path, Path]],
    names: dict[int, str] | None,
    *,
    tolerance_mm: float,
) -> list[CaseScores]:
    """Scores of every case and class; classes are those named, or else all that occur anywhere."""
    pairs = list(pairs)
    if names is None:
        present: set[int] = set()
        for _, *paths in pairs:
            for path in paths:
                present |= set(np.unique(read_labels(path).data).tolist())
        names = {number: f"label {number}" for number in sorted(present - {0})}
    foreground = {number: name for number, name in names.items() if number}
    rows: list[CaseScores] = []
    for name, prediction_path, reference_path in pairs:
        prediction, reference = read_labels(prediction_path), read_labels(reference_path)
        if not prediction.grid.agrees_with(reference.grid):
            raise VolumeError(
                f"{prediction_path}: lies on another grid than {reference_path}; "
                f"resample it onto the reference's"
            )
        try:
            rows += score_case(
                prediction.data,
                reference.data,
                foreground,
                reference.grid.spacing,
                case=name,
                tolerance_mm=tolerance_mm,
            )
        except ValueError as error:
            raise VolumeError(f"{prediction_path}: {error}") from None
    return rows


def _volumes(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.iterdir() if path.name.lower().endswith(SUFFIXES))
