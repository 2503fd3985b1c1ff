"""Scores as a table for the terminal."""

from dataclasses import replace

from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text

from segkit.errors import counted
from segkit.evaluation.scores import METRICS, Metric, Statistic, Summary, _is_length, statistic_in
from segkit.evaluation.tolerance import tolerance_in_words
from segkit.io.picture_rules import WORD_OF, Unit


def metric_in(metric: Metric, name: str, unit: Unit) -> Metric:
    """A metric with the heading and number format for lengths in this unit."""
    if not _is_length(name):
        return metric
    heading = metric.heading.replace("mm", WORD_OF[unit])
    return replace(metric, heading=heading, form=".3g" if unit == "µm" else metric.form)


def to_table(summary: Summary) -> Table:
    """The summary as a table for the terminal: a section for each class, the overall last."""
    tolerance = tolerance_in_words(summary.tolerance_mm, summary.tolerance_pixels, summary.unit)
    table = Table(
        box=HORIZONTALS,
        pad_edge=False,
        title=counted(summary.num_cases, "case"),
        caption=(
            "95 %: bootstrap interval of the mean over cases. "
            f"NSD: within {tolerance}. "
            "Undefined: the class is in neither image, or not labelled in the case; left out. "
            "Overall: mean over classes."
        ),
    )
    table.add_column("class", overflow="fold")
    table.add_column("metric", no_wrap=True)
    for heading in ("mean", "95 %", "median", "scored", "undefined"):
        table.add_column(heading, justify="right", no_wrap=True)
    for of_class in (*summary.classes, summary.overall):
        lines = [
            _line(
                metric_in(metric, key, summary.unit),
                statistic_in(key, of_class.metrics[key], summary.unit),
            )
            for key, metric in METRICS.items()
        ]
        columns = ["\n".join(cells) for cells in zip(*lines, strict=True)]
        # Text, because Rich would read a name such as [left] as markup.
        table.add_row(Text(of_class.name), *columns, end_section=True)
    return table


def _line(metric: Metric, value: Statistic) -> tuple[str, ...]:
    counts = str(value.num_scored), str(value.num_undefined)
    if value.num_scored == 0:
        return metric.heading, "-", "-", "-", *counts
    mean, low, high, median = (
        f"{number:{metric.form}}" for number in (value.mean, value.low, value.high, value.median)
    )
    return metric.heading, mean, f"{low} to {high}", median, *counts
