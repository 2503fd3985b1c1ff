"""`segkit evaluate`: compare predictions with references, case by case."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from segkit.config.labels import Labelling
from segkit.config.pictures import pixel_mm_of
from segkit.data.label_numbers import within
from segkit.errors import ConfigError, SegkitError, VolumeError, first_few, sentence_of
from segkit.evaluation.calibration import Calibration
from segkit.evaluation.evaluate_probabilities import calibrate_pairs
from segkit.evaluation.label_names import labelling_in, labels_file, picture_rules_in
from segkit.evaluation.pairing import Pairing, pair_with
from segkit.evaluation.references import references_in
from segkit.evaluation.scores import CaseScores, Summary, score_case, summarise, to_json
from segkit.evaluation.tolerance import Tolerance, tolerance_in
from segkit.io.checksums import checksum, checksums
from segkit.io.picture_rules import PictureRules
from segkit.io.volume import AS_IT_SAYS, Volume, read_labels
from segkit.io.volume_names import is_picture
from segkit.io.whole_numbers import noting_rounded_labels
from segkit.provenance import PROVENANCE, versions
from segkit.system.progress import Track, untracked
from segkit.system.resources import limit_threads

logger = logging.getLogger(__name__)

Missing: TypeAlias = Literal["refuse", "skip", "empty"]
"""How to treat references without a prediction: refuse to score, skip them, or score as empty."""
MOST_MISSING = 10
"""Largest number of missing cases that a message names."""
DEFAULT_TOLERANCE = Tolerance(mm=1.0, pixels=2.0)
"""The default tolerance of the normalised surface Dice: 1 mm, and 2 pixels for pictures."""
MOST_LABELS = 1000
"""Largest number of different labels in files without a dataset.json. Files with more are images;
scoring them would take days."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of each class in each case, and their summary over cases.

    Example:
        scores = segkit.evaluate("predictions", "references")
        [(row.case, row.name, row.metrics["dice"]) for row in scores.cases]
    """

    cases: Sequence[CaseScores]
    """Scores of each class and case: `metrics` by name ('dice', 'iou', 'hd95_mm', 'assd_mm',
    'nsd'), volumes in ml, and counts of voxels."""
    summary: Summary
    """`classes` and `overall`, each with the mean, median and 95 % interval of each metric."""
    made: Mapping[str, Any]
    """Provenance of the scores: files, settings and versions."""
    failures: Mapping[str, str]
    """The cases that could not be scored, each with the reason as one sentence."""
    missing: tuple[str, ...] = ()
    """Names of cases without a prediction."""
    extra: tuple[str, ...] = ()
    """Paths of predictions without a reference."""
    calibration: Calibration | None = None
    """Calibration of the probabilities beside the predictions, if wanted."""
    rounded: Mapping[str, float] = field(default_factory=dict)
    """Files whose labels were not whole numbers, up to rounding errors, and were rounded; with the
    largest difference."""

    @property
    def dice_of_cases(self) -> dict[str, float]:
        """Mean Dice of each case, over its classes with a defined Dice; NaN if there is none."""
        found: dict[str, list[float]] = {}
        for row in self.cases:
            found.setdefault(row.case, []).append(row.metrics["dice"])
        return {
            case: float(np.nanmean(dice)) if np.isfinite(dice).any() else float("nan")
            for case, dice in found.items()
        }

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers; an undefined score is None."""
        scores = to_json(self.cases, self.summary)
        more: dict[str, Any] = {"missing": list(self.missing), "extra": list(self.extra)}
        if self.rounded:
            more["rounded"] = dict(self.rounded)
        if self.calibration is not None:
            more["calibration"] = self.calibration.to_json(self.dice_of_cases)
        return {**scores, "failures": dict(self.failures), **more, PROVENANCE: dict(self.made)}


