"""One HTML file that shows a scan with overlays and measures. It works offline in any browser.

A page contains its volumes, its figures and the viewer (`viewer/`), which is plain JavaScript. Its
Content-Security-Policy forbids all access to the network, and all names are shown as plain text.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy import ndarray

from segkit.explain.display import Bars, Curve, Table, Verdict
from segkit.explain.page.embed import Embedded, embed, embed_labels, spread, thinning
from segkit.geometry.grid import Grid, Orientation
from segkit.io.atomic import write_text
from segkit.io.picture_rules import MM_OF, WORD_OF, Unit
from segkit.io.pictures import label_colour
from segkit.io.volume import Volume

VIEWER = files("segkit.explain.page") / "viewer"
SCRIPTS = ("theme.js", "volumes.js", "planes.js", "panel.js", "figures.js", "viewer.js")
FINE_CELLS = 2**21
"""Maps with more cells than this take one byte for each cell instead of two."""
SPANNED = (1, 99)
"""The percentiles of a map that its colours span at first."""


@dataclass(frozen=True, eq=False)
class Layer:
    """An overlay: labels or a map, on any grid in the scan's world coordinates.

    Label 0 is not drawn. A map may keep its own coarse grid: the viewer interpolates it linearly at
    each voxel of the scan. It draws nothing outside the map's cells or if a value is NaN.
    """

    name: str
    kind: Literal["labels", "map"]
    values: ndarray
    """Values (x, y, z)."""
    grid: Grid
    low: float | None = None
    """Lower end of the map's possible range; the map's lowest value if None."""
    high: float | None = None
    """Upper end of the map's possible range; the map's highest value if None."""
    label_names: Mapping[int, str] = field(default_factory=dict)
    quantity: str = ""
    """The quantity of a map's values, such as 'share let through'."""

    def __post_init__(self) -> None:
        if self.values.shape != self.grid.shape:
            raise ValueError(
                f"layer {self.name}: expected values of the grid's shape {self.grid.shape}, found "
                f"{self.values.shape}; pass the grid on which the values lie"
            )


@dataclass(frozen=True, eq=False)
class Page:
    """The content of a page."""

    title: str
    scan: Volume
    layers: Sequence[Layer] = ()
    """Drawn in this order, the last on top."""
    tables: Sequence[Table] = ()
    curves: Sequence[Curve] = ()
    bars: Sequence[Bars] = ()
    verdicts: Sequence[Verdict] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    """The model and the settings, in words."""


def write_page(path: Path, page: Page) -> None:
    """Write a page as one HTML file, completely or not at all.

    Raises:
        VolumeError: if a label is above 65535.
    """
    write_text(path, page_text(page))


