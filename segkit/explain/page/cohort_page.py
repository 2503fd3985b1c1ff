"""A page that summarises the measures of several scans and links to the page of each."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np

from segkit.errors import counted
from segkit.explain.display import Table, Verdict
from segkit.explain.measures.measure_maps import Measure
from segkit.explain.page.page import VIEWER, policy
from segkit.explain.page.parts import DISTRIBUTION, LOCALISATION, TITLES, by_row, measure_rows
from segkit.io.file_names import safe_name


@dataclass(frozen=True)
class CaseFigures:
    """The name, measures and Dice of one scan, for the files that summarise all scans."""

    name: str
    measures: Sequence[Measure]
    dice: Mapping[str, float]

    def rows(self) -> list[dict[str, Any]]:
        """The measures as rows of a table."""
        return measure_rows(self.name, self.measures, self.dice)


def cohort_text(
    cases: Sequence[CaseFigures],
    facts: Mapping[str, str],
    verdicts: Sequence[Verdict] = (),
    tables: Sequence[Table] = (),
) -> str:
    """The page as HTML: plain tables, without scripts and without access to the network.

    Args:
        cases: the measures of each scan.
        facts: the model and the settings, in words.
        verdicts: on maps and blocks, from all scans together.
        tables: below the verdicts, from all scans together.
    """
    style = (VIEWER / "cohort.css").read_text(encoding="utf-8")
    title = f"Attention maps of {counted(len(cases), 'scan')}"
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy(style)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{title}</h1>",
        "<p>Mean ± standard deviation over scans; the value expected by chance is in brackets. If "
        "not all scans have a value, their number follows. Rows of intensity and gradient are "
        "baselines: the same measures of the scan itself, on the cells of the map.</p>",
        *_verdicts(verdicts),
        *(part for table in tables for part in _shown(table)),
        *_measure_tables(cases),
        "<h2>Scans</h2>",
        _case_table(cases),
        "<h2>How this was made</h2>",
        _table(
            ["setting", "value"],
            [[_text(key), _text(value)] for key, value in facts.items()],
            kind="facts",
        ),
        "<footer>Research software, not a medical device.</footer>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    cards = [
        f'<div class="card"><p><b>{_text(one.map)}</b>: <b class="{_text(style)}">'
        f"{_text(one.verdict)}</b>. {_text(one.reason)}</p></div>"
        for one in verdicts
        for style in [one.verdict.replace(" ", "-")]
    ]
    return ["<h2>Verdicts over all scans</h2>", *cards] if cards else []


def _shown(table: Table) -> list[str]:
    rows = [["–" if cell is None else _text(str(cell)) for cell in row] for row in table.rows]
    columns = [_text(column) for column in table.columns]
    note = [f"<p>{_text(table.note)}</p>"] if table.note else []
    return [f"<h2>{_text(table.title)}</h2>", *note, _table(columns, rows)]


def _measure_tables(cases: Sequence[CaseFigures]) -> list[str]:
    grouped = [by_row(case.measures) for case in cases]
    places = list(dict.fromkeys(place for group in grouped for place in group))
    parts = []
    for structure in dict.fromkeys(structure for _, _, structure in places):
        names = LOCALISATION if structure else DISTRIBUTION
        rows = []
        for place in places:
            if place[2] != structure:
                continue
            found = [
                [group[place][name] for group in grouped if place in group and name in group[place]]
                for name in names
            ]
            rows.append([_text(place[0]), _text(place[1]), *map(_summary, found)])
        parts.append(f"<h2>{_text(structure or 'Distribution of values')}</h2>")
        parts.append(_table(["map", "values of", *(TITLES[name] for name in names)], rows))
    return parts


def _case_table(cases: Sequence[CaseFigures]) -> str:
    structures = list(dict.fromkeys(name for case in cases for name in case.dice))
    rows = [
        [
            f'<a href="{quote(safe_name(case.name))}/index.html">{_text(case.name)}</a>',
            *(_number(case.dice.get(name, math.nan)) for name in structures),
        ]
        for case in cases
    ]
    return _table(["scan", *(f"Dice: {_text(name)}" for name in structures)], rows)


def _summary(measures: Sequence[Measure]) -> str:
    values = [one.value for one in measures if not math.isnan(one.value)]
    if not values:
        return "–"
    text = f"{np.mean(values):.3f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{np.std(values):.3f}"
    chances = [one.chance for one in measures if one.chance is not None]
    if chances:
        text += f" ({np.mean(chances):.3f})"
    return text + f" of {len(values)}" * (len(values) < len(measures))


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _text(words: str) -> str:
    return html.escape(words)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "figures") -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="card {kind}"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'
