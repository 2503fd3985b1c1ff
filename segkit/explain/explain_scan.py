"""What a model attends to in one scan, as an object: maps, measures, and ways to look at them.

explanation = explain(Predictor.load("runs/mine"), read_volume(path), reference)
explanation.maps["skip.1/gate"].volume.data      # the map on its own grid
explanation.measures                              # dataclasses, a figure each
explanation                                       # in a notebook, pictures and a table
"""

import base64
import html
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from segkit.errors import SegkitError
from segkit.explain.heads.reach import HeadReach, watching
from segkit.explain.measures.fuse import with_fused
from segkit.explain.measures.measure_maps import (
    TOLERANCE_MM,
    Measure,
    check_reference,
    measure_maps,
    members,
)
from segkit.explain.page.page import Layer, Page
from segkit.explain.page.parts import (
    label_layer,
    map_layers,
    measure_bars,
    measure_rows,
    measure_tables,
)
from segkit.explain.verdicts.findings import Findings, Study
from segkit.inference.attention_maps import AttentionMap, map_on_source
from segkit.inference.model_walk import TrackSlabs
from segkit.inference.predictor import Predictor
from segkit.io.montage import Panel, write_montage
from segkit.io.volume import Volume


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a model makes of a scan, and what its maps are worth there."""

    name: str
    scan: Volume
    labels: Volume
    """The model's."""
    reference: Volume | None
    maps: dict[str, AttentionMap]
    """By key; the fused map with them, where there are several gates."""
    measures: list[Measure]
    """Against the reference, or the model's own labels where there is none."""
    tolerance_mm: float
    dice: dict[str, float]
    """Of each structure with the reference; NaN where neither holds it, nothing without one."""
    reach: dict[str, list[HeadReach]]
    """How far each head of attention reaches, by position."""
    findings: tuple[Findings, ...]
    """What further studies found."""
    label_names: dict[int, str]
    facts: dict[str, str] = field(default_factory=dict)
    """Which model and which settings made it."""

    @property
    def against(self) -> str:
        """What the measures compare with: 'reference' or 'prediction'."""
        return "prediction" if self.reference is None else "reference"

    def on_scan(self, key: str) -> Volume:
        """A map that has a place, resampled linearly to the scan's voxels."""
        return map_on_source(self.maps[key], self.scan)

    def rows(self) -> list[dict[str, Any]]:
        """The measures as a table: a row for each map, what is measured, and structure."""
        return measure_rows(self.name, self.measures, self.dice)

    def page(self) -> Page:
        """Everything as one page for `segkit.explain.page.page.write_page`."""
        tables = measure_tables(
            self.measures, self.dice, against=self.against, tolerance_mm=self.tolerance_mm
        )
        return Page(
            f"What the model attends to: {self.name}",
            self.scan,
            self._layers(),
            tables=[*tables, *(table for found in self.findings for table in found.tables)],
            curves=[curve for found in self.findings for curve in found.curves],
            bars=[
                *measure_bars(self.measures),
                *(bars for found in self.findings for bars in found.bars),
            ],
            verdicts=[verdict for found in self.findings for verdict in found.verdicts],
            facts=self.facts,
        )

    def to_niivue(self) -> Any:
        """The scan with its labels and maps in a NiiVue widget.

        Raises SegkitError where ipyniivue is not installed.
        """
        try:
            import ipyniivue
        except ImportError:
            raise SegkitError(
                "a NiiVue widget needs ipyniivue; run pip install 'segkit[notebook]'"
            ) from None
        shown = [ipyniivue.Volume(data=_nifti(self.scan), name="scan.nii")]
        for layer in self._layers():
            colours = "actc" if layer.kind == "labels" else "inferno"
            ends: dict[str, float] = {}
            if layer.kind == "map" and layer.low is not None and layer.high is not None:
                ends = {"cal_min": layer.low, "cal_max": layer.high}
            volume = Volume(layer.values, layer.grid)
            shown.append(
                ipyniivue.Volume(
                    data=_nifti(volume),
                    name=f"{layer.name.replace('/', '-')}.nii",
                    colormap=colours,
                    opacity=0.4,
                    **ends,
                )
            )
        widget = ipyniivue.NiiVue()
        widget.load_volumes(shown)
        return widget

    def _layers(self) -> list[Layer]:
        layers = [
            *map_layers(self.maps),
            label_layer("segmentation", self.labels, self.label_names),
        ]
        if self.reference is not None:
            layers.append(label_layer("reference", self.reference, self.label_names))
        return layers

    def _repr_html_(self) -> str:
        """Pictures, where matplotlib is installed, and a table of what the maps pick out."""
        parts = [f"<h3>{html.escape(self.name)}</h3>"]
        if find_spec("matplotlib") is not None:
            picture = base64.b64encode(self._montage()).decode()
            parts.append(f'<img alt="middle planes" src="data:image/png;base64,{picture}">')
        tables = measure_tables(
            self.measures, self.dice, against=self.against, tolerance_mm=self.tolerance_mm
        )
        for table in tables:
            rows = [table.columns, *table.rows]
            cells = "".join(
                f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in rows
            )
            parts.append(f"<h4>{html.escape(table.title)}</h4><table>{cells}</table>")
        return "".join(parts)

    def _montage(self) -> bytes:
        image = self.scan.data if self.scan.data.ndim == 3 else self.scan.data[..., 0]
        panels: list[Panel] = [
            ("scan", None, "labels"),
            ("segmentation", self.labels.data, "labels"),
        ]
        if self.reference is not None:
            panels.append(("reference", self.reference.data, "labels"))
        for key, one in self.maps.items():
            if one.volume is not None:
                values = self.on_scan(key).data
                panels.append((key, values if values.ndim == 3 else values.mean(axis=3), "map"))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "montage.png"
            write_montage(path, image, self.scan.grid, panels, label_names=self.label_names)
            return path.read_bytes()


