"""`segkit compare`: compare two models, or two cross-validations, on the same cases."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isclose, isnan
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Integer
from numpy import ndarray
from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text
from scipy.stats import permutation_test

from segkit.errors import ConfigError, DatasetError, counted, first_few
from segkit.evaluation.score_table import metric_in
from segkit.evaluation.scores import ENDING_OF, METRICS, score_name
from segkit.evaluation.scores_of_cases import CaseTable, ScoresOfCases, scores_of_cases
from segkit.io.atomic import without_nan
from segkit.io.picture_rules import MM_OF, Unit
from segkit.io.tables import read_csv

SMALLER_IS_BETTER = ("hd95_mm", "assd_mm")
MOST_SIGNS = 1 << 14
"""The test tries all sign patterns if there are at most this many, else this many at random."""


@dataclass(frozen=True)
class Difference:
    """The difference of a metric between A and B for one class, over cases with both scores."""

    name: str
    """Name of the class; `overall` is the mean over the classes of each case."""
    metric: str
    """Name of the metric; lengths end in their unit, such as `hd95_um`."""
    cases: int
    """Number of cases in which both scores are defined."""
    only_a: int
    """Number of cases in which only A has a score. The reference is then empty: A predicted the
    class and B correctly did not. (Dice of a class in neither image is undefined.)"""
    only_b: int
    """Number of cases in which only B has a score."""
    mean_a: float
    mean_b: float
    difference: float
    """Mean over cases of B - A; NaN if there is no case."""
    low: float
    high: float
    """95 % bootstrap interval of this mean."""
    p: float
    """P value of a two-sided test that exchanges the signs of the differences."""
    p_holm: float
    """The p value corrected for the number of classes (Holm 1979)."""
    better: int
    """Number of cases in which B is better."""
    worse: int
    """Number of cases in which B is worse."""


@dataclass(frozen=True)
class Comparison:
    """Differences between A and B for each class and metric.

    Example:
        comparison = segkit.compare("a.json", "b.json")
        [(row.name, row.difference) for row in comparison.differences]
    """

    differences: tuple[Difference, ...]
    a: str
    b: str
    num_cases: int
    """Number of cases that have scores in both."""
    only_in_a: tuple[str, ...]
    """Cases that have scores only in A. They are left out."""
    only_in_b: tuple[str, ...]
    """Cases that have scores only in B. They are left out."""
    num_resamples: int
    seed: int
    unit: Unit = "mm"
    """Unit of lengths: that of the scores of A."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers; NaN becomes None."""
        fields = asdict(self)
        differences = fields.pop("differences")
        content: dict[str, Any] = without_nan({**fields, "differences": differences})
        return content


