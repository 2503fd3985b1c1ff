"""Measures as tables: rows for files, and parts of a page."""

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
    (name, what)
    for name in LOCALISATION
    for what in ("value", "chance")
    if what == "value" or name in ("energy", "pointing", "iou")
]
"""What a table of the page shows of each structure; other chances are the same for all maps."""
QUANTITIES = {
    "gate": "share let through",
    "spatial": "share let through",
    "received": "attention received, 1 is a fair share",
    "pool": "share of the mean",
}
Grouped = dict[tuple[str, str, str], dict[str, Measure]]


def measure_rows(
    case: str, measures: Sequence[Measure], dice: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each map, what is measured of it, and structure: each value with its chance.

    Rows of no map say how well the segmentation agrees with its reference. All rows have the same
    columns; what does not apply is left empty.
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
    """Rows of any columns as the text of a CSV file, columns in the order they are first met."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def by_row(measures: Iterable[Measure]) -> Grouped:
    """Measures by name, of each map, what is measured of it, and structure."""
    grouped: Grouped = {}
    for one in measures:
        grouped.setdefault((one.map, one.of, one.structure), {})[one.name] = one
    return grouped


def map_layers(maps: Mapping[str, AttentionMap]) -> list[Layer]:
    """Each map that has a place, on its own grid; channels as their mean."""
    layers = []
    for key, one in maps.items():
        if one.volume is None:
            continue
        values, info = scalar(one.volume), one.info
        bounded = math.isfinite(info.highest)
        layers.append(
            Layer(
                key,
                "map",
                values.data,
                values.grid,
                low=info.lowest,
                high=info.highest if bounded else None,
                quantity=QUANTITIES.get(info.kind, info.kind),
            )
        )
    return layers


def measure_tables(
    measures: Sequence[Measure], dice: Mapping[str, float], *, against: str, tolerance_mm: float
) -> list[Table]:
    """What a page tells of the measures; `against` is 'reference' or 'prediction'."""
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
            [key, of, *(rounded(getattr(figures[name], what)) for name, what in PAGE_COLUMNS)]
            for (key, of, place), figures in grouped.items()
            if place == structure
        ]
        tables.append(
            Table(
                f"Where the maps are high: {structure}",
                [
                    *("map", "of"),
                    *(
                        TITLES[name] if what == "value" else "by chance"
                        for name, what in PAGE_COLUMNS
                    ),
                ],
                rows,
                note=f"Against the {against}, on each map's own grid; a cell is inside if half of "
                f"it is. Chance is 1 for enrichment and 0.5 for AUROC; pointing allows "
                f"{tolerance_mm:g} mm. Rows of intensity and gradient say what the scan itself "
                "tells on the same cells: a map that does no better adds nothing to them. For "
                "either, an AUROC near 0 tells as much as one near 1.",
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
        "How the maps' values lie",
        ["map", *(_title(name) for name in names)],
        [
            [key, *(rounded(figures[name].value if name in figures else None) for name in names)]
            for key, figures in rows.items()
        ],
        note="Entropy is 1 for a map that is the same everywhere and 0 for one of a single cell. "
        "The ends are within 0.02 of the least and most that a map can say. ρ is Spearman's "
        "correlation over cells. Disagreement is the standard deviation between the windows that "
        "overlap at a cell; there is none where one window holds the scan.",
    )


def measure_bars(measures: Sequence[Measure]) -> list[Bars]:
    """AUROC of each map beside that of intensity and gradient, one plot for each structure."""
    plots: dict[str, list[Bar]] = {}
    for one in measures:
        if one.name != "auroc" or math.isnan(one.value):
            continue
        of_map = one.of == "map"
        bar = Bar(one.map if of_map else one.of, one.value, chance=one.chance, beside=not of_map)
        plots.setdefault(one.structure, []).append(bar)
    return [
        Bars(
            f"AUROC: {structure}",
            "AUROC",
            bars,
            note="That a cell inside has a higher value than one outside. Each map beside the "
            "scan's own intensity and gradient on the same cells.",
        )
        for structure, bars in plots.items()
    ]


def label_layer(name: str, labels: Volume, names: Mapping[int, str]) -> Layer:
    """Labels as a layer of a page."""
    return Layer(name, "labels", labels.data, labels.grid, label_names=names)


def _title(name: str) -> str:
    return TITLES.get(name, name.replace("spearman_", "ρ with "))