def evaluate(
    predictions: str | Path,
    references: str | Path,
    *,
    labels: str | Path | None = None,
    tolerance_mm: float | None = None,
    tolerance: str | None = None,
    pixel_size: str | Sequence[str] | None = None,
    missing: Missing | str = "refuse",
    probabilities: bool = False,
    track: Track = untracked,
) -> Evaluation:
    """Score segmentations: Dice, IoU, HD95 and ASSD in mm, NSD, and volumes in ml.

    Args:
        predictions: a segmentation, or a folder of segmentations with its subfolders.
        references: the reference, a folder of references, a dataset (its folder or YAML file), or a
            table with the columns `id` and `label`.
            Files are paired by name: the same path, or the same name, or the same name without
            final words such as `_seg` (the whole rule is in docs/evaluation.md).
        labels: file with the names of labels and regions: a dataset.json or its folder, a config, a
            run or a model folder. If None, the dataset is used, or a dataset.json beside the
            references or one folder above.
        tolerance_mm: largest distance in mm at which two surfaces agree, for the normalised surface
            Dice. The default is 1 mm, and 2 pixels for pictures.
        tolerance: the tolerance as a length with its unit, such as '0.5 µm' or '2 pixels'. It is
            used instead of `tolerance_mm`.
        pixel_size: pixel size of pictures, such as '4 nm'. It overrides that of files and dataset.
        missing: how to treat references without a prediction: 'refuse' raises an error, 'skip'
            leaves them out, 'empty' scores them as empty predictions, with Dice 0 for each class
            that they contain.
        probabilities: whether to evaluate the calibration of the probabilities beside the
            predictions (`NAME_prob`).
        track: reports the progress over cases.

    Returns:
        The scores. A score is NaN if its class is in neither image, or if a config says that the
        class is not labelled in the case. Cases that cannot be scored are in `failures`; the others
        are scored.

    Raises:
        VolumeError: if files cannot be paired, no pair can be scored, `labels` is no such file, or
            the tolerance or the pixel size is not a length.
        ConfigError: if a YAML file is not valid, `missing` has an unknown value, or labels without
            names have probabilities.
        DatasetError: if the dataset or the dataset.json is not valid.
        ModelError: if the model in `labels` is not valid.

    Example:
        evaluation = segkit.evaluate("predictions", "references")
        evaluation.summary.overall.metrics["dice"].mean
    """
    limit_threads()
    predictions, references = Path(predictions), Path(references)
    if missing not in get_args(Missing):
        raise ConfigError(
            f"unknown value {missing!r} of missing; choose one of "
            f"{', '.join(map(repr, get_args(Missing)))}"
        )
    known = references_in(references, but=predictions)
    pairing = pair_with(predictions, known, references)
    if missing == "refuse":
        _refuse_missing(pairing, predictions, references)
    empty = [(name, None, path) for name, path in pairing.missing] if missing == "empty" else []
    pairs = sorted([*pairing.pairs, *empty], key=lambda pair: pair[0])
    source, labelling, rules = known.source, known.labelling, known.rules
    if labels is not None or labelling is None:
        source = labels_file(references, labels)
        labelling = None if source is None else labelling_in(source)
        rules = AS_IT_SAYS if source is None else picture_rules_in(source)
        rules = replace(rules, structures=known.rules.structures)
    rules = with_pixel_size(rules, pixel_size)
    wanted = tolerance_in(tolerance or tolerance_mm, DEFAULT_TOLERANCE)
    images = {volume.case: volume.image for volume in known.volumes if volume.image is not None}
    lacking = {volume.case: volume.unlabelled for volume in known.volumes}
    with noting_rounded_labels() as rounded:
        rows, failures = score_pairs(
            pairs, labelling, tolerance=wanted, rules=rules, images=images, track=track
        )
    rows = [_unscored(row) if row.name in lacking[row.case] else row for row in rows]
    if failures and not rows:
        raise VolumeError(next(iter(failures.values())))
    if not rows:
        raise VolumeError(
            f"{references}: expected labels to score, found only background; check the references"
        )
    _check_units(rows, references)
    summary = summarise(rows)
    made = {
        "tolerance_mm": summary.tolerance_mm,
        "tolerance_pixels": summary.tolerance_pixels,
        "missing": missing,
        "labels": checksums([source] if source else []),
        "inputs": [
            {
                "case": name,
                "prediction": None if prediction is None else checksum(prediction),
                "reference": checksum(reference),
            }
            for name, prediction, reference in pairs
            if name not in failures
        ],
        "versions": versions(),
    }
    calibration = None
    if probabilities:
        scored = [pair for pair in pairs if pair[0] not in failures]
        calibration = calibrate_pairs(
            scored, labelling, rules=rules, images=images, unlabelled=lacking, track=track
        )
    unpaired = tuple(name for name, _ in pairing.missing)
    extra = tuple(str(path) for path in pairing.extra)
    return Evaluation(rows, summary, made, failures, unpaired, extra, calibration, rounded)