def compare(
    a: str | Path,
    b: str | Path,
    *,
    metrics: Sequence[str] = ("dice",),
    strata: Mapping[str, str] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare the scores of B with those of A in a paired test over cases.

    The differences are taken within each case, so that hard and easy cases do not add noise. The
    interval is the percentile bootstrap over cases (Efron 1979). The test exchanges the signs of
    the differences (Fisher 1935, section 21) and assumes no distribution; it tries all sign
    patterns if there are few. With fewer than six cases, p is never below 0.05. `p_holm` is p
    corrected for the number of classes (Holm 1979).

    Args:
        a: scores written by `segkit evaluate --out`, or the folder of a run or cross-validation,
            which contains the Dice of its held-out cases.
        b: the scores to compare with A, in either form.
        metrics: dice, iou, hd95_mm, assd_mm or nsd. Lengths of pictures are given in the unit of
            A's scores, as `hd95_um` or `hd95_px`; each of these names may be asked for.
        strata: the group of each case, such as its hospital. Each bootstrap resample has as many
            cases of each group as the data.
        num_resamples: number of bootstrap resamples.
        seed: seed of all random numbers.

    Returns:
        A difference for each class and metric, and for the mean over classes.

    Raises:
        ConfigError: if a file has no scores, no case is in both, the classes differ, a metric is
            unknown or has no scores, a case has no stratum, a length is compared and only one of
            the two has lengths in pixels, or nsd is compared and the tolerances of a case differ;
            or if there is no metric or no resample, or the seed is negative.

    Example:
        comparison = segkit.compare("scores_of_a.json", "scores_of_b.json", metrics=["dice", "nsd"])
        comparison.differences[-1].difference
    """
    _check_settings(metrics, num_resamples, seed)
    metrics = [_in_mm(metric) for metric in metrics]
    for metric in metrics:
        if metric not in METRICS:
            raise ConfigError(f"unknown metric {metric!r}; choose from {', '.join(METRICS)}")
    table_of_a, table_of_b = scores_of_cases(Path(a)), scores_of_cases(Path(b))
    first, unit = table_of_a.scores, table_of_a.unit
    second, other_unit = table_of_b.scores, table_of_b.unit
    lengths = [metric for metric in metrics if score_name(metric, "pixel") != metric]
    if lengths and (unit == "pixel") != (other_unit == "pixel"):
        raise ConfigError(
            f"{a} has lengths in {unit}, {b} in {other_unit}; evaluate both with the same "
            "--pixel-size, or compare metrics that are not lengths"
        )
    names = sorted(first.keys() & second.keys())
    if not names:
        raise ConfigError(
            f"{a} and {b} have no case in common: A has {first_few(sorted(first), 3)}, B has "
            f"{first_few(sorted(second), 3)}; evaluate both on the same cases"
        )
    if "nsd" in metrics:
        _check_tolerances(names, table_of_a, table_of_b, a, b)
    groups = _groups(names, strata)
    classes = _classes(first, second, names, a, b)
    differences = []
    for metric in metrics:
        table_a, table_b = (_table(scores, names, classes, metric) for scores in (first, second))
        if np.isnan(table_a).all() or np.isnan(table_b).all():
            without = a if np.isnan(table_a).all() else b
            raise ConfigError(
                f"{without}: has no scores of {metric}; write them with segkit evaluate --out FILE"
            )
        smaller = metric in SMALLER_IS_BETTER
        shown = score_name(metric, unit)
        if metric in lengths:
            table_a, table_b = table_a / MM_OF[unit], table_b / MM_OF[unit]
        columns = [*table_a.T, _mean_over(table_a)], [*table_b.T, _mean_over(table_b)]
        rows = [
            _difference(name, shown, one, other, groups, smaller, num_resamples, seed)
            for name, one, other in zip([*classes, "overall"], *columns, strict=True)
        ]
        corrected = holm([row.p for row in rows[:-1]])
        differences += [
            Difference(**{**asdict(row), "p_holm": p})
            for row, p in zip(rows, [*corrected, rows[-1].p], strict=True)
        ]
    return Comparison(
        differences=tuple(differences),
        a=str(a),
        b=str(b),
        num_cases=len(names),
        only_in_a=tuple(sorted(first.keys() - second.keys())),
        only_in_b=tuple(sorted(second.keys() - first.keys())),
        num_resamples=num_resamples,
        seed=seed,
        unit=unit,
    )


def _check_settings(metrics: Sequence[str], num_resamples: int, seed: int) -> None:
    if not metrics:
        raise ConfigError(f"expected a metric, found none; choose from {', '.join(METRICS)}")
    if num_resamples < 1:
        raise ConfigError(f"num_resamples: expected at least 1, found {num_resamples}; raise it")
    if seed < 0:
        raise ConfigError(f"seed: expected 0 or a larger number, found {seed}; choose another")


def _check_tolerances(
    names: Sequence[str], first: CaseTable, second: CaseTable, a: str | Path, b: str | Path
) -> None:
    """Raise ConfigError if the NSD of a case was computed with different tolerances."""
    for name in names:
        one, other = first.tolerances.get(name), second.tolerances.get(name)
        if one is not None and other is not None and not _same_length(one, other, first, second):
            shown = [
                f"{length / MM_OF[each.unit]:g} {each.unit}"
                for length, each in ((one, first), (other, second))
            ]
            raise ConfigError(
                f"{name}: {a} has the NSD within {shown[0]}, {b} within {shown[1]}; evaluate both "
                "with the same --tolerance, or leave out nsd"
            )


def _same_length(one: float, other: float, first: CaseTable, second: CaseTable) -> bool:
    in_pixels = [each.unit == "pixel" for each in (first, second)]
    return in_pixels[0] == in_pixels[1] and isclose(one, other, rel_tol=1e-6)


def _in_mm(metric: str) -> str:
    """The name in `METRICS` of a metric whose name may end in another unit of length."""
    known = {score_name(name, unit): name for name in METRICS for unit in ENDING_OF}
    return known.get(metric, metric)


def read_strata(path: Path, column: str) -> dict[str, str]:
    """The group of each case, from a CSV file.

    Args:
        path: the file. It has a heading line and a column `case`.
        column: heading of the column with the groups.

    Raises:
        ConfigError: if a column is missing or a case has two lines.
    """
    try:
        rows, columns = read_csv(path)
    except DatasetError as error:
        raise ConfigError(str(error)) from None
    for needed in ("case", column):
        if not rows or needed not in columns:
            raise ConfigError(
                f"{path}: has no column {needed!r}; its first line must name the columns"
            )
    found = {row["case"]: row[column] for row in rows}
    if len(found) != len(rows):
        raise ConfigError(f"{path}: has several lines for a case; give each case one line")
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for multiple testing (Holm 1979).

    The smallest of n values is multiplied by n, the next by n - 1, and so on. No result is smaller
    than that of a smaller p. NaN stays NaN and does not count.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if not isnan(p))
    corrected, highest = [float("nan")] * len(p_values), 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        corrected[index] = highest
    return corrected


def _groups(names: Sequence[str], strata: Mapping[str, str] | None) -> Integer[ndarray, " cases"]:
    """The group of each case, as a number."""
    if strata is None:
        return np.zeros(len(names), dtype=np.int64)
    if missing := [name for name in names if name not in strata]:
        raise ConfigError(
            f"expected a stratum for each case, found none for {first_few(missing, 3)}; add it to "
            "the table"
        )
    return np.unique([strata[name] for name in names], return_inverse=True)[1]


def _classes(
    first: ScoresOfCases, second: ScoresOfCases, names: Sequence[str], a: str | Path, b: str | Path
) -> list[str]:
    """The classes, in their order in A."""
    of_a = list(dict.fromkeys(name for case in names for name in first[case]))
    of_b = list(dict.fromkeys(name for case in names for name in second[case]))
    if set(of_a) != set(of_b):
        raise ConfigError(
            f"{a} has scores of {first_few(of_a)}, but {b} has scores of {first_few(of_b)}; "
            "compare scores of the same classes"
        )
    return of_a


def _table(
    scores: ScoresOfCases, names: Sequence[str], classes: Sequence[str], metric: str
) -> Float64[ndarray, "cases classes"]:
    """The scores of a metric as an array (case, class); NaN if a score is missing."""
    nan: Mapping[str, float] = {}
    return np.array(
        [[scores[case].get(name, nan).get(metric, np.nan) for name in classes] for case in names]
    )


def _mean_over(table: Float64[ndarray, "cases classes"]) -> Float64[ndarray, " cases"]:
    """The mean score of each case, over the classes with a score."""
    counted = (~np.isnan(table)).sum(1)
    return np.divide(
        np.nansum(table, 1), counted, out=np.full(len(table), np.nan), where=counted > 0
    )


def _difference(
    name: str,
    metric: str,
    one: Float64[ndarray, " cases"],
    other: Float64[ndarray, " cases"],
    groups: Integer[ndarray, " cases"],
    smaller_is_better: bool,
    num_resamples: int,
    seed: int,
) -> Difference:
    """The difference of a metric for one class; `p_holm` is still NaN.

    Args:
        name: name of the class.
        metric: name of the metric.
        one, other: score of each case in A and in B; NaN if it is undefined.
        groups: the stratum of each case, as a number.
        smaller_is_better: whether a smaller score is better.
        num_resamples: number of bootstrap resamples.
        seed: seed of all random numbers.
    """
    defined_a, defined_b = ~np.isnan(one), ~np.isnan(other)
    both = defined_a & defined_b
    change = (other - one)[both]
    gained = -change if smaller_is_better else change
    low, high = _interval(change, groups[both], num_resamples, seed)
    nan = float("nan")
    return Difference(
        name=name,
        metric=metric,
        cases=int(both.sum()),
        only_a=int((defined_a & ~defined_b).sum()),
        only_b=int((defined_b & ~defined_a).sum()),
        mean_a=float(one[both].mean()) if both.any() else nan,
        mean_b=float(other[both].mean()) if both.any() else nan,
        difference=float(change.mean()) if both.any() else nan,
        low=low,
        high=high,
        p=_p_value(change, seed),
        p_holm=nan,
        better=int((gained > 0).sum()),
        worse=int((gained < 0).sum()),
    )


def _interval(
    change: Float64[ndarray, " cases"],
    groups: Integer[ndarray, " cases"],
    num_resamples: int,
    seed: int,
) -> tuple[float, float]:
    """The middle 95 % of the means of bootstrap resamples, drawn within each group.

    Args:
        change: the difference of each case.
        groups: the stratum of each case, as a number.
        num_resamples: number of resamples.
        seed: seed of the resamples.
    """
    if not len(change):
        return float("nan"), float("nan")
    random = np.random.default_rng(seed)
    totals = np.zeros(num_resamples)
    for group in np.unique(groups):
        inside = change[groups == group]
        totals += inside[random.integers(len(inside), size=(num_resamples, len(inside)))].sum(1)
    low, high = np.percentile(totals / len(change), [2.5, 97.5])
    return float(low), float(high)


def _p_value(change: Float64[ndarray, " cases"], seed: int) -> float:
    """Probability of a mean at least this far from 0 if the signs are random; NaN without cases."""
    if not len(change):
        return float("nan")
    if not change.any():
        return 1.0
    if len(change) == 1:
        return 1.0
    result = permutation_test(
        (change,),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=MOST_SIGNS,
        random_state=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def to_comparison_table(comparison: Comparison) -> Table:
    """The differences as a table for the terminal."""
    table = Table(
        box=HORIZONTALS,
        pad_edge=False,
        title=f"B compared with A, {counted(comparison.num_cases, 'case')}",
        caption=(
            "B - A: mean over cases. 95 %: bootstrap interval. p: sign permutation test, corrected "
            "for the number of classes (Holm). Cases in which only one has a score are left out."
        ),
    )
    table.add_column("class", overflow="fold")
    for heading in ("A", "B", "B - A", "95 %", "p", "B better"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = ""
    for each in comparison.differences:
        if each.metric != shown:
            shown = each.metric
            table.add_section()
            metric = metric_in(METRICS[_in_mm(shown)], _in_mm(shown), comparison.unit)
            table.add_row(Text(metric.heading, style="bold"))
        form = metric.form
        mean_a, mean_b = (
            "-" if isnan(value) else f"{value:{form}}" for value in (each.mean_a, each.mean_b)
        )
        defined = each.cases > 0
        table.add_row(
            Text(each.name),
            mean_a,
            mean_b,
            f"{each.difference:+{form}}" if defined else "-",
            f"{each.low:+{form}} to {each.high:+{form}}" if defined else "-",
            f"{each.p_holm:.3f}" if defined else "-",
            f"{each.better} of {each.cases}",
        )
    return table
