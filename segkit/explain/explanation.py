"""The explanation of a scan: maps, measures and verdicts, for a notebook, a page or files."""

import base64
import html
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from segkit.config.labels import Labelling
from segkit.data.label_numbers import volume_within
from segkit.errors import SegkitError
from segkit.explain.attribution.attribute import Attribution, attribution_table
from segkit.explain.attribution.examine import (
    AttributionTest,
    examination_curves,
    examination_tables,
)
from segkit.explain.display import Table
from segkit.explain.heads.reach import HeadReach
from segkit.explain.measures.measure_maps import Measure
from segkit.explain.page.page import Layer, Page, write_page
from segkit.explain.page.parts import (
    QUANTITIES,
    label_layer,
    map_layers,
    measure_bars,
    measure_rows,
    measure_tables,
    rows_as_csv,
)
from segkit.explain.verdicts.identity import IDENTITY, AttentionStudy, identity_tables
from segkit.explain.verdicts.rule import GateVerdict
from segkit.explain.verdicts.study import ABLATIONS, Worth, shown_verdicts
from segkit.inference.attention_maps import AttentionMap, map_on_source
from segkit.inference.map_files import write_maps
from segkit.io.atomic import write_json, write_text
from segkit.io.file_names import safe_name
from segkit.io.picture_rules import length_in_words
from segkit.io.pictures import PAGES, PLANES, Panel, write_montage
from segkit.io.volume import Volume, write_volume
from segkit.io.volume_names import WRITTEN_PICTURES
from segkit.provenance import PROVENANCE

