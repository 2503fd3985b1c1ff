"""Measures as rows for CSV files, and as tables, plots and layers of a page."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from segkit.explain.display import Bar, Bars, Table, rounded
from segkit.explain.measures.fuse import scalar
from segkit.explain.measures.measure_maps import Measure
from segkit.explain.page.page import Layer
from segkit.inference.attention_maps import AttentionMap
from segkit.io.volume import Volume

LOCALISATION = ("energy", "enrichment", "pointing", "auroc", "iou")
DISTRIBUTION = ("entropy", "saturated_low", "saturated_high", "disagreement", "disagreement_p95")
TITLES = {
    "energy": "energy inside",
    "enrichment": "enrichment",
    "pointing": "pointing",
    "auroc": "AUROC",
    "iou": "IoU",
    "entropy": "entropy",
    "saturated_low": "at the low end",
    "saturated_high": "at the high end",
    "disagreement": "disagreement",
    "disagreement_p95": "disagreement, 95th percentile",
}
PAGE_COLUMNS = [
    (name, part)
    for name in LOCALISATION
    for part in ("value", "chance")
    if part == "value" or name in ("energy", "pointing", "iou")
]
"""Columns of a structure's table: measures, with chance if it differs between maps."""
QUANTITIES = {
    "gate": "share let through",
    "spatial": "share let through",
    "received": "attention received, 1 is the average",
    "pool": "share of the mean",
    "attribution": "part in the structure's output",
}
LOW = "↓"
"""Marks a map whose low values show a structure."""
Grouped = dict[tuple[str, str, str], dict[str, Measure]]


def measure_rows(
    case: str, measures: Sequence[Measure], dice: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each map, baseline and structure, with each measure and its value by chance.

    Rows without a map contain the Dice of the segmentation. All rows have the same columns; values
    that do not apply are empty.

    Args:
        case: name of the scan.
        measures: the measures of the scan's maps.
        dice: the Dice of each structure with the reference.
    """
    columns = ["case", "map", "of", "structure", "dice"]
    for one in measures:
        columns += [one.name] if one.chance is None else [one.name, f"{one.name}_chance"]
    blank = {**dict.fromkeys(columns, ""), "case": case}
    rows: list[dict[str, Any]] = [
        {**blank, "of": "segmentation", "structure": structure, "dice": value}
        for structure, value in dice.items()
    ]
    for (key, of, structure), figures in by_row(measures).items():
        row: dict[str, Any] = {**blank, "map": key, "of": of, "structure": structure}
        for name, figure in figures.items():
            row[name] = figure.value
            if figure.chance is not None:
                row[f"{name}_chance"] = figure.chance
        rows.append(row)
    return [
        {column: "" if value != value else value for column, value in row.items()} for row in rows
    ]


def rows_as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """The text of a CSV file with all columns of the rows, in the order of first appearance."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def by_row(measures: Iterable[Measure]) -> Grouped:
    """Measures by name, grouped by map, 'map' or baseline, and structure."""
    grouped: Grouped = {}
    for one in measures:
        grouped.setdefault((one.map, one.of, one.structure), {})[one.name] = one
    return grouped


def map_layers(maps: Mapping[str, AttentionMap]) -> list[Layer]:
    """A layer for each map with a spatial grid. A map with several channels shows their mean."""
    layers = []
    for key, one in maps.items():
        if one.volume is None:
            continue
        values, info = scalar(one.volume), one.info
        layers.append(
            Layer(
                key,
                "map",
                values.data,
                values.grid,
                low=info.lowest if math.isfinite(info.lowest) else None,
                high=info.highest if math.isfinite(info.highest) else None,
                quantity=QUANTITIES.get(info.kind, info.kind),
            )
        )
    return layers


def measure_tables(
    measures: Sequence[Measure], dice: Mapping[str, float], *, against: str, tolerance: str
) -> list[Table]:
    """The tables of measures on a page.

    Args:
        measures: the measures of the scan's maps.
        dice: the Dice of each structure with the reference.
        against: the labels that maps are compared with: 'reference' or 'prediction'.
        tolerance: the tolerance of pointing, such as "5 mm".
    """
    grouped = by_row(measures)
    tables = []
    if dice:
        tables.append(
            Table(
                "The segmentation",
                ["structure", "Dice"],
                [[structure, rounded(value)] for structure, value in dice.items()],
            )
        )
    for structure in dict.fromkeys(structure for _, _, structure in grouped if structure):
        rows = [
            [key, of, *(rounded(getattr(figures[name], part)) for name, part in PAGE_COLUMNS)]
            for (key, of, place), figures in grouped.items()
            if place == structure
        ]
        tables.append(
            Table(
                f"Localisation: {structure}",
                [
                    *("map", "values of"),
                    *(
                        TITLES[name] if part == "value" else "by chance"
                        for name, part in PAGE_COLUMNS
                    ),
                ],
                rows,
                note=f"Compared with the {against}, on each map's own grid; a cell is inside if at "
                f"least half of it is. By chance, enrichment is 1 and AUROC 0.5. Pointing allows "
                f"{tolerance}. Rows of intensity and gradient are baselines on the same "
                "cells: a map that is no better adds nothing to them. An AUROC near 0 is as "
                "informative as one near 1; low values then show the structure.",
            )
        )
    if whole := _whole_table(grouped):
        tables.append(whole)
    return tables


def _whole_table(grouped: Grouped) -> Table | None:
    rows = {key: figures for (key, _, structure), figures in grouped.items() if not structure}
    if not rows:
        return None
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    return Table(
        "Distribution of the maps' values",
        ["map", *(_title(name) for name in names)],
        [
            [key, *(rounded(figures[name].value if name in figures else None) for name in names)]
            for key, figures in rows.items()
        ],
        note="Entropy is 1 for a constant map and 0 if only one cell is not 0. 'At the low end' "
        "and 'at the high end' are the shares of cells within 0.02 of the ends of the map's "
        "possible range. ρ is Spearman's correlation over cells. Disagreement is the standard "
        "deviation between the windows that overlap at a cell; there is none if one window covers "
        "the scan.",
    )


def measure_bars(measures: Sequence[Measure]) -> list[Bars]:
    """A plot for each structure: |AUROC - 0.5| of each map, with intensity and gradient beside it.

    A map with an AUROC of 0.2 shows a structure as well as one with 0.8, by its low values; the two
    bars have the same length.
    """
    plots: dict[str, list[Bar]] = {}
    for one in measures:
        if one.name != "auroc" or math.isnan(one.value):
            continue
        of_map = one.of == "map"
        name = one.map if of_map else one.of
        if one.value < 0.5:
            name = f"{name} {LOW}"
        bar = Bar(name, abs(one.value - 0.5), baseline=not of_map)
        plots.setdefault(one.structure, []).append(bar)
    return [
        Bars(
            f"AUROC: {structure}",
            "|AUROC - 0.5|: 0 by chance, 0.5 at most",
            bars,
            note="AUROC is the probability that a cell inside has a higher value than a cell "
            "outside. '↓' means that it is below 0.5: low values show the structure. Below each "
            "map are its baselines, the scan's intensity and gradient on the same cells. "
            "'magnitude' is the absolute value of an attribution.",
        )
        for structure, bars in plots.items()
    ]


def label_layer(name: str, labels: Volume, names: Mapping[int, str]) -> Layer:
    """A layer of a page that shows labels."""
    return Layer(name, "labels", labels.data, labels.grid, label_names=names)


def _title(name: str) -> str:
    return TITLES.get(name, name.replace("spearman_", "ρ with "))
