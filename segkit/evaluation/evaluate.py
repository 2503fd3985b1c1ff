"""`segkit evaluate`: predictions against references, file by file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segkit.config.labels import Labelling
from segkit.data.dataset_json import read_labelling
from segkit.errors import VolumeError
from segkit.evaluation.scores import CaseScores, Summary, score_case, summarise, to_json
from segkit.io.checksums import checksum, checksums
from segkit.io.volume import SUFFIXES, read_labels, stem_of
from segkit.provenance import PROVENANCE, versions
from segkit.system.progress import Track, untracked


@dataclass(frozen=True)
class Evaluation:
    """Scores of each class in each case, and their summary over cases."""

    cases: Sequence[CaseScores]
    """One for each class and case: `metrics` by name ('dice', 'iou', 'hd95_mm', 'assd_mm', 'nsd'),
    volumes in ml, and counts of voxels."""
    summary: Summary
    """`classes` and `overall`, each with a mean, a median and a 95 % interval of each metric."""
    made: Mapping[str, Any]
    """The files, the settings and the versions that the scores come from."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers; an undefined score is None."""
        return {**to_json(self.cases, self.summary), PROVENANCE: dict(self.made)}


def evaluate(
    predictions: str | Path,
    references: str | Path,
    *,
    labels: str | Path | None = None,
    tolerance_mm: float = 1.0,
    track: Track = untracked,
) -> Evaluation:
    """Dice, IoU, HD95 and ASSD in mm, NSD and volumes in ml of two files, or two folders.

    Example:
        evaluation = segkit.evaluate("predictions", "references")
        evaluation.summary.overall.metrics["dice"].mean

    Args:
        predictions: a segmentation, or a folder of them, paired with the references by name; a
            prediction may be called NAME_seg.
        references: its reference, or a folder of them.
        labels: a dataset.json with the names of labels and regions; if not given, the one beside
            the references or one folder above, if there is one.
        tolerance_mm: distance in mm within which two surfaces agree, for the normalised surface
            Dice.
        track: may show the progress over cases.

    Returns:
        The scores; a score is NaN if its class is in neither image.

    Raises:
        VolumeError: files do not pair, or a pair does not fit together.
        DatasetError: the dataset.json cannot be understood.
    """
    predictions, references = Path(predictions), Path(references)
    pairs = find_pairs(predictions, references)
    rows = score_pairs(
        track(pairs, "scoring", len(pairs)),
        find_labelling(references, labels),
        tolerance_mm=tolerance_mm,
    )
    if not rows:
        raise VolumeError(f"{references}: holds only background; there is nothing to score")
    source = labels_file(references, labels)
    made = {
        "tolerance_mm": tolerance_mm,
        "labels": checksums([source] if source else []),
        "inputs": [
            {"case": name, "prediction": checksum(prediction), "reference": checksum(reference)}
            for name, prediction, reference in pairs
        ],
        "versions": versions(),
    }
    return Evaluation(rows, summarise(rows), made)


MOST_LABELS = 1000
"""Of files without a dataset.json: beyond it they are images, and scoring them would take days."""


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


def find_labelling(references: Path, labels: str | Path | None) -> Labelling | None:
    """What is told apart, by a dataset.json: the one given, or one beside or above.

    Raises DatasetError where it cannot be understood, VolumeError where the one given is not there.
    """
    path = labels_file(references, labels)
    return None if path is None else read_labelling(path)


def labels_file(references: Path, labels: str | Path | None) -> Path | None:
    """The dataset.json that says what is told apart: the one given, or one beside or above.

    Raises VolumeError where the one given is not there.
    """
    folder = references if references.is_dir() else references.parent
    beside = [folder / "dataset.json", folder.parent / "dataset.json"]
    candidates = [Path(labels)] if labels else beside
    for path in candidates:
        if path.is_file():
            return path
    if labels:
        raise VolumeError(f"{labels}: no such file; check the path")
    return None


def score_pairs(
    pairs: Iterable[tuple[str, Path, Path]], labelling: Labelling | None, *, tolerance_mm: float
) -> list[CaseScores]:
    """Scores of every case and class or region; or else of all labels that occur anywhere.

    Raises VolumeError where a pair does not fit together.
    """
    pairs = list(pairs)
    if labelling is None:
        present: set[int] = set()
        for _, *paths in pairs:
            for path in paths:
                present |= set(np.unique(read_labels(path).data).tolist())
        if len(present) > MOST_LABELS:
            raise VolumeError(
                f"{pairs[0][2]}: holds {len(present)} different numbers with the other files, more "
                f"than labels would be; give segmentations, or name their labels by --labels"
            )
        labelling = Labelling({f"label {number}": number for number in sorted(present - {0})})
    names = {labelling.numbers[name]: name for name in labelling.members}
    regions = {labelling.numbers[name]: numbers for name, numbers in labelling.members.items()}
    rows: list[CaseScores] = []
    for name, prediction_path, reference_path in pairs:
        prediction, reference = read_labels(prediction_path), read_labels(reference_path)
        prediction = prediction.onto(
            reference.grid, what=f"{prediction_path}:", whose=str(reference_path)
        )
        try:
            rows += score_case(
                prediction.data,
                reference.data,
                names,
                reference.grid.spacing,
                case=name,
                tolerance_mm=tolerance_mm,
                regions=regions,
                ignore=labelling.ignore,
            )
        except ValueError as error:
            raise VolumeError(f"{prediction_path}: {error}") from None
    return rows


def _volumes(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.iterdir() if path.name.lower().endswith(SUFFIXES))
