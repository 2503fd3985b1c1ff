"""napari's widgets: one segments a layer, the other shows attention maps."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import napari
import numpy as np
from magicgui import widgets
from napari.layers import Image, Layer
from numpy import ndarray
from qtpy.QtCore import QTimer

from segkit import SegkitError
from segkit_napari.layers import OURS, LayerTuple, volume_of
from segkit_napari.predict import Cancelled, Work, channels_of, predicted_layers

MILLISECONDS = 200
"""Time between two looks at a prediction that runs."""


class PredictWidget(widgets.Container):
    """Chooses a model and a layer for each of its channels, and segments them."""

    def __init__(self, napari_viewer: "napari.viewer.Viewer") -> None:
        self.viewer = napari_viewer
        self.threads = ThreadPoolExecutor(1)
        self.future: Future[list[LayerTuple]] | None = None
        self.work = Work()
        self.model = widgets.FileEdit(label="model", mode="d", value="")
        self.channels = widgets.Container(labels=True)
        self.maps = widgets.CheckBox(text="attention maps", value=True)
        self.mirrors = widgets.CheckBox(text="average over mirror images (slower)")
        self.device = widgets.ComboBox(label="device", choices=["auto", "cpu", "cuda"])
        self.segment = widgets.PushButton(text="Segment")
        self.cancel = widgets.PushButton(text="Cancel", enabled=False)
        self.bar = widgets.ProgressBar(max=100, value=0, visible=False)
        self.status = widgets.Label(value="")
        super().__init__(
            widgets=[
                *(self.model, self.channels, self.maps, self.mirrors, self.device),
                *(self.segment, self.cancel, self.bar, self.status),
            ]
        )
        self.model.changed.connect(self.list_channels)
        self.segment.changed.connect(self.start)
        self.cancel.changed.connect(self.stop)
        self.viewer.layers.events.inserted.connect(self.list_layers)
        self.viewer.layers.events.removed.connect(self.list_layers)
        self.timer = QTimer()
        self.timer.setInterval(MILLISECONDS)
        self.timer.timeout.connect(self.poll)
        self._show_channels(["layer"])

    @property
    def address(self) -> str:
        """The model as it was typed: a folder, or an address such as `hf:owner/name`."""
        return str(self.model.line_edit.value)

    def list_channels(self, _: Any = None) -> None:
        """Show a choice of layers for each channel of the model.

        While an address is typed nothing is fetched, so its model is taken to have one channel.
        """
        if not Path(self.address).is_dir():
            self._show_channels(["layer"])
            return
        try:
            self._show_channels(channels_of(self.address))
            self.status.value = ""
        except SegkitError as error:
            self.status.value = str(error)

    def list_layers(self, _: Any = None) -> None:
        """Offer the layers that the viewer has now."""
        for box in self.channels:
            box.choices = self._choices()

    def start(self, _: Any = None) -> None:
        """Begin to segment; `poll` shows the result."""
        try:
            layers = [box.value for box in self.channels]
            volume = volume_of(*arrays_and_affine(layers))
        except SegkitError as error:
            self.status.value = str(error)
            return
        self.work = Work()
        self.future = self.threads.submit(
            predicted_layers,
            self.address,
            volume,
            layers[0].name,
            maps=self.maps.value,
            mirrors=self.mirrors.value,
            device=self.device.value,
            work=self.work,
        )
        self._show_running(True)
        self.status.value = "segmenting"
        self.timer.start()

    def stop(self, _: Any = None) -> None:
        """Ask the prediction to stop after the present slab."""
        self.work.stopped.set()
        self.status.value = "stopping"

    def poll(self) -> bool:
        """Show how far the prediction is, or its result. Returns whether it has ended."""
        if self.future is None:
            return True
        self.bar.value = round(100 * self.work.share)
        if not self.future.done():
            return False
        future, self.future = self.future, None
        self.timer.stop()
        self._show_running(False)
        try:
            layers = future.result()
        except Cancelled:
            self.status.value = "stopped, because you pressed Cancel"
        except SegkitError as error:
            self.status.value = str(error)
        else:
            for layer in layers:
                self.viewer.add_layer(Layer.create(*layer))
            self.status.value = f"{len(layers)} new layers"
        return True

    def _show_channels(self, names: list[str]) -> None:
        self.channels.clear()
        for name in names:
            self.channels.append(widgets.ComboBox(label=name, choices=self._choices()))

    def _choices(self) -> list[tuple[str, Layer]]:
        return [
            (layer.name, layer)
            for layer in self.viewer.layers
            if isinstance(layer, Image) and "map" not in layer.metadata.get(OURS, {})
        ]

    def _show_running(self, running: bool) -> None:
        self.segment.enabled = not running
        self.cancel.enabled = running
        self.bar.visible = running


class GatesWidget(widgets.Container):
    """Shows one attention map at a time over the scan, and how its values are spread."""

    def __init__(self, napari_viewer: "napari.viewer.Viewer") -> None:
        self.viewer = napari_viewer
        self.map = widgets.ComboBox(label="map", choices=[])
        self.opacity = widgets.FloatSlider(label="opacity", min=0, max=1, value=0.6)
        self.told = widgets.Label(value="")
        self.upright = widgets.PushButton(text="Head and front up, patient's right on the left")
        super().__init__(widgets=[self.map, self.opacity, self.told, self.upright])
        self.map.changed.connect(self.show_map)
        self.opacity.changed.connect(self.show_map)
        self.upright.changed.connect(self.turn_upright)
        self.viewer.layers.events.inserted.connect(self.list_maps)
        self.viewer.layers.events.removed.connect(self.list_maps)
        self.list_maps()

    def maps(self) -> list[Layer]:
        """The layers of attention maps."""
        return [layer for layer in self.viewer.layers if "map" in layer.metadata.get(OURS, {})]

    def list_maps(self, _: Any = None) -> None:
        """Offer the maps that the viewer has now."""
        self.map.choices = [(layer.name, layer) for layer in self.maps()]
        self.show_map()

    def show_map(self, _: Any = None) -> None:
        """Show the chosen map and hide the others."""
        chosen = self.map.value
        for layer in self.maps():
            layer.visible = layer is chosen
        if chosen is None:
            self.told.value = "no attention maps yet"
            return
        chosen.opacity = self.opacity.value
        self.told.value = spread_of(np.asarray(chosen.data))

    def turn_upright(self, _: Any = None) -> None:
        """Show slices as radiologists do: the world of the layers is (z, y, x) in RAS+."""
        # napari 0.9 moved the camera into a scene.
        getattr(self.viewer, "scene", self.viewer).camera.orientation2d = ("up", "left")


def spread_of(values: ndarray) -> str:
    """Minimum, mean and maximum of a map, and the share of cells without a value, in words."""
    known = values[np.isfinite(values)]
    if not known.size:
        return "no cell has a value"
    share = 1 - known.size / values.size
    told = f"min {known.min():.3g}, mean {known.mean():.3g}, max {known.max():.3g}"
    return f"{told}; {share:.0%} of the cells were not computed" if share else told


def arrays_and_affine(layers: list[Any]) -> tuple[list[ndarray], ndarray]:
    """The arrays of layers on one grid, and the affine (z, y, x) to world (z, y, x) in mm.

    Raises:
        SegkitError: there is no layer, or the layers are not grey volumes on one grid.
    """
    if not layers or None in layers:
        raise SegkitError("expected an image layer for each channel, found none; open a scan")
    affines = []
    for layer in layers:
        if layer.ndim not in (2, 3) or layer.rgb or layer.multiscale:
            raise SegkitError(
                f"{layer.name}: expected a grey layer with 2 or 3 axes and one scale, found "
                f"another; choose another layer"
            )
        affines.append(affine_of(layer))
        if layers[0].data.shape != layer.data.shape or not np.allclose(affines[0], affines[-1]):
            raise SegkitError(
                f"{layer.name}: expected the grid of {layers[0].name}, found another; resample one "
                f"of the two"
            )
    return [np.asarray(layer.data) for layer in layers], affines[0]


def affine_of(layer: Any) -> ndarray:
    """The affine of a layer in mm, from all of its transforms; a slice gets a third axis."""
    axes = layer.ndim
    origin = np.asarray(layer.data_to_world(np.zeros(axes)), float)
    steps = [np.asarray(layer.data_to_world(one), float) - origin for one in np.eye(axes)]
    lengths = np.array([_millimetres(unit) for unit in layer.units])
    affine = np.eye(4)
    affine[3 - axes : 3, 3 - axes : 3] = np.stack(steps, axis=1) * lengths[:, None]
    affine[3 - axes : 3, 3] = origin * lengths
    return affine


def _millimetres(unit: Any) -> float:
    """The length of a unit; a pixel counts as 1 mm, as it does for segkit."""
    length = 1 * unit
    return float(length.to("mm").magnitude) if length.is_compatible_with("mm") else 1.0
