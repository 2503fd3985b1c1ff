"""`segkit evaluate`: predictions against references, file by file."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from segkit.config.dataset_files import DatasetConfig
from segkit.config.labels import Labelling
from segkit.config.load import DatasetFileConfig, read_yaml, validated
from segkit.data.dataset_json import labelling_of, read_labelling
from segkit.data.label_numbers import within
from segkit.errors import SegkitError, VolumeError, sentence_of
from segkit.evaluation.scores import CaseScores, Summary, score_case, summarise, to_json
from segkit.io.checksums import checksum, checksums
from segkit.io.volume import SUFFIXES, Volume, read_labels, stem_of
from segkit.model.folder import DESCRIPTION, load_description
from segkit.provenance import PROVENANCE, versions
from segkit.system.progress import Track, untracked

logger = logging.getLogger(__name__)


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
    failures: Mapping[str, str]
    """Why a case has no scores, by its name: a sentence."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers; an undefined score is None."""
        scores = to_json(self.cases, self.summary)
        return {**scores, "failures": dict(self.failures), PROVENANCE: dict(self.made)}


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
        labels: what gives labels and regions names: a dataset.json or its folder, a config, a run
            or a model folder; if not given, the dataset.json beside the references or one folder
            above, if there is one.
        tolerance_mm: distance in mm within which two surfaces agree, for the normalised surface
            Dice.
        track: may show the progress over cases.

    Returns:
        The scores; a score is NaN if its class is in neither image. A case that cannot be scored
        is told in `failures`, and the others are scored.

    Raises:
        VolumeError: files do not pair, or no pair can be scored.
        DatasetError: the dataset.json cannot be understood.
    """
    predictions, references = Path(predictions), Path(references)
    pairs = find_pairs(predictions, references)
    rows, failures = score_pairs(
        track(pairs, "scoring", len(pairs)),
        find_labelling(references, labels),
        tolerance_mm=tolerance_mm,
    )
    if failures and not rows:
        raise VolumeError(next(iter(failures.values())))
    if not rows:
        raise VolumeError(f"{references}: holds only background; there is nothing to score")
    source = labels_file(references, labels)
    made = {
        "tolerance_mm": tolerance_mm,
        "labels": checksums([source] if source else []),
        "inputs": [
            {"case": name, "prediction": checksum(prediction), "reference": checksum(reference)}
            for name, prediction, reference in pairs
            if name not in failures
        ],
        "versions": versions(),
    }
    return Evaluation(rows, summarise(rows), made, failures)


MOST_LABELS = 1000
"""Of files without a dataset.json: beyond it they are images, and scoring them would take days."""


def find_pairs(predictions: Path, references: Path) -> list[tuple[str, Path, Path]]:
    """Name, prediction and reference of every case: two files, or two folders paired by name.

    A prediction called `CASE_seg` pairs with a reference called `CASE`. Raises VolumeError where a
    reference has no prediction, where there is nothing to pair, or where two share a name.
    """
    if predictions.is_file() and references.is_file():
        return [(stem_of(references), predictions, references)]
    for folder in (predictions, references):
        if not folder.is_dir():
            raise VolumeError(f"{folder}: expected two files or two folders; check the path")
    by_name = _by_name(_volumes(predictions), "_seg")
    pairs = [
        (name, by_name.get(name), path) for name, path in _by_name(_volumes(references)).items()
    ]
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


def _by_name(paths: Sequence[Path], ending: str = "") -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in paths:
        other = named.setdefault(stem_of(path).removesuffix(ending), path)
        if other != path:
            raise VolumeError(f"{path}: is the same case as {other.name}; move one away")
    return named


def find_labelling(references: Path, labels: str | Path | None) -> Labelling | None:
    """What is told apart, by a dataset.json, config or model: that given, or one beside or above.

    Raises DatasetError, ConfigError or ModelError where it cannot be understood, VolumeError where
    the one given is not there.
    """
    path = labels_file(references, labels)
    if path is None:
        return None
    if path.suffix in (".yaml", ".yml"):
        return labelling_in_config(path)
    if path.name == DESCRIPTION:
        return load_description(path.parent).labelling
    return read_labelling(path)


def labelling_in_config(path: Path) -> Labelling:
    """What the section `data` of a config tells apart. Raises ConfigError and DatasetError."""
    data = read_yaml(path).get("data")
    own = {name: data[name] for name in DatasetConfig.model_fields if name in data} if data else {}
    source = validated(DatasetFileConfig, {"data": own}, str(path)).data
    if source.labels is not None:
        return labelling_of(str(path), source.labels, source.regions_class_order, {})
    if source.files is not None and source.files.labels:
        files = source.files
        return labelling_of(str(path), files.labels, files.regions_class_order, {})
    return read_labelling(source.folder / "dataset.json")


def labels_file(references: Path, labels: str | Path | None) -> Path | None:
    """The file that says what is told apart: the one given, or a dataset.json beside or above.

    Of a folder it is its dataset.json, or the description of its model.

    Raises VolumeError where the one given is not there.
    """
    folder = references if references.is_dir() else references.parent
    beside = [folder / "dataset.json", folder.parent / "dataset.json"]
    candidates = [Path(labels)] if labels else beside
    if labels and Path(labels).is_dir():
        inside = ("dataset.json", DESCRIPTION, f"model/{DESCRIPTION}")
        candidates = [Path(labels) / name for name in inside]
    for path in candidates:
        if path.is_file():
            return path
    if labels:
        raise VolumeError(
            f"{labels}: expected a dataset.json, a config, a run or a model folder; check the path"
        )
    return None


def score_pairs(
    pairs: Iterable[tuple[str, Path, Path]], labelling: Labelling | None, *, tolerance_mm: float
) -> tuple[list[CaseScores], dict[str, str]]:
    """Scores of every case and class or region; or else of all labels that occur anywhere.

    A case that fails has no scores, and does not stop the others: the second dictionary says why,
    by the case's name.
    """
    pairs = list(pairs)
    failures: dict[str, str] = {}
    if labelling is None:
        present: set[int] = set()
        for name, *paths in pairs:
            with _told(failures, name, paths[0]):
                present = _with_labels_of(paths, present)
        labelling = Labelling({f"label {number}": number for number in sorted(present - {0})})
    rows: list[CaseScores] = []
    for name, prediction, reference in pairs:
        if name not in failures:
            with _told(failures, name, prediction):
                rows += _score_pair(name, prediction, reference, labelling, tolerance_mm)
    return rows, failures


@contextmanager
def _told(failures: dict[str, str], name: str, path: Path) -> Iterator[None]:
    """Keeps what goes wrong with a case as a sentence that names its file."""
    try:
        yield
    except SegkitError as error:
        failures[name] = str(error)
    except OSError as error:
        failures[name] = f"{path}: {sentence_of(error)}"
    except Exception as error:
        # Our own fault rather than the file's; no reason to lose the scores of all other cases.
        logger.info("%s", path, exc_info=True)
        reason = " ".join(str(error).split())
        failures[name] = f"{path}: cannot be scored ({type(error).__name__}: {reason})"


def _read_pair(prediction_path: Path, reference_path: Path) -> tuple[Volume, Volume]:
    prediction, reference = read_labels(prediction_path), read_labels(reference_path)
    prediction = prediction.onto(
        reference.grid, what=f"{prediction_path}:", whose=str(reference_path)
    )
    return prediction, reference


def _with_labels_of(paths: Sequence[Path], present: set[int]) -> set[int]:
    """The labels that occur in other cases and in this one."""
    prediction, reference = paths
    for volume in _read_pair(prediction, reference):
        present = present | set(np.unique(volume.data).tolist())
    if len(present) > MOST_LABELS:
        raise VolumeError(
            f"{reference}: holds {len(present)} different numbers with the other files, more "
            f"than labels would be; give segmentations, or name their labels by --labels"
        )
    return present


def _score_pair(
    case: str,
    prediction_path: Path,
    reference_path: Path,
    labelling: Labelling,
    tolerance_mm: float,
) -> list[CaseScores]:
    prediction, reference = _read_pair(prediction_path, reference_path)
    try:
        rows = score_case(
            _within(prediction, labelling),
            _within(reference, labelling),
            {labelling.numbers[name]: name for name in labelling.members},
            reference.grid.spacing,
            case=case,
            tolerance_mm=tolerance_mm,
            directions=reference.grid.directions,
            regions={
                labelling.numbers[name]: numbers for name, numbers in labelling.members.items()
            },
            ignore=labelling.ignore,
        )
    except ValueError as error:
        raise VolumeError(f"{prediction_path}: {error}") from None
    return [replace(row, label=labelling.in_file(row.label)) for row in rows]


def _within(labels: Volume, labelling: Labelling) -> ndarray:
    return within(labels.data, labelling) if labelling.in_files else labels.data


def _volumes(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.iterdir() if path.name.lower().endswith(SUFFIXES))