def _refuse_missing(pairing: Pairing, predictions: Path, references: Path) -> None:
    if not pairing.missing:
        return
    names = first_few([name for name, _ in pairing.missing], MOST_MISSING)
    raise VolumeError(
        f"{predictions}: contains no prediction for {len(pairing.missing)} of "
        f"{len(pairing.missing) + len(pairing.pairs)} references in {references}: {names}; predict "
        f"them, or pass --missing skip (leave them out) or --missing empty (Dice 0)"
    )


def _check_units(rows: Sequence[CaseScores], references: Path) -> None:
    """Raise VolumeError if pictures are mixed with pictures of another unit, or with volumes."""
    unsized = next((row.case for row in rows if row.unit == "pixel"), None)
    sized = next((row.case for row in rows if row.unit != "pixel"), None)
    if unsized is not None and sized is not None:
        raise VolumeError(
            f"{references}: expected a pixel size for all pictures or for none, but {sized} has "
            f"one and {unsized} has none; set one for all by --pixel-size, or evaluate them in two "
            f"runs"
        )
    in_mm = next((row.case for row in rows if row.tolerance_pixels is None), None)
    in_pixels = next((row.case for row in rows if row.tolerance_pixels is not None), None)
    if in_mm is not None and in_pixels is not None:
        raise VolumeError(
            f"{references}: expected only pictures or only volumes, as their tolerances differ, "
            f"found the picture {in_pixels} and the volume {in_mm}; give one tolerance for all, "
            "such as --tolerance '1 mm'"
        )


def _unscored(row: CaseScores) -> CaseScores:
    """The row without scores, for a class that is not labelled in the case."""
    return replace(row, metrics=dict.fromkeys(row.metrics, float("nan")))


def score_pairs(
    pairs: Iterable[tuple[str, Path | None, Path]],
    labelling: Labelling | None,
    *,
    tolerance: Tolerance,
    rules: PictureRules = AS_IT_SAYS,
    images: Mapping[str, Path] = MappingProxyType({}),
    track: Track = untracked,
) -> tuple[list[CaseScores], dict[str, str]]:
    """Scores of every case and class or region.

    Args:
        pairs: name, prediction and reference of each case. If the prediction is None, an empty one
            is scored.
        labelling: the classes or regions. If None, all labels that occur in any file are scored.
        tolerance: the tolerance of the normalised surface Dice; one in pixels is a length of each
            case's own pixels.
        rules: how pictures are read.
        images: for the name of a case, the image on whose grid its DICOM structures are painted.
        track: reports the progress over cases.

    Returns:
        The scores, and the reason for each case that failed, by its name. A failure does not stop
        the other cases.
    """
    pairs = list(pairs)
    failures: dict[str, str] = {}
    tolerances: dict[str, tuple[float, float | None]] = {}
    for name, prediction, reference in pairs:
        with _failure_recorded(failures, name, prediction or reference):
            tolerances[name] = tolerance.of_case((prediction, reference), rules)
    if labelling is None:
        present: set[int] = set()
        readable = [pair for pair in pairs if pair[0] in tolerances]
        for name, prediction, reference in track(readable, "looking for labels", len(readable)):
            with _failure_recorded(failures, name, prediction or reference):
                own = rules.painting_on(images.get(name))
                present = _with_labels_of(prediction, reference, own, present)
        labelling = Labelling({f"label {number}": number for number in sorted(present - {0})})
    rows: list[CaseScores] = []
    for name, prediction, reference in track(pairs, "scoring", len(pairs)):
        if name not in failures:
            with _failure_recorded(failures, name, prediction or reference):
                tolerance_mm, pixels = tolerances[name]
                own = rules.painting_on(images.get(name))
                scored = _score_pair(name, prediction, reference, labelling, tolerance_mm, own)
                rows += [replace(row, tolerance_pixels=pixels) for row in scored]
    return rows, failures


