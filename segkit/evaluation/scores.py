"""Scores of every case and class, their summary over cases, and its table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isclose, isfinite
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float64, Shaped

from segkit.evaluation.overlap import Overlap
from segkit.evaluation.surface import (
    SurfaceDistances,
    average_symmetric_surface_distance,
    hausdorff95,
    normalised_surface_dice,
    surface_distances,
)
from segkit.geometry.grid import ml_of_voxel
from segkit.io.picture_rules import MM_OF, Unit

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | None"


@dataclass(frozen=True, eq=False)
class ClassPair:
    """Overlap and surface distances of one class, which all metrics are computed from."""

    overlap: Overlap
    distances: SurfaceDistances
    tolerance_mm: float


@dataclass(frozen=True)
class Metric:
    """A metric: its heading in tables, its number format, and its function."""

    heading: str
    form: str
    of: Callable[[ClassPair], float]
    """The function that computes the score; NaN if it is undefined."""


METRICS: Mapping[str, Metric] = {
    "dice": Metric("Dice", ".3f", lambda pair: pair.overlap.dice.item()),
    "iou": Metric("IoU", ".3f", lambda pair: pair.overlap.iou.item()),
    "hd95_mm": Metric("HD95 (mm)", ".2f", lambda pair: hausdorff95(pair.distances)),
    "assd_mm": Metric(
        "ASSD (mm)", ".2f", lambda pair: average_symmetric_surface_distance(pair.distances)
    ),
    "nsd": Metric(
        "NSD", ".3f", lambda pair: normalised_surface_dice(pair.distances, pair.tolerance_mm)
    ),
}
"""The metrics by their names in JSON, in the order of tables. A new metric is one more entry."""
ENDING_OF: Mapping[Unit, str] = {"mm": "_mm", "µm": "_um", "pixel": "_px"}
"""The ending of names of lengths in JSON, by their unit."""


@dataclass(frozen=True)
class CaseScores:
    """Scores of one class in one case. tp, fp and fn count voxels."""

    case: str
    label: int
    name: str
    metrics: Mapping[str, float]
    """The score of each of `METRICS`; NaN if the class is in neither image. Lengths are in mm. In
    pictures of unknown scale, one pixel counts as 1 mm."""
    tolerance_mm: float
    prediction_ml: float
    """Volume; NaN in a 2D image."""
    reference_ml: float
    """Volume; NaN in a 2D image."""
    tp: int
    fp: int
    fn: int
    unit: Unit = "mm"
    """The unit of lengths in tables and JSON."""
    tolerance_pixels: float | None = None
    """The tolerance in pixels of the case; None if it is a length that all cases share."""

    def to_json(self) -> Json:
        """The scores as one flat dict, with lengths in `unit`; NaN becomes None."""
        fields = {key: value for key, value in vars(self).items() if key != "metrics"}
        if self.tolerance_pixels is None:
            del fields["tolerance_pixels"]
        return _without_nan(_in_unit({**fields, **self.metrics}, self.unit))


@dataclass(frozen=True)
class Statistic:
    """Mean, median and 95 % interval of the mean, over the cases in which a score is defined."""

    mean: float
    median: float
    low: float
    high: float
    num_scored: int
    num_undefined: int


@dataclass(frozen=True)
class ClassSummary:
    """The statistic of each of `METRICS` for one class, or overall (`label` is None)."""

    label: int | None
    name: str
    metrics: Mapping[str, Statistic]


@dataclass(frozen=True)
class Summary:
    """Statistics of each class and overall, and the settings behind them."""

    classes: tuple[ClassSummary, ...]
    overall: ClassSummary
    num_cases: int
    tolerance_mm: float | None
    """None if the tolerance is in pixels whose size differs between cases."""
    num_resamples: int
    seed: int
    unit: Unit = "mm"
    """The unit of lengths in tables and JSON."""
    tolerance_pixels: float | None = None
    """The tolerance in pixels of each case; None if it is a length that all cases share."""


def score_case(
    prediction: Shaped[np.ndarray, "*space"],
    reference: Shaped[np.ndarray, "..."],
    labels: Mapping[int, str],
    spacing: Sequence[float],
    *,
    case: str,
    tolerance_mm: float = 1.0,
    directions: Float64[np.ndarray, "axis world"] | None = None,
    regions: Mapping[int, Sequence[int]] = MappingProxyType({}),
    ignore: int | None = None,
    unit: Unit = "mm",
) -> list[CaseScores]:
    """Scores of each class of one case, sorted by label.

    Args:
        prediction: label map in 2D or 3D. 0 is background, which is not scored.
        reference: label map of the same shape.
        labels: name of each label.
        spacing: voxel size in mm along each axis.
        case: name of the case.
        tolerance_mm: tolerance of the normalised surface Dice.
        directions: unit vectors along the axes; if None, the axes are at right angles.
        regions: for labels that are regions, the values that belong to them.
        ignore: reference value of voxels that count as background in both images.
        unit: unit of lengths in tables and JSON.

    Raises:
        ValueError: if an image contains a value that is not listed. Otherwise a whole structure
            could be left out unnoticed.
    """
    members = {label: regions.get(label, (label,)) for label in sorted(labels) if label != 0}
    known = {0, *labels, *(value for values in members.values() for value in values)}
    _check_listed(prediction, known, "prediction")
    _check_listed(reference, known if ignore is None else {*known, ignore}, "reference")
    counted = np.True_ if ignore is None else reference != ignore
    return [
        _score_class(
            _within(prediction, values) & counted,
            _within(reference, values) & counted,
            spacing,
            directions,
            case=case,
            label=label,
            name=labels[label],
            tolerance_mm=tolerance_mm,
            unit=unit,
        )
        for label, values in members.items()
    ]


def _within(volume: Shaped[np.ndarray, "*space"], values: Sequence[int]) -> np.ndarray:
    return volume == values[0] if len(values) == 1 else np.isin(volume, values)


def _check_listed(volume: Shaped[np.ndarray, "*space"], labels: set[int], role: str) -> None:
    listed = np.isin(volume, sorted(labels))
    if listed.all():
        return
    found = ", ".join(str(value) for value in np.unique(volume[~listed])[:5].tolist())
    raise ValueError(
        f"expected the labels 0, {', '.join(map(str, sorted(labels - {0})))}, got {found} in "
        f"the {role}; add it to the labels or correct the file"
    )


def _score_class(
    prediction_mask: Bool[np.ndarray, "*space"],
    reference_mask: Bool[np.ndarray, "..."],
    spacing: Sequence[float],
    directions: Float64[np.ndarray, "axis world"] | None,
    *,
    case: str,
    label: int,
    name: str,
    tolerance_mm: float,
    unit: Unit,
) -> CaseScores:
    """Scores of one class, from its masks. The arguments are those of `score_case`."""
    distances = surface_distances(prediction_mask, reference_mask, spacing, directions)
    tp = int(np.count_nonzero(prediction_mask & reference_mask))
    fp = int(np.count_nonzero(prediction_mask)) - tp
    fn = int(np.count_nonzero(reference_mask)) - tp
    overlap = Overlap(torch.tensor(tp), torch.tensor(fp), torch.tensor(fn))
    voxel_ml = ml_of_voxel(spacing, directions) if len(spacing) == 3 else float("nan")
    pair = ClassPair(overlap, distances, tolerance_mm)
    metrics = {key: metric.of(pair) for key, metric in METRICS.items()}
    volumes = ((tp + fp) * voxel_ml, (tp + fn) * voxel_ml)
    return CaseScores(case, label, name, metrics, tolerance_mm, *volumes, tp, fp, fn, unit)


def summarise(rows: Sequence[CaseScores], *, num_resamples: int = 2000, seed: int = 0) -> Summary:
    """Mean, median and bootstrap interval of each metric, for each class and overall.

    The overall mean is the mean over classes of the class means, and the overall median is the mean
    of the class medians. All classes therefore have the same weight, however often their scores are
    defined. Undefined scores are left out and counted. The order of the rows does not matter.

    The interval is the percentile bootstrap of Efron (1979, doi:10.1214/aos/1176344552): the middle
    95 % of the means of resamples, drawn with replacement from the cases in which the score is
    defined. For the overall interval, whole cases are drawn, because the classes of a case belong
    together. If a resample does not contain a class, the class is left out of its mean. Every
    statistic uses the same seed, so its interval depends only on its scores.

    Args:
        rows: one for each class and case.
        num_resamples: number of bootstrap resamples.
        seed: seed of the resamples.

    Raises:
        ValueError: if a row is missing or double, or tolerances or units differ.
    """
    classes = sorted({(row.label, row.name) for row in rows})
    num_cases = len({row.case for row in rows})
    num_distinct = len({(row.label, row.name, row.case) for row in rows})
    if not num_distinct == len(rows) == len(classes) * num_cases > 0:
        raise ValueError(
            f"expected one row for each of {len(classes)} classes in each of {num_cases} cases, "
            f"got {len(rows)}; score every case once, with its own name and the same labels"
        )
    tolerances = sorted({row.tolerance_mm for row in rows})
    in_pixels = {row.tolerance_pixels for row in rows}
    if len(in_pixels) > 1 or (len(tolerances) > 1 and None in in_pixels):
        raise ValueError(
            f"expected scores with one tolerance, got {tolerances} mm; score all cases with the "
            f"same tolerance"
        )
    units = {row.unit for row in rows}
    if "pixel" in units and len(units) > 1:
        raise ValueError(
            "expected all cases measured in pixels or all in mm, got both; set one pixel size for "
            "all"
        )
    ordered = sorted(rows, key=lambda row: (row.label, row.case))
    scores = {
        key: np.array([float(row.metrics[key]) for row in ordered]).reshape(-1, num_cases)
        for key in METRICS
    }

    def summary_of(label: int | None, name: str, of_classes: slice) -> ClassSummary:
        statistics = {
            metric: statistic_of(values[of_classes], num_resamples, seed)
            for metric, values in scores.items()
        }
        return ClassSummary(label, name, statistics)

    return Summary(
        classes=tuple(
            summary_of(label, name, slice(row, row + 1))
            for row, (label, name) in enumerate(classes)
        ),
        overall=summary_of(None, "overall", slice(None)),
        num_cases=num_cases,
        tolerance_mm=tolerances[0] if isclose(tolerances[0], tolerances[-1]) else None,
        num_resamples=num_resamples,
        seed=seed,
        unit=rows[0].unit,
        tolerance_pixels=in_pixels.pop(),
    )


def statistic_of(
    scores: Float64[np.ndarray, "num_classes num_cases"],
    num_resamples: int = 2000,
    seed: int = 0,
) -> Statistic:
    """Mean, median and bootstrap interval of one metric, as `summarise` computes them.

    Args:
        scores: the score of each class in each case; NaN if it is undefined.
        num_resamples: number of bootstrap resamples.
        seed: seed of the resamples.
    """
    defined = [of_class[~np.isnan(of_class)] for of_class in scores]
    defined = [of_class for of_class in defined if len(of_class)]
    num_scored = sum(len(of_class) for of_class in defined)
    if num_scored == 0:
        nan = float("nan")
        return Statistic(nan, nan, nan, nan, num_scored=0, num_undefined=scores.size)
    low, high = np.percentile(_resampled_means(scores, num_resamples, seed), [2.5, 97.5])
    return Statistic(
        mean=float(np.mean([of_class.mean() for of_class in defined])),
        median=float(np.mean([np.median(of_class) for of_class in defined])),
        low=float(low),
        high=float(high),
        num_scored=num_scored,
        num_undefined=scores.size - num_scored,
    )


def _resampled_means(
    scores: Float64[np.ndarray, "num_classes num_cases"], num_resamples: int, seed: int
) -> Float64[np.ndarray, "num_resamples"]:
    """Mean over classes of the class means, in each resample of the cases that have a score."""
    scores = scores[:, ~np.isnan(scores).all(axis=0)]
    num_cases = scores.shape[1]
    drawn = np.random.default_rng(seed).integers(num_cases, size=(num_resamples, num_cases))
    # Row r counts how often resample r drew each case; one bincount serves all rows.
    ranges = num_cases * np.arange(num_resamples)[:, None]
    weights = np.bincount((drawn + ranges).ravel(), minlength=num_resamples * num_cases)
    weights = weights.reshape(num_resamples, num_cases)
    totals = weights @ np.nan_to_num(scores).T
    counts = weights @ (~np.isnan(scores)).T.astype(np.int64)
    class_means = np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)
    return np.asarray(np.nanmean(class_means, axis=1))


def to_json(rows: Sequence[CaseScores], summary: Summary) -> dict[str, Json]:
    """Scores and summary as plain dicts, lists and numbers for JSON; NaN becomes None."""
    in_mm, in_pixels = summary.tolerance_mm, summary.tolerance_pixels
    return {
        "num_cases": summary.num_cases,
        "unit": summary.unit,
        **({} if in_mm is None else _in_unit({"tolerance_mm": in_mm}, summary.unit)),
        **({} if in_pixels is None else {"tolerance_pixels": in_pixels}),
        "bootstrap": {
            "interval": 0.95,
            "num_resamples": summary.num_resamples,
            "seed": summary.seed,
        },
        "overall": _class_json(summary.overall, summary.unit),
        "classes": [_class_json(of_class, summary.unit) for of_class in summary.classes],
        "cases": [row.to_json() for row in rows],
    }


def _class_json(of_class: ClassSummary, unit: Unit) -> Json:
    statistics = {
        score_name(metric, unit): _without_nan(asdict(statistic_in(metric, value, unit)))
        for metric, value in of_class.metrics.items()
    }
    return {"label": of_class.label, "name": of_class.name, **statistics}


def _is_length(name: str) -> bool:
    return name.endswith("_mm")


def score_name(name: str, unit: Unit) -> str:
    """The name of a score in JSON; that of a length ends in its unit, as `hd95_um` does."""
    return name.removesuffix("_mm") + ENDING_OF[unit] if _is_length(name) else name


def _in_unit(fields: Mapping[str, Any], unit: Unit) -> dict[str, Any]:
    """The fields with lengths converted from mm to another unit, and named after it."""
    return {
        score_name(name, unit): value / MM_OF[unit] if _is_length(name) else value
        for name, value in fields.items()
    }


def statistic_in(name: str, value: Statistic, unit: Unit) -> Statistic:
    """A statistic of a metric, converted to this unit if it is a length."""
    if not _is_length(name):
        return value
    lengths = (value.mean, value.median, value.low, value.high)
    mean, median, low, high = (length / MM_OF[unit] for length in lengths)
    return replace(value, mean=mean, median=median, low=low, high=high)


def _without_nan(fields: Mapping[str, str | int | float]) -> Json:
    return {
        name: None if isinstance(value, float) and not isfinite(value) else value
        for name, value in fields.items()
    }