def explain_volume(
    predictor: Predictor,
    volume: Volume,
    reference: Volume | None = None,
    *,
    name: str = "scan",
    tolerance_mm: float = TOLERANCE_MM,
    studies: Sequence[Study] = (),
    track: TrackSlabs = lambda slabs, count: slabs,
) -> Explanation:
    """What a model attends to in a scan, measured against labels: the right ones, or its own.

    `tolerance_mm` is how far a map's highest value may lie from a structure and still point at it.
    Each of `studies` is then asked what more it finds, in order. Raises what the predictor raises,
    and VolumeError for a reference on another grid.
    """
    description = predictor.model.description
    labelling = description.labelling
    if reference is not None:
        check_reference(reference, volume, f"{name}: the reference")
    with watching(predictor) as watchers:
        prediction = predictor(volume, maps=True, disagreement=True, track=track)
    reach = {position: watcher.result() for position, watcher in watchers.items()}
    maps = with_fused(prediction.maps)
    measures = measure_maps(
        maps,
        volume,
        prediction.labels if reference is None else reference,
        labelling,
        channels=description.channels,
        tolerance_mm=tolerance_mm,
    )
    dice: dict[str, float] = {}
    if reference is not None:
        told = np.ones(volume.grid.shape, bool)
        if labelling.ignore is not None:
            told = reference.data != labelling.ignore
        dice = {
            structure: _dice(prediction.labels.data[told], reference.data[told], numbers)
            for structure, numbers in members(labelling).items()
        }
    return Explanation(
        name,
        volume,
        prediction.labels,
        reference,
        maps,
        measures,
        tolerance_mm,
        dice,
        reach,
        tuple(study(predictor, name, volume, reference, maps, measures) for study in studies),
        {number: label for label, number in labelling.numbers.items()},
        facts_of(predictor),
    )


def facts_of(predictor: Predictor) -> dict[str, str]:
    """Which model and which settings a predictor works with, in words."""
    description = predictor.model.description
    patch, overlap, _ = predictor.layout
    network = description.network
    return {
        "model": description.run,
        "network": f"{network.spatial_dims}D U-Net, channels {network.channels}",
        "attention": ", ".join(
            f"{place}: {setting.kind}"
            for place in ("skip", "encoder", "decoder", "bottleneck", "head")
            if (setting := getattr(network.attention, place)) is not None
        )
        or "none",
        "image channels": ", ".join(description.channels),
        "spacing": " × ".join(f"{mm:g}" for mm in description.spacing) + " mm",
        "windows": " × ".join(map(str, patch)) + f" voxels, overlap {max(overlap):g}",
        "measured": "on each map's own grid; a cell lies in a structure if half of it does",
        "versions": f"segkit {version('segkit')} (model: {description.segkit}), "
        f"torch {torch.__version__}, numpy {np.__version__}",
    }


def _dice(labels: np.ndarray, reference: np.ndarray, numbers: Iterable[int]) -> float:
    wanted = list(numbers)
    found, right = np.isin(labels, wanted), np.isin(reference, wanted)
    total = int(found.sum()) + int(right.sum())
    return 2 * int((found & right).sum()) / total if total else float("nan")


def _cell(value: str | float | int | None) -> str:
    return "–" if value is None else html.escape(str(value))


def _nifti(volume: Volume) -> bytes:
    kind = np.float32 if volume.data.dtype.kind == "f" else np.int32
    image = nib.Nifti1Image(np.asarray(volume.data, kind), volume.grid.affine)
    return image.to_bytes()