TABLE = "measures.csv"
FIGURES = "measures.json"
PAGE = "index.html"
ENDINGS = (
    *("_seg.nii.gz", "_seg.json", "_maps.json"),
    *(f"_seg{suffix}" for suffix in WRITTEN_PICTURES),
)
"""Endings of the files whose names begin with the name of the scan."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """The segmentation of a scan, the attention maps behind it, and measures of the maps.

    Example:
        explanation = segkit.explain_volume(predictor, scan, reference)
        explanation.maps["skip.1/gate"].volume.data
        explanation.write("explained")  # maps, tables and index.html
    """

    name: str
    scan: Volume
    labels: Volume
    """The predicted labels."""
    reference: Volume | None
    maps: dict[str, AttentionMap]
    """Each map by its key. If there are several gates, also their mean, 'fused/gate'."""
    measures: list[Measure]
    """Compared with the reference, or with the predicted labels if there is no reference."""
    tolerance_mm: float
    dice: dict[str, float]
    """Dice of each structure with the reference; NaN if neither contains the structure. Empty if
    there is no reference."""
    reach: dict[str, list[HeadReach]]
    """Attention distance and entropy of each head, by position in the network."""
    worth: Worth | None
    """Verdicts on the gates and their evidence; None if verdicts were not wanted."""
    attention: AttentionStudy | None
    """Dice with attention blocks as the identity, and the share of the network outside them; None
    if this was not wanted."""
    label_names: dict[int, str]
    """Name of each label, by its number in files."""
    facts: dict[str, str] = field(default_factory=dict)
    """The model and the settings, in words."""
    labelling: Labelling = field(default_factory=lambda: Labelling({}))
    """The model's classes or regions, and their numbers in files."""
    unlabelled: tuple[str, ...] = ()
    """Classes or regions that nobody labelled in the reference. Their Dice is NaN, and nothing else
    of them is measured."""
    attributions: dict[str, Attribution] = field(default_factory=dict)
    """Attributions of the predicted structures by their keys, such as 'occlusion/liver'. They are
    among `maps` too."""
    attribution_tests: dict[str, AttributionTest] = field(default_factory=dict)
    """Deletion and randomisation of each attribution, by its key; empty if verdicts were not
    wanted."""

    @property
    def against(self) -> str:
        """The labels that the maps are compared with: 'reference' or 'prediction'."""
        return "prediction" if self.reference is None else "reference"

    @property
    def verdicts(self) -> tuple[GateVerdict, ...]:
        """The verdict on each gate, channel and structure; empty if none were wanted."""
        return self.worth.verdicts if self.worth else ()

    def on_scan(self, key: str) -> Volume:
        """A map resampled linearly to the scan's voxels.

        Args:
            key: key of a map with a spatial grid, such as 'skip.1/gate'.

        Raises:
            VolumeError: the map is over channels, so it has no position.
        """
        return map_on_source(self.maps[key], self.scan)

    def rows(self) -> list[dict[str, Any]]:
        """The measures as a table: a row for each map, baseline and structure."""
        return measure_rows(self.name, self.measures, self.dice)

    def page(self) -> Page:
        """The content of the HTML page, for `segkit.explain.page.page.write_page`."""
        return Page(
            f"Attention maps: {self.name}",
            self.scan,
            self._layers(),
            tables=[
                *self._tables(),
                *attribution_table(self.attributions),
                *examination_tables(self.attribution_tests),
                *(self.worth.tables if self.worth else ()),
                *(identity_tables(self.attention) if self.attention else ()),
            ],
            curves=[
                *(self.worth.curves if self.worth else ()),
                *examination_curves(self.attribution_tests),
            ],
            bars=measure_bars(self.measures),
            verdicts=shown_verdicts(self.verdicts),
            facts=self.facts,
        )

    def write(
        self,
        folder: str | Path,
        *,
        made: Mapping[str, Any] | None = None,
        suffix: str | None = None,
    ) -> tuple[Path, ...]:
        """Write labels, maps, measures and the page, as `segkit explain` does.

        Args:
            folder: the folder to write the files to. It is created if it is missing; existing files
                are replaced.
            made: provenance (model, inputs, settings) for each JSON file.
            suffix: suffix of the labels of a picture, such as '.tif'. If None, '.png', or '.tif'
                for a stack. Labels of other volumes are '.nii.gz'.

        Returns:
            The files, the labels first.
        """
        folder = Path(folder)
        provenance = {} if made is None else {PROVENANCE: made}
        name = safe_name(self.name)
        of_picture = suffix or (".png" if self.scan.is_flat else ".tif")
        labels = folder / f"{name}_seg{of_picture if self.scan.picture else '.nii.gz'}"
        sidecar = folder / f"{name}_seg.json"
        write_volume(labels, self.labels)
        numbers = {label: number for number, label in self.label_names.items()}
        write_json(sidecar, {"labels": numbers, **provenance})
        heads = {place: [head.figures() for head in reach] for place, reach in self.reach.items()}
        maps = write_maps(folder, name, self.maps, self.scan, heads=heads, made=provenance)
        write_text(folder / TABLE, rows_as_csv(self.rows()))
        figures = {
            "case": self.name,
            "against": self.against,
            "tolerance_mm": self.tolerance_mm,
            **({"unlabelled": list(self.unlabelled)} if self.unlabelled else {}),
            "made": self.facts,
            **provenance,
            "dice": self.dice,
            "measures": [vars(measure) for measure in self.measures],
        }
        if self.attributions:
            figures["attributions"] = [
                {
                    **one.figures(),
                    **(self.attribution_tests[key].figures() if self.attribution_tests else {}),
                }
                for key, one in self.attributions.items()
            ]
        names = [TABLE, FIGURES, PAGE]
        if self.worth:
            figures["worth"] = self.worth.figures
            names.insert(2, ABLATIONS)
            write_text(folder / ABLATIONS, rows_as_csv(self.worth.figures["ablation"]))
        if self.attention:
            figures["identity"] = self.attention.to_json()
            names.insert(2, IDENTITY)
            write_text(folder / IDENTITY, rows_as_csv(map(vars, self.attention.ablations)))
        write_json(folder / FIGURES, figures)
        write_page(folder / PAGE, self.page())
        return (labels, sidecar, *maps, *(folder / name for name in names))

    def to_niivue(self) -> Any:
        """A NiiVue widget that shows the scan with its labels and maps in a notebook.

        Raises:
            SegkitError: if ipyniivue is not installed.
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

    def _tables(self) -> list[Table]:
        tolerance = length_in_words(self.tolerance_mm, self.scan.unit)
        return measure_tables(self.measures, self.dice, against=self.against, tolerance=tolerance)

    def _shown(self, labels: Volume) -> tuple[Volume, dict[int, str]]:
        """Labels for display, with 0 as background, and their names."""
        own = self.labelling.numbers
        names = {own.get(name, number): name for number, name in self.label_names.items()}
        return volume_within(labels, self.labelling), names

    def _layers(self) -> list[Layer]:
        layers = [
            *map_layers(self.maps),
            label_layer("segmentation", *self._shown(self.labels)),
        ]
        if self.reference is not None:
            layers.append(label_layer("reference", *self._shown(self.reference)))
        return layers

    def _repr_html_(self) -> str:
        """Tables of measures, below pictures if Pillow is installed."""
        parts = [f"<h3>{html.escape(self.name)}</h3>"]
        if find_spec("PIL") is not None:
            picture = base64.b64encode(self._montage()).decode()
            parts.append(f'<img alt="middle slices" src="data:image/png;base64,{picture}">')
        for table in self._tables():
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
            ("segmentation", self._shown(self.labels)[0].data, "labels"),
        ]
        if self.reference is not None:
            panels.append(("reference", self._shown(self.reference)[0].data, "labels"))
        for key, one in self.maps.items():
            if one.volume is not None:
                values = self.on_scan(key).data
                panels.append((key, values if values.ndim == 3 else values.mean(axis=3), "map"))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "montage.png"
            write_montage(
                path,
                image,
                self.scan.grid,
                panels,
                label_names=self._shown(self.labels)[1],
                planes=PAGES if self.scan.picture else PLANES,
                quantities={
                    key: QUANTITIES.get(one.info.kind, one.info.kind)
                    for key, one in self.maps.items()
                },
            )
            return path.read_bytes()


def _cell(value: str | float | int | None) -> str:
    return "–" if value is None else html.escape(str(value))


def _nifti(volume: Volume) -> bytes:
    kind = np.float32 if volume.data.dtype.kind == "f" else np.int32
    image = nib.Nifti1Image(np.asarray(volume.data, kind), volume.grid.affine)
    return image.to_bytes()