def page_text(page: Page) -> str:
    """The page as HTML."""
    unit = page.scan.unit
    scan = page.scan.on(_told_in(unit, page.scan.grid), page.scan.data)
    volumes, described = _scan(scan)
    scan_grid = volumes[0].grid
    layers = []
    for layer in page.layers:
        layer = replace(layer, grid=_told_in(unit, layer.grid))
        volume, description = _layer(layer, scan_grid, counted=scan.picture is not None)
        layers.append({**description, "volume": len(volumes)})
        volumes.append(volume)
    content = {
        "scan": described,
        "layers": layers,
        "volumes": [volume.description() for volume in volumes],
        **{
            name: [asdict(part) for part in getattr(page, name)]
            for name in ("tables", "curves", "bars", "verdicts")
        },
        "facts": dict(page.facts),
    }
    theme, *scripts = [(VIEWER / name).read_text(encoding="utf-8") for name in SCRIPTS]
    style = (VIEWER / "viewer.css").read_text(encoding="utf-8")
    parts = {
        "policy": policy(style, [theme, *scripts]),
        "title": html.escape(page.title),
        "style": style,
        "theme": theme,
        "content": _inert_json(content),
        "volumes": "\n".join(
            f'<script type="text/plain" id="volume-{number}">{volume.text}</script>'
            for number, volume in enumerate(volumes)
        ),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    template = (VIEWER / "page.html").read_text(encoding="utf-8")
    # In one pass, so that a name in braces inside a part is not replaced.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _told_in(unit: Unit, grid: Grid) -> Grid:
    """A grid whose world coordinates are in the page's unit of length instead of mm."""
    scale = 1 / MM_OF[unit]
    return Grid(grid.shape, np.diag([scale, scale, scale, 1.0]) @ grid.affine)


def _scan(scan: Volume) -> tuple[list[Embedded], dict[str, Any]]:
    """The encoded volume of each channel, and the scan's description for the viewer."""
    channels = np.moveaxis(scan.data.reshape(*scan.grid.shape, -1), -1, 0)
    volumes = [embed(channel, scan.grid) for channel in channels]
    grid = volumes[0].grid
    return volumes, {
        "affine": _rows(grid.affine),
        "index": _rows(np.linalg.inv(grid.affine)),
        "file_index": _rows(np.linalg.inv(scan.grid.affine)),
        "file_shape": list(scan.grid.shape),
        "orientation": Orientation.of(scan.grid.affine).code,
        "spacing": list(grid.spacing),
        "file_spacing": list(scan.grid.spacing),
        "unit": WORD_OF[scan.unit],
        "picture": scan.picture is not None,
        "flat": scan.is_flat,
        "every": list(thinning(scan.grid)),
        "oblique": _obliqueness(grid),
        "windows": [_window(channel) for channel in channels],
    }


def _layer(layer: Layer, scan_grid: Grid, *, counted: bool) -> tuple[Embedded, dict[str, Any]]:
    described: dict[str, Any] = {"name": layer.name, "kind": layer.kind}
    if layer.kind == "labels":
        volume = embed_labels(layer.values, layer.grid)
        described["labels"] = _labels(layer, counted=counted)
    else:
        volume = embed(layer.values, layer.grid, fine=layer.values.size <= FINE_CELLS)
        lowest, highest = spread(layer.values)
        known = layer.values[np.isfinite(layer.values)]
        spans = np.percentile(known, SPANNED).tolist() if known.size else [lowest, highest]
        low = lowest if layer.low is None else float(layer.low)
        high = highest if layer.high is None else float(layer.high)
        described |= {"low": low, "high": high, "spans": spans, "quantity": layer.quantity}
    from_scan = np.linalg.inv(volume.grid.affine) @ scan_grid.affine
    return volume, {
        **described,
        "from_scan": _rows(from_scan),
        "to_scan": _rows(np.linalg.inv(from_scan)),
        "spacing": list(volume.grid.spacing),
    }


def _labels(layer: Layer, *, counted: bool) -> list[dict[str, Any]]:
    """Name, colour and amount of each label except 0, if it has a name or occurs in the layer.

    The amount is a volume in ml; for pictures it is the number of pixels.
    """
    counts = np.bincount(layer.values.ravel().astype(np.int64))
    each = 1.0 if counted else abs(float(np.linalg.det(layer.grid.affine[:3, :3]))) / 1000
    numbers = {*np.flatnonzero(counts).tolist(), *layer.label_names} - {0}
    return [
        {
            "number": number,
            "name": layer.label_names.get(number, f"label {number}"),
            "colour": label_colour(number),
            "amount": float(counts[number] * each) if number < len(counts) else 0.0,
            "unit": "pixels" if counted else "ml",
        }
        for number in sorted(numbers)
    ]


def _window(values: ndarray) -> tuple[float, float]:
    """The values shown as black and white at first: percentiles 0.5 and 99.5, without zeros."""
    shown = values[np.isfinite(values) & (values != 0)]
    if not shown.size:
        return 0.0, 1.0
    low, high = (float(bound) for bound in np.percentile(shown, [0.5, 99.5]))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _obliqueness(grid: Grid) -> float:
    """The largest angle (degrees) between an array axis and its nearest patient axis."""
    cosines = np.abs(np.diag(grid.affine)[:3]) / grid.spacing
    return float(np.degrees(np.arccos(np.clip(cosines, 0, 1))).max())


def policy(style: str, scripts: Sequence[str] = ()) -> str:
    """A Content-Security-Policy that allows only these scripts and this style, and no requests."""
    allowed = f"script-src {' '.join(map(_digest, scripts))}; " if scripts else ""
    return (
        f"default-src 'none'; {allowed}style-src {_digest(style)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _inert_json(content: Any) -> str:
    """JSON without '<', so that a name cannot close the HTML element around it."""
    return json.dumps(_plain(content), allow_nan=False).replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    """The same value in Python's own types; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Sequence | ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


def _rows(affine: ndarray) -> list[list[float]]:
    rows: list[list[float]] = affine[:3].tolist()
    return rows