@contextmanager
def _failure_recorded(failures: dict[str, str], name: str, path: Path) -> Iterator[None]:
    """Record an error of a case in `failures`, as one sentence that names its file."""
    try:
        yield
    except SegkitError as error:
        failures[name] = str(error)
    except OSError as error:
        failures[name] = f"{path}: {sentence_of(error)}"
    except Exception as error:
        # This is a bug of segkit, but the scores of the other cases must not be lost.
        logger.info("%s", path, exc_info=True)
        reason = " ".join(str(error).split())
        failures[name] = f"{path}: cannot be scored ({type(error).__name__}: {reason})"


def with_pixel_size(rules: PictureRules, pixel_size: str | Sequence[str] | None) -> PictureRules:
    """The rules, with another pixel size if one is given.

    Raises:
        VolumeError: if the pixel size is not a length.
    """
    if pixel_size is None:
        return rules
    sizes = [pixel_size] if isinstance(pixel_size, str) else list(pixel_size)
    try:
        pixel_mm, in_pixels = pixel_mm_of(sizes)
    except ValueError as error:
        raise VolumeError(f"pixel size: {error}") from None
    return replace(rules, pixel_mm=pixel_mm, in_pixels=in_pixels)


def _read_prediction(path: Path, rules: PictureRules) -> Volume:
    """A prediction's labels; those of a picture may be colours or numbers."""
    try:
        return read_labels(path, rules=rules)
    except VolumeError:
        if not (rules.colours and is_picture(path)):
            raise
        numbers = read_labels(path, rules=replace(rules, colours={}))
        if not np.isin(numbers.data, list({0, *rules.colours.values()})).all():
            raise
        return numbers


def _read_pair(
    prediction_path: Path | None, reference_path: Path, rules: PictureRules
) -> tuple[Volume, Volume]:
    reference = read_labels(reference_path, rules=rules)
    if prediction_path is None:
        return reference, reference
    prediction = _read_prediction(prediction_path, replace(rules, structures=None))
    reference = reference.sized_as(prediction)
    prediction = prediction.sized_as(reference).onto(
        reference.grid, what=f"{prediction_path}:", whose=str(reference_path)
    )
    return prediction, reference


def _with_labels_of(
    prediction: Path | None, reference: Path, rules: PictureRules, present: set[int]
) -> set[int]:
    """The labels in `present` and those of this case."""
    for volume in _read_pair(prediction, reference, rules):
        present = present | set(np.unique(volume.data).tolist())
    if len(present) > MOST_LABELS:
        raise VolumeError(
            f"{reference}: expected at most {MOST_LABELS} labels, found {len(present)} different "
            "numbers in this and other files; give segmentations, or list the labels with --labels"
        )
    return present


def _score_pair(
    case: str,
    prediction_path: Path | None,
    reference_path: Path,
    labelling: Labelling,
    tolerance_mm: float,
    rules: PictureRules,
) -> list[CaseScores]:
    """Scores of each class or region of one case. Raises VolumeError.

    Args:
        case: name of the case.
        prediction_path: the prediction; None for an empty one.
        reference_path: the reference.
        labelling: the classes or regions.
        tolerance_mm: tolerance of the normalised surface Dice.
        rules: how pictures are read.
    """
    prediction, reference = _read_pair(prediction_path, reference_path, rules)
    grid = reference.grid
    shape: tuple[int, ...] = grid.shape
    axes = 3
    if reference.is_flat:  # it has an area and no volume
        shape, axes = shape[:2], 2
    try:
        found, right = (
            (within(volume.data, labelling) if labelling.in_files else volume.data).reshape(shape)
            for volume in (prediction, reference)
        )
        ignored = found == labelling.ignore
        if prediction_path and labelling.ignore is not None and ignored.any():
            number = prediction.data.reshape(shape)[ignored][0]
            raise ValueError(
                f"expected a class for each voxel of a prediction, found {number}, which is "
                "ignored; replace it with the number of a class"
            )
        rows = score_case(
            found if prediction_path else np.zeros_like(right),
            right,
            {labelling.numbers[name]: name for name in labelling.members},
            grid.spacing[:axes],
            case=case,
            tolerance_mm=tolerance_mm,
            directions=grid.directions[:axes, :axes],
            regions={
                labelling.numbers[name]: numbers for name, numbers in labelling.members.items()
            },
            ignore=labelling.ignore,
            unit=reference.unit,
        )
    except ValueError as error:
        raise VolumeError(f"{prediction_path or reference_path}: {error}") from None
    return [replace(row, label=labelling.in_file(row.label)) for row in rows]
